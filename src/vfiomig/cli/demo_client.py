"""The client process of ``vfiomig demo``: an ordinary VFIO program that migrates vfio0 into vfio1.

Theory of operation
-------------------
It knows two paths and nothing of what serves them: all that it does are calls of open, ioctl,
read, write, pread, pwrite and close, made by ``DeviceClient`` as on a machine with the hardware.

In the landed dialect the state is read while the source still runs. A round of pre-copy reads to
the temporary end, but no more than twice what the device said that it had: one that changes faster
than it is read never comes to an end. The rounds are over when what is left is small, or when
there were many. V6 has no pre-copy: the source stops, and all is read.

The source leaves STOP_COPY after the destination runs: that may take long (docs/protocol.md,
USER-10), and until the destination has accepted the state the source could still go on.

Reports are JSON lines on a descriptor that its parent left open. Who cannot report any more has
lost its parent, and ends.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Final

from vfiomig.abi.ioctls import Dialect
from vfiomig.client import open_target
from vfiomig.errors import VfioMigError
from vfiomig.fsm import State

if TYPE_CHECKING:
    from vfiomig.client import DeviceClient, Session

__all__ = ("main",)

SOURCE: Final = "/dev/vfio/devices/vfio0"
DESTINATION: Final = "/dev/vfio/devices/vfio1"
CHUNK: Final = 1 << 20
ROUNDS: Final = 10
#: Pre-copy is over when so much is left, or this part of what has been moved.
SMALL: Final = 1 << 20
SMALL_PART: Final = 64
REPORT_SECONDS: Final = 0.05
#: Written to BAR0 of the source, so that its registers have something to move as well.
NOTE: Final = b"moved by vfiomig demo"


class Mover:
    """Carries a saving session's bytes into a resuming one, and reports how far it is."""

    def __init__(self, source: DeviceClient, loading: Session, reports: int) -> None:
        self._source = source
        self._loading = loading
        self._reports = reports
        self._view = memoryview(bytearray(CHUNK))
        self._phase = ""
        self._report_at = 0.0
        self.moved = 0

    def begin(self, phase: str) -> None:
        """Name what happens from here on."""
        self._phase = phase
        self._tell(time.monotonic())

    def move(self, saving: Session, limit: float = math.inf) -> None:
        """Move to an end, temporary or permanent, or until ``limit`` bytes have come."""
        stop = self.moved + limit
        while self.moved < stop:
            count = saving.readinto(self._view)
            if not count:
                return
            self._loading.write_all(self._view[:count])
            self.moved += count
            now = time.monotonic()
            if now >= self._report_at:
                self._tell(now)

    def _tell(self, now: float) -> None:
        self._report_at = now + REPORT_SECONDS
        tells = self._source.dialect is Dialect.LANDED
        left = self._source.data_size() if tells else None
        report(self._reports, phase=self._phase, moved=self.moved, left=left)


def report(to: int, **facts: str | int | None) -> None:
    os.write(to, json.dumps(facts).encode() + b"\n")


def migrate(reports: int) -> int:
    """Migrate, and return the number of rounds that pre-copy took."""
    with open_target(SOURCE) as source, open_target(DESTINATION) as destination:
        source.write_region(0, 0, NOTE)
        loading = _session(destination, State.RESUMING)
        mover = Mover(source, loading, reports)
        rounds = precopy(source, mover) if source.dialect is Dialect.LANDED else 0
        saving = _session(source, State.STOP_COPY)
        mover.begin("the rest, both stopped")
        mover.move(saving)
        destination.set_state(State.STOP)
        destination.set_state(State.RUNNING)
        saving.close()
        source.set_state(State.STOP)
        return rounds


def precopy(source: DeviceClient, mover: Mover) -> int:
    """Read what can be read while the source runs; return how many rounds it took."""
    source.precopy_v2()
    saving = _session(source, State.PRE_COPY)
    rounds = 0
    while rounds < ROUNDS:
        there = saving.precopy_info()
        promised = there.initial_bytes + there.dirty_bytes
        if not there.initial_bytes and promised <= max(SMALL, mover.moved // SMALL_PART):
            break
        rounds += 1
        mover.begin(f"pre-copy, round {rounds}")
        mover.move(saving, 2 * promised)
    source.set_state(State.PRE_COPY_P2P)
    return rounds


def _session(device: DeviceClient, state: State) -> Session:
    session = device.set_state(state)
    assert session is not None  # these states have one, and nobody was in them before
    return session


def outcome(reports: int) -> dict[str, str | int]:
    """Migrate, and say what came of it."""
    try:
        return {"rounds": migrate(reports)}
    except BrokenPipeError:
        raise  # nobody listens any more
    except OSError as error:
        return {"failed": error.strerror or str(error)}
    except VfioMigError as error:
        return {"failed": str(error)}


def main(reports: int) -> int:
    """Migrate; report to the descriptor ``reports`` and return the exit code."""
    try:
        facts = outcome(reports)
        report(reports, **facts)
    except BrokenPipeError:
        return 1
    return 1 if "failed" in facts else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
