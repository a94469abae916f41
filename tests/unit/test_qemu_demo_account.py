"""The account of `vfiomig demo --qemu`: what it says follows from what was reported."""

from __future__ import annotations

import errno
import json
import threading

import pytest

from vfiomig.cli.qemu_demo_account import DESTINATION, SOURCE, Account
from vfiomig.cli.qemu_demo_table import as_data, show
from vfiomig.errors import GuestTimeout
from vfiomig.fsm import State

NAMES = ("card", "disk")
DIGESTS = {"card": "c" * 64, "disk": "d" * 64}
QEMU = {"ram": {"transferred": 5 << 20}, "total-time": 1500, "downtime": 40}


class Story:
    """Tells an account of a migration, each arc a second long and a second after the one before."""

    def __init__(self) -> None:
        self.account = Account(NAMES)
        self.account.qemu = QEMU
        self.now = 100.0

    def tell(
        self,
        side: str,
        device: str,
        requested: str,
        *arcs: str,
        nbytes: int = 0,
        digest: str = "",
        failure: int = 0,
    ) -> None:
        for arc in arcs:
            origin, target = arc.split("-")
            self.now += 2
            self.account.hear(
                side,
                {
                    "device": f"vfio{NAMES.index(device)}",
                    "requested": requested,
                    "origin": origin,
                    "target": target,
                    "ended": self.now,
                    "seconds": 1.0,
                    "errno": failure,
                    "nbytes": nbytes,
                    "digest": digest if target == "STOP" else "",
                    "digest_seconds": 0.5 if digest and target == "STOP" else 0.0,
                },
            )

    def both(self, side: str, requested: str, *arcs: str, nbytes: int = 0) -> None:
        for name in NAMES:
            self.tell(side, name, requested, *arcs, nbytes=nbytes)

    def leave(self) -> None:
        self.both(DESTINATION, "RESUMING", "RUNNING_P2P-STOP", "STOP-RESUMING")
        self.both(SOURCE, "PRE_COPY", "RUNNING-PRE_COPY")
        self.both(SOURCE, "PRE_COPY_P2P", "PRE_COPY-PRE_COPY_P2P", nbytes=700)
        self.both(SOURCE, "STOP_COPY", "PRE_COPY_P2P-STOP_COPY", nbytes=700)
        for name in NAMES:
            self.tell(SOURCE, name, "STOP", "STOP_COPY-STOP", nbytes=1000, digest=DIGESTS[name])

    def arrive(self, **digests: str) -> None:
        for name in NAMES:
            digest = digests.get(name, DIGESTS[name])
            arcs = ("RESUMING-STOP", "STOP-RUNNING_P2P")
            self.tell(DESTINATION, name, "RUNNING_P2P", *arcs, nbytes=1000, digest=digest)
        self.both(DESTINATION, "RUNNING", "RUNNING_P2P-RUNNING")

    def migrate(self, **digests: str) -> Account:
        self.leave()
        self.arrive(**digests)
        self.account.end(1)
        self.account.work.serial_bytes = 4321
        self.account.work.blocks = 50
        return self.account


@pytest.fixture
def story() -> Story:
    return Story()


def test_what_arrived_whole_is_verified(story: Story) -> None:
    account = story.migrate()
    assert account.lost == []
    assert account.verdict == "verified: state identical, 4321 serial bytes, 50 blocks"


def test_states_are_those_that_were_asked_for_whatever_arcs_led_there(story: Story) -> None:
    account = story.migrate()
    for name in NAMES:
        assert account.states(SOURCE, name) == [
            State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY, State.STOP
        ]  # fmt: skip
        assert account.states(DESTINATION, name) == [
            State.RESUMING, State.RUNNING_P2P, State.RUNNING
        ]  # fmt: skip


def test_what_was_before_and_comes_after_does_not_count(story: Story) -> None:
    story.both(SOURCE, "RUNNING_P2P", "RUNNING-RUNNING_P2P")
    story.account.begin()
    account = story.migrate()
    story.both(DESTINATION, "STOP", "RUNNING-RUNNING_P2P", "RUNNING_P2P-STOP")
    assert State.RUNNING_P2P not in account.states(SOURCE, "card")
    assert account.states(DESTINATION, "disk")[-1] is State.RUNNING


def test_the_downtime_is_from_the_first_stop_to_the_last_start_without_the_digests(
    story: Story,
) -> None:
    account = story.migrate()
    # The source stops twice in 3 s, is done with both 4 s later, and a second later the first
    # verdict begins; 6 arcs with pauses of a second, and 2 digests.
    assert account.downtime == {"stop": 3.0, "rest": 5.0, "start": 11.0 - 2 * 0.5}


def test_bytes_are_those_of_the_sources_sessions(story: Story) -> None:
    account = story.migrate()
    assert (account.moved("disk"), account.moved_running("disk")) == (1000, 700)


def test_the_end_is_waited_for_and_has_a_deadline(story: Story) -> None:
    story.leave()
    with pytest.raises(GuestTimeout):
        story.account.end(0.05)
    late = threading.Timer(0.05, story.arrive)
    late.start()
    story.account.end(10)
    late.join()
    assert story.account.verdict.startswith("verified")


def test_a_state_that_differs_is_lost(story: Story) -> None:
    account = story.migrate(disk="e" * 64)
    assert account.verdict == (
        f"LOST: the state of disk, sha256 {'d' * 16} on the source and {'e' * 16}"
        " on the destination"
    )


def test_a_state_that_the_destination_refuses_is_lost_and_not_waited_for(story: Story) -> None:
    story.leave()
    arcs = ("RESUMING-STOP", "STOP-RUNNING_P2P")
    story.tell(DESTINATION, "card", "RUNNING_P2P", *arcs, digest=DIGESTS["card"])
    story.tell(DESTINATION, "disk", "RUNNING_P2P", "RESUMING-STOP", failure=errno.EINVAL)
    story.tell(DESTINATION, "card", "RUNNING", "RUNNING_P2P-RUNNING")
    story.account.end(1)
    assert story.account.lost == ["the state of disk, RESUMING -> STOP failed with EINVAL"]


def test_work_that_is_lost_is_told_with_the_rest(
    story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    account = story.migrate(card="e" * 64)
    account.work.problems.append("the serial stream, after byte 7 it is wrong")
    account.work.wrong_blocks = [3, 4]
    show(account)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("LOST: the state of card, sha256")
    assert "; the serial stream, after byte 7 it is wrong; " in last
    assert last.endswith("2 of 50 acknowledged blocks, block 3 for one")


def test_the_table_has_a_row_for_each_request_in_the_order_of_time(
    story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    show(story.migrate())
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("source ", "destination "))]
    assert [row[:2] for row in rows] == [
        ["destination", "RESUMING"],
        ["source", "PRE_COPY"],
        ["source", "PRE_COPY_P2P"],
        ["source", "STOP_COPY"],
        ["source", "STOP"],
        ["destination", "RUNNING_P2P"],
        ["destination", "RUNNING"],
    ]
    assert rows[0][2:] == ["2.00", "s", "2.00", "s"], "of both arcs"
    assert any("1000 B" in line and "bytes moved" in line for line in lines)
    assert any(line.startswith("downtime    40.00 ms as QEMU reports it") for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_request_that_failed_shows_its_errno(
    story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    story.leave()
    for name in NAMES:
        story.tell(DESTINATION, name, "RUNNING_P2P", "RESUMING-STOP", failure=errno.EIO)
    story.account.end(1)
    show(story.account)
    output = capsys.readouterr().out
    assert "EIO" in output
    assert "as the devices saw it" not in output, "they never ran again"


def test_the_document_has_everything(story: Story) -> None:
    account = story.migrate()
    told = json.loads(json.dumps(as_data(account, "/bin/qemu")))
    assert (told["verified"], told["lost"], told["verdict"]) == (True, [], account.verdict)
    assert told["devices"]["disk"]["source"] == {
        "states": ["PRE_COPY", "PRE_COPY_P2P", "STOP_COPY", "STOP"],
        "sha256": DIGESTS["disk"],
    }
    assert told["downtime_seconds"] == sum(told["downtime_parts"].values())
    assert told["downtime_seconds_of_qemu"] == 0.04
    assert len(told["arcs"]) == len(account.taken)
