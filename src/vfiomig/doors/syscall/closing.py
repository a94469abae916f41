"""Last closes of devices and groups, each carried out once and before any later call that could tell.

Theory of operation
===================
The kernel lets go of a device inside the ``close()`` of its last descriptor, which may take long
(a reset). Here the program's ``close()`` has returned before anybody knows of it. So a close is
noted first, at once and in order; whoever answers a later call about the same device carries it
out before, or waits for the thread that is at it. Calls about other devices do not wait.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.doors.syscall.opened import DeviceOpen, GroupOpen

__all__ = ("Closing",)

log = logging.getLogger("vfiomig.doors.syscall")


@dataclass(slots=True, eq=False)
class Close:
    opened: DeviceOpen | GroupOpen
    taken: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class Closing:
    """The closes that are noted or under way. Safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closes: list[Close] = []

    def __bool__(self) -> bool:
        return bool(self._closes)

    @property
    def waiting(self) -> bool:
        """Whether there is a close that nobody is at."""
        return any(not close.taken for close in list(self._closes))

    def note(self, opened: DeviceOpen | GroupOpen) -> None:
        with self._lock:
            self._closes.append(Close(opened))

    def finish(self, number: int | None, may_wait: Callable[[], None] = lambda: None) -> None:
        """Carry out the closes of device ``number``, all if ``None``; ``may_wait`` comes before."""
        with self._lock:
            closes = [c for c in self._closes if number is None or c.opened.number == number]
        for close in closes:
            may_wait()
            with self._lock:
                mine, close.taken = not close.taken, True
            if mine:
                self._carry_out(close)
            else:
                close.done.wait()

    def _carry_out(self, close: Close) -> None:
        try:
            close.opened.close()
        except Exception:
            log.exception("%s: its last close failed", close.opened.label)
        finally:
            with self._lock:
                self._closes.remove(close)
            close.done.set()
