"""What is reported of the devices of `vfiomig demo --qemu`, and that looking changes nothing."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from in_process import Program
from vfiomig.cli.qemu_demo_machine import digest_of, main, report_of
from vfiomig.fsm import State
from vfiomig.models import make

if TYPE_CHECKING:
    from vfiomig.core.migration import ArcEvent

SPECS = ("mtty,ports=1", "virtio_blk,size=1M", "pattern,size=300K,seed=5")
OTHER = {SPECS[2]: "pattern,size=300K,seed=6"}

Report = dict[str, str | int | float]


class Reported:
    """A program with one device, and what was reported of it."""

    def __init__(self, spec: str) -> None:
        self.device = make(spec)
        self.reports: list[Report] = []
        self.program = Program(self.device)
        self.program.served.migration.observers.append(self._saw)

    def _saw(self, event: ArcEvent) -> None:
        self.reports.append(report_of(event, self.device))

    def digests(self) -> list[tuple[str, str]]:
        """The arcs behind which there is a digest, and the digest."""
        return [
            (f"{one['origin']}-{one['target']}", str(one["digest"]))
            for one in self.reports
            if one["digest"]
        ]


def move(source: Reported, destination: Reported) -> None:
    saving, loading = source.program, destination.program
    fd, other = saving.go(State.STOP_COPY), loading.go(State.RESUMING)
    state = saving.read_all(fd)
    assert loading.write(other, state) == len(state)
    saving.go(State.STOP)
    loading.go(State.RUNNING)


@pytest.mark.parametrize("spec", SPECS)
def test_both_sides_have_a_digest_where_their_sessions_ended_and_it_is_the_same(spec: str) -> None:
    source, destination = Reported(spec), Reported(OTHER.get(spec, spec))
    with source.program, destination.program:
        move(source, destination)
    ((arc, left),) = source.digests()
    ((other_arc, arrived),) = destination.digests()
    assert (arc, other_arc) == ("STOP_COPY-STOP", "RESUMING-STOP")
    assert left == arrived


@pytest.mark.parametrize("spec", SPECS)
def test_a_digest_disturbs_no_session_that_comes_after_it(spec: str) -> None:
    first, second, third = Reported(spec), Reported(OTHER.get(spec, spec)), Reported(spec)
    with first.program, second.program, third.program:
        move(first, second)
        move(second, third)
    assert {digest for one in (first, second, third) for _, digest in one.digests()} == {
        first.digests()[0][1]
    }


def test_devices_that_differ_have_digests_that_differ() -> None:
    digests = {digest_of(make(f"pattern,size=64K,seed={seed}")) for seed in range(4)}
    assert len(digests) == 4


def test_a_report_says_what_was_asked_and_when_it_ended() -> None:
    with (reported := Reported(SPECS[2])).program as program:
        before = time.monotonic()
        program.go(State.STOP_COPY)
        after = time.monotonic()
    last = reported.reports[2]
    assert (last["requested"], last["origin"], last["target"]) == ("STOP_COPY", "STOP", "STOP_COPY")
    assert last["device"] == "vfio0"
    assert before < float(last["ended"]) < after
    assert (last["errno"], last["digest"], last["digest_seconds"]) == (0, "", 0.0)
    assert {one["requested"] for one in reported.reports} == {"STOP_COPY"}


def test_a_device_that_cannot_be_made_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    assert main([str(writer), "nonsense", "--", "true"]) == 125
    os.close(reader)
    os.close(writer)
    assert capfd.readouterr().err.startswith("vfiomig: no device is called 'nonsense'")
