"""System calls that name a path: open, stat, access and readlink in all their forms.

A path that is not ours goes on to the kernel. Opening puts a placeholder into the program's
table and answers the call in one step, so there is never a descriptor without an answer.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from vfiomig.abi.syscalls import X86_64
from vfiomig.doors.syscall.answers import CARRY_ON, HELD
from vfiomig.doors.syscall.opened import DeviceOpen, IommufdOpen
from vfiomig.doors.syscall.paths import DEVICES, IOMMU, read_path
from vfiomig.memory import CallMemory, ProcessMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.doors.syscall.answers import Answer, Handler
    from vfiomig.doors.syscall.door import Door, Turn
    from vfiomig.doors.syscall.notify import Notification
    from vfiomig.doors.syscall.paths import DevTree

__all__ = ("PathCalls",)

AT_FDCWD: Final = (1 << 64) - 100
AT_EMPTY_PATH: Final = 0x1000
OPEN_HOW_SIZE: Final = 24  # struct open_how, first version: flags, mode, resolve
#: Status flags that open hands on to the descriptor.
KEPT_FLAGS: Final = os.O_ACCMODE | os.O_NONBLOCK | os.O_APPEND


class PathCalls:
    """Answers for one door's tree of devices."""

    def __init__(self, door: Door, tree: DevTree) -> None:
        self._door = door
        self._tree = tree

    def handlers(self) -> dict[int, Handler]:
        """Position of the directory (if any) and of the path, for each call."""
        return {
            X86_64[name]: self._handler(directory, path, action)
            for name, directory, path, action in (
                ("open", None, 0, self._open(1)),
                ("creat", None, 0, self._creat),
                ("openat", 0, 1, self._open(2)),
                ("openat2", 0, 1, self._openat2),
                ("access", None, 0, self._access(1)),
                ("faccessat", 0, 1, self._access(2)),
                ("faccessat2", 0, 1, self._access(2)),
                ("stat", None, 0, self._stat(1)),
                ("lstat", None, 0, self._stat(1)),
                ("newfstatat", 0, 1, self._stat(2)),
                ("statx", 0, 1, self._statx),
                ("readlink", None, 0, self._readlink),
                ("readlinkat", 0, 1, self._readlink),
            )
        }

    def _handler(
        self,
        directory: int | None,
        position: int,
        action: Callable[[Notification, Turn, str], Answer],
    ) -> Handler:
        def handle(call: Notification, turn: Turn) -> Answer:
            path = read_path(ProcessMemory(call.tid), call.args[position])
            if path is None:
                if directory is None or not self._stats_descriptor(call):
                    return CARRY_ON
                path = self._path_of(call, call.args[directory])
            elif not path.startswith("/"):
                path = self._path_in(call, directory, path)
            if path is None or not self._tree.has(path):
                return CARRY_ON
            self._door.settle(turn)
            if turn.traced is not None:
                turn.traced.extend((path, NAMES[call.nr]))
            return action(call, turn, path)

        return handle

    def _path_in(self, call: Notification, directory: int | None, path: str) -> str | None:
        """Name a path that is relative to a listing of ours."""
        if directory is None or call.args[directory] == AT_FDCWD:
            return None
        try:
            inside = os.readlink(f"/proc/{call.tid}/fd/{call.args[directory] & 0xFFFF_FFFF}")
        except OSError:
            return None
        return self._tree.inside(inside, path)

    def _stats_descriptor(self, call: Notification) -> bool:
        flags = {X86_64["newfstatat"]: 3, X86_64["statx"]: 2}.get(call.nr)
        return flags is not None and bool(call.args[flags] & AT_EMPTY_PATH)

    def _path_of(self, call: Notification, fd: int) -> str | None:
        """Name the path of an open: fstat of a device shows the device."""
        opened = self._door.table.find(call.tid, fd)
        if isinstance(opened, DeviceOpen):
            return f"{DEVICES}/{self._door.devices[opened.number].name}"
        return IOMMU if isinstance(opened, IommufdOpen) else None

    # Opening.

    def _open(self, position: int) -> Callable[[Notification, Turn, str], Answer]:
        return lambda call, turn, path: self._do_open(call, turn, path, call.args[position])

    def _creat(self, call: Notification, turn: Turn, path: str) -> Answer:
        return self._do_open(call, turn, path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def _openat2(self, call: Notification, turn: Turn, path: str) -> Answer:
        if call.args[3] < OPEN_HOW_SIZE:
            raise OSError(errno.EINVAL, "struct open_how is too small")
        how = CallMemory(ProcessMemory(call.tid)).read(call.args[2], OPEN_HOW_SIZE)
        return self._do_open(call, turn, path, int.from_bytes(how[:8], "little"))

    def _do_open(self, call: Notification, turn: Turn, path: str, flags: int) -> Answer:
        if flags & os.O_CREAT and flags & os.O_EXCL:
            raise OSError(errno.EEXIST, path)
        number = self._tree.device(path)
        if self._tree.is_folder(path):
            if flags & (os.O_CREAT | os.O_ACCMODE):
                raise OSError(errno.EISDIR, path)
            fd = self._tree.open_folder(path)
        elif flags & os.O_DIRECTORY:
            raise OSError(errno.ENOTDIR, path)
        elif number is None:
            fd = self._door.open_iommu(flags & KEPT_FLAGS)
        else:
            turn.pass_on()  # a V6 device starts here
            fd = self._door.open_device(number, flags & KEPT_FLAGS)
        with fd:
            self._door.give(call, fd, cloexec=bool(flags & os.O_CLOEXEC), turn=turn)
        return HELD

    # Looking.

    def _access(self, position: int) -> Callable[[Notification, Turn, str], Answer]:
        def action(call: Notification, turn: Turn, path: str) -> Answer:  # noqa: ARG001
            self._tree.check_access(path, call.args[position] & 0xFFFF_FFFF)
            return 0

        return action

    def _stat(self, position: int) -> Callable[[Notification, Turn, str], Answer]:
        def action(call: Notification, turn: Turn, path: str) -> Answer:  # noqa: ARG001
            ProcessMemory(call.tid).write(call.args[position], self._tree.stat(path))
            return 0

        return action

    def _statx(self, call: Notification, turn: Turn, path: str) -> Answer:  # noqa: ARG002
        ProcessMemory(call.tid).write(call.args[4], self._tree.statx(path))
        return 0

    def _readlink(self, call: Notification, turn: Turn, path: str) -> Answer:  # noqa: ARG002
        raise OSError(errno.EINVAL, f"{path} is no symbolic link")


NAMES: Final = {number: name for name, number in X86_64.items()}
