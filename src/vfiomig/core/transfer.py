"""What every data transfer session has in common, and one read or write on its way through it.

Theory of operation
-------------------
A ``Migf`` is the object behind a data_fd. Its bytes come from, or go to, code of the device's
author that may block, so that code runs in a thread of the session, and whoever reads or writes
hands in a ``Transfer``. A transfer that needs no code of the author (the bytes are there, or the
buffer to fill is) is done at once, in the caller's own thread; any other waits in a queue for the
session's thread. When the session ends, every waiting transfer is answered with ENODEV at once,
whatever the author's code is doing: that is how a blocked reader wakes.

``finish`` is called exactly once for each transfer, by whichever thread gets there, under
``_lock``; it must not call back into the session. Bytes are moved under that lock as well,
so that nothing is written into a caller's buffer after the caller was told that it is over.
"""

from __future__ import annotations

import errno
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Protocol

from vfiomig.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.fsm import SessionKind

__all__ = ("JOIN_SECONDS", "Migf", "SessionAborted", "Transfer", "as_errno")

log = logging.getLogger("vfiomig.core")

#: How long the end of a session waits for the author's code to notice. It goes on without it
#: after that: the descriptor is dead already, and the thread ends when the code returns.
JOIN_SECONDS = 2.0


def as_errno(number: int) -> int:
    """Return what a device chose as its errno; EIO for a number that callers cannot be told.

    From 512 on they are the kernel's own, and make a system call start again.
    """
    return number if 0 < number < 512 else errno.EIO


class SessionAborted(DeviceError):
    """What a session's own code sees in ``StateReader`` when its session is over."""

    def __init__(self) -> None:
        super().__init__(errno.ENODEV, "the data transfer session is over")


class Transfer(Protocol):
    """One read or write of a data_fd."""

    @property
    def size(self) -> int:
        """Bytes that the caller offers or wants."""

    def move(self, view: memoryview, done: int) -> int:
        """Copy between ``view`` and the caller's bytes from ``done`` on; return how many.

        Fewer than ``view`` holds means that the caller's memory faulted there.
        """

    def finish(self, result: int) -> None:
        """Answer the caller: a byte count, or a negative errno."""


class Migf(ABC):
    """One data transfer session, from the arc that opened it to the arc that ends it."""

    kind: SessionKind

    def __init__(self, name: str, on_fatal: Callable[[Migf], None]) -> None:
        """``name`` is for logs; ``on_fatal`` is called when the device cannot go on.

        That is after the transfer that met the failure has been answered with its errno.
        """
        self.name = name
        self.dead = False
        self.moved = 0  # bytes, for accounts
        self._on_fatal = on_fatal
        self._lock = threading.Lock()
        # To wait and to wake; what is held is the lock, which Ctrl-C cannot come into.
        self._condition = threading.Condition(self._lock)
        self._queue: deque[Transfer] = deque()
        self._thread: threading.Thread | None = None
        self._watchers: list[Callable[[], None]] = []

    def watch(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``ready`` or ``dead`` may have changed."""
        self._watchers.append(callback)

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether poll() reports the data_fd readable (saving) or writable (resuming)."""

    def submit(self, transfer: Transfer) -> None:
        """Take a read or write; ``transfer.finish`` is called now or later."""
        with self._lock:
            result = -errno.ENODEV if self.dead else self._at_once_locked(transfer)
            if result is None:
                try:
                    self._enqueue_locked(transfer)
                except DeviceError as refusal:
                    transfer.finish(-as_errno(refusal.errno or 0))
                return
            transfer.finish(result)

    def withdraw(self, transfer: Transfer) -> bool:
        """Answer a waiting transfer now with what it has moved, EINTR if that is nothing.

        ``False`` if it has its answer already, or its bytes are with the author's code.
        """
        with self._lock:
            moved = self._give_up_locked(transfer)
            if moved is None:
                return False
            transfer.finish(moved or -errno.EINTR)
            return True

    def end(self) -> None:
        """End the session: waiting and later transfers get ENODEV. Safe to call twice."""
        with self._lock:
            self.dead = True
            self._refuse_waiting_locked()
            self._condition.notify_all()
        self._changed()

    def join(self) -> None:
        """After the end: wait for the author's code to be out of the session."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(JOIN_SECONDS)
        if thread.is_alive():
            log.warning("%s: a session is over, but its hook has not returned yet", self.name)

    def _refuse_waiting_locked(self) -> None:
        for transfer in (*self._in_progress_locked(), *self._queue):
            transfer.finish(-errno.ENODEV)
        self._queue.clear()

    @abstractmethod
    def _at_once_locked(self, transfer: Transfer) -> int | None:
        """Do the transfer without the author's code; ``None`` if that is not possible."""

    @abstractmethod
    def _give_up_locked(self, transfer: Transfer) -> int | None:
        """Forget a transfer that is not finished; return the bytes moved, ``None`` if not held."""

    @abstractmethod
    def _in_progress_locked(self) -> list[Transfer]:
        """Give up the transfers that the session's thread is at, for the end to answer."""

    @abstractmethod
    def _run(self) -> None:
        """Body of the session's thread."""

    def _enqueue_locked(self, transfer: Transfer) -> None:
        """Leave a transfer to the session's thread; EAGAIN if there can be none."""
        self._queue.append(transfer)
        try:
            self._wake_locked()
        except DeviceError:
            self._queue.pop()
            raise

    def _wake_locked(self) -> None:
        """See that the session's thread runs and looks at the queue."""
        if self._thread is None:
            name = f"vfiomig-{self.name}-{self.kind.name.lower()}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as refusal:
                raise DeviceError(errno.EAGAIN, f"no thread for the session: {refusal}") from None
            self._thread = thread
        self._condition.notify_all()

    def _changed(self) -> None:
        for callback in self._watchers:
            callback()

    def _refusal(self, problem: BaseException, hook: str) -> DeviceError:
        """What an exception out of the author's code means: a refusal, or a bug, which is fatal."""
        if isinstance(problem, DeviceError):
            log.debug("%s: %s() refused: %s", self.name, hook, problem)
            return problem
        outcome = "its session is over already" if self.dead else "the device goes to ERROR"
        log.error("%s: %s() raised; %s", self.name, hook, outcome, exc_info=problem)
        return DeviceError(errno.EIO, f"{hook}() has a bug", fatal=True)
