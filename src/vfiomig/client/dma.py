"""Memory for a device's DMA, and the log of what it wrote there.

Memory reaches the device by way of an IO address space of the iommufd, made and attached when
the first piece is mapped. The device may log what it writes there, and so may the IOMMU in front of
it: for that the device moves to a page table over the same address space that can track writes,
which only some IOMMUs have. Both logs speak in bitmaps, ``dirty_ranges`` in ranges. Requests:
include/uapi/linux/iommufd.h and the DMA_LOGGING features in include/uapi/linux/vfio.h.
"""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

from vfiomig.abi import iommufd, vfio
from vfiomig.client.requests import GET, SET
from vfiomig.client.transport import NO_FD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from _typeshed import WriteableBuffer

    from vfiomig.client.requests import Requests

__all__ = ("AddressSpace", "dirty_ranges", "report_logging", "start_logging", "stop_logging")

PAGE = 4096
#: What a kernel answers that knows the iommufd but not the request.
UNKNOWN = {errno.ENOTTY, errno.EOPNOTSUPP}
READ_WRITE = iommufd.IOMMU_IOAS_MAP_READABLE | iommufd.IOMMU_IOAS_MAP_WRITEABLE


class AddressSpace:
    """The IO address space of one device. Memory in it stays put until it is unmapped."""

    def __init__(self, requests: Requests, devid: int | None) -> None:
        """``devid`` is what the iommufd calls the device, if that was bound to one."""
        self._requests = requests
        self._devid = devid
        self._ioas = 0
        #: The page table that tracks writes, once it was asked for.
        self._table = 0
        #: Whether it does now.
        self.tracking = False
        #: By IOVA: length, and the hold on the buffer that keeps it from going away.
        self._mapped: dict[int, tuple[int, object]] = {}

    def map(self, iova: int, memory: WriteableBuffer) -> None:
        length = memoryview(memory).nbytes
        held = ctypes.c_char.from_buffer(memory)
        argument = iommufd.IoasMap(
            size=iommufd.IoasMap.SIZE,
            flags=READ_WRITE | iommufd.IOMMU_IOAS_MAP_FIXED_IOVA,
            ioas_id=self._attached(),
            user_va=ctypes.addressof(held),
            length=length,
            iova=iova,
        )
        try:
            self._requests.on(self._iommufd(), iommufd.IOMMU_IOAS_MAP, argument)
        except OSError:
            del held  # or the traceback would hold the memory
            raise
        self._mapped[iova] = length, held

    def unmap(self, iova: int, length: int) -> int:
        argument = iommufd.IoasUnmap(
            size=iommufd.IoasUnmap.SIZE, ioas_id=self._ioas, iova=iova, length=length
        )
        self._requests.on(self._iommufd(), iommufd.IOMMU_IOAS_UNMAP, argument)
        for start in [at for at in self._mapped if iova <= at < iova + length]:
            del self._mapped[start]
        return argument.length

    def release(self) -> None:
        """After the device and its iommufd were closed: let go of the memory."""
        self._mapped.clear()

    def _attached(self) -> int:
        """Return the id of the address space; the first time make and attach it."""
        if not self._ioas:
            space = iommufd.IoasAlloc(size=iommufd.IoasAlloc.SIZE)
            self._requests.on(self._iommufd(), iommufd.IOMMU_IOAS_ALLOC, space)
            self._attach(space.out_ioas_id)
            self._ioas = space.out_ioas_id
        return self._ioas

    def _attach(self, number: int) -> None:
        attach = vfio.AttachIommufdPt(argsz=vfio.AttachIommufdPt.end_of("pt_id"), pt_id=number)
        self._requests.on_device(vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach)

    def _iommufd(self) -> int:
        number = self._requests.transport.iommufd
        if number == NO_FD:
            raise OSError(errno.ENODEV, "there is no /dev/iommu to map memory with")
        return number

    # What the IOMMU tracks.

    def can_track(self) -> bool:
        """Ask whether the IOMMU in front of the device can track its writes."""
        if self._devid is None:
            return False
        info = iommufd.HwInfo(size=iommufd.HwInfo.SIZE, dev_id=self._devid)
        try:
            self._requests.on(self._iommufd(), iommufd.IOMMU_GET_HW_INFO, info)
        except OSError as failure:
            if failure.errno in UNKNOWN:
                return False
            raise
        return bool(info.out_capabilities & iommufd.IOMMU_HW_CAP_DIRTY_TRACKING)

    def start_tracking(self) -> None:
        """Track from now on, with nothing written so far; the device changes its page table once.

        Raises:
            OSError: EOPNOTSUPP if nothing in front of the device can.
        """
        if not self._table:
            if not self.can_track():
                raise OSError(
                    errno.EOPNOTSUPP,
                    "there is no IOMMU in front of it that can; "
                    "let the device log its writes, if it can: start_dma_logging",
                )
            self._table = self._tracking_table()
        self._track(iommufd.IOMMU_HWPT_DIRTY_TRACKING_ENABLE)
        self.tracking = True

    def stop_tracking(self) -> None:
        if self._table:
            self._track(0)
        self.tracking = False

    def report_tracking(self, iova: int, length: int, page_size: int, *, clear: bool) -> bytearray:
        """Return the bitmap of [iova, iova + length), in whole words of 64 bits.

        Raises:
            OSError: EINVAL while nothing is tracked, when a kernel shows an empty bitmap.
        """
        if not self.tracking:
            raise OSError(errno.EINVAL, "nothing was tracked; start_iommu_tracking comes before")
        bitmap, address = _bitmap(length, page_size)
        report = iommufd.HwptGetDirtyBitmap(
            size=iommufd.HwptGetDirtyBitmap.SIZE,
            hwpt_id=self._table,
            flags=0 if clear else iommufd.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
            iova=iova,
            length=length,
            page_size=page_size,
            data=address,
        )
        self._requests.on(self._iommufd(), iommufd.IOMMU_HWPT_GET_DIRTY_BITMAP, report)
        return bitmap

    def _tracking_table(self) -> int:
        """Move the device to a page table that can track, over the same address space."""
        table = iommufd.HwptAlloc(
            size=iommufd.HwptAlloc.SIZE,
            flags=iommufd.IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
            dev_id=self._devid or 0,
            pt_id=self._attached(),
        )
        self._requests.on(self._iommufd(), iommufd.IOMMU_HWPT_ALLOC, table)
        try:
            self._attach(table.out_hwpt_id)
        except OSError:
            gone = iommufd.IommuDestroy(size=iommufd.IommuDestroy.SIZE, id=table.out_hwpt_id)
            self._requests.on(self._iommufd(), iommufd.IOMMU_DESTROY, gone)
            raise
        return table.out_hwpt_id

    def _track(self, flags: int) -> None:
        change = iommufd.HwptSetDirtyTracking(
            size=iommufd.HwptSetDirtyTracking.SIZE, flags=flags, hwpt_id=self._table
        )
        self._requests.on(self._iommufd(), iommufd.IOMMU_HWPT_SET_DIRTY_TRACKING, change)


def start_logging(requests: Requests, ranges: Sequence[tuple[int, int]], page_size: int) -> int:
    """Start the log; return the page size that the device keeps it in."""
    rows = (vfio.DmaLoggingRange * len(ranges))(
        *(vfio.DmaLoggingRange(iova=iova, length=length) for iova, length in ranges)
    )
    control = vfio.DmaLoggingControl(
        page_size=page_size, num_ranges=len(ranges), ranges=ctypes.addressof(rows)
    )
    requests.feature(vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, SET, control)
    return control.page_size


def stop_logging(requests: Requests) -> None:
    requests.feature(vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, SET)


def report_logging(requests: Requests, iova: int, length: int, page_size: int) -> bytearray:
    """Return the bitmap of [iova, iova + length), in whole words of 64 bits."""
    bitmap, address = _bitmap(length, page_size)
    report = vfio.DmaLoggingReport(iova=iova, length=length, page_size=page_size, bitmap=address)
    requests.feature(vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, GET, report)
    return bitmap


def _bitmap(length: int, page_size: int) -> tuple[bytearray, int]:
    """Make the empty bitmap of a report, in whole words of 64 bits, and return its address too."""
    pages = -(-length // page_size) if page_size else 0
    # One word at least: an empty buffer has no address to give.
    bitmap = bytearray(max(8, -(-pages // 64) * 8))
    return bitmap, ctypes.addressof(ctypes.c_char.from_buffer(bitmap))


def dirty_ranges(
    bitmap: bytes | bytearray | memoryview, iova: int, length: int, page_size: int = PAGE
) -> Iterator[tuple[int, int]]:
    """Yield the (iova, length) of each run of dirty pages in the bitmap of one report.

    The last run is cut at the end of the report, which may lie inside its last page.
    """
    end = iova + length
    start = 0
    pages = -(-length // page_size)
    bits = int.from_bytes(bitmap, "little") & ((1 << pages) - 1)
    while bits:
        clean = (bits & -bits).bit_length() - 1  # zeros below the lowest bit
        bits >>= clean
        dirty = (~bits & (bits + 1)).bit_length() - 1  # ones from there on
        bits >>= dirty
        first = iova + (start + clean) * page_size
        start += clean + dirty
        yield first, min(iova + start * page_size, end) - first
