"""The placeholder of a data_fd that answers poll, select and epoll: one end of a pipe.

The program has the end whose direction is the session's; this process keeps the other and so
decides what the program's poll sees, and sees when the program has closed its last copy.

====================  ==================================  ===========================
session               how                                 the program's poll
====================  ==================================  ===========================
saving, data ready    one byte lies in the pipe           IN
saving, nothing now   the byte is taken back              nothing
saving, over          the byte lies there, our end shut   IN and HUP
resuming              the pipe is empty                   OUT
resuming, over        our end is shut                     OUT and ERR
====================  ==================================  ===========================

The door answers the program's reads itself; only one that does not stop here, through a copy that
the fast filter does not know or in a process without a filter, can take the byte away. With our end
shut nobody tells us of the program's close, so a pipe whose session is over carries a mark
(opened.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import TYPE_CHECKING

from vfiomig.descriptors import Fd, reopen
from vfiomig.fsm import SessionKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.core.transfer import Migf

__all__ = ("DataPipe",)


class DataPipe:
    """A pipe that can follow the readiness of ``migf``.

    ``work`` wakes whoever waits on it when the program may have closed its last copy.
    """

    def __init__(self, migf: Migf, work: select.epoll) -> None:
        self._migf = migf
        self._saving = migf.kind is SessionKind.SAVING
        self._lock = threading.Lock()
        self._shown = False  # the byte lies in the pipe
        self._mark = 0
        self._over: Callable[[], None] = lambda: None
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        self.program_end = Fd(read_end if self._saving else write_end)
        self._own_end = Fd(write_end if self._saving else read_end)
        work.register(self._own_end, 0)  # the end of the other side is reported unasked

    def follow(self, mark: int, over: Callable[[], None]) -> None:
        """Show from here on what the session is ready for.

        When it is over the pipe gets ``mark`` as its time of modification and ``over`` is called.
        """
        self._mark = mark
        self._over = over
        self._migf.watch(self.refresh)
        self.refresh()

    def refresh(self) -> None:
        """Show what the session is ready for now."""
        with self._lock:
            if self._own_end.closed:
                return
            over = self._migf.dead
            if self._saving:
                self._show_locked(over or self._migf.ready)
            if over:
                os.utime(self._own_end.fileno(), ns=(self._mark, self._mark))
                self._own_end.close()
        if over:
            self._over()

    def abandoned(self) -> bool:
        """Whether the program has no copy left. Also after the session: nobody can tell then."""
        with self._lock:
            if self._own_end.closed:
                return False
            poller = select.poll()
            poller.register(self._own_end, 0)
            return bool(poller.poll(0))

    def close(self) -> None:
        with self._lock:
            self._own_end.close()
            self.program_end.close()

    def _show_locked(self, ready: bool) -> None:
        if ready == self._shown:
            return
        if ready:
            with contextlib.suppress(BrokenPipeError):  # the program's copies are gone
                os.write(self._own_end.fileno(), b"\0")
        else:
            try:
                taker = reopen(self._own_end, os.O_RDONLY | os.O_NONBLOCK)
            except OSError:
                return  # for want of a descriptor it looks ready for longer
            with taker, contextlib.suppress(BlockingIOError):  # a read that nobody stopped has it
                os.read(taker.fileno(), 1)
        self._shown = ready
