"""Who does a device's work: whoever kicks it if that is quick, else a thread of its own.

Theory of operation
-------------------
``work`` is done by one thread at a time, the holder of ``_busy``. A kick leaves a note and tries
to become the holder; if somebody else is, that one finds the note when it lets go. So no kick is
lost, and the caller of ``kick`` never waits. It does a first share of the work itself: a guest
that waits for a single short request is answered without a change of threads. What ``work`` then
says is left, or would have to wait for storage, goes to the thread, which is there from the first
time that it is needed until ``stop``.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Worker",)


class Worker:
    """Calls ``work(may_wait) -> whether some is left``; with ``may_wait`` it does all there is.

    ``work`` looks at ``running`` now and then, and leaves the rest where it is when that is over.
    """

    def __init__(self, name: str, work: Callable[[bool], bool]) -> None:
        self.running = False
        self._name = name
        self._work = work
        self._busy = threading.Lock()
        self._kicked = False
        self._thread: threading.Thread | None = None
        self._thread_lock = threading.Lock()
        self._wakeups: SimpleQueue[bool] = SimpleQueue()  # False: the end

    def start(self) -> None:
        """Allow work from here on."""
        self.running = True

    def stop(self) -> None:
        """Return when nobody works any more."""
        self.running = False
        with self._busy:
            pass
        with self._thread_lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._wakeups.put(False)
            thread.join()

    def kick(self) -> None:
        """Tell that there is work; do some of it at once."""
        self._kicked = True
        while self._kicked and self._busy.acquire(blocking=False):
            try:
                self._kicked = False
                left = self._work(False)
            finally:
                self._busy.release()
            if left:
                self.wake()
                return

    def wake(self) -> None:
        """Have the thread do what there is, if work is allowed."""
        with self._thread_lock:
            if not self.running:
                return
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread
            self._wakeups.put(True)

    def _run(self) -> None:
        while self._wakeups.get():
            self._kicked = True
            while self._kicked:
                with self._busy:
                    self._kicked = False
                    self._work(True)
