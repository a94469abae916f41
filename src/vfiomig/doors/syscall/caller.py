"""The program as ``core`` sees it during one request."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from typing import TYPE_CHECKING

from vfiomig.abi.syscalls import X86_64
from vfiomig.descriptors import Fd
from vfiomig.doors.syscall.opened import ContainerOpen, IommufdOpen
from vfiomig.eventfd import EventFd
from vfiomig.memory import CallMemory, MemoryFault, ProcessMemory
from vfiomig.process import capable, process_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.core.transfer import Migf
    from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
    from vfiomig.descriptors import HasFileno
    from vfiomig.doors.syscall.door import Door
    from vfiomig.doors.syscall.notify import Notification
    from vfiomig.iommu import Backings, Place

__all__ = ("SyscallCaller",)

#: include/uapi/linux/pidfd.h
PIDFD_THREAD = os.O_EXCL

_libc = ctypes.CDLL(None, use_errno=True)


class SyscallCaller:
    """``core.Caller`` for one stopped system call."""

    __slots__ = ("_call", "_door", "blocks", "check", "read", "write")

    def __init__(self, call: Notification, door: Door, blocks: Callable[[], None]) -> None:
        self._call = call
        self._door = door
        memory = CallMemory(ProcessMemory(call.tid))
        self.read = memory.read
        self.write = memory.write
        self.check = memory.check
        self.blocks = blocks

    def memory(self, address: int, length: int, *, writable: bool, known: Backings) -> Place:
        tid = self._call.tid
        return known.of_program(process_of(tid), tid, address, length, writable=writable)

    def file(self, number: int) -> Fd:
        if self._door.table.find_open(self._call.tid, number) is not None:
            raise OSError(errno.EINVAL, f"{number} is a device or what belongs to one")
        return Fd(self._share(number))

    def capable(self, capability: int) -> bool:
        return capable(self._call.tid, capability)

    def return_fd(self, migf: Migf, address: int, render: Callable[[int], bytes]) -> None:
        """Give the program a descriptor and write its number, or neither.

        A descriptor that is in the program's table cannot be taken out again, so whether the
        write will fault is found out first, by writing what is there already.
        """
        size = len(render(-1))
        try:
            self.write(address, self.read(address, size))
        except MemoryFault:
            if _table_is_full(self._call.tid):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from None
            raise
        self.write(address, render(self._door.install(self._call, migf)))

    def return_device(
        self, device: VfioDevice, open_file: Callable[[HasFileno | None], VfioDeviceFile]
    ) -> int:
        if _table_is_full(self._call.tid):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._door.install_device(self._call, device, open_file)

    def opened(self, number: int) -> object:
        opened = self._door.table.find_open(self._call.tid, number)
        if isinstance(opened, IommufdOpen | ContainerOpen):
            return opened.context
        if opened is None and not os.path.lexists(f"/proc/{self._call.tid}/fd/{number}"):
            raise OSError(errno.EBADF, f"{number} is not open")
        return opened

    def eventfd(self, number: int) -> EventFd:
        return EventFd(self._share(number), owner=process_of(self._call.tid))

    def _share(self, number: int) -> int:
        with _open_thread(self._call.tid) as thread:
            call = X86_64["pidfd_getfd"]
            copy = _libc.syscall(call, thread.fileno(), ctypes.c_int(number), 0)
            if copy < 0:
                raise OSError(ctypes.get_errno(), f"descriptor {number} cannot be shared")
        return int(copy)


def _open_thread(tid: int) -> Fd:
    """Open a thread, whose table may be its own, or its process where no thread can be opened."""
    try:
        return Fd(os.pidfd_open(tid, PIDFD_THREAD))
    except OSError as problem:
        if problem.errno != errno.EINVAL:
            raise
    return Fd(os.pidfd_open(process_of(tid)))  # before Linux 6.9


def _table_is_full(tid: int) -> bool:
    """Whether the next descriptor of the thread would be EMFILE."""
    try:
        limit = resource.prlimit(tid, resource.RLIMIT_NOFILE)[0]
        return len(os.listdir(f"/proc/{tid}/fd")) >= limit
    except (OSError, ValueError):
        return False
