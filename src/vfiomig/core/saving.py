"""The saving session: what ``precopy`` and ``save`` yield, read through a data_fd.

Theory of operation
-------------------
The author's iterables are walked one buffer at a time; what a read did not take of a buffer
stays in ``_view`` for the next. Where the stream is: ``TEMPORARY_END`` after ``precopy`` said
"nothing now" (ENOMSG, and the next read asks again), ``PERMANENT_END`` after ``save`` ended in
STOP_COPY (0 for ever), ``MORE`` otherwise. A read that has bytes returns them first; an error or
an end that it meets after them is for the next read. A read of no bytes gets 0, whatever the
stream has. Rules: ``VFIO_MIG_GET_PRECOPY_INFO`` and
``enum vfio_device_mig_state`` in include/uapi/linux/vfio.h; docs/protocol.md, sessions.
"""

from __future__ import annotations

import errno
import threading
from enum import Enum, auto
from typing import TYPE_CHECKING

from vfiomig.core.transfer import Migf, Transfer, as_errno
from vfiomig.device import Buffer, PrecopyInfo
from vfiomig.fsm import SessionKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfiomig.errors import DeviceError

__all__ = ("SavingMigf",)

EMPTY = memoryview(b"")


class Position(Enum):
    MORE = auto()
    TEMPORARY_END = auto()
    PERMANENT_END = auto()


class Peek:
    """A transfer of no bytes: makes the session's thread have the next buffer at hand."""

    size = 0

    def __init__(self, done: Callable[[], None]) -> None:
        self._done = done

    def move(self, view: memoryview, done: int) -> int:  # noqa: ARG002 - moves nothing
        return 0

    def finish(self, result: int) -> None:  # noqa: ARG002 - whatever came of it
        self._done()


class SavingMigf(Migf):
    """A session of the saving group; it lives through PRE_COPY, PRE_COPY_P2P and STOP_COPY."""

    kind = SessionKind.SAVING

    def __init__(
        self,
        name: str,
        source: Iterator[Buffer],
        on_fatal: Callable[[Migf], None],
        *,
        precopy: bool,
    ) -> None:
        super().__init__(name, on_fatal)
        self._sources = [source]  # all that there were, for the end to close
        self._source = source
        self._precopy: Iterator[Buffer] | None = source if precopy else None
        self._stop_copy = not precopy
        self._initial = precopy  # what is at hand belongs to the initial data
        self._initial_limit: int | None = None  # initial_bytes may only fall
        self._view = EMPTY
        self._position = Position.MORE
        self._failure: DeviceError | None = None  # for the next read to tell
        self._end_due = False  # a read met the temporary end behind its bytes: the next tells
        self._active: Transfer | None = None
        self._active_done = 0  # bytes that it has moved
        self._fatal = False  # a failure means that the device cannot go on

    @property
    def ready(self) -> bool:
        return bool(self._view) or self._position is not Position.TEMPORARY_END

    def stop_copy(self, rest: Iterator[Buffer] | None) -> None:
        """Enter STOP_COPY: what ``precopy`` still has, then ``rest``, then the permanent end.

        Without ``rest`` the one source goes on, and its end is the permanent one.
        """
        with self._lock:
            self._stop_copy = True
            if rest is not None:
                self._sources.append(rest)
                self._source = rest
            if rest is None or self._position is not Position.MORE:
                self._precopy = None
            self._position = Position.MORE
            self._end_due = False
        self._changed()

    def data_ready(self) -> None:
        """Note that the device has more pre-copy data: pollers wake."""
        with self._lock:
            if self._position is Position.TEMPORARY_END:
                self._position = Position.MORE
                self._end_due = False
        self._changed()

    def end(self) -> None:
        super().end()
        with self._lock:
            self._view = EMPTY  # a device cannot resize what is still held

    def look(self) -> None:
        """Have the next buffer at hand if there is one, as a read of it would."""
        looked = threading.Event()
        with self._lock:
            if self.dead or self._view or self._failure is not None:
                return
            self._enqueue_locked(Peek(looked.set))
        looked.wait()

    def account(self, rest: PrecopyInfo, *, reinit_heard: bool) -> PrecopyInfo:
        """Add what is at hand to ``rest``, what the device will yet yield."""
        with self._lock:
            reinit = rest.reinit and reinit_heard
            self._initial = self._initial or reinit
            initial, dirty = rest.initial_bytes, rest.dirty_bytes
            if self._initial:
                initial += len(self._view)
            else:
                dirty += len(self._view)
            if not reinit and self._initial_limit is not None and initial > self._initial_limit:
                dirty += initial - self._initial_limit
                initial = self._initial_limit
            self._initial_limit = initial
            return PrecopyInfo(initial, dirty, reinit)

    def _at_once_locked(self, transfer: Transfer) -> int | None:
        if not transfer.size:
            return 0
        if self._queue or self._active is not None:
            return None
        if self._failure is not None:
            return self._take_failure_locked(self._failure)
        if self._end_due:
            self._end_due = False
            return -errno.ENOMSG
        if self._view and transfer.size <= len(self._view):
            return self._copy_locked(transfer, 0) or -errno.EFAULT
        if self._position is Position.PERMANENT_END and not self._view:
            return 0
        return None

    def _copy_locked(self, transfer: Transfer, done: int) -> int:
        """Move what ``_view`` has for this transfer; return the bytes moved."""
        size = min(len(self._view), transfer.size - done)
        moved = transfer.move(self._view[:size], done)
        self._view = self._view[moved:] if moved < len(self._view) else EMPTY
        self.moved += moved
        return moved

    def _take_failure_locked(self, failure: DeviceError) -> int:
        self._failure = None
        self.dead = True  # it ends the session: what follows could not be put in its place
        self._condition.notify_all()
        return -as_errno(failure.errno or 0)

    def _give_up_locked(self, transfer: Transfer) -> int | None:
        if transfer is self._active:
            self._active = None
            return self._active_done
        if transfer in self._queue:
            self._queue.remove(transfer)
            return 0
        return None

    def _in_progress_locked(self) -> list[Transfer]:
        active, self._active = self._active, None
        return [active] if active is not None else []

    def _run(self) -> None:
        while (transfer := self._next_transfer()) is not None:
            result = self._serve(transfer)
            with self._lock:
                if self._active is transfer:
                    self._active = None
                    transfer.finish(result)
                fatal, self._fatal = self._fatal, False
            self._changed()
            if fatal:
                self._on_fatal(self)
        with self._lock:
            self._refuse_waiting_locked()  # a failure may have ended the session, not end()
            self._view = EMPTY
        self._changed()
        self._close_sources()

    def _next_transfer(self) -> Transfer | None:
        with self._lock:
            self._condition.wait_for(lambda: self.dead or self._queue)
            if self.dead:
                return None
            self._active = self._queue.popleft()
            self._active_done = 0
            return self._active

    def _serve(self, transfer: Transfer) -> int:
        """Carry one transfer out as far as the stream goes now."""
        done, more = 0, True
        while True:
            with self._lock:
                if self._active is not transfer:
                    return done  # it has its answer: the session is over, or it was taken back
                if self._view and done < transfer.size:
                    wanted = min(len(self._view), transfer.size - done)
                    moved = self._copy_locked(transfer, done)
                    done += moved
                    self._active_done = done
                    if moved < wanted:
                        return done or -errno.EFAULT
                if (done and done == transfer.size) or (self._view and not transfer.size):
                    return done
                if not more:
                    result = self._end_locked(transfer, done)
                    if result is not None:
                        return result
            more = self._advance()

    def _end_locked(self, transfer: Transfer, done: int) -> int | None:
        """Answer a transfer that met an end; ``None`` if STOP_COPY or more data came meanwhile."""
        if self._failure is not None:
            if done or not transfer.size:
                return done
            return self._take_failure_locked(self._failure)
        if self._position is Position.TEMPORARY_END:
            self._end_due = done > 0
            return done or -errno.ENOMSG
        return done if self._position is Position.PERMANENT_END else None

    def _advance(self) -> bool:
        """Run the author's code for the next buffer; ``False`` at an end or after a failure."""
        with self._lock:
            precopy = self._precopy
            source = self._source if precopy is None else precopy
            if self._failure is not None:
                return False
        try:
            view = memoryview(next(source)).cast("B")
        except StopIteration:
            return self._source_ended(precopy)
        except BaseException as problem:  # noqa: BLE001 - hook boundary: all others are bugs
            refusal = self._refusal(problem, "save" if precopy is None else "precopy")
            with self._lock:
                self._failure = refusal
                self._fatal = refusal.fatal
            return False
        if not view:
            return precopy is None or self._source_ended(precopy, empty=True)
        with self._lock:
            self._view = view
            self._position = Position.MORE
            self._end_due = False
        return True

    def _source_ended(self, precopy: Iterator[Buffer] | None, *, empty: bool = False) -> bool:
        with self._lock:
            if precopy is None:
                self._position = Position.PERMANENT_END
                return False
            if self._stop_copy:
                self._precopy = None  # on to save()
                return True
            self._position = Position.TEMPORARY_END
            self._initial = False
            if not empty:
                self._precopy = iter(())
        self._changed()  # pollers first: who is told ENOMSG finds nothing to read either
        return False

    def _close_sources(self) -> None:
        """Let generators run their ``finally`` blocks in the thread that ran them."""
        for source in self._sources:
            close = getattr(source, "close", None)
            if close is None:
                continue
            try:
                close()
            except BaseException as problem:  # noqa: BLE001 - hook boundary
                self._refusal(problem, "save")
