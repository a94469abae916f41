"""Reads and writes that wait, and the signals that they give way to.

Theory of operation
===================
While a call is held its thread does not see signals, but for those that end it, and no
notification tells that one is due: /proc/TID/status does. A held call that has moved nothing is
taken back then. It fails with EINTR, or in the way that makes the kernel look at the signal and
repeat the call if the handler was installed so (SA_RESTART), or if there is none and the process
is merely stopped for a while. The latter may only be said to a thread that has a signal to look
at, since the internal errno would reach the program otherwise: the signal is the thread's own, or
the process has no other thread.

A signal that a thread does not block, that is not ignored and yet is pending is about to do
something: to run a handler, to stop the process, or to end it with a core dump.

A call on a descriptor with O_NONBLOCK gets the time from one look to the next, since nobody knows
how long the device's code is going to take. Then it is taken back with EAGAIN.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from typing import TYPE_CHECKING, NamedTuple

from vfiomig.doors.syscall.notify import ERESTARTSYS

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.core.transfer import Migf
    from vfiomig.doors.syscall.transfer import CallTransfer

__all__ = ("HeldCalls", "interruption")

STOPS = sum(
    1 << number - 1 for number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
)


class Held(NamedTuple):
    transfer: CallTransfer
    migf: Migf
    waits: Callable[[], bool]


class HeldCalls:
    """The calls that wait in sessions. Safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[int, Held] = {}
        #: How many there have ever been.
        self.added = 0

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, transfer: CallTransfer, migf: Migf, waits: Callable[[], bool]) -> None:
        with self._lock:
            self._calls[id(transfer)] = Held(transfer, migf, waits)
            self.added += 1

    def discard(self, transfer: CallTransfer) -> None:
        with self._lock:
            self._calls.pop(id(transfer), None)

    def look(self) -> None:
        """Take back the calls whose thread is gone or has a signal to handle."""
        with self._lock:
            held = list(self._calls.values())
        for transfer, migf, waits in held:
            number = 0 if waits() else errno.EINTR
            number = number or _pending(transfer.tid)
            if not number and transfer.looked_at and _is_nonblocking(transfer.tid, transfer.fd):
                number = errno.EAGAIN
            transfer.looked_at = True
            if number:
                transfer.withdrawn = number
                migf.withdraw(transfer)


def _pending(tid: int) -> int:
    try:
        with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as status:
            return interruption(status.read())
    except OSError:
        return 0


def interruption(status: str) -> int:
    """Tell from a /proc/TID/status with what a held call of the thread fails; 0: it goes on."""
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    own, shared, blocked, ignored, caught = (
        int(lines.get(name, "0"), 16) for name in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")
    )
    due = ~(blocked | ignored)
    if own & due:
        return ERESTARTSYS
    if lines.get("Threads", "").strip() == "1":
        return ERESTARTSYS if shared & due else 0
    # Perhaps another thread's: of a stop without a handler this one must not even hear.
    return errno.EINTR if shared & due & ~(STOPS & ~caught) else 0


def _is_nonblocking(tid: int, fd: int) -> bool:
    try:
        with open(f"/proc/{tid}/fdinfo/{fd}", encoding="ascii") as info:
            for line in info:
                if line.startswith("flags:"):
                    return bool(int(line.split()[1], 8) & os.O_NONBLOCK)
    except OSError:
        pass
    return False
