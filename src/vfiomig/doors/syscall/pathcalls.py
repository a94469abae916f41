"""System calls that name a path: open, stat, access, readlink in all their forms, and xattrs.

Theory of operation
===================
A path that is not ours goes on to the kernel. Ours are found by name, from the program's working
directory or the folder that the call names, and through /proc/self/fd: opening that is opening
the device anew, as it is for a device of the kernel. Links elsewhere that lead to us are not
followed. What is ours in sysfs is a real file under another name (standin.py), which the call is
about then.

Opening puts a placeholder into the program's table, gives up the copy of this process and only
then answers the call: nobody but the program can delay its last close.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import TYPE_CHECKING, Final

from vfiomig.abi.ioctls import FdKind
from vfiomig.abi.syscalls import X86_64
from vfiomig.doors.syscall.about import About
from vfiomig.doors.syscall.answers import CARRY_ON, HELD
from vfiomig.doors.syscall.opened import (
    ContainerOpen,
    DataOpen,
    DeviceOpen,
    GroupOpen,
    IommufdOpen,
    PathOpen,
)
from vfiomig.doors.syscall.paths import (
    ANONYMOUS,
    CONTAINER,
    DEVICES,
    IOMMU,
    VFIO,
    join,
    read_path,
)
from vfiomig.memory import CallMemory, MemoryRefused, ProcessMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.descriptors import Fd
    from vfiomig.doors.syscall.answers import Answer, Handler
    from vfiomig.doors.syscall.door import Door
    from vfiomig.doors.syscall.notify import Notification
    from vfiomig.doors.syscall.receivers import Turn

    Action = Callable[[Notification, Turn, str], Answer]

__all__ = ("PathCalls",)

LOW: Final = 0xFFFF_FFFF
AT_FDCWD: Final = LOW - 99
AT_EMPTY_PATH: Final = 0x1000
AT_SYMLINK_NOFOLLOW: Final = 0x100
OPEN_HOW_SIZE: Final = 24  # struct open_how, first version: flags, mode, resolve
#: Status flags that open hands on to the descriptor.
KEPT_FLAGS: Final = os.O_NONBLOCK | os.O_APPEND
#: Paths that lead to a descriptor of the program, or of another process of it.
TO_DESCRIPTOR = re.compile(
    r"/proc/(?:self|thread-self|(?P<pid>[0-9]+)(?:/task/[0-9]+)?)/fd/(?P<fd>[0-9]+)"
    r"|/dev/(?:fd/(?P<dev_fd>[0-9]+)|(?P<name>stdin|stdout|stderr))"
)
STANDARD: Final = {"stdin": 0, "stdout": 1, "stderr": 2}
OPENS: Final = frozenset(X86_64[name] for name in ("open", "openat", "openat2", "creat"))


class PathCalls:
    """Answers for one door's tree of devices."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._tree = door.tree
        self._sysfs = door.sysfs
        self._stand_in = door.stand_in

    def handlers(self) -> dict[int, Handler]:
        """Position of the directory (if any) and of the path, for each call."""
        rows: tuple[tuple[str, int | None, int, Action], ...] = (
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
            ("readlink", None, 0, self._readlink(1)),
            ("readlinkat", 0, 1, self._readlink(2)),
            ("getxattr", None, 0, _no_attribute),
            ("lgetxattr", None, 0, _no_attribute),
            ("listxattr", None, 0, _no_attributes),
            ("llistxattr", None, 0, _no_attributes),
        )
        handlers = {
            X86_64[name]: self._handler(directory, position, action)
            for name, directory, position, action in rows
        }
        return {**handlers, X86_64["fstat"]: self._fstat}

    def _handler(self, directory: int | None, position: int, action: Action) -> Handler:
        def handle(call: Notification, turn: Turn) -> Answer:
            try:
                named = read_path(ProcessMemory(call.tid), call.args[position])
            except MemoryRefused as problem:
                self._door.say_once(str(problem))
                return CARRY_ON
            path = None if named is None else self._meant(call, directory, named)
            if named is None or path is None:
                return CARRY_ON
            if turn.line is not None:
                turn.line.about_path(path)
            self._check(path, named, follow=not _looks_at_link(call))
            self._door.settle(turn, self._tree.device(path))
            return action(call, turn, path)

        return handle

    def _meant(self, call: Notification, directory: int | None, named: str) -> str | None:
        """Return the path of ours that is meant: by a name, or by the descriptor without one."""
        if named:
            return self._resolve(call, directory, named)
        if directory is not None and _names_descriptor(call):
            return self._path_of(call.tid, call.args[directory])
        return None

    def _resolve(self, call: Notification, directory: int | None, named: str) -> str | None:
        """Return the path of ours that a name leads to; ``None`` if it leads elsewhere."""
        if not named.startswith("/"):
            base = self._base(call, directory)
            if base is None:
                return None
            named = f"{base}/{named}"
        path = self._walk(named)
        match = TO_DESCRIPTOR.fullmatch(path)
        if match is not None:
            return self._through_descriptor(call, match)
        return path if self._has(path) or path.startswith(f"{VFIO}/") else None

    def _walk(self, named: str) -> str:
        """Put a path together; ``..`` behind a link of ours leaves where that leads to."""
        if ".." not in named:
            return join("/", named)
        path = "/"
        for part in named.split("/"):
            if part == ".." and self._sysfs.has(path):
                path = self._stand_in.name_of(os.path.realpath(self._stand_in.path(path)))
            path = join(path, part)
        return path

    def _has(self, path: str) -> bool:
        return self._tree.has(path) or self._sysfs.has(path)

    def _about(self, path: str, *, follow: bool = True) -> About:
        """Tell of a path of ours; links of sysfs lead to what is ours as well."""
        if self._tree.has(path):
            return self._tree.about(path)
        return About.of(os.stat(self._stand_in.path(path), follow_symlinks=follow))

    def _base(self, call: Notification, directory: int | None) -> str | None:
        """Name the folder in which a relative path begins."""
        fd = AT_FDCWD if directory is None else call.args[directory] & LOW
        try:
            link = os.readlink(f"/proc/{call.tid}/" + ("cwd" if fd == AT_FDCWD else f"fd/{fd}"))
        except OSError:
            return None
        return self._stand_in.name_of(link)

    def _through_descriptor(self, call: Notification, match: re.Match[str]) -> str | None:
        if _looks_at_link(call):
            return None
        tid = int(match["pid"] or call.tid)
        fd = int(match["fd"] or match["dev_fd"] or STANDARD[match["name"]])
        path = self._path_of(tid, fd)
        is_anonymous = path == ANONYMOUS or isinstance(self._door.table.find(tid, fd), DataOpen)
        if call.nr in OPENS and is_anonymous:
            raise OSError(errno.ENXIO, "what has no path cannot be opened again")
        return path

    def _path_of(self, tid: int, fd: int) -> str | None:
        """Name what a descriptor of ours is an open of: fstat of a device shows the device."""
        opened = self._door.table.find(tid, fd)
        if isinstance(opened, DeviceOpen):
            return f"{DEVICES}/{opened.label}" if opened.file.binds else ANONYMOUS
        if isinstance(opened, GroupOpen):
            return f"{VFIO}/{opened.number}"
        if isinstance(opened, PathOpen):
            return opened.label
        if isinstance(opened, ContainerOpen | IommufdOpen):
            return CONTAINER if isinstance(opened, ContainerOpen) else IOMMU
        if isinstance(opened, DataOpen) or not self._stand_in.is_made:
            return None
        try:
            path = self._stand_in.name_of(os.readlink(f"/proc/{tid}/fd/{fd & LOW}"))
        except OSError:
            return None
        return path if self._has(path) else None

    def _check(self, path: str, named: str, *, follow: bool) -> None:
        """Refuse what is not there: the real machine's devices are not this program's."""
        if not self._has(path):
            above = os.path.dirname(path)
            is_below = self._tree.has(above) and not self._tree.is_folder(above)
            raise OSError(errno.ENOTDIR if is_below else errno.ENOENT, path)
        about = self._about(path, follow=follow)
        if named.endswith(("/", "/.")) and not stat.S_ISDIR(about.mode):
            raise OSError(errno.ENOTDIR, path)

    # Opening.

    def _open(self, position: int) -> Action:
        return lambda call, turn, path: self._do_open(call, turn, path, call.args[position])

    def _creat(self, call: Notification, turn: Turn, path: str) -> Answer:
        return self._do_open(call, turn, path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def _openat2(self, call: Notification, turn: Turn, path: str) -> Answer:
        if call.args[3] < OPEN_HOW_SIZE:
            raise OSError(errno.EINVAL, "struct open_how is too small")
        how = CallMemory(ProcessMemory(call.tid)).read(call.args[2], OPEN_HOW_SIZE)
        return self._do_open(call, turn, path, int.from_bytes(how[:8], "little"))

    def _do_open(self, call: Notification, turn: Turn, path: str, flags: int) -> Answer:
        if flags & os.O_CREAT and flags & os.O_EXCL and not flags & os.O_PATH:
            raise OSError(errno.EEXIST, path)
        is_folder = stat.S_ISDIR(self._about(path).mode)
        if flags & os.O_DIRECTORY and not is_folder:
            raise OSError(errno.ENOTDIR, path)
        if flags & os.O_PATH:
            # A mere handle cannot be put into another table: a file stands for it too.
            flags &= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_PATH
        if is_folder and flags & (os.O_CREAT | os.O_ACCMODE):
            raise OSError(errno.EISDIR, path)
        if is_folder or not self._tree.has(path):
            if flags & os.O_ACCMODE:
                raise OSError(errno.EACCES, f"{path} cannot be written")
            fd = self._stand_in.open(path, flags & os.O_NOFOLLOW)
        elif flags & os.O_PATH:
            fd = self._door.open_path(path)
        else:
            # The odd mode 3 opens for requests only; reading is not missed where it changes nothing.
            mode = flags & os.O_ACCMODE
            kept = flags & KEPT_FLAGS | (mode if mode != os.O_ACCMODE else os.O_RDONLY)
            fd = self._open_file(path, kept, turn)
        with fd:
            self._door.give(call, fd, cloexec=bool(flags & os.O_CLOEXEC), turn=turn)
        return HELD

    def _open_file(self, path: str, flags: int, turn: Turn) -> Fd:
        node = self._tree.node(path)
        if node.kind is FdKind.IOMMUFD:
            return self._door.open_iommu(flags)
        if node.kind is FdKind.CONTAINER:
            return self._door.open_container(flags)
        if node.kind is FdKind.GROUP:
            return self._door.open_group(node.number, flags)
        turn.pass_on()  # a V6 device starts here
        return self._door.open_device(node.number, flags)

    # Looking.

    def _access(self, position: int) -> Action:
        def action(call: Notification, _turn: Turn, path: str) -> Answer:
            mode = call.args[position] & LOW
            if mode & ~(os.R_OK | os.W_OK | os.X_OK):
                raise OSError(errno.EINVAL, "mode")
            refused = 0 if stat.S_ISDIR(self._about(path).mode) else os.X_OK
            if not self._tree.has(path):
                refused |= os.W_OK
            if mode & refused:
                raise OSError(errno.EACCES, path)
            return 0

        return action

    def _stat(self, position: int) -> Action:
        def action(call: Notification, _turn: Turn, path: str) -> Answer:
            about = self._about(path, follow=not _looks_at_link(call))
            ProcessMemory(call.tid).write(call.args[position], about.stat())
            return 0

        return action

    def _statx(self, call: Notification, _turn: Turn, path: str) -> Answer:
        about = self._about(path, follow=not _looks_at_link(call))
        ProcessMemory(call.tid).write(call.args[4], about.statx())
        return 0

    def _fstat(self, call: Notification, turn: Turn) -> Answer:
        path = self._path_of(call.tid, call.args[0])
        if path is None:
            return CARRY_ON
        if turn.line is not None:
            turn.line.about_access(path)
        return self._stat(1)(call, turn, path)

    def _readlink(self, position: int) -> Action:
        """Read what /proc/self/fd/N links to, or a link of sysfs: no other path of ours is one."""

        def action(call: Notification, _turn: Turn, path: str) -> Answer:
            named = read_path(ProcessMemory(call.tid), call.args[position - 1]) or ""
            if "/fd/" not in named:
                if self._tree.has(path):
                    raise OSError(errno.EINVAL, f"{path} is no symbolic link")
                path = os.readlink(self._stand_in.path(path))
            size = call.args[position + 1] & LOW
            if not 0 < size <= LOW >> 1:
                raise OSError(errno.EINVAL, "size of the buffer")
            text = os.fsencode(path)[:size]
            ProcessMemory(call.tid).write(call.args[position], text)
            return len(text)

        return action


def _no_attribute(_call: Notification, _turn: Turn, path: str) -> Answer:
    raise OSError(errno.ENODATA, f"{path} has no extended attribute")


def _no_attributes(_call: Notification, _turn: Turn, _path: str) -> Answer:
    return 0


def _looks_at_link(call: Notification) -> bool:
    """Whether a stat is about a link, and not about what it leads to."""
    flags = {X86_64["newfstatat"]: 3, X86_64["statx"]: 2}.get(call.nr)
    if flags is None:
        return call.nr == X86_64["lstat"]
    return bool(call.args[flags] & AT_SYMLINK_NOFOLLOW)


def _names_descriptor(call: Notification) -> bool:
    """Whether no path at all means the descriptor beside it."""
    flags = {X86_64["newfstatat"]: 3, X86_64["statx"]: 2}.get(call.nr)
    return flags is not None and bool(call.args[flags] & AT_EMPTY_PATH)
