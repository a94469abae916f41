"""A device behind a vfio-user socket, reached as if by system calls.

Requests are those of the kernel, in structs of this process; here stands which messages they
become, a row for each. Pointers inside the structs are followed here. The numbers that are given
out mean something in this object alone: the device, an iommufd of this process, and a data_fd for
each session.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from types import MappingProxyType
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import FdKind
from vfiomig.client.local import LocalCaller
from vfiomig.client.numbers import Numbers
from vfiomig.client.vfio_user import running
from vfiomig.client.vfio_user.dirty_log import DmaLog
from vfiomig.client.vfio_user.features import WITHOUT_IT, Features
from vfiomig.client.vfio_user.interrupts import set_irqs
from vfiomig.client.vfio_user.memory import SharedMemory
from vfiomig.client.vfio_user.sessions import DataFd
from vfiomig.core.regions import PAGE, pages_lie_in
from vfiomig.errors import RequestError
from vfiomig.fsm import SessionKind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.client.vfio_user.facts import Facts, Region
    from vfiomig.client.vfio_user.remote import Remote
    from vfiomig.core.caller import Caller

__all__ = ("VfioUserTransport",)


class VfioUserTransport:
    """One connection to a server: its device, an iommufd, and data_fds as they come."""

    def __init__(self, remote: Remote, facts: Facts, *, nofile: int = 1024) -> None:
        """Take the connection over. ``nofile``: see ``Numbers``."""
        self._remote = remote
        self._facts = facts
        self._memory = SharedMemory(remote)
        self.numbers: Numbers[FdKind | DataFd] = Numbers(nofile)
        self._features = Features(remote, DmaLog(remote, self._memory), self.numbers)
        self.iommufd = self.numbers.install(FdKind.IOMMUFD)
        self.device = self.numbers.install(FdKind.DEVICE)
        #: Requests on the device: given the address of the argument.
        self._requests: Mapping[int, Callable[[int, Caller], object]] = {
            vfio.VFIO_DEVICE_GET_INFO: facts.device_get_info,
            vfio.VFIO_DEVICE_GET_REGION_INFO: facts.device_get_region_info,
            vfio.VFIO_DEVICE_GET_IRQ_INFO: facts.device_get_irq_info,
            vfio.VFIO_DEVICE_SET_IRQS: self._set_irqs,
            vfio.VFIO_DEVICE_RESET: self._reset,
            vfio.VFIO_DEVICE_FEATURE: self._features.ioctl,
            vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT: self._attach,
            vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT: self._detach,
        }

    @property
    def about(self) -> Mapping[str, str | int | bool]:
        limits = self._remote.limits
        return MappingProxyType(
            {
                "by": "vfio-user",
                "socket": self._remote.channel.name,
                "version": f"0.{limits.minor}",
                "mig_stream": limits.mig_stream,
                "max_data_xfer_size": limits.data_out,
                "max_msg_fds": limits.fds_out,
            }
        )

    @property
    def lost(self) -> str:
        return self._remote.channel.lost

    @property
    def mended(self) -> list[str]:
        """See ``DeviceClient``."""
        return self._remote.mended

    def keep_whole_state(self, state: memoryview) -> None:
        """Have a state at hand for a server that lets nobody without one leave RESUMING."""
        self._remote.whole_state[:] = [state]

    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int:
        address = 0 if argument is None else ctypes.addressof(argument)
        target = self.numbers.find(on)
        caller = LocalCaller(self.numbers)
        if target is FdKind.IOMMUFD:
            return self._memory.ioctl(number, address, caller)
        if isinstance(target, DataFd):
            return self._data_ioctl(target, number, address, caller)
        request = self._requests.get(number)
        if request is None:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        request(address, caller)
        return 0

    # Requests on the device and on a data_fd.

    def _set_irqs(self, address: int, caller: Caller) -> None:
        index = vfio.IrqSet.parse(caller.read(address, vfio.IrqSet.SIZE)).index
        irqs = self._facts.irqs
        irq = irqs[index] if index < len(irqs) else None
        set_irqs(self._remote, irq.count if irq is not None else 0, address, caller)

    def _reset(self, address: int, caller: Caller) -> None:  # noqa: ARG002 - it has no argument
        running.reset(self._remote)

    def _attach(self, address: int, caller: Caller) -> None:
        size = vfio.AttachIommufdPt.end_of("pt_id")
        argsz, flags, number = struct.unpack("=III", caller.read(address, size))
        if argsz < size or flags:
            raise OSError(errno.EINVAL, "argsz or flags")
        self._memory.attach(number)

    def _detach(self, address: int, caller: Caller) -> None:
        size = vfio.DetachIommufdPt.end_of("flags")
        argsz, flags = struct.unpack("=II", caller.read(address, size))
        if argsz < size or flags:
            raise OSError(errno.EINVAL, "argsz or flags")
        self._memory.detach()

    def _data_ioctl(self, target: DataFd, number: int, address: int, caller: Caller) -> int:
        if number != vfio.VFIO_MIG_GET_PRECOPY_INFO or target.kind is not SessionKind.SAVING:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        if not self._remote.limits.mig_stream:
            raise RequestError(
                errno.ENOTTY, f"no server tells what is left of a pre-copy {WITHOUT_IT}"
            )
        asked = vfio.PrecopyInfo.parse(caller.read(address, vfio.PrecopyInfo.SIZE))
        caller.write(address, bytes(self._remote.precopy_info(target, asked)))
        return 0

    # Bytes.

    def readinto(self, data_fd: int, buffer: memoryview) -> int:
        return self._remote.read_data(self._find_data(data_fd), buffer)

    def write(self, data_fd: int, data: memoryview) -> int:
        return self._remote.write_data(self._find_data(data_fd), data)

    def _find_data(self, number: int) -> DataFd:
        target = self.numbers.find(number)
        if not isinstance(target, DataFd):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return target

    def pread(self, offset: int, length: int) -> bytes:
        index, at, region = self._region_at(offset)
        buffer = bytearray(min(length, region.size - at))
        self._remote.read_region(index, at, memoryview(buffer))
        return bytes(buffer)

    def pwrite(self, offset: int, data: bytes) -> int:
        index, at, region = self._region_at(offset)
        view = memoryview(data)[: region.size - at]
        self._remote.write_region(index, at, view)
        return len(view)

    def map(self, offset: int, length: int, *, writable: bool) -> memoryview:
        index, at, region = self._region_at(offset)
        mappable = region.flags & vfio.VFIO_REGION_INFO_FLAG_MMAP
        areas = [(0, region.size)] if region.areas is None else sorted(region.areas)
        if not mappable or length <= 0 or at % PAGE or not pages_lie_in(tuple(areas), at, length):
            raise OSError(errno.EINVAL, "these are not pages that may be mapped")
        return self._remote.map_region(index, at, length, writable=writable)

    def _region_at(self, offset: int) -> tuple[int, int, Region]:
        self.numbers.find(self.device)
        return self._facts.region_at(offset)

    def close(self, number: int) -> None:
        if self.numbers.remove(number) is FdKind.DEVICE:
            self._remote.channel.close()
