"""A device behind system calls: the kernel's own, or one that a front door serves.

``ioctl`` is called through libc with the address of the argument, as a C program does it:
``fcntl.ioctl`` hands over a copy, and promises nothing about it after a failure, which is just
where V6 puts the state.
"""

from __future__ import annotations

import ctypes
import os
from types import MappingProxyType
from typing import TYPE_CHECKING

from vfiomig.client.regions import map_file
from vfiomig.client.transport import NO_FD

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.descriptors import Fd

__all__ = ("BY", "KernelTransport", "ioctl")

#: How a device of the kernel is reached.
BY = "system calls"

_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int


NOTHING_MORE: Mapping[str, str | int | bool] = MappingProxyType({})


def ioctl(on: int, number: int, argument: int) -> int:
    """Make a request; ``argument`` is a plain value, or an address of this process."""
    result: int = _ioctl(on, number, argument)
    if result < 0:
        failure = ctypes.get_errno()
        raise OSError(failure, os.strerror(failure))
    return result


class KernelTransport:
    """The descriptors of one device: its own, its iommufd's, and data_fds as they come."""

    lost = ""

    def __init__(
        self, device: Fd, iommufd: Fd | None, about: Mapping[str, str | int | bool] = NOTHING_MORE
    ) -> None:
        """Take the descriptors over. ``about`` is what more there is to say of the device."""
        self.device = device.move()
        self.iommufd = NO_FD if iommufd is None else iommufd.move()
        self.about: Mapping[str, str | int | bool] = {"by": BY, **about}

    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int:
        return ioctl(on, number, 0 if argument is None else ctypes.addressof(argument))

    def readinto(self, data_fd: int, buffer: memoryview) -> int:
        return os.readv(data_fd, [buffer])

    def write(self, data_fd: int, data: memoryview) -> int:
        return os.write(data_fd, data)

    def pread(self, offset: int, length: int) -> bytes:
        return os.pread(self.device, length, offset)

    def pwrite(self, offset: int, data: bytes) -> int:
        return os.pwrite(self.device, data, offset)

    def map(self, offset: int, length: int, *, writable: bool) -> memoryview:
        return map_file(self.device, offset, length, writable=writable)

    def close(self, number: int) -> None:
        os.close(number)
