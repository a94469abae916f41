"""Memory that a request cannot read, or cannot write, as a program may have by mistake.

``Pages("rw", "r", "")`` are pages with these protections, side by side, and nothing behind them.
A struct is laid over them with ``from_address``, which touches no byte.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

__all__ = ("PAGE", "Pages", "buffer_at", "map_descriptor")

PAGE = mmap.PAGESIZE
FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def map_descriptor(number: int) -> int:
    """Try to map a page of a descriptor for reading; return the errno, 0 for success."""
    address = _libc.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, number, 0)
    if address == FAILED:
        return ctypes.get_errno()
    _libc.munmap(address, PAGE)
    return 0


def buffer_at(address: int, size: int) -> memoryview:
    """Return memory that may not be there as a buffer."""
    area = (ctypes.c_char * size).from_address(address)
    return memoryview(area).cast("B")


class Pages:
    """A few pages of this process; use it in a ``with`` block."""

    def __init__(self, *protections: str) -> None:
        self._size = (len(protections) + 1) * PAGE  # the last one is for nothing
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        access = mmap.PROT_READ | mmap.PROT_WRITE
        base = _libc.mmap(None, self._size, access, flags, -1, 0)
        if base == FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._base = int(base)
        for number, letters in enumerate((*protections, "")):
            self.protect(number, letters)

    def page(self, number: int) -> int:
        """Return the address of a page."""
        return self._base + number * PAGE

    def end(self, number: int, length: int) -> int:
        """Return the address at which the last ``length`` bytes of a page begin."""
        return self.page(number + 1) - length

    def protect(self, number: int, letters: str) -> None:
        bits = mmap.PROT_READ * ("r" in letters) | mmap.PROT_WRITE * ("w" in letters)
        if _libc.mprotect(self.page(number), PAGE, bits):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def read_only(self, data: bytes) -> int:
        """Put ``data`` at the start of the first page, for reading only; return where it is."""
        self.protect(0, "rw")
        ctypes.memmove(self.page(0), data, len(data))
        self.protect(0, "r")
        return self.page(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        _libc.munmap(self._base, self._size)
