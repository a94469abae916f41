"""The log of a device's DMA writes, and its bitmap.

Theory of operation
-------------------
Writes are remembered in units of 4 KiB, whatever page sizes start and report are asked with, so
that a report in any page size is exact: a bit is set when a written unit, cut to the logged
range that holds it, touches the bit's page. A report clears the units whose logged part it
covers whole; a unit that it covers in part stays, and is told again rather than lost.
See ``VFIO_DEVICE_FEATURE_DMA_LOGGING_START`` and ``..._REPORT`` in include/uapi/linux/vfio.h.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfiomig.iommu.space import Memory

__all__ = ("UNIT", "DirtyLog")

#: Bytes that one remembered write covers at least.
UNIT = 4096
#: Bytes of a caller's bitmap that are looked at together.
MERGE_BYTES = 4096


class DirtyLog:
    """What was written inside some IOVA ranges since it was last reported."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        """``ranges``: (iova, length) each, not overlapping."""
        self.ranges = sorted((iova, iova + length) for iova, length in ranges if length)
        self._lock = threading.Lock()
        self._units: set[int] = set()

    def mark(self, iova: int, length: int) -> None:
        """Remember a write of ``length`` bytes at ``iova``; outside the ranges it is not logged."""
        for start, end in self._clip(iova, iova + length):
            with self._lock:
                self._units.update(range(start // UNIT, (end - 1) // UNIT + 1))

    def report(self, iova: int, length: int, page_size: int) -> bytearray:
        """Return the bitmap of [iova, iova + length) and forget what it tells.

        Bit n mod 8 of byte n div 8 stands for the page at ``iova + n * page_size``; the bitmap is
        a multiple of 8 bytes long.
        """
        with self._lock:
            return self._collect_locked(iova, length, page_size)

    def report_into(
        self, iova: int, length: int, page_size: int, memory: Memory, address: int
    ) -> None:
        """Set the bits of a report in a bitmap at ``address``; bits that are set there stay.

        A bitmap that faults fails the report, and nothing of it is forgotten.
        """
        with self._lock:
            before = set(self._units)
            bitmap = self._collect_locked(iova, length, page_size)
            try:
                _merge(bitmap, memory, address)
            except OSError:
                self._units |= before
                raise

    def _collect_locked(self, iova: int, length: int, page_size: int) -> bytearray:
        pages = -(-length // page_size)
        bitmap = bytearray(-(-pages // 64) * 8)
        end = iova + length
        for unit in self._units_in(iova, end):
            covered = True
            for start, stop in self._clip(unit * UNIT, (unit + 1) * UNIT):
                low, high = max(start, iova), min(stop, end)
                covered = covered and (low, high) == (start, stop)
                if low < high:
                    _set_bits(bitmap, (low - iova) // page_size, (high - 1 - iova) // page_size)
            if covered:
                self._units.discard(unit)
        return bitmap

    def clear(self) -> None:
        with self._lock:
            self._units.clear()

    def _units_in(self, start: int, end: int) -> list[int]:
        """Units that were written and lie at least partly in [start, end)."""
        if start >= end:
            return []
        first, last = start // UNIT, (end - 1) // UNIT
        if last - first < len(self._units):
            return [unit for unit in range(first, last + 1) if unit in self._units]
        return [unit for unit in self._units if first <= unit <= last]

    def _clip(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, end) that are logged."""
        for low, high in self.ranges:
            if start < high and end > low:
                yield max(start, low), min(end, high)


def _set_bits(bitmap: bytearray, first: int, last: int) -> None:
    for bit in range(first, last + 1):
        bitmap[bit >> 3] |= 1 << (bit & 7)


def _merge(bitmap: bytearray, memory: Memory, address: int) -> None:
    """Set the bits of ``bitmap`` in memory, chunk by chunk; chunks without a bit stay untouched."""
    for at in range(0, len(bitmap), MERGE_BYTES):
        ours = bitmap[at : at + MERGE_BYTES]
        if any(ours):
            theirs = int.from_bytes(memory.read(address + at, len(ours)), "little")
            merged = theirs | int.from_bytes(ours, "little")
            memory.write(address + at, merged.to_bytes(len(ours), "little"))
