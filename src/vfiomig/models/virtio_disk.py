"""What a virtio block device keeps its sectors in: memory that travels with it, or a file.

Theory of operation
-------------------
Both move bytes between the medium and guest memory, which is given as (address, length) of the
guest's. A *file* is shared storage: its content stays where it is and is no part of the device's
state. It is open only while the device runs, so that a stopped device holds on to nothing. It is
not ``prompt``: what the page cache does not hold, or not take at once, is worth a thread of its
own. A write into the cache hardly ever waits, but nobody can tell before; so it is made at once
as long as none has taken long lately, and so is a read where the file system cannot be asked.

*Memory* is zero until it is written. It is divided into blocks, and it remembers which of them
were ever written: these are all that a state carries. While a saving session is on, ``Unsent``
tells which of them it has yet to send. A writer changes a block and then says so; a session says
that a block is sent and then copies it: whatever comes between the two is sent again.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from vfiomig.descriptors import Fd
from vfiomig.errors import DeviceError, SpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfiomig.iommu import DmaPort

__all__ = ("BLOCK", "RUN", "SECTOR", "Disk", "FileDisk", "MemoryDisk", "Segments", "Unsent")

SECTOR: Final = 512
#: Unit in which memory is tracked and sent.
BLOCK: Final = 64 << 10
#: Bytes of a file that are on their way at a time.
PIECE: Final = 1 << 20
#: A transfer that takes longer is a reason to make no other at once, for a while.
SLOW_SECONDS: Final = 0.001
A_WHILE_SECONDS: Final = 0.1
#: A number of <linux/mman.h> that Python's mmap does not name in every version.
MAP_NORESERVE: Final = 0x4000

# What a saving session has to do about a block.
DONE: Final = 0
NEW: Final = 1  # never sent yet
CHANGED: Final = 2  # sent, and written again since

#: Neighbours are sent together, at most so many.
RUN: Final = 16
_RUN: Final = re.compile(rb"[\x01\x02]{1,%d}" % RUN)

#: Guest memory: (address, length) each.
Segments: TypeAlias = list[tuple[int, int]]


class Disk(Protocol):
    """A medium of ``size`` bytes; offsets and lengths have been checked against it."""

    @property
    def size(self) -> int: ...

    #: Whether a write is only done when it survives a loss of power.
    durable_writes: bool

    @property
    def prompt(self) -> bool:
        """Whether every request is answered at once, never waiting for storage."""

    def open(self) -> None:
        """Get ready for requests; once more is harmless."""

    def close(self) -> None:
        """Let go of what ``open`` took."""

    def read(self, dma: DmaPort, offset: int, segments: Segments) -> None:
        """Fill guest memory from ``offset`` on."""

    def read_cached(self, dma: DmaPort, offset: int, segments: Segments) -> bool:
        """Do the same unless it would have to wait: then it is not done, or in part."""

    def write(self, dma: DmaPort, offset: int, segments: Segments) -> None:
        """Write guest memory to ``offset``."""

    def write_cached(self, dma: DmaPort, offset: int, segments: Segments) -> bool:
        """Do the same unless it might have to wait: then it is not done."""

    def flush(self) -> None:
        """Have all that was written survive a loss of power."""


class FileDisk:
    """The sectors of a file or a block device."""

    prompt = False

    def __init__(self, path: str, *, readonly: bool) -> None:
        self.path = path
        self.durable_writes = False
        self._flags = os.O_CLOEXEC | (os.O_RDONLY if readonly else os.O_RDWR)
        try:
            with Fd(os.open(path, self._flags | os.O_NONBLOCK)) as file:  # or a FIFO would wait
                kind = os.fstat(file.fileno()).st_mode
                end = os.lseek(file.fileno(), 0, os.SEEK_END)
        except OSError as refusal:
            hint = "name a file that is there, made for example with truncate -s 64M"
            if refusal.errno != errno.ENOENT:
                hint = "name one that this user may read, and write unless readonly=yes"
            raise SpecError(f"path={path}: {refusal.strerror}; {hint}") from refusal
        self.size = end // SECTOR * SECTOR
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)) or not self.size:
            raise SpecError(f"path={path}: give a file or block device of at least {SECTOR} bytes")
        self._file: Fd | None = None
        self._buffer = memoryview(bytearray(PIECE))
        self._cache_can_be_asked = True
        self._at_once_from = 0.0

    def open(self) -> None:
        if self._file is None:
            try:
                self._file = Fd(os.open(self.path, self._flags))
            except OSError as refusal:
                what = f"{self.path} cannot be opened any more: {refusal.strerror}"
                raise DeviceError(refusal.errno or errno.EIO, what) from refusal

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, dma: DmaPort, offset: int, segments: Segments) -> None:
        for some, length in _rounds(segments):
            if os.preadv(self._fd, [self._buffer[:length]], offset) < length:
                raise DeviceError(errno.EIO, f"{self.path} ends before byte {offset + length}")
            self._scatter(dma, some)
            offset += length

    def read_cached(self, dma: DmaPort, offset: int, segments: Segments) -> bool:
        if not self._cache_can_be_asked:
            return self._at_once(self.read, dma, offset, segments)
        at = offset
        for some, length in _rounds(segments):
            try:
                if os.preadv(self._fd, [self._buffer[:length]], at, os.RWF_NOWAIT) < length:
                    return False
            except OSError as refusal:
                if refusal.errno != errno.EOPNOTSUPP:
                    return False  # it would have to wait
                self._cache_can_be_asked = False  # a file system such as tmpfs never knows
                return self.read_cached(dma, offset, segments)
            self._scatter(dma, some)
            at += length
        return True

    def write(self, dma: DmaPort, offset: int, segments: Segments) -> None:
        flags = os.RWF_DSYNC if self.durable_writes else 0
        for some, length in _rounds(segments):
            at = 0
            for address, size in some:
                dma.read_into(address, self._buffer[at : at + size])
                at += size
            if os.pwritev(self._fd, [self._buffer[:length]], offset, flags) < length:
                raise DeviceError(errno.EIO, f"{self.path} does not take byte {offset + length}")
            offset += length

    def write_cached(self, dma: DmaPort, offset: int, segments: Segments) -> bool:
        return not self.durable_writes and self._at_once(self.write, dma, offset, segments)

    def _at_once(
        self,
        transfer: Callable[[DmaPort, int, Segments], None],
        dma: DmaPort,
        offset: int,
        segments: Segments,
    ) -> bool:
        """Make a transfer if none has taken long lately; tell whether it was made."""
        start = time.monotonic()
        if start < self._at_once_from:
            return False
        transfer(dma, offset, segments)
        end = time.monotonic()
        if end - start > SLOW_SECONDS:
            self._at_once_from = end + A_WHILE_SECONDS
        return True

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def _scatter(self, dma: DmaPort, segments: Segments) -> None:
        at = 0
        for address, size in segments:
            dma.write(address, self._buffer[at : at + size])
            at += size

    @property
    def _fd(self) -> int:
        if self._file is None:
            raise DeviceError(errno.EIO, f"{self.path} is not open: the device does not run")
        return self._file.fileno()


def _rounds(segments: Segments) -> Iterator[tuple[Segments, int]]:
    """Divide segments into rounds of at most ``PIECE`` bytes: (segments, their length)."""
    some: Segments = []
    total = 0
    for address, length in segments:
        at = 0
        while at < length:
            size = min(length - at, PIECE - total)
            some.append((address + at, size))
            at, total = at + size, total + size
            if total == PIECE:
                yield some, total
                some, total = [], 0
    if some:
        yield some, total


class MemoryDisk:
    """Sectors in memory of this process."""

    prompt = True

    def __init__(self, size: int) -> None:
        if size < SECTOR or size % SECTOR:
            raise SpecError(f"size={size}: give a multiple of {SECTOR}, like 64M")
        self.size = size
        self.durable_writes = False  # nothing here survives a loss of power
        self.blocks = -(-size // BLOCK)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            self._map = mmap.mmap(-1, size, flags=flags)
        except (OSError, OverflowError, ValueError) as refusal:
            raise SpecError(f"size={size}: the machine does not map that much") from refusal
        self._view = memoryview(self._map)
        self._written = bytearray(self.blocks)
        self._unsent: Unsent | None = None

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def read(self, dma: DmaPort, offset: int, segments: Segments) -> None:
        for address, length in segments:
            dma.write(address, self._view[offset : offset + length])
            offset += length

    def read_cached(self, dma: DmaPort, offset: int, segments: Segments) -> bool:
        self.read(dma, offset, segments)
        return True

    def write(self, dma: DmaPort, offset: int, segments: Segments) -> None:
        start = offset
        end = start + sum(length for _, length in segments)
        try:
            for address, length in segments:
                dma.read_into(address, self._view[offset : offset + length])
                offset += length
        finally:  # what a failing transfer wrote counts as well
            self._changed(start, end)

    def write_cached(self, dma: DmaPort, offset: int, segments: Segments) -> bool:
        self.write(dma, offset, segments)
        return True

    def flush(self) -> None:
        pass

    def _changed(self, start: int, end: int) -> None:
        unsent = self._unsent
        for block in range(start // BLOCK, -(-end // BLOCK)):
            self._written[block] = 1
            if unsent is not None:
                unsent.changed(block)

    # The content, for sessions.

    def begin(self) -> Unsent:
        """Start a saving session: everything that was written is unsent."""
        self._unsent = unsent = Unsent(self)  # first, so that no change is missed
        unsent.add(self._written)
        return unsent

    def end(self) -> None:
        """End a saving session."""
        self._unsent = None

    def content(self, first: int, count: int) -> memoryview:
        """The memory of these blocks itself."""
        return self._view[first * BLOCK : (first + count) * BLOCK]

    def overwritten(self, first: int, count: int) -> memoryview:
        """The memory of these blocks for somebody who writes all of it."""
        self._written[first : first + count] = b"\1" * count
        return self.content(first, count)

    def clear(self) -> None:
        """Return to zeroes."""
        self._map.madvise(mmap.MADV_DONTNEED)
        self._written[:] = bytes(self.blocks)

    def unsent(self) -> Unsent:
        """What a saving session has to send that begins now."""
        unsent = Unsent(self)
        unsent.add(self._written)
        return unsent

    def bytes_of(self, blocks: int, *, last: bool) -> int:
        """The bytes of so many blocks; the ``last`` one of the disk may be shorter."""
        return blocks * BLOCK - last * (self.blocks * BLOCK - self.size)


class Unsent:
    """What a saving session has yet to send of a memory disk."""

    def __init__(self, disk: MemoryDisk) -> None:
        self._disk = disk
        self._marks = bytearray(disk.blocks)
        self._lock = threading.Lock()
        self._next = 0  # where the search for the next run begins

    def add(self, written: bytearray) -> None:
        """Have every block sent that was ever written."""
        with self._lock:
            self._marks[:] = written

    def changed(self, block: int) -> None:
        """Have a block sent again."""
        with self._lock:
            if self._marks[block] == DONE:
                self._marks[block] = CHANGED

    def next_run(self) -> tuple[int, int] | None:
        """Choose neighbours to send, which count as sent now: (first, count)."""
        with self._lock:
            run = _RUN.search(self._marks, self._next) or _RUN.search(self._marks)
            if run is None:
                return None
            first, self._next = run.span()
            count = self._next - first
            self._marks[first : self._next] = bytes(count)
            return first, count

    def sizes(self) -> tuple[int, int, int]:
        """Bytes to send for the first time, bytes to send again, and in how many runs."""
        with self._lock:
            marks = bytes(self._marks)
        new, changed = (
            self._disk.bytes_of(marks.count(mark), last=marks[-1] == mark)
            for mark in (NEW, CHANGED)
        )
        return new, changed, sum(1 for _ in _RUN.finditer(marks))
