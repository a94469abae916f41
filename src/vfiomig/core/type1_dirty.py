"""VFIO_IOMMU_DIRTY_PAGES, and the bitmap that an unmap may ask for.

Theory of operation
-------------------
The log is that of the page table, which devices mark as they write (iommu/port.py). A report is
about whole mappings, and writes the bits of each from its first page to the end of a 64-bit word:
unlike those of iommufd and of a device's own log, bits of clean pages are cleared, and what lies
between mappings is left alone. A device whose IOMMU cannot track its writes makes all that is
mapped dirty, in every report, and once more when it has left (docs/protocol.md, CHOICE-16).

Mapping by mapping, in their order, bits are written and forgotten, or unmapped: where the bitmap
cannot be written everything stays from there on, and what came before is done.
See ``update_user_bitmap`` and ``vfio_iommu_type1_dirty_pages`` in the kernel.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio_iommu as abi
from vfiomig.iommu.dirty import bitmap_size

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.core.type1 import Type1
    from vfiomig.iommu import Mapping

__all__ = ("Report", "check_bitmap", "dirty_pages")

#: The one page size that a bitmap may have.
PAGE = 4096
WORD_BITS, WORD_BYTES = 64, 8
#: Bytes of the largest bitmap: of as many pages as a positive int counts.
LARGEST_BITMAP = 1 << 28
#: No user address lies above.
HIGHEST_ADDRESS = (1 << 47) - PAGE

START = abi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START
STOP = abi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP
GET = abi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP


def dirty_pages(iommu: Type1, arg: int, caller: Caller) -> int:
    if not iommu.is_v2:
        raise OSError(errno.EACCES, "version 1 does not track writes")
    argument = abi.Type1DirtyBitmap.parse(caller.read(arg, abi.Type1DirtyBitmap.SIZE))
    if argument.argsz < argument.SIZE or argument.flags not in {START, STOP, GET}:
        raise OSError(errno.EINVAL, "argsz, or not exactly one flag")
    if argument.flags == GET:
        caller.blocks()
        _get_bitmap(iommu, arg + argument.SIZE, argument.argsz - argument.SIZE, caller)
    else:
        with iommu.lock:
            on = argument.flags == START
            if on is (iommu.table.log is None):  # once more changes nothing
                iommu.table.track(on)
                with iommu.space.lock:
                    iommu.unseen.clear()
    return 0


def _get_bitmap(iommu: Type1, arg: int, room: int, caller: Caller) -> None:
    if room < abi.Type1DirtyBitmapGet.SIZE:
        raise OSError(errno.EINVAL, "argsz has no room for the range")
    asked = abi.Type1DirtyBitmapGet.parse(caller.read(arg, abi.Type1DirtyBitmapGet.SIZE))
    if asked.iova + asked.size >= 1 << 64:
        raise OSError(errno.EINVAL, "iova + size")
    check_bitmap(asked.size, asked.bitmap)
    if (asked.iova | asked.size) % PAGE or iommu.table.log is None:
        raise OSError(errno.EINVAL, "no whole pages, or dirty pages are not tracked")
    with iommu.space.lock:
        found = iommu.find_whole_locked(asked.iova, asked.size)
    report = Report(iommu, asked.iova, asked.bitmap.data, caller)
    for mapping in found:
        report.tell(mapping)


def check_bitmap(size: int, bitmap: abi.Bitmap) -> None:
    """Refuse a bitmap that cannot be the one of ``size`` bytes of IOVA: EINVAL."""
    needed = bitmap_size(size, PAGE)
    if (
        bitmap.pgsize != PAGE
        or not 0 < needed <= bitmap.size <= LARGEST_BITMAP
        or bitmap.data + bitmap.size > HIGHEST_ADDRESS
    ):
        raise OSError(errno.EINVAL, "the bitmap's page size, size or address")


class Report:
    """A bitmap of the caller's at ``address``, which begins with the page at ``base``."""

    def __init__(self, iommu: Type1, base: int, address: int, caller: Caller) -> None:
        self._iommu = iommu
        self._base = base
        self._address = address
        self._caller = caller

    def tell(self, mapping: Mapping, *, remove: bool = False) -> int:
        """Write a mapping's bits and forget them; ``remove`` it in the same step.

        Returns how many bytes were removed. EFAULT leaves everything as it was.
        """
        first, last = self._words_of(mapping)
        at, length = self._address + first * WORD_BYTES, (last - first) * WORD_BYTES
        if not self._caller.check(at, length, writable=True):
            raise OSError(errno.EFAULT, "the bitmap cannot be written")
        space = self._iommu.space
        with space.lock:
            if space.find_locked(mapping.iova, mapping.length) is not mapping:
                return 0  # another thread was faster
            bits = self._take_locked(mapping)
            size = self._iommu.remove_locked([mapping]) if remove else 0
        shift = (mapping.iova - self._base) // PAGE % WORD_BITS
        before = int.from_bytes(self._caller.read(at, WORD_BYTES), "little") if shift else 0
        word = before & ((1 << shift) - 1) | bits << shift
        self._caller.write(at, word.to_bytes(length, "little"))
        return size

    def _take_locked(self, mapping: Mapping) -> int:
        iommu, log = self._iommu, self._iommu.table.log
        if log is None:
            raise OSError(errno.EINVAL, "dirty pages are not tracked")
        bits = int.from_bytes(log.report(mapping.iova, mapping.length, PAGE), "little")
        if not iommu.tracks or mapping.iova in iommu.unseen:
            bits = (1 << mapping.length // PAGE) - 1
            iommu.unseen.discard(mapping.iova)
        return bits

    def _words_of(self, mapping: Mapping) -> tuple[int, int]:
        """The words that hold a mapping's bits: the first, and the one behind the last."""
        start = (mapping.iova - self._base) // PAGE
        return start // WORD_BITS, -(-(start + mapping.length // PAGE) // WORD_BITS)
