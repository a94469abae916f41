"""Memory of any size in blocks, with content that can be told apart and a checksum per block.

Theory of operation
-------------------
The memory is one anonymous mapping. After power-on block ``n`` holds a slice of one
pseudo-random base with ``n`` itself in its last bytes: no two blocks are equal, and the checksum
of a whole block follows from that of its slice. So neither content nor checksums of a device of
100 GiB have to be computed before they are asked for. A block is *filled* when it is first needed;
whether it was filled already never shows in what anyone reads.

All bulk work is done by calls that release the interpreter lock, a block at a time.
``lock`` is held by whoever changes a block or copies one that may be changed meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import random
import threading
import time
import zlib
from array import array
from typing import Final

from vfiomig.errors import SpecError

__all__ = ("BLOCK", "BlockMemory", "PowerOn")

BLOCK: Final = 1 << 20
#: Slices of the base begin at so many different places, so far apart.
SLICES: Final = 16
SLICE_STEP: Final = BLOCK // SLICES
STAMP_BYTES: Final = 8
#: MAP_NORESERVE of <linux/mman.h>, which Python's mmap names from 3.13 on.
MAP_NORESERVE: Final = 0x4000

# What a block holds, and whether its checksum is in the table.
EMPTY: Final = 0  # not filled: power-on content by definition
POWER_ON: Final = 1  # filled; the checksum is computed from the base's
KNOWN: Final = 2  # written; the table holds its checksum
STALE: Final = 3  # written; nobody has computed its checksum yet


class PowerOn:
    """The content after power-on, for a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._base = bytearray(random.Random(seed).randbytes(BLOCK + SLICES * SLICE_STEP))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._base))
        self.size = len(self._base)
        self._slice_checksums: dict[int, int] = {}

    def fill(self, block: int, address: int, length: int) -> None:
        stamp = self._stamp(block, length)
        rest = length - len(stamp)
        ctypes.memmove(address, self.address + self._offset(block), rest)
        ctypes.memmove(address + rest, stamp, len(stamp))

    def checksum(self, block: int, length: int) -> int:
        stamp = self._stamp(block, length)
        return zlib.crc32(stamp, self._slice_checksum(self._offset(block), length - len(stamp)))

    @staticmethod
    def _stamp(block: int, length: int) -> bytes:
        return block.to_bytes(STAMP_BYTES, "little")[:length]

    @staticmethod
    def _offset(block: int) -> int:
        return block % SLICES * SLICE_STEP

    def _slice_checksum(self, offset: int, length: int) -> int:
        if length != BLOCK - STAMP_BYTES:  # the last block may be shorter, and is one of its kind
            return zlib.crc32(memoryview(self._base)[offset : offset + length])
        if offset not in self._slice_checksums:
            content = memoryview(self._base)[offset : offset + length]
            self._slice_checksums[offset] = zlib.crc32(content)
        return self._slice_checksums[offset]


@functools.lru_cache(maxsize=4)
def power_on(seed: int) -> PowerOn:
    """Share the base between the devices of a seed: a thousand small ones need only one."""
    return PowerOn(seed)


class BlockMemory:
    """``size`` bytes in blocks of 1 MiB, the last one perhaps shorter."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.blocks = -(-size // BLOCK)
        self.lock = threading.Lock()
        self._power_on = power_on(seed)
        self._map = _anonymous(size)
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._content = bytearray(self.blocks)
        self._checksums = array("I", bytes(4 * self.blocks))

    def length(self, block: int) -> int:
        return min(BLOCK, self.size - block * BLOCK)

    def restart(self, seed: int) -> None:
        """Return to the power-on content of ``seed``."""
        with self.lock:
            self._power_on = power_on(seed)
            self._content[:] = bytes(self.blocks)

    def adopt(self, seed: int) -> None:
        """Take ``seed`` for the next power-on, after every block was written."""
        self._power_on = power_on(seed)

    # Content.

    def fill(self, first: int, count: int) -> None:
        """See that these blocks hold what they should."""
        for block in range(first, first + count):
            if self._content[block] != EMPTY:
                continue
            with self.lock:
                if self._content[block] == EMPTY:
                    self._power_on.fill(block, self._address + block * BLOCK, self.length(block))
                    self._content[block] = POWER_ON

    def fill_for(self, seconds: float) -> None:
        """Fill blocks from the first on until ``seconds`` are over."""
        deadline = time.monotonic() + seconds
        for block in range(self.blocks):
            if time.monotonic() >= deadline:
                return
            self.fill(block, 1)

    def view(self, first: int, count: int) -> memoryview:
        """The memory of these blocks itself, filled."""
        self.fill(first, count)
        return self._view[first * BLOCK : (first + count) * BLOCK]

    def overwritten(self, first: int, count: int) -> memoryview:
        """The memory of these blocks for somebody who writes all of it."""
        with self.lock:
            self._content[first : first + count] = bytes((STALE,)) * count
        return self._view[first * BLOCK : (first + count) * BLOCK]

    def copy_locked(self, block: int, buffer: memoryview) -> int:
        """Copy a filled block to the start of ``buffer``; return its length."""
        length = self.length(block)
        target = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        ctypes.memmove(target, self._address + block * BLOCK, length)
        return length

    def rewrite_locked(self, offset: int, size: int) -> None:
        """Put other pseudo-random bytes into a part of one filled block."""
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

    def checksum(self, block: int) -> int:
        """The CRC-32 of a block that nobody changes now."""
        if self._content[block] in {EMPTY, POWER_ON}:
            return self._power_on.checksum(block, self.length(block))
        if self._content[block] == STALE:
            self.measure(block, 1)
        return self._checksums[block]


def _anonymous(size: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except (OSError, OverflowError, ValueError) as refusal:
        raise SpecError(f"size={size}: the machine does not map that much: {refusal}") from refusal
    with contextlib.suppress(OSError):  # a kernel without huge pages is only slower
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
