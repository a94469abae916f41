"""Memory of any size in blocks, with content that can be told apart and a checksum per block.

Theory of operation
-------------------
After power-on the memory is many private mappings of one small pseudo-random file, each from
another page of it on: the kernel shares the file's pages until they are written. So a device of
any size exists at once, costs nothing until it is written, and is read at full speed all the
same; and as the content of a block follows from its place, so does its checksum.

The first write to a page costs a page fault, many times as much as the write. Memory up to
``POPULATED`` therefore gets pages of its own in advance, what takes too long in the background,
so that a state is loaded at the speed of memory; that never changes content.

All bulk work is done by calls that release the interpreter lock, a block at a time.
``lock`` is held by whoever changes a block or copies one that may be changed meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import random
import threading
import time
import weakref
import zlib
from array import array
from typing import TYPE_CHECKING, Final

from vfiomig.descriptors import Fd
from vfiomig.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("BLOCK", "BlockMemory")

BLOCK: Final = 1 << 20
PAGE: Final = mmap.PAGESIZE
#: The file is mapped from so many different pages on, so that neighbours differ.
PLACES: Final = 31
#: Few spans are mapped fast, short ones have fewer checksums to know; the mappings of one process
#: are limited (vm.max_map_count, 65530).
SPANS: Final = 256
LONG_SPAN: Final = 8 << 20
MOST_SPANS: Final = 32768
#: Memory up to this size is not worth the mappings: its content is copied there.
SMALL: Final = 4 << 20
#: Bytes that get pages of their own, how many at a time, and for how long while one waits.
POPULATED: Final = 1 << 30
POPULATE_STEP: Final = 256 << 10
POPULATE_SECONDS: Final = 0.4
#: Numbers of <linux/mman.h> that Python's mmap does not name in every version.
MAP_FIXED: Final = 0x10
MAP_NORESERVE: Final = 0x4000
MADV_DONTFORK: Final = 10
MADV_POPULATE_WRITE: Final = 23

# What the checksum of a block is computed from.
POWER_ON: Final = 0  # never written: its place
KNOWN: Final = 1  # the table holds it
STALE: Final = 2  # written; nobody has computed it yet

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t) + (ctypes.c_int,) * 3 + (ctypes.c_long,)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class PowerOn:
    """The content after power-on, for a seed, of memory that is mapped in spans of ``span``."""

    def __init__(self, seed: int, span: int) -> None:
        self._span = span
        self._base = bytearray(random.Random(seed).randbytes(span + (PLACES - 1) * PAGE))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._base))
        self.size = len(self._base)
        self._checksums: dict[tuple[int, int], int] = {}

    def place(self, address: int, size: int) -> None:
        """Put the content at ``address``, in place of what is there."""
        if size <= SMALL:
            for start, length, place in self._spans(size):
                ctypes.memmove(address + start, self.address + place, length)
        else:
            self._map(address, size)

    def _map(self, address: int, size: int) -> None:
        with Fd(os.memfd_create("vfiomig-power-on", os.MFD_CLOEXEC)) as file:
            os.write(file.fileno(), self._base)
            flags = mmap.MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE
            access = mmap.PROT_READ | mmap.PROT_WRITE
            for start, length, place in self._spans(size):
                if _mmap(address + start, length, access, flags, file.fileno(), place) is None:
                    raise OSError(ctypes.get_errno(), "power-on content")  # pragma: no cover

    def _spans(self, size: int) -> Iterator[tuple[int, int, int]]:
        """Offset in the memory, length, and offset in the base, of every span."""
        for number, start in enumerate(range(0, size, self._span)):
            yield start, min(self._span, size - start), number % PLACES * PAGE

    def checksum(self, offset: int, length: int) -> int:
        """The CRC-32 of ``length`` bytes at ``offset`` of the memory, inside one span."""
        number, inside = divmod(offset, self._span)
        start = number % PLACES * PAGE + inside
        if (start, length) not in self._checksums:
            content = memoryview(self._base)[start : start + length]
            self._checksums[start, length] = zlib.crc32(content)
        return self._checksums[start, length]


@functools.lru_cache(maxsize=4)
def power_on(seed: int, span: int) -> PowerOn:
    """Share the base between the devices of a seed: a thousand small ones need only one."""
    return PowerOn(seed, span)


class BlockMemory:
    """``size`` bytes in blocks of 1 MiB, the last one perhaps shorter."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.blocks = -(-size // BLOCK)
        self.lock = threading.Lock()
        self._span = _span(size)
        self._map = _reserve(size)
        self._power_on = power_on(seed, self._span)
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._content = bytearray(self.blocks)
        self._checksums = array("I", bytes(4 * self.blocks))
        self._power_on.place(self._address, size)
        _populate(self._map, self._address)

    def length(self, block: int) -> int:
        return min(BLOCK, self.size - block * BLOCK)

    def restart(self, seed: int) -> None:
        """Return to the power-on content of ``seed``."""
        with self.lock:
            self._power_on = power_on(seed, self._span)
            self._power_on.place(self._address, self.size)
            self._content[:] = bytes(self.blocks)

    def adopt(self, seed: int) -> None:
        """Take ``seed`` for what is rewritten, after every block was written."""
        self._power_on = power_on(seed, self._span)

    # Content.

    def view(self, first: int, count: int) -> memoryview:
        """The memory of these blocks itself."""
        return self._view[first * BLOCK : (first + count) * BLOCK]

    def overwritten(self, first: int, count: int) -> memoryview:
        """The memory of these blocks for somebody who writes all of it."""
        with self.lock:
            self._content[first : first + count] = bytes((STALE,)) * count
        return self.view(first, count)

    def copy_locked(self, block: int, buffer: memoryview) -> int:
        """Copy a block to the start of ``buffer``; return its length."""
        length = self.length(block)
        target = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        ctypes.memmove(target, self._address + block * BLOCK, length)
        return length

    def rewrite_locked(self, offset: int, size: int) -> None:
        """Put other pseudo-random bytes into a part of one block."""
        power_on = self._power_on
        source = power_on.address + random.randrange(power_on.size - size)
        ctypes.memmove(self._address + offset, source, size)
        self._content[offset // BLOCK] = STALE

    # Checksums.

    def measure(self, first: int, count: int) -> None:
        """Compute the checksums of blocks that were written."""
        for block in range(first, first + count):
            start = block * BLOCK
            self._checksums[block] = zlib.crc32(self._view[start : start + self.length(block)])
            self._content[block] = KNOWN

    def know_checksums(self, first: int, count: int) -> None:
        """Compute in advance what ``checksum`` will need of the power-on content."""
        for block in range(first, first + count):
            self._power_on.checksum(block * BLOCK, self.length(block))

    def checksum(self, block: int) -> int:
        """The CRC-32 of a block that nobody changes now."""
        if self._content[block] == POWER_ON:
            return self._power_on.checksum(block * BLOCK, self.length(block))
        if self._content[block] == STALE:
            self.measure(block, 1)
        return self._checksums[block]


def _span(size: int) -> int:
    """Choose the length of the mappings that memory of this size is made of."""
    span = BLOCK
    while span * MOST_SPANS < size or (span < LONG_SPAN and span * SPANS < size):
        span *= 2
    return span


def _reserve(size: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except (OSError, OverflowError, ValueError) as refusal:
        raise SpecError(f"size={size}: the machine does not map that much: {refusal}") from refusal
    return memory


def _populate(memory: mmap.mmap, address: int) -> None:
    """Give the first part of a memory pages of its own: at once, or what takes longer later."""
    # A fork would make every page of it copy-on-write once more.
    _madvise(address, len(memory), MADV_DONTFORK)
    if len(memory) <= SMALL:
        return  # its content was copied there
    steps = iter(range(0, min(len(memory), POPULATED), POPULATE_STEP))
    deadline = time.monotonic() + POPULATE_SECONDS
    if not _populate_until(deadline, weakref.ref(memory), address, steps):
        threading.Thread(
            target=_populate_until,
            args=(math.inf, weakref.ref(memory), address, steps),
            name="vfiomig-populate",
            daemon=True,
        ).start()


def _populate_until(
    deadline: float, memory: weakref.ref[mmap.mmap], address: int, steps: Iterator[int]
) -> bool:
    """Go on with ``steps``; ``False`` if the deadline came first.

    The steps are short: each keeps other mappings of the process waiting.
    """
    for start in steps:
        mapped = memory()  # held for the time of a step: a device that is dropped is not kept
        if mapped is None:
            break
        length = min(POPULATE_STEP, len(mapped) - start)
        if _madvise(address + start, length, MADV_POPULATE_WRITE):
            break  # too little memory, or an older kernel: pages come when they are written
        del mapped
        if time.monotonic() >= deadline:
            return False
    return True
