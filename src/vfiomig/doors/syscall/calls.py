"""What each stopped system call means on a descriptor of ours.

Theory of operation
===================
``Calls.answer`` looks the call up by its number and finds whose descriptor it is about. One that
is not ours goes on to the kernel, which knows best what to do with it. A call on one of ours is
answered as the kernel's own file would: requests and region accesses by ``core``, reads and
writes of a data_fd by its session (now, or later from another thread: ``HELD``), and everything
that such a file does not do by the errno in ``REFUSED``. Checks come in the order in which the
kernel makes them (``ksys_read``, ``vfs_readv`` and so on in fs/read_write.c).

A handler returns the result, or ``CARRY_ON`` or ``HELD``, or raises ``OSError``.
"""

from __future__ import annotations

import errno
import mmap
import os
import termios
from typing import TYPE_CHECKING, Final

from vfiomig.abi.kvm import KVM_DEV_VFIO_FILE, KVM_SET_DEVICE_ATTR, KvmDeviceAttr
from vfiomig.abi.syscalls import X86_64
from vfiomig.doors.syscall.answers import CARRY_ON, HELD
from vfiomig.doors.syscall.caller import SyscallCaller
from vfiomig.doors.syscall.opened import (
    ContainerOpen,
    DataOpen,
    DeviceOpen,
    GroupOpen,
    Held,
    IommufdOpen,
    Opened,
)
from vfiomig.doors.syscall.transfer import buffers, read_iovecs
from vfiomig.fsm import SessionKind
from vfiomig.memory import CallMemory, MemoryFault, ProcessMemory

if TYPE_CHECKING:
    from vfiomig.doors.syscall.answers import Answer, Handler
    from vfiomig.doors.syscall.door import Door
    from vfiomig.doors.syscall.notify import Notification
    from vfiomig.doors.syscall.receivers import Turn

__all__ = ("Calls",)


LOW = 0xFFFF_FFFF
#: A region is accessed in pieces of this size, and longer copies to the program are left to
#: other threads than the receiver.
REGION_PIECE = 1 << 20
LONG_COPY = 4 << 20
MAP_TYPE = 0xF
MAP_SHARED_VALIDATE = 3
RWF_HIPRI = 1  # the one flag that files without iterators take

#: What a file of ours refuses: call, positions of its descriptor arguments, and the errno on a
#: device, group, container or iommufd and on a data_fd. Where a data_fd is a pipe end, the kernel's own answer to
#: fallocate and the like is right already, but a memfd's would not be.
REFUSED: Final = {
    "lseek": ((0,), errno.ESPIPE, errno.ESPIPE),
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
#: Positions of the descriptor that a call reads from and of the one that it writes to: EBADF
#: comes before the errno above where they are not open for that.
DIRECTIONS: Final[dict[str, tuple[int | None, int]]] = {
    "splice": (0, 2),
    "tee": (0, 1),
    "sendfile": (1, 0),
    "fallocate": (None, 0),
}
WRITES: Final = frozenset({"write", "writev", "pwrite64", "pwritev", "pwritev2"})


class Calls:
    """Decodes the stopped calls of one door."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._find = door.table.find_open
        plain = ("read", "write", "readv", "writev")
        positional = ("pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2")
        self._handlers: dict[int, Handler] = {
            X86_64["ioctl"]: self._ioctl,
            **{X86_64[name]: self._plain(name) for name in plain},
            **{X86_64[name]: self._positional(name) for name in positional},
            **{X86_64[name]: self._refusal(name) for name in REFUSED},
            X86_64["mmap"]: self._mmap,
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
        door = self._door
        door.settle(turn, _device_of(opened))
        caller = SyscallCaller(call, door, turn.pass_on)
        if turn.line is not None:
            door.trace_request(turn, opened, caller)
        if number == termios.FIONREAD and type(opened) is not ContainerOpen:
            raise OSError(errno.ENOTTY, "no request of a file of ours")
        if isinstance(opened, Held):
            opened.enter()
            try:
                return opened.ioctl(number, call.args[2], caller)
            finally:
                opened.leave()
        if type(opened) is IommufdOpen or type(opened) is ContainerOpen:
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
        return isinstance(self._find(call.tid, fd), DeviceOpen | GroupOpen)

    # Reads and writes.

    def _about(self, call: Notification, turn: Turn, descriptor: int = 0) -> Opened | None:
        """Find what a read or write is about, after every close before it."""
        opened = self._find(call.tid, call.args[descriptor])
        if opened is not None:
            self._door.settle(turn, _device_of(opened))
            if turn.line is not None:
                turn.line.about_access(opened.label)
        return opened

    def _plain(self, name: str) -> Handler:
        """Reads and writes at the file's own position: streams, and a device's regions."""
        writes, vectored = name in WRITES, name.endswith("v")

        def handle(call: Notification, turn: Turn) -> Answer:
            opened = self._about(call, turn)
            if opened is None:
                return CARRY_ON
            if isinstance(opened, DataOpen):
                return self._transfer(opened, call, turn, writes=writes, vectored=vectored)
            return self._access(opened, call, turn, None, writes=writes, vectored=vectored)

        return handle

    def _transfer(
        self,
        opened: DataOpen,
        call: Notification,
        turn: Turn,
        *,
        writes: bool,
        vectored: bool,
        flags: int = 0,
    ) -> Answer:
        _check_direction(opened, writes=writes)
        if vectored:
            memory = CallMemory(ProcessMemory(call.tid))
            segments = read_iovecs(memory, call.args[1], _signed(call.args[2]))
            if not segments:
                return 0  # the file is not even asked
            if flags & ~RWF_HIPRI:
                raise OSError(errno.EOPNOTSUPP, "flags")
        else:
            segments = buffers([(call.args[1], call.args[2])])
        if sum(length for _, length in segments) >= LONG_COPY:
            turn.pass_on()
        self._door.submit(opened, call, turn, segments)
        return HELD

    def _positional(self, name: str) -> Handler:
        """Accesses of a region; a data_fd is a stream and has no positions."""
        writes, vectored = name in WRITES, "v" in name
        extended = name.endswith("2")  # flags, and position -1 means the file's own

        def handle(call: Notification, turn: Turn) -> Answer:
            opened = self._about(call, turn)
            if opened is None:
                return CARRY_ON
            offset = _signed(call.args[3])
            flags = call.args[5] & LOW if extended else 0
            if isinstance(opened, DataOpen) and extended and offset == -1:
                return self._transfer(opened, call, turn, writes=writes, vectored=True, flags=flags)
            if offset < 0 and not (extended and offset == -1):
                raise OSError(errno.EINVAL, "a negative offset")
            if isinstance(opened, DataOpen):
                raise OSError(errno.ESPIPE, "a data_fd is a stream")
            at = None if offset == -1 else offset
            return self._access(
                opened, call, turn, at, writes=writes, vectored=vectored, flags=flags
            )

        return handle

    def _access(
        self,
        opened: Opened,
        call: Notification,
        turn: Turn,
        offset: int | None,
        *,
        writes: bool,
        vectored: bool,
        flags: int = 0,
    ) -> Answer:
        """Access a region at ``offset``, or at the file's position, which goes on then."""
        _check_direction(opened, writes=writes)
        if not isinstance(opened, DeviceOpen):
            raise OSError(errno.EINVAL, f"{opened.label} has nothing to read")
        if vectored:
            memory = CallMemory(ProcessMemory(call.tid))
            segments = read_iovecs(memory, call.args[1], _signed(call.args[2]))
            if segments and flags & ~RWF_HIPRI:
                raise OSError(errno.EOPNOTSUPP, "flags")
        else:
            segments = buffers([(call.args[1], call.args[2])])
        if opened.hooked:
            turn.if_long()
        at = opened.position if offset is None else offset
        done = _access_region(opened, call.tid, segments, at, turn, writes=writes)
        if offset is None:
            opened.position += done
        return done

    def _mmap(self, call: Notification, turn: Turn) -> Answer:
        """The kernel maps a device's pages, if they may be mapped: they are in the memfd."""
        opened = self._about(call, turn, descriptor=4)
        if opened is None:
            return CARRY_ON
        if isinstance(opened, DataOpen):
            raise OSError(errno.ENODEV, "a stream is not mapped")
        shared = call.args[3] & MAP_TYPE in {mmap.MAP_SHARED, MAP_SHARED_VALIDATE}
        access = opened.flags & os.O_ACCMODE
        writes = shared and call.args[2] & mmap.PROT_WRITE
        if access == os.O_WRONLY or (access == os.O_RDONLY and writes):
            raise OSError(errno.EACCES, "the file was not opened for that")
        if not isinstance(opened, DeviceOpen):
            number = errno.EINVAL if isinstance(opened, IommufdOpen) else errno.ENODEV
            raise OSError(number, f"{opened.label} has nothing to map")
        opened.file.require_mappable(_signed(call.args[5]), call.args[1], shared=shared)
        return CARRY_ON

    # What files of ours do not do.

    def _refusal(self, name: str) -> Handler:
        positions, on_device, on_data = REFUSED[name]

        def handle(call: Notification, turn: Turn) -> Answer:
            found: Opened | None = None
            for position in positions:
                found = found or self._find(call.tid, call.args[position])
            if found is None:
                return CARRY_ON
            if turn.line is not None:
                turn.line.about_access(found.label)
            self._check_directions(name, call)
            if name == "sendfile" and call.args[2]:
                source = self._find(call.tid, call.args[1])
                if isinstance(source, DataOpen):
                    raise OSError(errno.ESPIPE, "a stream has no offset")
            raise OSError(on_data if isinstance(found, DataOpen) else on_device, name)

        return handle

    def _check_directions(self, name: str, call: Notification) -> None:
        reads, writes = DIRECTIONS.get(name, (None, None))
        for position, is_write in ((reads, False), (writes, True)):
            opened = None if position is None else self._find(call.tid, call.args[position])
            if opened is not None:
                _check_direction(opened, writes=is_write)


def _device_of(opened: Opened) -> int | None:
    """Return the number of the device whose closes must be settled before a call about it."""
    if type(opened) is DeviceOpen:  # nearly always
        return opened.number
    return opened.number if isinstance(opened, DataOpen | GroupOpen) else None


def _check_direction(opened: Opened, *, writes: bool) -> None:
    if isinstance(opened, DataOpen):
        wrong = writes is not (opened.migf.kind is SessionKind.RESUMING)
    else:
        wrong = opened.flags & os.O_ACCMODE == (os.O_RDONLY if writes else os.O_WRONLY)
    if wrong:
        raise OSError(errno.EBADF, "the file was opened for the other direction")


def _access_region(
    opened: DeviceOpen,
    tid: int,
    segments: list[tuple[int, int]],
    offset: int,
    turn: Turn,
    *,
    writes: bool,
) -> int:
    """Read or write a region; a fault after some bytes leaves them done and counted."""
    if not segments:
        if not opened.file.in_use:
            raise OSError(errno.EINVAL, "the device has not been bound to an iommufd")
        return 0
    memory = ProcessMemory(tid)
    done = 0
    opened.enter()
    try:
        for address, length in segments:
            for at in range(address, address + length, REGION_PIECE):
                wanted = min(address + length - at, REGION_PIECE)
                if writes:
                    data = memory.read(at, wanted)
                    moved = opened.file.pwrite(offset + done, data, turn.pass_on)
                else:
                    data = opened.file.pread(offset + done, wanted)
                    memory.write(at, data)
                    moved = len(data)
                done += moved
                if moved < wanted:
                    return done
    except OSError:
        if not done:
            raise
    finally:
        opened.leave()
    return done


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
