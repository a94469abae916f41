"""The process in front of each QEMU of ``vfiomig demo --qemu``: it serves its devices, and reports.

Theory of operation
-------------------
It is ``vfiomig run`` with an observer. Every arc becomes a JSON line on a descriptor that its
parent left open, with the moment of its end by the clock that all processes of a machine share.

Where a session has ended in STOP a digest of the device's state is added: the SHA-256 of what
``save`` would send now. On the source that is what it stopped with, on the destination what it
accepted, before the next arc can start it. It takes its time, which is reported as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from vfiomig.core.vfio_device import VfioDevice
from vfiomig.doors.syscall.run import run
from vfiomig.errors import VfioMigError
from vfiomig.fsm import State
from vfiomig.models import make

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.core.migration import ArcEvent
    from vfiomig.device import Device

__all__ = ("digest_of", "main", "report_of")

_OWN_FAILURE: Final = 125


def digest_of(device: Device) -> str:
    """Return the digest of all that a device that is stopped, and has no session, would send."""
    sha256 = hashlib.sha256()
    for piece in device.save():
        sha256.update(piece)
    return sha256.hexdigest()


def report_of(event: ArcEvent, device: Device) -> dict[str, str | int | float]:
    """Return what is reported of an arc that has just been taken by ``device``."""
    ended = time.monotonic()
    digest = ""
    if event.arc.closes is not None and event.arc.target is State.STOP and not event.errno:
        digest = digest_of(device)
    return {
        "device": event.device,
        "requested": event.requested.name,
        "origin": event.arc.origin.name,
        "target": event.arc.target.name,
        "ended": ended,
        "seconds": event.seconds,
        "errno": event.errno,
        "nbytes": event.nbytes,
        "digest": digest,
        "digest_seconds": time.monotonic() - ended if digest else 0.0,
    }


def main(arguments: Sequence[str]) -> int:
    """Serve: the reports' descriptor, SPECs, ``--``, and the program. Return the exit code."""
    end = list(arguments).index("--")
    reports, *specs = arguments[:end]
    # The program must not hold the parent's pipe open.
    os.set_inheritable(int(reports), False)
    try:
        served = [VfioDevice(make(spec), f"vfio{at}") for at, spec in enumerate(specs)]
        for one in served:
            one.migration.observers.append(partial(_report, int(reports), one.device))
        return run(served, arguments[end + 1 :], filter_name="fast")
    except (VfioMigError, OSError) as problem:
        print(f"vfiomig: {problem}", file=sys.stderr)
        return _OWN_FAILURE


def _report(to: int, device: Device, event: ArcEvent) -> None:
    line = json.dumps(report_of(event, device)).encode() + b"\n"
    with contextlib.suppress(OSError):  # nobody may listen any more: the device goes on
        os.write(to, line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
