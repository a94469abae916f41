"""What the two devices of ``vfiomig demo`` saw: every arc with its time, the digests, the downtime.

Theory of operation
-------------------
The account is kept in the process that serves the devices, by observers of their arcs; what the
client says about itself does not enter it. Both digests are taken where a session has just ended
in STOP, so from memory that stands still: the source's after its last stop, the destination's
after it has accepted the state and before the next arc can start it. An observer is called
between arcs, and computing a digest takes longer than many of them; the clock of the account
stands still meanwhile, so the times are those of a migration that nobody checks.
"""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vfiomig.fsm import Arc, SessionKind, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.core.migration import ArcEvent
    from vfiomig.core.vfio_device import VfioDevice
    from vfiomig.models.pattern import Pattern

__all__ = ("DESTINATION", "SOURCE", "Account", "TakenArc")

SOURCE: Final = "source"
DESTINATION: Final = "destination"
STOPPED: Final = frozenset({State.STOP, State.STOP_COPY, State.RESUMING})


@dataclass(frozen=True, slots=True)
class TakenArc:
    """One arc: its device, when it began and ended, and what its session had moved by then."""

    device: str
    arc: Arc
    began: float
    ended: float
    failure: int
    nbytes: int | None

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def __str__(self) -> str:
        name = errno.errorcode.get(self.failure, str(self.failure))
        return f"{self.arc}, {name}" if self.failure else str(self.arc)


class Account:
    """Observes two ``pattern`` devices from the moment it is made. Safe for concurrent use."""

    def __init__(
        self, source: Pattern, destination: Pattern, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.arcs: list[TakenArc] = []
        self.digests: dict[str, str] = {}
        self.nbytes = source.nbytes
        self._devices = {SOURCE: source, DESTINATION: destination}
        self._clock = clock
        self._digesting = 0.0  # seconds that went into digests
        self._lock = threading.Lock()

    def observe(self, served: VfioDevice, role: str) -> None:
        """Be told of the arcs of a device from now on."""
        served.migration.observers.append(lambda event: self.note(role, event))

    def note(self, role: str, event: ArcEvent) -> None:
        """Enter an arc, and take the digest if a session has ended with it."""
        with self._lock:
            ended = self._clock() - self._digesting
            arc = event.arc
            in_session = arc.closes is not None or event.nbytes
            self.arcs.append(
                TakenArc(
                    device=role,
                    arc=arc,
                    began=ended - event.seconds,
                    ended=ended,
                    failure=event.errno,
                    nbytes=event.nbytes if in_session else None,
                )
            )
            if arc.closes is not None and arc.target is State.STOP and not event.errno:
                started = self._clock()
                self.digests[role] = self._devices[role].digest()
                self._digesting += self._clock() - started

    # What follows from it, once the destination runs.

    @property
    def identical(self) -> bool:
        return self.digests[SOURCE] == self.digests[DESTINATION]

    @property
    def verdict(self) -> str:
        """The line that the demo ends with."""
        source, destination = self.digests[SOURCE], self.digests[DESTINATION]
        if self.identical:
            return f"identical: {self.nbytes} bytes, sha256 {source}"
        return (
            f"DIFFERENT: of {self.nbytes} bytes, source sha256 {source}, "
            f"destination sha256 {destination}"
        )

    @property
    def seconds(self) -> float:
        """From the first arc to the last."""
        return self.arcs[-1].ended - self.arcs[0].began

    @property
    def moved(self) -> int:
        """Bytes of the source's session."""
        return self._arc(SOURCE, lambda arc: arc.closes is SessionKind.SAVING).nbytes or 0

    @property
    def throughput(self) -> float:
        """Bytes per second, from the source's data_fd to the destination's last byte."""
        opened = self._arc(SOURCE, lambda arc: arc.opens is SessionKind.SAVING)
        return self.moved / max(self._verdict.began - opened.ended, 1e-9)

    @property
    def downtime(self) -> dict[str, float]:
        """The seconds in which neither device ran, in order, by what happened in them."""
        stopped = self._arc(SOURCE, lambda arc: arc.target in STOPPED and arc.origin not in STOPPED)
        running = self._arc(DESTINATION, lambda arc: arc.target is State.RUNNING)
        return {
            "stop": stopped.seconds,
            "rest": self._verdict.began - stopped.ended,
            "load": self._verdict.seconds,
            "start": running.ended - self._verdict.ended,
        }

    @property
    def moved_stopped(self) -> int:
        """Bytes that were left to move when the source had stopped."""
        stopped = self._arc(SOURCE, lambda arc: arc.target in STOPPED and arc.origin not in STOPPED)
        return self.moved - (stopped.nbytes or 0)

    @property
    def _verdict(self) -> TakenArc:
        return self._arc(DESTINATION, lambda arc: arc.closes is SessionKind.RESUMING)

    def _arc(self, role: str, wanted: Callable[[Arc], bool]) -> TakenArc:
        """The arc of a device that has this property; each has been taken once."""
        return next(
            taken
            for taken in self.arcs
            if taken.device == role and not taken.failure and wanted(taken.arc)
        )
