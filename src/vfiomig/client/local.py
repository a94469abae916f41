"""A device in this process, reached as if by system calls.

The caller of every request is this very process: its memory is read and written at the addresses
that the request names, so a bad one faults, and its descriptors are numbers of a small table.
A read or write that the device cannot answer at once waits for it in the calling thread; the end
of the session wakes it with ENODEV, as a reader in the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from vfiomig.client.numbers import Numbers
from vfiomig.core.iommufd import Iommufd
from vfiomig.core.transfer import Migf
from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
from vfiomig.descriptors import Fd
from vfiomig.eventfd import EventFd
from vfiomig.fsm import SessionKind
from vfiomig.iommu import Place
from vfiomig.memory import MemoryFault, ProcessMemory
from vfiomig.process import capable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.descriptors import HasFileno
    from vfiomig.iommu import Backings

__all__ = ("LocalCaller", "LocalTransport")

Thing: TypeAlias = VfioDeviceFile | Iommufd | Migf


class LocalTransport:
    """One open of ``device``, one iommufd, and the data_fds of its sessions."""

    about: Mapping[str, str | int | bool] = MappingProxyType({"by": "calls in this process"})
    lost = ""

    def __init__(self, device: VfioDevice, *, nofile: int = 1024) -> None:
        """Open the device and an iommufd. ``nofile``: see ``Numbers``.

        Raises:
            OSError: what the device refused its open with.
        """
        self._open_device = device
        self.numbers: Numbers[Thing] = Numbers(nofile)
        self.iommufd = self.numbers.install(Iommufd())
        self.device = self.numbers.install(device.open())

    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int:
        address = 0 if argument is None else ctypes.addressof(argument)
        target = self.numbers.find(on)
        # Made for each request: kept, the two would be a cycle that keeps the device's memory.
        caller = LocalCaller(self.numbers)
        if isinstance(target, Migf):
            return self._open_device.data_ioctl(target, number, address, caller)
        return target.ioctl(number, address, caller)

    def readinto(self, data_fd: int, buffer: memoryview) -> int:
        return self._transfer(data_fd, SessionKind.SAVING, ReadTransfer(buffer))

    def write(self, data_fd: int, data: memoryview) -> int:
        return self._transfer(data_fd, SessionKind.RESUMING, WriteTransfer(data))

    def _transfer(
        self, data_fd: int, direction: SessionKind, transfer: ReadTransfer | WriteTransfer
    ) -> int:
        migf = self.numbers.find(data_fd)
        if not isinstance(migf, Migf) or migf.kind is not direction:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            migf.submit(transfer)
            result = transfer.wait()
        except BaseException:  # Ctrl-C: its memory is the caller's again
            migf.withdraw(transfer)
            raise
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def pread(self, offset: int, length: int) -> bytes:
        return self._file().pread(offset, length)

    def pwrite(self, offset: int, data: bytes) -> int:
        return self._file().pwrite(offset, data)

    def map(self, offset: int, length: int, *, writable: bool) -> memoryview:
        view = self._file().view(offset, length)
        return view if writable else view.toreadonly()

    def _file(self) -> VfioDeviceFile:
        file = self.numbers.find(self.device)
        assert isinstance(file, VfioDeviceFile)
        return file

    def close(self, number: int) -> None:
        closed = self.numbers.remove(number)
        if isinstance(closed, VfioDeviceFile):
            closed.release()


class LocalCaller:
    """This process as the maker of a request: ``core.caller.Caller``."""

    def __init__(self, numbers: Numbers[Any]) -> None:
        self._numbers = numbers
        self._memory = ProcessMemory(os.getpid())
        self.read = self._memory.read
        self.write = self._memory.write
        self.check = self._memory.check

    def memory(self, address: int, length: int, *, writable: bool, known: Backings) -> Place:  # noqa: ARG002
        if not self.check(address, length, writable=writable):
            raise MemoryFault(address, length)
        return Place(self._memory, address)

    def file(self, number: int) -> Fd:
        """Share a file: a real descriptor of this process, not one of the small table."""
        return Fd(os.dup(number))

    def capable(self, capability: int) -> bool:
        return capable(threading.get_native_id(), capability)

    def blocks(self) -> None:
        """Nobody else waits for this thread."""

    def return_fd(self, migf: Migf, address: int, render: Callable[[int], bytes]) -> None:
        number = self._numbers.install(migf)
        try:
            self.write(address, render(number))
        except OSError:
            self._numbers.remove(number)
            raise

    def return_device(
        self,
        device: VfioDevice,  # noqa: ARG002 - its memory is where it is
        open_file: Callable[[HasFileno | None], VfioDeviceFile],
    ) -> int:
        return self._numbers.install_new(lambda: open_file(None))

    def opened(self, number: int) -> object:
        return self._numbers.find(number)

    def eventfd(self, number: int) -> EventFd:
        """Share an eventfd: a real descriptor of this process, not one of the small table."""
        return EventFd(os.dup(number))


class LocalTransfer:
    """A read or write of this process that waits for its answer."""

    __slots__ = ("_answered", "_result", "_view", "size")

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.size = view.nbytes
        self._result = 0
        # A lock rather than an Event: nearly every transfer is answered before anybody waits.
        self._answered = threading.Lock()
        self._answered.acquire()

    def finish(self, result: int) -> None:
        self._result = result
        self._answered.release()

    def wait(self) -> int:
        self._answered.acquire()
        return self._result


class ReadTransfer(LocalTransfer):
    """``core.transfer.Transfer`` of a read."""

    __slots__ = ()

    def move(self, view: memoryview, done: int) -> int:
        into = self._view[done : done + len(view)]
        into[:] = view[: len(into)]
        return len(into)


class WriteTransfer(LocalTransfer):
    """``core.transfer.Transfer`` of a write."""

    __slots__ = ()

    def move(self, view: memoryview, done: int) -> int:
        data = self._view[done : done + len(view)]
        view[: len(data)] = data
        return len(data)
