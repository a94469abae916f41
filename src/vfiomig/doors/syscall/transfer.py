"""A read or write of a data_fd by the program: bytes go straight between its buffers and ours."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from vfiomig.doors.syscall.notify import ERESTARTSYS
from vfiomig.memory import ProcessGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.memory import CallMemory, ProcessMemory

__all__ = ("MAX_RW_COUNT", "CallTransfer", "read_iovecs")

#: More bytes than this one call never moves: 2 GiB less a page.
MAX_RW_COUNT = 0x7FFF_F000
IOV_MAX = 1024
_IOVEC = struct.Struct("QQ")


class CallTransfer:
    """One call. ``answer(result)`` is given a count or a negative errno, once."""

    __slots__ = ("_answer", "_memory", "_segments", "_to_program", "restart", "size", "tid")

    def __init__(
        self,
        memory: ProcessMemory,
        segments: list[tuple[int, int]],
        *,
        to_program: bool,
        answer: Callable[[int], None],
    ) -> None:
        self._memory = memory
        self._segments = segments
        self._to_program = to_program
        self._answer = answer
        self.tid = memory.pid
        self.size = min(sum(length for _, length in segments), MAX_RW_COUNT)
        #: Taken back for a signal of the thread itself: its handler decides whether to repeat.
        self.restart = False

    def move(self, view: memoryview, done: int) -> int:
        """Copy between ``view`` and the program; return the bytes before the first fault."""
        moved = 0
        for address, length in self._segments:
            if done >= length:
                done -= length
                continue
            piece = view[moved : moved + length - done]
            if not piece:
                break
            copied = self._copy(address + done, piece)
            moved += copied
            done = 0
            if copied < len(piece):
                break
        return moved

    def _copy(self, address: int, piece: memoryview) -> int:
        try:
            if self._to_program:
                return self._memory.write_from(address, piece)
            return self._memory.read_into(address, piece)
        except ProcessGone:
            return 0  # nobody is there to be told; the bytes stay for another reader

    def finish(self, result: int) -> None:
        if result == -errno.EINTR and self.restart:
            result = -ERESTARTSYS
        self._answer(result)


def read_iovecs(memory: CallMemory, address: int, count: int) -> list[tuple[int, int]]:
    """Read a caller's ``struct iovec`` array.

    Raises:
        OSError: EINVAL for more than 1024 or a negative length or sum, EFAULT.
    """
    if not 0 <= count <= IOV_MAX:
        raise OSError(errno.EINVAL, f"{count} buffers in one call")
    data = memory.read(address, count * _IOVEC.size) if count else b""
    segments = [_IOVEC.unpack_from(data, at) for at in range(0, len(data), _IOVEC.size)]
    if any(length >> 63 for _, length in segments):
        raise OSError(errno.EINVAL, "a buffer of negative length")
    return [(start, length) for start, length in segments if length]
