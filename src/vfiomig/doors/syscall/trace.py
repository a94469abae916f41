"""One line for every request that the door answered."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, TextIO

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import FdKind, request_name
from vfiomig.abi.syscalls import X86_64
from vfiomig.core.group import read_name
from vfiomig.doors.tracing import TraceFile, feature_words, state_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.core.migration import ArcEvent
    from vfiomig.core.vfio_device import VfioDevice
    from vfiomig.doors.syscall.caller import SyscallCaller
    from vfiomig.doors.syscall.notify import Notification

__all__ = ("Line", "Trace")

HEADER = struct.Struct("<II")
#: Requests whose argument is a number.
PLAIN = frozenset({"VFIO_CHECK_EXTENSION", "VFIO_SET_IOMMU"})
NAMES = {number: name for name, number in X86_64.items()}
#: Arguments of system calls other than ioctl that a line shows, by their position.
SHOWN = {
    **dict.fromkeys(("read", "write", "readv", "writev"), ((2, "d"),)),
    **dict.fromkeys(
        ("pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2"),
        ((2, "d"), (3, "#x")),
    ),
    "mmap": ((1, "d"), (5, "#x")),
    "ftruncate": ((1, "d"),),
}


class Line:
    """What is going to be told of one call; of calls that are not about us, nothing."""

    __slots__ = ("arcs", "call", "is_path", "on", "request")

    def __init__(self, call: Notification) -> None:
        self.call = call
        self.on = ""
        self.request = ""
        self.is_path = False
        self.arcs: list[str] = []

    def about_path(self, path: str) -> None:
        self.on, self.is_path = path, True
        self.request = NAMES[self.call.nr]

    def about_access(self, label: str) -> None:
        name = NAMES[self.call.nr]
        words = (format(_signed(self.call.args[at]), how) for at, how in SHOWN.get(name, ()))
        self.on, self.request = label, f"{name}({', '.join(words)})"

    def about_request(self, label: str, kind: FdKind, caller: SyscallCaller) -> None:
        """Name a request, with the part of its argument that tells what it is about."""
        number, arg = self.call.args[1] & 0xFFFF_FFFF, self.call.args[2]
        name = request_name(kind, number)
        try:
            detail = _detail(name, arg, caller)
        except OSError:
            detail = f"{arg:#x}"
        self.on, self.request = label, f"{name}({detail})"


class Trace(TraceFile):
    """The trace of a program's calls on ``devices``."""

    def __init__(self, out: TextIO, devices: Sequence[VfioDevice], *, as_json: bool) -> None:
        super().__init__(out, as_json=as_json)
        self._current = threading.local()
        for device in devices:
            device.migration.observers.append(self._saw_arc)

    def begin(self, call: Notification) -> Line:
        """Start to collect what a call, answered by this thread, turns out to be."""
        self._current.line = line = Line(call)
        return line

    def end(self, line: Line, result: int) -> None:
        """Write the line, before the program can go on."""
        if line.on:
            fd = None if line.is_path else line.call.args[0] & 0xFFFF_FFFF
            who = {"thread": line.call.tid, "fd": fd}
            self.write(who, line.on, line.request, result, line.arcs)

    def _saw_arc(self, event: ArcEvent) -> None:
        line: Line | None = getattr(self._current, "line", None)
        if line is not None:
            line.arcs.append(str(event))


def _detail(name: str, arg: int, caller: SyscallCaller) -> str:
    if name == "VFIO_DEVICE_MIG_SET_STATE":
        return state_name(caller.read(arg + vfio.MigSetState.device_state.offset, 4))
    if name in PLAIN:
        return str(arg)
    if name == "VFIO_GROUP_GET_DEVICE_FD":
        return read_name(arg, caller).decode("ascii", "backslashreplace")
    if name != "VFIO_DEVICE_FEATURE":
        return ""
    _, flags = HEADER.unpack(caller.read(arg, HEADER.size))
    try:
        payload = caller.read(arg + HEADER.size, 4)
    except OSError:
        payload = b""
    return feature_words(flags, payload)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
