"""The log of a device's DMA writes, and its bitmap.

Theory of operation
-------------------
Writes are remembered in units of 4 KiB, for each logged range by itself, whatever page sizes
start and report are asked with. So a report in any page size is exact: a bit is set when a
written unit, cut to the logged range that holds it, touches the bit's page. A report clears the
units whose logged part it covers whole; a unit that it covers in part stays, and is told again
rather than lost.

Only what was written costs anything: a bitmap is held as the 64-bit words that have a bit, and
the other words of the caller's are not touched, so a report may span the whole address space.
See ``VFIO_DEVICE_FEATURE_DMA_LOGGING_START`` and ``..._REPORT`` in include/uapi/linux/vfio.h.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ("UNIT", "BitmapMemory", "DirtyLog", "bitmap_size")

#: Bytes that one remembered write covers at least.
UNIT = 4096
WORD_BITS = 64
WORD_BYTES = 8
#: Neighbouring words of a caller's bitmap that are read and written together, at most.
MERGE_WORDS = 512


def bitmap_size(length: int, page_size: int) -> int:
    """Bytes of the bitmap of ``length`` bytes: a multiple of 8."""
    return -(-length // (page_size * WORD_BITS)) * WORD_BYTES


class BitmapMemory(Protocol):
    """Where a report goes: the memory of whoever asks."""

    def read(self, address: int, length: int) -> bytes: ...
    def write(self, address: int, data: bytes | bytearray | memoryview) -> None: ...


class DirtyLog:
    """What was written inside some IOVA ranges since it was last reported."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        """``ranges``: (iova, length) each, not overlapping."""
        self.ranges = sorted((iova, iova + length) for iova, length in ranges if length)
        self._ends = [end for _, end in self.ranges]
        self._units: list[set[int]] = [set() for _ in self.ranges]
        self._lock = threading.Lock()

    def mark(self, iova: int, length: int) -> None:
        """Remember a write of ``length`` bytes at ``iova``; outside the ranges it is not logged."""
        end = iova + length
        at = bisect_right(self._ends, iova)
        if at < len(self.ranges) and length:
            low, high = self.ranges[at]
            if low <= iova and end <= high:  # nearly every write lies inside one range
                units, first = self._units[at], iova // UNIT
                if (end - 1) // UNIT == first and first in units:
                    return  # whichever report takes it away comes after this write
                with self._lock:
                    units.update(range(first, (end - 1) // UNIT + 1))
                return
        for at, low, high in self._overlaps(iova, end):
            with self._lock:
                self._units[at].update(range(low // UNIT, (high - 1) // UNIT + 1))

    def report(self, iova: int, length: int, page_size: int, *, clear: bool = True) -> bytearray:
        """Return the bitmap of [iova, iova + length) and forget what it tells, if ``clear``.

        Bit n mod 8 of byte n div 8 stands for the page at ``iova + n * page_size``; the bitmap is
        a multiple of 8 bytes long.
        """
        with self._lock:
            words, told = self._take_locked(iova, length, page_size)
            if not clear:
                self._put_back_locked(told)
        bitmap = bytearray(bitmap_size(length, page_size))
        for at, word in words.items():
            bitmap[at * WORD_BYTES : (at + 1) * WORD_BYTES] = word.to_bytes(WORD_BYTES, "little")
        return bitmap

    def report_into(
        self,
        iova: int,
        length: int,
        page_size: int,
        memory: BitmapMemory,
        address: int,
        *,
        clear: bool = True,
    ) -> None:
        """Set the bits of a report in a bitmap at ``address``; bits that are set there stay.

        A bitmap that faults fails the report, and nothing of it is forgotten; without ``clear``
        nothing is forgotten in any case.
        """
        with self._lock:
            words, told = self._take_locked(iova, length, page_size)
            try:
                _merge(words, memory, address)
            except OSError:
                clear = False
                raise
            finally:
                if not clear:
                    self._put_back_locked(told)

    def forget(self, iova: int, length: int) -> None:
        """Forget what was written to pages that are gone."""
        with self._lock:
            for at, low, high in self._overlaps(iova, iova + length):
                units = self._units[at]
                units.difference_update(_within(units, low // UNIT, (high - 1) // UNIT))

    def _take_locked(
        self, iova: int, length: int, page_size: int
    ) -> tuple[dict[int, int], list[tuple[int, list[int]]]]:
        """Words of the bitmap by their index, and the units that are now forgotten, by range."""
        words: dict[int, int] = {}
        forgotten = []
        for at, low, high in self._overlaps(iova, iova + length):
            start, end = self.ranges[at]
            told = []
            for unit in _within(self._units[at], low // UNIT, (high - 1) // UNIT):
                logged = max(start, unit * UNIT), min(end, (unit + 1) * UNIT)
                seen = max(low, logged[0]), min(high, logged[1])
                _set_bits(words, (seen[0] - iova) // page_size, (seen[1] - 1 - iova) // page_size)
                if seen == logged:
                    told.append(unit)
            self._units[at].difference_update(told)
            forgotten.append((at, told))
        return words, forgotten

    def _put_back_locked(self, told: list[tuple[int, list[int]]]) -> None:
        for at, units in told:
            self._units[at].update(units)

    def _overlaps(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The logged parts of [start, end): index of the range, first byte, byte behind it."""
        if start >= end:
            return
        for at in range(bisect_right(self._ends, start), len(self.ranges)):
            low, high = self.ranges[at]
            if low >= end:
                return
            yield at, max(start, low), min(end, high)


def _within(units: set[int], first: int, last: int) -> list[int]:
    if last - first < len(units):
        return [unit for unit in range(first, last + 1) if unit in units]
    return [unit for unit in units if first <= unit <= last]


def _set_bits(words: dict[int, int], first: int, last: int) -> None:
    for bit in range(first, last + 1):
        at = bit // WORD_BITS
        words[at] = words.get(at, 0) | 1 << bit % WORD_BITS


def _merge(words: dict[int, int], memory: BitmapMemory, address: int) -> None:
    """Set the bits of ``words`` in memory; words without a bit are not touched."""
    for run in _runs(sorted(words)):
        at, size = address + run[0] * WORD_BYTES, len(run) * WORD_BYTES
        ours = b"".join(words[index].to_bytes(WORD_BYTES, "little") for index in run)
        theirs = int.from_bytes(memory.read(at, size), "little")
        memory.write(at, (theirs | int.from_bytes(ours, "little")).to_bytes(size, "little"))


def _runs(indices: Iterable[int]) -> Iterator[list[int]]:
    """Group sorted indices into neighbours."""
    run: list[int] = []
    for index in indices:
        if run and (index != run[-1] + 1 or len(run) == MERGE_WORDS):
            yield run
            run = []
        run.append(index)
    if run:
        yield run
