"""Reads and writes that wait, and the signals that they give way to.

While a call is held its thread cannot run a signal handler, and no notification tells that one is
due: /proc/TID/status does. A held call that has moved nothing is taken back then. It fails with
EINTR, or, if the signal is the thread's own, in the way that makes the kernel repeat it under
SA_RESTART: only then is it certain that this very thread has a signal to handle, and the internal
errno never reaches a program.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.core.transfer import Migf
    from vfiomig.doors.syscall.transfer import CallTransfer

__all__ = ("HeldCalls", "Signals", "parse_signals")


class Signals(NamedTuple):
    """Pending signals that have a handler and are not blocked."""

    own: bool
    shared: bool


class Held(NamedTuple):
    transfer: CallTransfer
    migf: Migf
    waits: Callable[[], bool]


class HeldCalls:
    """The calls that wait in sessions. Safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[int, Held] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, transfer: CallTransfer, migf: Migf, waits: Callable[[], bool]) -> None:
        with self._lock:
            self._calls[id(transfer)] = Held(transfer, migf, waits)

    def discard(self, transfer: CallTransfer) -> None:
        with self._lock:
            self._calls.pop(id(transfer), None)

    def look(self) -> None:
        """Take back the calls whose thread is gone or has a signal to handle."""
        with self._lock:
            held = list(self._calls.values())
        for transfer, migf, waits in held:
            signals = _pending(transfer.tid)
            if signals.own or signals.shared or not waits():
                transfer.restart = signals.own
                migf.withdraw(transfer)


def _pending(tid: int) -> Signals:
    try:
        with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as status:
            return parse_signals(status.read())
    except OSError:
        return Signals(own=False, shared=False)


def parse_signals(status: str) -> Signals:
    """Read the signal masks of a /proc/TID/status."""
    masks = {
        name: int(value, 16)
        for name, _, value in (line.partition(":") for line in status.splitlines())
        if name in {"SigPnd", "ShdPnd", "SigBlk", "SigCgt"}
    }
    handled = masks.get("SigCgt", 0) & ~masks.get("SigBlk", 0)
    return Signals(
        own=bool(masks.get("SigPnd", 0) & handled), shared=bool(masks.get("ShdPnd", 0) & handled)
    )
