"""Memory for a device's DMA by way of a container, which is what there was before iommufd.

Theory of operation
-------------------
A container tells dirty pages of whole mappings only, in pages of 4 KiB, and forgets at once what
it told. So it is asked about whole mappings, and what it says is kept here until it is asked for.

For mediated devices, and those that a front door serves, a container's log is exact; of all
others it calls everything dirty that is mapped, and does not say which of the two it does.
Requests: ``VFIO_IOMMU_MAP_DMA`` and its neighbours in include/uapi/linux/vfio.h.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio_iommu as abi
from vfiomig.client.chain import MOST_INFO, capability_chain
from vfiomig.client.dma import PAGE, HeldMemory, bitmap_for, dirty_ranges
from vfiomig.iommu import DirtyLog

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.client.requests import Requests
    from vfiomig.descriptors import Fd

__all__ = ("ContainerSpace",)

READ_WRITE = abi.VFIO_DMA_MAP_FLAG_READ | abi.VFIO_DMA_MAP_FLAG_WRITE
START = abi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START
STOP = abi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP
GET = abi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP
EVERYTHING = (0, 1 << 64)


class ContainerSpace:
    """``DeviceMemory`` of a device that came out of a group."""

    def __init__(self, requests: Requests, container: Fd, group: Fd | None = None) -> None:
        """Take the descriptors over; ``release`` closes them."""
        self._requests = requests
        self._container = container
        self._group = group
        self.tracking = False
        #: What the container told and nobody has asked for yet.
        self._told = DirtyLog([EVERYTHING])
        self._held = HeldMemory()

    def map(self, iova: int, memory: WriteableBuffer) -> None:
        with self._held.holding(iova, memory) as (address, length):
            argument = abi.Type1DmaMap(
                argsz=abi.Type1DmaMap.SIZE,
                flags=READ_WRITE,
                vaddr=address,
                iova=iova,
                size=length,
            )
            self._ask(abi.VFIO_IOMMU_MAP_DMA, argument)

    def unmap(self, iova: int, length: int) -> int:
        argument = abi.Type1DmaUnmap(argsz=abi.Type1DmaUnmap.SIZE, iova=iova, size=length)
        self._ask(abi.VFIO_IOMMU_UNMAP_DMA, argument)
        if not argument.size:
            raise OSError(errno.ENOENT, "nothing is mapped there")
        self._held.let_go(iova, length)
        self._told.forget(iova, length)
        return argument.size

    def release(self) -> None:
        if self._group is not None:
            self._group.close()
        self._container.close()
        self._held.clear()

    # What the container tracks.

    def can_track(self) -> bool:
        """Ask for the capability; whether the log is exact nobody can ask."""
        info = abi.Type1Info(argsz=abi.Type1Info.SIZE)
        self._ask(abi.VFIO_IOMMU_GET_INFO, info)
        if not info.flags & abi.VFIO_IOMMU_INFO_CAPS or info.argsz > MOST_INFO:
            return False
        buffer = bytearray(info.argsz)
        info = abi.Type1Info.from_buffer(buffer)
        info.argsz = len(buffer)
        self._ask(abi.VFIO_IOMMU_GET_INFO, info)
        chain = capability_chain(buffer, info.cap_offset, info.SIZE, "the container")
        return abi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION in {number for number, _ in chain}

    def start_tracking(self) -> None:
        """Track from now on, with nothing written so far.

        Raises:
            OSError: EOPNOTSUPP if this container cannot.
        """
        if not self.can_track():
            raise OSError(errno.EOPNOTSUPP, "its container does not track dirty pages")
        for flag in (STOP, START) if self.tracking else (START,):
            self._track(flag)
        self._told = DirtyLog([EVERYTHING])
        self.tracking = True

    def stop_tracking(self) -> None:
        if self.tracking:
            self._track(STOP)
        self.tracking = False

    def report_tracking(self, iova: int, length: int, page_size: int, *, clear: bool) -> bytearray:
        """Return the bitmap of [iova, iova + length), in whole words of 64 bits.

        Raises:
            OSError: EINVAL while nothing is tracked, or for a range that is not made of pages.
        """
        pages = page_size >= PAGE and not page_size & (page_size - 1)
        if not self.tracking or not pages or not length or (iova | length) % page_size:
            raise OSError(errno.EINVAL, "nothing is tracked, or the range is not made of pages")
        for start, size in self._held.touching(iova, length):
            for at, dirty in dirty_ranges(self._take(start, size), start, size):
                self._told.mark(at, dirty)
        return self._told.report(iova, length, page_size, clear=clear)

    def _take(self, iova: int, length: int) -> bytearray:
        """Take the bitmap of a mapping from the container."""
        bitmap, address = bitmap_for(length, PAGE)
        asked = abi.Type1DirtyBitmapGet(
            iova=iova,
            size=length,
            bitmap=abi.Bitmap(pgsize=PAGE, size=len(bitmap), data=address),
        )
        head = abi.Type1DirtyBitmap(argsz=abi.Type1DirtyBitmap.SIZE + asked.SIZE, flags=GET)
        whole = abi.Type1DirtyBitmap.from_buffer(bytearray(bytes(head) + bytes(asked)))
        self._ask(abi.VFIO_IOMMU_DIRTY_PAGES, whole)
        return bitmap

    def _track(self, flag: int) -> None:
        argument = abi.Type1DirtyBitmap(argsz=abi.Type1DirtyBitmap.SIZE, flags=flag)
        self._ask(abi.VFIO_IOMMU_DIRTY_PAGES, argument)

    def _ask(self, number: int, argument: UapiStruct) -> None:
        self._requests.on(self._container.fileno(), number, argument)
