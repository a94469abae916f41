"""The parts of `vfiomig demo`: its account and verdict, the bar, and a client with no parent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import pytest

from vfiomig.cli import demo_client
from vfiomig.cli.demo_account import DESTINATION, SOURCE, Account
from vfiomig.cli.demo_table import Bar, as_data, bytes_text, time_text
from vfiomig.core.migration import ArcEvent
from vfiomig.fsm import ARCS, State

if TYPE_CHECKING:
    from vfiomig.models.pattern import Pattern

HASHING = 100.0  # seconds, so that it could not be overlooked


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Hashed:
    """A device as far as the account knows it: its digest takes time."""

    clock: Clock
    content: str
    nbytes: int = 4096
    asked: int = 0

    def digest(self) -> str:
        self.asked += 1
        self.clock.now += HASHING
        return self.content


class Story:
    """Tells an account of arcs, each so long and so long after the one before."""

    def __init__(self, destination: str = "same") -> None:
        self.clock = Clock()
        self.devices = (Hashed(self.clock, "same"), Hashed(self.clock, destination))
        source, target = (cast("Pattern", device) for device in self.devices)
        self.account = Account(source, target, self.clock)

    def tell(
        self,
        role: str,
        origin: State,
        target: State,
        seconds: float,
        *,
        after: float = 0.0,
        nbytes: int = 0,
        errno: int = 0,
    ) -> None:
        (arc,) = (arc for arc in ARCS if (arc.origin, arc.target) == (origin, target))
        self.clock.now += after + seconds
        self.account.note(role, ArcEvent("vfio0", target, arc, seconds, errno, nbytes))

    def migrate(self) -> Account:
        self.tell(DESTINATION, State.STOP, State.RESUMING, 1)
        self.tell(SOURCE, State.RUNNING, State.PRE_COPY, 2)
        self.tell(SOURCE, State.PRE_COPY, State.PRE_COPY_P2P, 1, after=20, nbytes=1000)
        self.tell(SOURCE, State.PRE_COPY_P2P, State.STOP_COPY, 3, nbytes=1000)
        self.tell(DESTINATION, State.RESUMING, State.STOP, 5, after=10, nbytes=1330)
        self.tell(DESTINATION, State.STOP, State.RUNNING_P2P, 1, after=2)
        self.tell(DESTINATION, State.RUNNING_P2P, State.RUNNING, 1)
        self.tell(SOURCE, State.STOP_COPY, State.STOP, 4, nbytes=1330)
        return self.account


def test_the_downtime_is_the_sum_of_its_parts_and_digests_are_in_none_of_them() -> None:
    account = Story().migrate()
    assert account.downtime == {"stop": 3, "rest": 10, "load": 5, "start": 4}
    assert account.seconds == 1 + 2 + 21 + 3 + 15 + 3 + 1 + 4
    assert (account.moved, account.moved_stopped) == (1330, 330)
    assert account.throughput == 1330 / (21 + 3 + 10)


def test_each_digest_is_taken_once_and_before_the_next_arc() -> None:
    story = Story()
    story.tell(DESTINATION, State.STOP, State.RESUMING, 1)
    assert story.account.digests == {}
    story.tell(DESTINATION, State.RESUMING, State.STOP, 1)
    assert story.account.digests == {DESTINATION: "same"}
    story.tell(DESTINATION, State.STOP, State.RUNNING_P2P, 1)
    assert story.devices[1].asked == 1


def test_a_refused_state_is_no_state_to_compare() -> None:
    story = Story()
    story.tell(DESTINATION, State.RESUMING, State.STOP, 1, errno=22)
    assert story.account.digests == {}
    assert str(story.account.arcs[0]) == "RESUMING -> STOP, EINVAL"


def test_the_verdict_names_the_bytes_and_the_digests() -> None:
    assert Story().migrate().verdict == "identical: 4096 bytes, sha256 same"
    different = Story(destination="other").migrate()
    assert not different.identical
    assert different.verdict == (
        "DIFFERENT: of 4096 bytes, source sha256 same, destination sha256 other"
    )


def test_arcs_without_a_session_have_no_bytes() -> None:
    arcs = Story().migrate().arcs
    assert [taken.nbytes for taken in arcs] == [None, None, 1000, 1000, 1330, None, None, 1330]


def test_the_document_holds_what_the_table_shows() -> None:
    from vfiomig.abi.ioctls import Dialect

    data = as_data(Story().migrate(), Dialect.LANDED, rounds=3)
    assert data["dialect"] == "landed"
    assert data["downtime_seconds"] == 22
    assert (data["arcs"][1]["from"], data["arcs"][1]["to"]) == ("RUNNING", "PRE_COPY")
    assert data["precopy_rounds"] == 3


def test_the_bar_never_runs_backwards_though_there_may_be_more_left_than_before() -> None:
    bar = Bar(1000)
    seen = []
    for moved, left in ((0, 1000), (900, 100), (901, 5000), (902, 5000), (1500, 500), (2000, 0)):
        bar.advance("pre-copy", moved, left)
        seen.append(bar.fraction)
    assert seen == sorted(seen)
    assert seen[1] == seen[2] == 0.9
    assert seen[-1] < 1.0, "only the end is the end"
    bar.finish()
    assert bar.fraction == 1.0


def test_a_device_that_does_not_tell_has_its_size_left() -> None:
    bar = Bar(1000)
    bar.advance("stopped", 250, None)
    assert bar.fraction == 0.25
    bar.advance("stopped", 1200, None)
    assert bar.fraction == 0.99


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (5 << 30, "5.0 GiB")],
)
def test_sizes_are_said_in_the_unit_that_fits(size: int, text: str) -> None:
    assert bytes_text(size) == text


def test_times_are_said_in_milliseconds_below_a_second() -> None:
    assert (time_text(0.0123), time_text(2.5)) == ("12.30 ms", "2.50 s")


def test_a_client_says_what_it_met_and_nothing_if_nobody_listens(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_client, "SOURCE", "model:nothing")
    reader, writer = os.pipe()
    assert demo_client.main(writer) == 1
    assert b'"failed": "no device is called \'nothing\'' in os.read(reader, 4096)
    os.close(reader)
    assert demo_client.main(writer) == 1
    os.close(writer)
    assert capfd.readouterr() == ("", "")
