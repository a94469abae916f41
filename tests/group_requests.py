"""A program that reaches devices by group and container, without a front door."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Self

from in_process import PAGE, Answer, Caller, Scripted
from iommu_requests import bits_of, words
from vfiomig.abi import vfio_iommu as abi
from vfiomig.abi.ioctls import Dialect
from vfiomig.abi.pci import PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY
from vfiomig.core.container import Container
from vfiomig.core.group import Group
from vfiomig.core.regions import region_offset
from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile

if TYPE_CHECKING:
    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.core.type1 import Type1
    from vfiomig.device import Device

ADDRESS = "0000:01:00.0"
#: The descriptor number of the program's container.
CONTAINER = 7
READ, WRITE, VADDR = 1, 2, 4
BITMAP, ALL = 1, 2
START, STOP, GET_BITMAP = 1, 2, 4
V1, V2 = 1, 3


class OldProgram:
    """Has a group open, which is in a container if ``version`` names its IOMMU's."""

    def __init__(
        self,
        device: Device | None = None,
        version: int = V2,
        *,
        dialect: Dialect = Dialect.LANDED,
        caller: Caller | None = None,
    ) -> None:
        self.device = Scripted() if device is None else device
        self.served = VfioDevice(self.device, dialect=dialect)
        self.group = Group(self.served, ADDRESS)
        self.caller = caller or Caller()
        self.container = self.caller.containers.setdefault(CONTAINER, Container())
        self.group.open()
        self._files: list[VfioDeviceFile] = []
        if version:
            assert self.set_container() == 0
            if self.container.iommu is None:
                assert self.at(self.container, abi.VFIO_SET_IOMMU, version) == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for number in list(self.caller.files):
            self.caller.files.pop(number).release()
        self.group.leave()

    # Requests.

    def at(self, on: Group | Container | VfioDeviceFile, number: int, arg: int) -> int:
        """Make a request; return its result, or the errno as a negative number."""
        try:
            return on.ioctl(number, arg, self.caller)
        except OSError as failure:
            return -(failure.errno or 1)

    def ioctl(
        self, on: Group | Container | VfioDeviceFile, number: int, argument: UapiStruct | bytes
    ) -> Answer:
        memory = ctypes.create_string_buffer(bytes(argument), max(1, len(bytes(argument))))
        result = self.at(on, number, ctypes.addressof(memory))
        return Answer(-result if result < 0 else result, memory.raw[: len(bytes(argument))])

    def set_container(self, number: int = CONTAINER) -> int:
        return self.ioctl(self.group, abi.VFIO_GROUP_SET_CONTAINER, words(number)).errno

    def unset_container(self) -> int:
        return -self.at(self.group, abi.VFIO_GROUP_UNSET_CONTAINER, 0)

    def device_fd(self, name: bytes = ADDRESS.encode()) -> int:
        """Ask for a descriptor; the errno as a negative number."""
        memory = ctypes.create_string_buffer(name)
        return self.at(self.group, abi.VFIO_GROUP_GET_DEVICE_FD, ctypes.addressof(memory))

    def open_device(self) -> VfioDeviceFile:
        number = self.device_fd()
        assert number > 0
        file = self.caller.files[number]
        file.pwrite(
            region_offset(7) + PCI_COMMAND, bytes([PCI_COMMAND_MASTER | PCI_COMMAND_MEMORY, 0])
        )
        return file

    def close_device(self, file: VfioDeviceFile) -> None:
        for number in [n for n, known in self.caller.files.items() if known is file]:
            del self.caller.files[number]
        file.release()

    # The IOMMU.

    @property
    def iommu(self) -> Type1:
        assert self.container.iommu is not None
        return self.container.iommu

    def map(self, address: int, iova: int, size: int = PAGE, flags: int = READ | WRITE) -> int:
        argument = abi.Type1DmaMap(argsz=32, flags=flags, vaddr=address, iova=iova, size=size)
        return self.ioctl(self.container, abi.VFIO_IOMMU_MAP_DMA, argument).errno

    def unmap(self, iova: int, size: int, flags: int = 0) -> tuple[int, int]:
        """Return the errno, and the size that is told."""
        argument = abi.Type1DmaUnmap(argsz=24, flags=flags, iova=iova, size=size)
        answer = self.ioctl(self.container, abi.VFIO_IOMMU_UNMAP_DMA, argument)
        return answer.errno, abi.Type1DmaUnmap.parse(answer.data).size

    def track(self, flags: int) -> int:
        argument = abi.Type1DirtyBitmap(argsz=8, flags=flags)
        return self.ioctl(self.container, abi.VFIO_IOMMU_DIRTY_PAGES, argument).errno

    def dirty(self, iova: int, size: int, before: int = 0) -> tuple[int, set[int]]:
        """Return the errno, and the numbers of the bits of a bitmap that had ``before``."""
        length = -(-size // (PAGE * 64)) * 8
        bitmap = ctypes.create_string_buffer(before.to_bytes(length, "little"), length)
        asked = abi.Type1DirtyBitmapGet(
            iova=iova,
            size=size,
            bitmap=abi.Bitmap(pgsize=PAGE, size=length, data=ctypes.addressof(bitmap)),
        )
        head = abi.Type1DirtyBitmap(argsz=8 + asked.SIZE, flags=GET_BITMAP)
        answer = self.ioctl(self.container, abi.VFIO_IOMMU_DIRTY_PAGES, bytes(head) + bytes(asked))
        return answer.errno, bits_of(bitmap.raw)
