"""What QEMU does when a device fails it, arc by arc, on either side.

Theory of operation
-------------------
``requests`` are QEMU's, by capability set; their arcs come from the state machine. One arc fails,
once: a file arms the device, and is gone when it has failed. ``REACTIONS`` is what QEMU 10 does
about it. It asks for another state where it knows one to go back to, and else, or if that fails
as well, it resets the device. From then on it takes the device for RUNNING, so it does not ask
for that; the machine that runs on has a blank device then.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

import pytest

from qemu_pair import SWITCH_AT_ONCE, VfioGuest, pair, witnessed
from qemu_states import (
    CAPS,
    SOURCE_STATES,
    TARGET_STATES,
    follow,
    has_p2p,
    machine_starts,
    machine_stops,
)
from vfiomig.errors import MigrationFailed
from vfiomig.fsm import Arc, State, parse_capabilities, path
from vfiomig.models.pattern import Pattern
from vfiomig.qemu.migration import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guest_parts import GuestParts

SIZE = 256 << 10
SEEDS = {"source": 1, "target": 101}
STATES = {"source": SOURCE_STATES, "target": TARGET_STATES}


class Reaction(NamedTuple):
    """What QEMU does when a request for a state fails."""

    #: Whether the migration is completed all the same.
    completes: bool = False
    #: The state that it asks for instead; without one it resets the device.
    recovers: str = ""
    #: Whether the machine had stopped already, so that it starts again.
    starts_again: bool = False
    #: Whether it goes on to stop the other devices, and this one with them.
    goes_on_to_stop: bool = False


#: By side, the state that the device is in, and the one that it is asked for.
REACTIONS = {
    ("source", "RUNNING", "PRE_COPY"): Reaction(recovers="RUNNING"),
    ("source", "RUNNING", "RUNNING_P2P"): Reaction(goes_on_to_stop=True, starts_again=True),
    ("source", "RUNNING", "STOP"): Reaction(starts_again=True),
    ("source", "RUNNING_P2P", "STOP"): Reaction(starts_again=True),
    ("source", "PRE_COPY", "PRE_COPY_P2P"): Reaction(goes_on_to_stop=True, starts_again=True),
    ("source", "PRE_COPY", "STOP_COPY"): Reaction(starts_again=True),
    ("source", "PRE_COPY_P2P", "STOP_COPY"): Reaction(starts_again=True),
    ("source", "STOP", "STOP_COPY"): Reaction(recovers="STOP", starts_again=True),
    # The target has everything by then.
    ("source", "STOP_COPY", "STOP"): Reaction(completes=True),
    # Then QEMU ends.
    ("target", "RUNNING", "RESUMING"): Reaction(recovers="RUNNING"),
    # The source has been told that all is well, and the state is lost.
    ("target", "RESUMING", "RUNNING"): Reaction(completes=True),
    ("target", "RESUMING", "RUNNING_P2P"): Reaction(completes=True),
    ("target", "RUNNING_P2P", "RUNNING"): Reaction(completes=True),
}


class Failure(NamedTuple):
    """One arc that fails."""

    caps: str
    side: str
    #: Which of QEMU's requests in a migration, and from which state.
    at: int
    origin: State
    arc: Arc
    number: int = errno.EIO
    fatal: bool = False

    @property
    def asked(self) -> str:
        return STATES[self.side][self.caps][self.at]

    @property
    def reaction(self) -> Reaction:
        return REACTIONS[self.side, self.origin.name, self.asked]

    @property
    def is_reset(self) -> bool:
        """A device in ERROR cannot go back to any state."""
        return self.fatal or not self.reaction.recovers

    @property
    def is_plain(self) -> bool:
        """Whether it is the one that stands for QEMU's request."""
        first = path(parse_capabilities(self.caps), self.origin, State[self.asked])
        return first is not None and first[0] is self.arc and self[-2:] == (errno.EIO, False)

    def states(self) -> list[str]:
        """What QEMU asks the failing device for in the whole of its life."""
        states = machine_starts(self.caps) if self.side == "source" else []
        states += STATES[self.side][self.caps][: self.at + 1]
        if self.reaction.recovers:
            states.append(self.reaction.recovers)
        if self.reaction.goes_on_to_stop:
            states.append("STOP")
        if self.reaction.starts_again:
            states += self.starts_again()
        return states + self.ends()

    def starts_again(self) -> list[str]:
        if has_p2p(self.caps):
            return machine_starts(self.caps)
        return [] if self.is_reset else ["RUNNING"]

    def ends(self) -> list[str]:
        runs = self.reaction.completes == (self.side == "target")
        return machine_stops(self.caps) if runs else []

    def keys(self, side: str, armed: Path) -> dict[str, object]:
        """What makes the device on a side fail so, if it is to."""
        if side != self.side:
            return {}
        name = f"{self.arc.origin.name}-{self.arc.target.name}".lower()
        return {"fails": name, "number": self.number, "fatal": int(self.fatal), "armed": armed}


def failures() -> Iterator[Failure]:
    """Every arc of every request with EIO; and the first of each with what may differ."""
    for caps in CAPS:
        for side in STATES:
            at = State.RUNNING
            for number, asked in enumerate(STATES[side][caps]):
                arcs = path(parse_capabilities(caps), at, State[asked])
                assert arcs
                for arc in arcs:
                    yield Failure(caps, side, number, at, arc)
                first = Failure(caps, side, number, at, arcs[0])
                yield first._replace(fatal=True)
                if first.reaction.recovers:
                    yield first._replace(number=errno.ENOMEM)
                at = State[asked]


def failure_name(failure: Failure) -> str:
    how = "ERROR" if failure.fatal else errno.errorcode[failure.number]
    return f"{failure.caps}, {failure.side}, {failure.asked}, {failure.arc}: {how}"


FAILURES = list(failures())


@pytest.mark.parametrize("failure", FAILURES, ids=failure_name)
def test_a_failing_arc_has_the_consequences_that_qemu_gives_it(
    parts: GuestParts, tmp_path: Path, failure: Failure
) -> None:
    armed = tmp_path / "armed"
    leaving, arriving = (
        witnessed(size=SIZE, caps=failure.caps, seed=seed, **failure.keys(side, armed))
        for side, seed in SEEDS.items()
    )
    with pair(parts.qemu, tmp_path, [leaving], [arriving]) as (source, target):
        armed.touch()
        assert try_to_migrate(source, target, tmp_path) is failure.reaction.completes
        assert not armed.exists()
        failed = source if failure.side == "source" else target
        assert f"Failed setting device state to {failure.asked}" in failed.said
    assert failed.states_of(0) == failure.states()
    assert failed.resets(0) == 1 + failure.is_reset  # the first one is the machine's start
    told = (f"SET MIG_DEVICE_STATE {failure.asked}", errno.errorcode[failure.number])
    refused = (f"SET MIG_DEVICE_STATE {failure.reaction.recovers}", "EINVAL")
    in_error = failure.fatal and failure.reaction.recovers
    assert failed.failures(0) == ([told, refused] if in_error else [told])
    for guest, fatal in ((source, failure.side == "source"), (target, failure.side == "target")):
        follow(guest.requests_of(0), failure.caps, fatal=fatal and failure.fatal)
    if failure.side == "target" and failure.reaction.completes:
        assert target.digest(0, "stopped") == Pattern(size=SIZE, seed=SEEDS["target"]).digest()


def try_to_migrate(source: VfioGuest, target: VfioGuest, folder: Path) -> bool:
    """Migrate, see who goes on, and end both; return whether QEMU took it for completed."""
    try:
        migrate(source.qmp, target.qmp, f"unix:{folder}/link", parameters=SWITCH_AT_ONCE)
    except MigrationFailed:
        assert target.wait() == 1
        source.wait_status("running")
        assert source.finish() == 0
        return False
    source.wait_status("postmigrate")
    target.wait_status("running")
    assert (source.finish(), target.finish()) == (0, 0)
    return True


@pytest.mark.parametrize(
    "failure",
    [failure for failure in FAILURES if failure.caps == "all" and failure.is_plain],
    ids=failure_name,
)
def test_the_other_device_of_a_machine_keeps_its_state_when_one_fails(
    parts: GuestParts, tmp_path: Path, failure: Failure
) -> None:
    armed = tmp_path / "armed"
    leaving, arriving = (
        [
            witnessed(size=SIZE, seed=seed, dirty=SIZE // 4 if side == "source" else 0),
            witnessed(size=SIZE, seed=seed + 1, **failure.keys(side, armed)),
        ]
        for side, seed in SEEDS.items()
    )
    with pair(parts.qemu, tmp_path, leaving, arriving) as (source, target):
        armed.touch()
        completed = try_to_migrate(source, target, tmp_path)
    assert completed is failure.reaction.completes
    for guest in (source, target):
        assert guest.failures(0) == []
        assert guest.resets(0) == 1  # the machine's start
        follow(guest.requests_of(0), failure.caps)
        follow(guest.requests_of(1), failure.caps)
    if completed:
        left = source.digest(0, "stopped")
        assert target.digest(0, "loaded") == target.digest(0, "stopped") == left


@pytest.mark.parametrize("caps", CAPS)
def test_a_source_whose_state_cannot_be_read_goes_on(
    parts: GuestParts, tmp_path: Path, caps: str
) -> None:
    leaving = witnessed(size=SIZE, caps=caps, seed=SEEDS["source"], fails="saving")
    arriving = witnessed(size=SIZE, caps=caps, seed=SEEDS["target"])
    with pair(parts.qemu, tmp_path, [leaving], [arriving]) as (source, target):
        assert not try_to_migrate(source, target, tmp_path)
    asked = SOURCE_STATES[caps][: SOURCE_STATES[caps].index("STOP_COPY") + 1]
    starts_again = machine_starts(caps) or ["RUNNING"]
    assert source.states_of(0) == [
        *machine_starts(caps), *asked, *starts_again, *machine_stops(caps)
    ]  # fmt: skip
    assert source.resets(0) == 1  # the machine's start
    assert source.failures(0) == []
    follow(source.requests_of(0), caps)
    assert [row["errno"] for row in source.requests() if row["on"] == "vfio0:saving"][-1] == "EIO"
    assert target.states_of(0) == ["RESUMING"]


@pytest.mark.parametrize("caps", CAPS)
def test_a_target_whose_state_cannot_be_written_ends_and_the_source_goes_on(
    parts: GuestParts, tmp_path: Path, caps: str
) -> None:
    leaving = witnessed(size=SIZE, caps=caps, seed=SEEDS["source"])
    arriving = witnessed(size=SIZE, caps=caps, seed=SEEDS["target"], fails="loading")
    with pair(parts.qemu, tmp_path, [leaving], [arriving]) as (source, target):
        assert not try_to_migrate(source, target, tmp_path)
    follow(source.requests_of(0), caps)
    assert source.failures(0) == []
    assert target.states_of(0) == ["RESUMING"]
    assert [row["errno"] for row in target.requests() if row["on"] == "vfio0:resuming"] == ["EIO"]
