"""The resuming session: what is written to a data_fd, read by ``load``.

Theory of operation
-------------------
``load`` runs in the session's thread, from the first write on or, without any, from the end of
the session. ``readinto`` names the buffer that the next bytes belong in, and they are copied
there once, straight from the caller. A write that leaves that buffer unfilled is done at once, in
the caller's thread. A write that fills it wakes ``load`` and is answered only when ``load`` asks
for more, returns or raises: so an error about these bytes is this write's errno.

RESUMING -> STOP is ``verdict``: the stream ends, ``load`` comes to its end, and what it raises is
the arc's errno. A session whose load has failed stays failed; only a reset discards it. Bytes
after ``load`` has returned are refused with ENOMEM, as drivers do for a state that is too long.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.core.transfer import Migf, SessionAborted, Transfer, as_errno
from vfiomig.device import StateReader
from vfiomig.fsm import SessionKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.errors import DeviceError

__all__ = ("ResumingMigf",)


class ResumingMigf(Migf):
    """A session of RESUMING."""

    kind = SessionKind.RESUMING

    def __init__(
        self, name: str, load: Callable[[StateReader], None], on_fatal: Callable[[Migf], None]
    ) -> None:
        super().__init__(name, on_fatal)
        self._load = load
        self._ended = False  # no more writes: readinto() returns what there is
        self._returned = False  # load() is over
        self._failure: DeviceError | None = None
        self._wanted: memoryview | None = None  # the part of readinto's buffer yet to fill
        self._held: Transfer | None = None  # its bytes are taken; load decides the answer
        self._partial = 0  # bytes taken of the transfer at the head of the queue

    @property
    def ready(self) -> bool:
        return True

    def verdict(self) -> None:
        """End the stream, let ``load`` finish, and raise what it has to say.

        Raises:
            DeviceError: the device refuses the state; the session is dead from here on.
        """
        with self._lock:
            self._ended = True
            if not self._returned:
                self._wake_locked()
                self._condition.wait_for(lambda: self._returned)
            failure = self._failure
        self.end()
        if failure is not None:
            raise failure

    def _at_once_locked(self, transfer: Transfer) -> int | None:
        if self._ended:
            return -errno.ENODEV  # leaving RESUMING: whatever load() says, no session follows
        if not transfer.size:
            return 0
        if self._returned:
            return -errno.ENOMEM
        wanted = self._wanted
        if wanted is None or self._queue or transfer.size >= len(wanted):
            return None
        moved = self._move_locked(transfer, wanted[: transfer.size], 0)
        return moved or -errno.EFAULT

    def _move_locked(self, transfer: Transfer, into: memoryview, done: int) -> int:
        moved = transfer.move(into, done)
        if self._wanted is not None:
            self._wanted = self._wanted[moved:]
        self.moved += moved
        return moved

    def _give_up_locked(self, transfer: Transfer) -> int | None:
        if transfer not in self._queue:
            return None
        moved = 0
        if transfer is self._queue[0]:
            moved, self._partial = self._partial, 0
        self._queue.remove(transfer)
        return moved

    def _in_progress_locked(self) -> list[Transfer]:
        held, self._held = self._held, None
        return [held] if held is not None else []

    def _run(self) -> None:
        failure: DeviceError | None = None
        try:
            self._load(Reader(self))
        except BaseException as problem:  # noqa: BLE001 - hook boundary: all others are bugs
            # Without the frames that it was raised through: they hold the device.
            failure = self._refusal(problem, "load").with_traceback(None)
        with self._lock:
            self._returned = True
            self._failure = failure
            self.dead = self.dead or failure is not None
            self._answer_rest_locked(-as_errno(failure.errno or 0) if failure else 0)
            self._condition.notify_all()
        self._changed()
        if failure is not None and failure.fatal:
            self._on_fatal(self)

    def _answer_rest_locked(self, error: int) -> None:
        """Answer the writes that ``load`` leaves behind: the held one, then those in the queue."""
        for transfer in self._in_progress_locked():
            transfer.finish(error or transfer.size)
        for transfer in self._queue:
            transfer.finish(error or self._partial or -errno.ENOMEM)
            self._partial = 0
        self._queue.clear()

    def fill(self, view: memoryview) -> int:
        """Serve ``readinto``: fill ``view``, fewer bytes only at the end of the stream."""
        with self._lock:
            for transfer in self._in_progress_locked():
                transfer.finish(transfer.size)
            self._wanted = view
            try:
                while self._wanted and self._fill_some_locked():
                    pass
                return len(view) - len(self._wanted)
            finally:
                self._wanted = None

    def _fill_some_locked(self) -> bool:
        """Wait for bytes and take some; ``False`` at the end of the stream."""
        self._condition.wait_for(lambda: self.dead or self._queue or self._ended)
        if self.dead:
            raise SessionAborted
        if self._queue:
            self._take_locked(self._queue[0])
            return True
        return False

    def _take_locked(self, transfer: Transfer) -> None:
        """Move bytes of the first waiting write, and answer it when it is used up."""
        assert self._wanted is not None
        into = self._wanted[: transfer.size - self._partial]
        moved = self._move_locked(transfer, into, self._partial)
        self._partial += moved
        faulted = moved < len(into)
        if not faulted and self._partial < transfer.size:
            return
        taken, self._partial = self._partial, 0
        self._queue.popleft()
        if faulted or self._wanted:
            transfer.finish(taken or -errno.EFAULT)
        else:
            self._held = transfer


class Reader(StateReader):
    """What ``load`` is given."""

    def __init__(self, migf: ResumingMigf) -> None:
        self._migf = migf

    def readinto(self, buffer: bytearray | memoryview) -> int:
        view = memoryview(buffer).cast("B")
        if view.readonly:
            raise TypeError("readinto() needs a buffer that can be written")
        return self._migf.fill(view)
