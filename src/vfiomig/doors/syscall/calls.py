"""What each stopped system call means on a descriptor of ours.

Theory of operation
===================
``Calls.answer`` looks the call up by its number and finds whose descriptor it is about. One that
is not ours goes on to the kernel, which knows best what to do with it. A call on one of ours is
answered as the kernel's own file would: requests and region accesses by ``core``, reads and
writes of a data_fd by its session (now, or later from another thread: ``HELD``), and everything
that such a file does not do by the errno in ``REFUSED``.

A handler returns the result, or ``CARRY_ON`` or ``HELD``, or raises ``OSError``.
"""

from __future__ import annotations

import errno
import termios
from typing import TYPE_CHECKING, Final

from vfiomig.abi.kvm import KVM_DEV_VFIO_FILE, KVM_SET_DEVICE_ATTR, KvmDeviceAttr
from vfiomig.abi.syscalls import X86_64
from vfiomig.doors.syscall.answers import CARRY_ON, HELD
from vfiomig.doors.syscall.caller import SyscallCaller
from vfiomig.doors.syscall.opened import DataOpen, DeviceOpen, IommufdOpen, Opened
from vfiomig.doors.syscall.transfer import MAX_RW_COUNT, read_iovecs
from vfiomig.fsm import SessionKind
from vfiomig.memory import CallMemory, MemoryFault, ProcessMemory

if TYPE_CHECKING:
    from vfiomig.doors.syscall.answers import Answer, Handler
    from vfiomig.doors.syscall.door import Door, Turn
    from vfiomig.doors.syscall.notify import Notification

__all__ = ("Calls",)


LOW = 0xFFFF_FFFF
#: Region accesses larger than this are cut, as a read may be.
REGION_ACCESS_MAX = 1 << 20

#: What a file of ours refuses: call, positions of its descriptor arguments, and the errno on a
#: device or iommufd and on a data_fd. Where a data_fd is a pipe end, the kernel's own answer to
#: fallocate and the like is right already, but a memfd's would not be.
REFUSED: Final = {
    "lseek": ((0,), errno.ESPIPE, errno.ESPIPE),
    "mmap": ((4,), errno.EINVAL, errno.ENODEV),
    "splice": ((0, 2), errno.EINVAL, errno.EINVAL),
    "tee": ((0, 1), errno.EINVAL, errno.EINVAL),
    "vmsplice": ((0,), errno.EBADF, errno.EBADF),
    "sendfile": ((0, 1), errno.EINVAL, errno.EINVAL),
    "copy_file_range": ((0, 2), errno.EINVAL, errno.EINVAL),
    "ftruncate": ((0,), errno.EINVAL, errno.EINVAL),
    "fallocate": ((0,), errno.ENODEV, errno.ENODEV),
    "fsync": ((0,), errno.EINVAL, errno.EINVAL),
    "fdatasync": ((0,), errno.EINVAL, errno.EINVAL),
    "sync_file_range": ((0,), errno.ESPIPE, errno.ESPIPE),
}
WRITES: Final = frozenset({"write", "writev", "pwrite64", "pwritev", "pwritev2"})


class Calls:
    """Decodes the stopped calls of one door."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._find = door.table.find
        self._handlers: dict[int, Handler] = {
            X86_64["ioctl"]: self._ioctl,
            X86_64["read"]: self._plain("read"),
            X86_64["write"]: self._plain("write"),
            X86_64["readv"]: self._plain("readv"),
            X86_64["writev"]: self._plain("writev"),
            X86_64["pread64"]: self._positional("pread64"),
            X86_64["pwrite64"]: self._positional("pwrite64"),
            X86_64["preadv"]: self._positional("preadv"),
            X86_64["pwritev"]: self._positional("pwritev"),
            X86_64["preadv2"]: self._positional("preadv2"),
            X86_64["pwritev2"]: self._positional("pwritev2"),
            **{X86_64[name]: self._refusal(name) for name in REFUSED},
            **door.path_calls(),
        }

    def answer(self, call: Notification, turn: Turn) -> Answer:
        handler = self._handlers.get(call.nr)
        return CARRY_ON if handler is None else handler(call, turn)

    # Requests.

    def _ioctl(self, call: Notification, turn: Turn) -> Answer:
        opened = self._find(call.tid, call.args[0])
        number = call.args[1] & LOW
        if opened is None:
            if number == KVM_SET_DEVICE_ATTR and self._adds_our_file_to_kvm(call):
                return 0
            return CARRY_ON
        self._door.settle(turn)
        caller = SyscallCaller(call, self._door.table, turn.pass_on, self._door.install)
        turn.request(opened, number, call, caller)
        if number == termios.FIONREAD:
            raise OSError(errno.ENOTTY, "no request of a file of ours")
        if type(opened) is DeviceOpen:
            return opened.file.ioctl(number, call.args[2], caller)
        if type(opened) is IommufdOpen:
            return opened.context.ioctl(number, call.args[2], caller)
        assert isinstance(opened, DataOpen)
        return opened.device.data_ioctl(opened.migf, number, call.args[2], caller)

    def _adds_our_file_to_kvm(self, call: Notification) -> bool:
        """QEMU tells KVM of its VFIO files; of ours the kernel's KVM has never heard."""
        memory = CallMemory(ProcessMemory(call.tid))
        try:
            attribute = KvmDeviceAttr.parse(memory.read(call.args[2], KvmDeviceAttr.SIZE))
            if attribute.group != KVM_DEV_VFIO_FILE:
                return False
            fd = int.from_bytes(memory.read(attribute.addr, 4), "little")
        except MemoryFault:
            return False
        return isinstance(self._find(call.tid, fd), DeviceOpen)

    # Reads and writes.

    def _plain(self, name: str) -> Handler:
        """Reads and writes at the file's own position: sessions, and nothing else of ours."""
        writes, vectored = name in WRITES, name.endswith("v")

        def handle(call: Notification, turn: Turn) -> Answer:
            opened = self._find(call.tid, call.args[0])
            if opened is None:
                return CARRY_ON
            self._door.settle(turn)
            turn.access(opened, name, call)
            if not isinstance(opened, DataOpen):
                raise OSError(errno.EINVAL, "the file has no position")
            return self._transfer(opened, call, turn, writes=writes, vectored=vectored)

        return handle

    def _transfer(
        self, opened: DataOpen, call: Notification, turn: Turn, *, writes: bool, vectored: bool
    ) -> Answer:
        if writes is not (opened.migf.kind is SessionKind.RESUMING):
            raise OSError(errno.EBADF, "the data_fd has the other direction")
        memory = ProcessMemory(call.tid)
        if vectored:
            segments = read_iovecs(CallMemory(memory), call.args[1], _signed(call.args[2]))
        else:
            segments = [(call.args[1], min(call.args[2], MAX_RW_COUNT))]
        self._door.submit(opened, call, turn, memory, segments)
        return HELD

    def _positional(self, name: str) -> Handler:
        """Accesses of a region; a data_fd is a stream and has no positions."""
        writes, vectored = name in WRITES, "v" in name
        current = name.endswith("2")  # position -1 means the file's own there

        def handle(call: Notification, turn: Turn) -> Answer:
            opened = self._find(call.tid, call.args[0])
            if opened is None:
                return CARRY_ON
            self._door.settle(turn)
            turn.access(opened, name, call)
            offset = _signed(call.args[3])
            if isinstance(opened, DataOpen):
                if current and offset == -1:
                    return self._transfer(opened, call, turn, writes=writes, vectored=True)
                raise OSError(errno.ESPIPE, "a data_fd is a stream")
            if isinstance(opened, IommufdOpen) or offset < 0:
                raise OSError(errno.EINVAL, "no such offset")
            memory = CallMemory(ProcessMemory(call.tid))
            count = _signed(call.args[2])
            segments = (
                read_iovecs(memory, call.args[1], count) if vectored else [(call.args[1], count)]
            )
            return _access_region(opened, memory, segments, offset, writes=writes)

        return handle

    # What files of ours do not do.

    def _refusal(self, name: str) -> Handler:
        positions, on_device, on_data = REFUSED[name]

        def handle(call: Notification, turn: Turn) -> Answer:
            found: Opened | None = None
            for position in positions:
                found = found or self._find(call.tid, call.args[position])
            if found is None:
                return CARRY_ON
            turn.access(found, name, call)
            if name == "sendfile" and call.args[2] and self._find(call.tid, call.args[1]):
                raise OSError(errno.ESPIPE, "a stream has no offset")
            raise OSError(on_data if isinstance(found, DataOpen) else on_device, name)

        return handle


def _access_region(
    opened: DeviceOpen,
    memory: CallMemory,
    segments: list[tuple[int, int]],
    offset: int,
    *,
    writes: bool,
) -> int:
    """Read or write a region; a fault after some bytes leaves them done and counted."""
    done = 0
    for address, length in segments:
        if length < 0:
            raise OSError(errno.EINVAL, "a negative length")
        wanted = min(length, REGION_ACCESS_MAX)
        try:
            if writes:
                moved = opened.file.pwrite(offset + done, memory.read(address, wanted))
            else:
                data = opened.file.pread(offset + done, wanted)
                memory.write(address, data)
                moved = len(data)
        except OSError:
            if not done:
                raise
            break
        done += moved
        if moved < length:
            break
    return done


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
