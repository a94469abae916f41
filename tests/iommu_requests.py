"""Requests of a program to /dev/iommu, made of ``core`` in process."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from in_process import IOMMUFD, PAGE, Answer, Caller
from vfiomig.abi import iommufd as abi
from vfiomig.core.iommufd import BoundDevice

if TYPE_CHECKING:
    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.core.iommufd import Iommufd

FIXED, WRITABLE, READABLE = 1, 2, 4
U64_MAX = (1 << 64) - 1


def words(*numbers: int) -> bytes:
    return b"".join((number & 0xFFFF_FFFF).to_bytes(4, "little") for number in numbers)


class Iommu:
    """An open of /dev/iommu and its caller."""

    def __init__(self, caller: Caller | None = None) -> None:
        self.caller = caller or Caller()
        context = self.caller.iommufds[IOMMUFD]
        assert context is not None
        self.context: Iommufd = context

    def at(self, number: int, address: int) -> int:
        try:
            return self.context.ioctl(number, address, self.caller)
        except OSError as failure:
            return failure.errno or -1

    def ioctl(self, number: int, argument: UapiStruct | bytes) -> Answer:
        memory = ctypes.create_string_buffer(bytes(argument))
        result = self.at(number, ctypes.addressof(memory))
        return Answer(result, memory.raw[: len(bytes(argument))])

    def alloc(self) -> int:
        answer = self.ioctl(abi.IOMMU_IOAS_ALLOC, abi.IoasAlloc(size=12))
        assert answer.errno == 0
        return abi.IoasAlloc.parse(answer.data).out_ioas_id

    def in_use(self) -> int:
        """Make an address space with a device attached: it consists of pages, of 48 bits."""
        ioas = self.alloc()
        self.context.attach(ioas, BoundDevice("vfio1"))
        return ioas

    def map(self, ioas: int, address: int, **more: int) -> tuple[int, int]:
        members = {"size": 40, "flags": FIXED | WRITABLE | READABLE, "length": PAGE, **more}
        answer = self.ioctl(
            abi.IOMMU_IOAS_MAP, abi.IoasMap(ioas_id=ioas, user_va=address, **members)
        )
        return answer.errno, abi.IoasMap.parse(answer.data).iova

    def unmap(self, ioas: int, iova: int, length: int) -> tuple[int, int]:
        argument = abi.IoasUnmap(size=24, ioas_id=ioas, iova=iova, length=length)
        answer = self.ioctl(abi.IOMMU_IOAS_UNMAP, argument)
        return answer.errno, abi.IoasUnmap.parse(answer.data).length

    def destroy(self, number: int) -> int:
        return self.ioctl(abi.IOMMU_DESTROY, abi.IommuDestroy(size=8, id=number)).errno

    def copy(self, source: int, target: int, **more: int) -> tuple[int, int]:
        members = {"size": 40, "flags": FIXED | WRITABLE | READABLE, "length": PAGE, **more}
        argument = abi.IoasCopy(src_ioas_id=source, dst_ioas_id=target, **members)
        answer = self.ioctl(abi.IOMMU_IOAS_COPY, argument)
        return answer.errno, abi.IoasCopy.parse(answer.data).dst_iova

    def map_file(self, ioas: int, fd: int, **more: int) -> tuple[int, int]:
        members = {"size": 40, "flags": FIXED | WRITABLE | READABLE, "length": PAGE, **more}
        answer = self.ioctl(
            abi.IOMMU_IOAS_MAP_FILE, abi.IoasMapFile(ioas_id=ioas, fd=fd, **members)
        )
        return answer.errno, abi.IoasMapFile.parse(answer.data).iova

    def hwpt(self, device: int, parent: int, **more: int) -> tuple[int, int]:
        """Make a page table: errno and id."""
        argument = abi.HwptAlloc(**{"size": 48, "dev_id": device, "pt_id": parent, **more})
        answer = self.ioctl(abi.IOMMU_HWPT_ALLOC, argument)
        return answer.errno, abi.HwptAlloc.parse(answer.data).out_hwpt_id

    def track(self, table: int, on: int) -> int:
        argument = abi.HwptSetDirtyTracking(size=16, flags=on, hwpt_id=table)
        return self.ioctl(abi.IOMMU_HWPT_SET_DIRTY_TRACKING, argument).errno

    def dirty(
        self, table: int, iova: int, length: int, page_size: int = PAGE, **more: int
    ) -> tuple[int, set[int]]:
        """Ask for the dirty bitmap: errno and the numbers of the bits."""
        size = max(8, -(-length // ((page_size or 1) * 64)) * 8) if length < 1 << 40 else 8
        bitmap = ctypes.create_string_buffer(bytes(size), size)
        members = {"size": 48, "data": ctypes.addressof(bitmap), **more}
        argument = abi.HwptGetDirtyBitmap(
            hwpt_id=table, iova=iova, length=length, page_size=page_size, **members
        )
        result = self.ioctl(abi.IOMMU_HWPT_GET_DIRTY_BITMAP, argument).errno
        return result, bits_of(bitmap.raw)


class Nothing:
    """Memory that nobody looks at."""

    def read(self, address: int, length: int) -> bytes:
        raise NotImplementedError

    def read_into(self, address: int, view: memoryview) -> int:
        raise NotImplementedError

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        raise NotImplementedError


def bits_of(bitmap: bytes) -> set[int]:
    return {bit for bit in range(len(bitmap) * 8) if bitmap[bit >> 3] >> (bit & 7) & 1}
