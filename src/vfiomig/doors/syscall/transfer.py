"""A read or write of a data_fd by the program: bytes go straight between its buffers and ours."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import struct
from typing import TYPE_CHECKING

from vfiomig.descriptors import Fd
from vfiomig.memory import ProcessGone, ProcessMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.doors.syscall.notify import Notification
    from vfiomig.memory import CallMemory

__all__ = ("CallTransfer", "buffers", "read_iovecs")

log = logging.getLogger("vfiomig.doors.syscall")

#: More bytes than this one call never moves: 2 GiB less a page.
MAX_RW_COUNT = 0x7FFF_F000
#: Below it no user address is refused for its value, on machines with 4 levels of page tables.
UNDOUBTED = (1 << 47) - (1 << 13)
IOV_MAX = 1024
_IOVEC = struct.Struct("QQ")

_libc = ctypes.CDLL(None, use_errno=True)
_read = _libc.read
_read.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t)
_read.restype = ctypes.c_ssize_t


class CallTransfer:
    """One call. ``answer(result)`` is given a count or a negative errno, once."""

    __slots__ = (
        "_answer",
        "_memory",
        "_segments",
        "_to_program",
        "fd",
        "looked_at",
        "size",
        "tid",
        "withdrawn",
    )

    def __init__(
        self,
        call: Notification,
        segments: list[tuple[int, int]],
        *,
        to_program: bool,
        answer: Callable[[int], None],
    ) -> None:
        self.tid = call.tid
        self.fd = call.args[0] & 0xFFFF_FFFF
        self._memory = ProcessMemory(call.tid)
        self._segments = segments
        self._to_program = to_program
        self._answer = answer
        self.size = min(sum(length for _, length in segments), MAX_RW_COUNT)
        #: The errno if the call is taken back before it has moved anything.
        self.withdrawn = errno.EINTR
        self.looked_at = False

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
        except (OSError, RuntimeError) as problem:
            log.warning("a data_fd's bytes could not be copied: %s", problem)
            return 0

    def finish(self, result: int) -> None:
        self._answer(-self.withdrawn if result == -errno.EINTR else result)


def buffers(segments: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cut what a call names to what one call may move, as the kernel does before it moves any.

    Raises:
        OSError: EFAULT or EINVAL for addresses and lengths that it refuses at sight.
    """
    left = MAX_RW_COUNT
    usable = []
    for address, length in segments:
        if address + length > UNDOUBTED:
            _ask_kernel(address, length)
        if length and left:
            usable.append((address, min(length, left)))
            left -= usable[-1][1]
    return usable


def _ask_kernel(address: int, length: int) -> None:
    """Refuse what this kernel refuses: reading /dev/null checks the range and touches nothing."""
    with Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as null:
        if _read(null.fileno(), address, length) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"no buffer: {length} bytes at {address:#x}")


def read_iovecs(memory: CallMemory, address: int, count: int) -> list[tuple[int, int]]:
    """Read a caller's ``struct iovec`` array.

    Raises:
        OSError: EINVAL for more than 1024 or a negative length, EFAULT.
    """
    if not 0 <= count <= IOV_MAX:
        raise OSError(errno.EINVAL, f"{count} buffers in one call")
    data = memory.read(address, count * _IOVEC.size) if count else b""
    segments = [_IOVEC.unpack_from(data, at) for at in range(0, len(data), _IOVEC.size)]
    if any(length >> 63 for _, length in segments):
        raise OSError(errno.EINVAL, "a buffer of negative length")
    if len(segments) == 1:
        # One buffer is cut before it is looked at, several are looked at first.
        segments = [(segments[0][0], min(segments[0][1], MAX_RW_COUNT))]
    return buffers(segments)
