"""Memory for a device's DMA, and the log of what it wrote there.

Memory reaches the device by way of an IO address space of the iommufd, made and attached when
the first piece is mapped. The log speaks in bitmaps, ``dirty_ranges`` in ranges. Requests:
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
READ_WRITE = iommufd.IOMMU_IOAS_MAP_READABLE | iommufd.IOMMU_IOAS_MAP_WRITEABLE


class AddressSpace:
    """The IO address space of one device. Memory in it stays put until it is unmapped."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._ioas = 0
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
            attach = vfio.AttachIommufdPt(
                argsz=vfio.AttachIommufdPt.end_of("pt_id"), pt_id=space.out_ioas_id
            )
            self._requests.on_device(vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach)
            self._ioas = space.out_ioas_id
        return self._ioas

    def _iommufd(self) -> int:
        number = self._requests.transport.iommufd
        if number == NO_FD:
            raise OSError(errno.ENODEV, "there is no /dev/iommu to map memory with")
        return number


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
    pages = -(-length // page_size) if page_size else 0
    # One word at least: an empty buffer has no address to give.
    bitmap = bytearray(max(8, -(-pages // 64) * 8))
    held = ctypes.c_char.from_buffer(bitmap)
    report = vfio.DmaLoggingReport(
        iova=iova, length=length, page_size=page_size, bitmap=ctypes.addressof(held)
    )
    requests.feature(vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, GET, report)
    return bitmap


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
