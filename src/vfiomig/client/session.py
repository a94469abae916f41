"""A data transfer session, as its user sees it.

Theory of operation
-------------------
Drivers disagree on how a data_fd says "nothing now" in the pre-copy states: some answer ENOMSG,
most answer 0, which elsewhere is the end of the stream (docs/protocol.md, FAULT-8). Here both are
``None``, and 0 is the permanent end alone. What decides is where the device was when the read
began: a read that began in pre-copy and returned 0 may have met either end, so it counts as
"nothing now", and the next read tells.

An ENOMSG in STOP_COPY is an error: whoever took it for the end would cut the stream.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.client.requests import said_about
from vfiomig.client.transport import NO_FD
from vfiomig.device import PrecopyInfo
from vfiomig.errors import SessionError
from vfiomig.fsm import SessionKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from _typeshed import ReadableBuffer, WriteableBuffer

    from vfiomig.client.requests import Requests

__all__ = ("CHUNK", "Session")

#: Bytes that iteration asks for at a time.
CHUNK = 1 << 20

ADVICE = {
    errno.ENODEV: "the session is over: read the device's state and go on from there",
    errno.EBADF: "this descriptor is closed, or of the other direction",
    errno.ENOMSG: "a temporary end outside pre-copy is no end: the stream is not complete",
}


class Session:
    """One session and its data_fd. Leaving a ``with`` block closes the descriptor, no more.

    Closing changes no state, and a descriptor that was closed does not come back: the session
    itself ends when the device leaves its states. A session of the saving group is the same
    object in PRE_COPY, PRE_COPY_P2P and STOP_COPY.
    """

    def __init__(
        self,
        requests: Requests,
        data_fd: int,
        kind: SessionKind,
        on_close: Callable[[Session], None],
    ) -> None:
        self.kind = kind
        #: Bytes that went through here.
        self.transferred = 0
        #: Whether the device is in a pre-copy state, as far as its client brought it there.
        self.in_precopy = False
        self._requests = requests
        self._data_fd = data_fd
        self._on_close = on_close

    def fileno(self) -> int:
        """The data_fd: a number that the system does not know, unless it is a kernel's device."""
        if self._data_fd == NO_FD:
            raise SessionError(errno.EBADF, f"{self._requests.name}: the session was closed")
        return self._data_fd

    @property
    def closed(self) -> bool:
        return self._data_fd == NO_FD

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        """Read into ``buffer``, which is not empty, and return how many bytes came.

        0 is the permanent end: the whole state was read. ``None`` is the temporary end of a
        pre-copy state: nothing now, perhaps more later. Fewer bytes than fit mean nothing.

        Raises:
            SessionError: with the errno; ENODEV when the session is over.
        """
        view = memoryview(buffer).cast("B")
        if not view:
            raise ValueError("a read of no bytes tells nothing; pass a buffer with room")
        in_precopy = self.in_precopy
        try:
            count = self._requests.transport.readinto(self.fileno(), view)
        except OSError as failure:
            if failure.errno == errno.ENOMSG and in_precopy:
                return None
            raise self._failure("read", failure) from None
        self.transferred += count
        return None if in_precopy and not count else count

    def chunks(self, size: int = CHUNK) -> Iterator[memoryview]:
        """Read up to an end, permanent or temporary; yield what each read brought.

        Every chunk has memory of its own and may be kept; ``readinto`` reuses one buffer.
        """
        while count := self.readinto(buffer := memoryview(bytearray(size))):
            yield buffer[:count]

    def __iter__(self) -> Iterator[memoryview]:
        return self.chunks()

    def write(self, data: ReadableBuffer) -> int:
        """Write bytes of a state; return how many were taken, which may be fewer.

        Raises:
            SessionError: with the errno. The session is lost then: reset the device
                (docs/protocol.md, LOAD-5).
        """
        view = memoryview(data).cast("B")
        try:
            count = self._requests.transport.write(self.fileno(), view)
        except OSError as failure:
            raise self._failure("write", failure) from None
        self.transferred += count
        return count

    def write_all(self, data: ReadableBuffer) -> None:
        """Write all of ``data``, in as many writes as it takes."""
        view = memoryview(data).cast("B")
        while view:
            count = self.write(view)
            if not count:
                raise SessionError(
                    errno.EIO,
                    f"{self._requests.name}: the device takes no bytes and gives no reason; "
                    "reset it",
                )
            view = view[count:]

    def precopy_info(self) -> PrecopyInfo:
        """Ask what is left to read before STOP_COPY; some devices look for changes only then.

        ``reinit`` is never set before ``DeviceClient.precopy_v2``.

        Raises:
            SessionError: EINVAL outside the pre-copy states, ENODEV when the session is over,
                ENOTTY where there is no pre-copy at all.
        """
        argument = vfio.PrecopyInfo(argsz=vfio.PrecopyInfo.SIZE)
        try:
            self._requests.on(self.fileno(), vfio.VFIO_MIG_GET_PRECOPY_INFO, argument)
        except OSError as failure:
            raise self._failure("VFIO_MIG_GET_PRECOPY_INFO", failure) from None
        reinit = self._requests.precopy_v2 and argument.flags & vfio.VFIO_PRECOPY_INFO_REINIT
        return PrecopyInfo(argument.initial_bytes, argument.dirty_bytes, bool(reinit))

    def _failure(self, what: str, failure: OSError) -> SessionError:
        if isinstance(failure, SessionError):
            return failure
        number = failure.errno or errno.EIO
        name = errno.errorcode.get(number, str(number))
        if number in ADVICE:
            advice = ADVICE[number]
        elif self.kind is SessionKind.RESUMING:
            advice = "what was written so far is lost: reset the device"
        else:
            advice = "the stream is lost: take the device out of its state and start again"
        return SessionError(
            number,
            f"{self._requests.name}: {what} of the data_fd failed with {name}"
            f"{said_about(failure)}; {advice}",
        )

    def close(self) -> None:
        """Close the data_fd; once more is harmless. A blocked reader is not woken by this."""
        number, self._data_fd = self._data_fd, NO_FD
        if number != NO_FD:
            self._on_close(self)
            self._requests.transport.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        condition = "closed" if self.closed else f"data_fd {self._data_fd}"
        return f"<Session of {self._requests.name}, {self.kind.value}, {condition}>"
