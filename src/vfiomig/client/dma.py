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
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from vfiomig.abi import iommufd, vfio
from vfiomig.client.requests import GET, SET
from vfiomig.client.transport import NO_FD
from vfiomig.iommu.dirty import bitmap_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from _typeshed import WriteableBuffer

    from vfiomig.client.requests import Requests

__all__ = (
    "AddressSpace",
    "DeviceMemory",
    "HeldMemory",
    "bitmap_for",
    "dirty_ranges",
    "report_logging",
    "start_logging",
    "stop_logging",
)

PAGE = 4096
#: What a kernel answers that knows the iommufd but not the request.
UNKNOWN = {errno.ENOTTY, errno.EOPNOTSUPP}
READ_WRITE = iommufd.IOMMU_IOAS_MAP_READABLE | iommufd.IOMMU_IOAS_MAP_WRITEABLE


class DeviceMemory(Protocol):
    """What a device reaches by DMA, and what its IOMMU tracks there. Failures are ``OSError``."""

    tracking: bool

    def map(self, iova: int, memory: WriteableBuffer) -> None:
        """Map memory of this process: EEXIST if something is mapped there."""

    def unmap(self, iova: int, length: int) -> int:
        """Unmap whole mappings; return their bytes. ENOENT if there is none."""

    def can_track(self) -> bool:
        """Tell whether the IOMMU may track writes at all."""

    def start_tracking(self) -> None:
        """Track from now on, with nothing written so far."""

    def stop_tracking(self) -> None: ...

    def report_tracking(self, iova: int, length: int, page_size: int, *, clear: bool) -> bytearray:
        """Return the bitmap of a range in whole words of 64 bits; EINVAL while nothing tracks."""

    def release(self) -> None:
        """After the device was closed: let go of everything."""


class HeldMemory:
    """Memory of this process that a device may reach, by IOVA: it stays put until it is let go."""

    def __init__(self) -> None:
        #: Length, and the hold on the buffer.
        self._held: dict[int, tuple[int, object]] = {}

    @contextmanager
    def holding(self, iova: int, memory: WriteableBuffer) -> Iterator[tuple[int, int]]:
        """Give a request the memory's address and length; hold on to it if that succeeds."""
        held = ctypes.c_char.from_buffer(memory)
        length = memoryview(memory).nbytes
        try:
            yield ctypes.addressof(held), length
        except OSError:
            del held  # or the traceback would hold the memory
            raise
        self._held[iova] = length, held

    def let_go(self, iova: int, length: int) -> None:
        """Let go of what begins in [iova, iova + length)."""
        for start in [at for at in self._held if iova <= at < iova + length]:
            del self._held[start]

    def clear(self) -> None:
        self._held.clear()

    def touching(self, iova: int, length: int) -> list[tuple[int, int]]:
        """Return the (iova, length) of what lies in [iova, iova + length), whole or in part."""
        return sorted(
            (at, size)
            for at, (size, _) in self._held.items()
            if at < iova + length and iova < at + size
        )


class AddressSpace:
    """An IO address space of the iommufd, with one device."""

    def __init__(self, requests: Requests, devid: int | None, *, bound: bool = False) -> None:
        """``devid`` is what the iommufd calls the device, if this client has bound it.

        ``bound``: somebody else has, and to this iommufd.
        """
        self._requests = requests
        self._devid = devid
        self._bound = bound or devid is not None
        self._ioas = 0
        #: The page table that tracks writes, once it was asked for.
        self._table = 0
        #: Whether it does now.
        self.tracking = False
        self._held = HeldMemory()

    def map(self, iova: int, memory: WriteableBuffer) -> None:
        ioas = self._attached()
        with self._held.holding(iova, memory) as (address, length):
            argument = iommufd.IoasMap(
                size=iommufd.IoasMap.SIZE,
                flags=READ_WRITE | iommufd.IOMMU_IOAS_MAP_FIXED_IOVA,
                ioas_id=ioas,
                user_va=address,
                length=length,
                iova=iova,
            )
            self._requests.on(self._iommufd(), iommufd.IOMMU_IOAS_MAP, argument)

    def unmap(self, iova: int, length: int) -> int:
        argument = iommufd.IoasUnmap(
            size=iommufd.IoasUnmap.SIZE, ioas_id=self._ioas, iova=iova, length=length
        )
        self._requests.on(self._iommufd(), iommufd.IOMMU_IOAS_UNMAP, argument)
        self._held.let_go(iova, length)
        return argument.length

    def release(self) -> None:
        self._held.clear()

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
        if not self._bound:  # the id of our address space might be that of another one there
            raise OSError(
                errno.ENODEV,
                "it is not bound to this client's iommufd; name the iommufd or the container that "
                "it belongs to, as in fd:3,iommufd=4 or fd:3,container=4",
            )
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
        bitmap, address = bitmap_for(length, page_size)
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
    bitmap, address = bitmap_for(length, page_size)
    report = vfio.DmaLoggingReport(iova=iova, length=length, page_size=page_size, bitmap=address)
    requests.feature(vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, GET, report)
    return bitmap


def bitmap_for(length: int, page_size: int) -> tuple[bytearray, int]:
    """Make the empty bitmap of a report, in whole words of 64 bits, and return its address too."""
    # One word at least: an empty buffer has no address to give.
    bitmap = bytearray(max(8, bitmap_size(length, page_size) if page_size else 0))
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
