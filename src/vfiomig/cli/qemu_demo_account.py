"""What was seen of a migration under QEMU: from the devices, from QEMU, from the guest's work.

Theory of operation
-------------------
The devices of each side report every arc that they take (``qemu_demo_machine``), with moments of
one clock, so that the time between the source's stop and the destination's start is a difference.
Digests are taken between arcs and take longer than many of them. Those that kept a destination
from running are not a part of its downtime as it is told here; in QEMU's own figure they are.

What QEMU asks of the devices before the migration and after it, when a machine starts or quits,
does not belong to the account.
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from vfiomig.errors import GuestTimeout
from vfiomig.fsm import ARCS, Arc, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ("DESTINATION", "SOURCE", "Account", "Taken", "Work")

SOURCE: Final = "source"
DESTINATION: Final = "destination"
_STOPPED: Final = frozenset({State.STOP, State.STOP_COPY, State.RESUMING})
_ARCS: Final = {(arc.origin, arc.target): arc for arc in ARCS}


@dataclass(frozen=True, slots=True)
class Taken:
    """One arc of one device, and what was seen behind it."""

    side: str
    device: str
    requested: State
    arc: Arc
    ended: float
    seconds: float
    failure: int
    nbytes: int
    digest: str
    digest_seconds: float

    @property
    def began(self) -> float:
        return self.ended - self.seconds

    @property
    def stops(self) -> bool:
        return self.arc.target in _STOPPED and self.arc.origin not in _STOPPED


@dataclass(slots=True)
class Work:
    """What became of what the guest did."""

    #: Bytes that came back as they were sent, and those that were on their way at the switch.
    serial_bytes: int = 0
    serial_on_their_way: int = 0
    #: Blocks that the disk acknowledged, all and those before the switch, and those that are wrong.
    blocks: int = 0
    blocks_before: int = 0
    wrong_blocks: list[int] = field(default_factory=list)
    #: What else is wrong, in words.
    problems: list[str] = field(default_factory=list)


class Account:
    """Hears the reports of both sides from the moment it is made. Safe for concurrent use."""

    def __init__(self, names: Sequence[str]) -> None:
        """``names`` are what the devices are called here, in their order."""
        self.names = list(names)
        self.taken: list[Taken] = []
        #: QEMU's own account of the migration.
        self.qemu: dict[str, Any] = {}
        self.work = Work()
        self._over = False
        self._news = threading.Condition()

    def hear(self, side: str, report: dict[str, Any]) -> Taken:
        """Enter what one side reports."""
        one = Taken(
            side=side,
            device=self.names[int(report["device"].removeprefix("vfio"))],
            requested=State[report["requested"]],
            arc=_ARCS[State[report["origin"]], State[report["target"]]],
            ended=report["ended"],
            seconds=report["seconds"],
            failure=report["errno"],
            nbytes=report["nbytes"],
            digest=report["digest"],
            digest_seconds=report["digest_seconds"],
        )
        with self._news:
            if not self._over:
                self.taken.append(one)
                self._news.notify_all()
        return one

    def begin(self) -> None:
        """Forget what was before: the migration begins."""
        with self._news:
            self.taken.clear()

    def end(self, timeout: float) -> None:
        """Wait until all devices have taken their last arcs, and hear of no other any more."""
        with self._news:
            self._over = self._news.wait_for(self._is_over, timeout)
        if not self._over:
            raise GuestTimeout(f"QEMU was not done with every device after {timeout:.0f} s")

    def _is_over(self) -> bool:
        return all(
            any(one.device == name and _is_last(one) for one in self._on(side))
            for side in (SOURCE, DESTINATION)
            for name in self.names
        )

    # What follows from it, once it is over.

    def states(self, side: str, device: str) -> list[State]:
        """Return the states that QEMU asked a device for, in order."""
        asked: list[State] = []
        for one in self._on(side):
            # Several arcs may lead to one state; no state is asked for twice in a row.
            if one.device == device and asked[-1:] != [one.requested]:
                asked.append(one.requested)
        return asked

    def requests(self) -> list[tuple[str, State, dict[str, list[Taken]]]]:
        """Return what QEMU asked for in the order of time, with each device's arcs for it."""
        rows: dict[tuple[str, State], dict[str, list[Taken]]] = {}
        for one in sorted(self.taken, key=lambda one: one.began):
            devices = rows.setdefault((one.side, one.requested), {})
            devices.setdefault(one.device, []).append(one)
        return [(side, state, devices) for (side, state), devices in rows.items()]

    def digest(self, side: str, device: str) -> str:
        """Return the digest of a device's state; nothing if it never came to that."""
        found = (one.digest for one in self._on(side) if one.device == device and one.digest)
        return next(found, "")

    def moved(self, device: str) -> int:
        """Return the bytes of a source device's session."""
        return max(one.nbytes for one in self._on(SOURCE) if one.device == device)

    def moved_running(self, device: str) -> int:
        """Return how many of them were read while the device ran."""
        stops = self._of(SOURCE, lambda one: one.device == device and one.stops)
        return stops[0].nbytes if stops else 0

    @property
    def downtime(self) -> dict[str, float]:
        """The seconds in which no device ran, in order, by what happened in them."""
        stops = self._of(SOURCE, lambda one: one.stops)
        verdicts = self._of(DESTINATION, lambda one: one.arc.origin is State.RESUMING)
        runs = self._of(DESTINATION, lambda one: one.arc.target is State.RUNNING)
        if not (stops and verdicts and runs):
            return {}
        began, stopped = min(one.began for one in stops), max(one.ended for one in stops)
        accepting = min(one.began for one in verdicts)
        digesting = sum(one.digest_seconds for one in self._on(DESTINATION))
        running = max(one.ended for one in runs)
        return {
            "stop": stopped - began,
            "rest": accepting - stopped,
            "start": running - accepting - digesting,
        }

    @property
    def lost(self) -> list[str]:
        """What did not arrive, in words; nothing if everything did."""
        work = self.work
        found = [text for name in self.names if (text := self._lost_state(name))]
        found += work.problems
        if work.wrong_blocks:
            first = work.wrong_blocks[0]
            found.append(
                f"{len(work.wrong_blocks)} of {work.blocks} acknowledged blocks, "
                f"block {first} for one"
            )
        return found

    @property
    def verdict(self) -> str:
        """The line that the demo ends with."""
        if self.lost:
            return f"LOST: {'; '.join(self.lost)}"
        work = self.work
        return f"verified: state identical, {work.serial_bytes} serial bytes, {work.blocks} blocks"

    def _lost_state(self, device: str) -> str:
        for one in self._on(DESTINATION):
            if one.device == device and one.failure:
                name = errno.errorcode.get(one.failure, str(one.failure))
                return f"the state of {device}, {one.arc} failed with {name}"
        source, destination = (self.digest(side, device) for side in (SOURCE, DESTINATION))
        if source and source == destination:
            return ""
        return (
            f"the state of {device}, sha256 {source[:16] or 'unknown'} on the source and "
            f"{destination[:16] or 'unknown'} on the destination"
        )

    def _on(self, side: str) -> Iterable[Taken]:
        return [one for one in self.taken if one.side == side]

    def _of(self, side: str, wanted: Callable[[Taken], bool]) -> list[Taken]:
        return [one for one in self._on(side) if not one.failure and wanted(one)]


def _is_last(one: Taken) -> bool:
    """Whether QEMU asks the device for nothing more after this.

    A device of the destination that fails is reset, and taken for one that runs.
    """
    if one.side == SOURCE:
        return one.requested is State.STOP
    return one.requested is State.RUNNING or one.failure != 0
