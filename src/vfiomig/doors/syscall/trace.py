"""One line for every request that the door answered, for people or as JSON.

A line that cannot be written (the disk is full, the reader of a pipe is gone) ends the trace with
one warning; the program's requests are answered as before.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import struct
import threading
import time
from typing import TYPE_CHECKING, TextIO

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import FdKind, feature_name, request_name
from vfiomig.abi.syscalls import X86_64
from vfiomig.core.group import read_name
from vfiomig.fsm import State

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vfiomig.core.migration import ArcEvent
    from vfiomig.core.vfio_device import VfioDevice
    from vfiomig.doors.syscall.caller import SyscallCaller
    from vfiomig.doors.syscall.notify import Notification

__all__ = ("Line", "Trace", "open_trace")

log = logging.getLogger("vfiomig.doors.syscall")

OPERATIONS = (
    (vfio.VFIO_DEVICE_FEATURE_PROBE, "PROBE"),
    (vfio.VFIO_DEVICE_FEATURE_GET, "GET"),
    (vfio.VFIO_DEVICE_FEATURE_SET, "SET"),
)
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


class Trace:
    """Writes to ``out``; times are seconds since it was made."""

    def __init__(self, out: TextIO, devices: Sequence[VfioDevice], *, as_json: bool) -> None:
        self._out: TextIO | None = out
        self._as_json = as_json
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._current = threading.local()
        for device in devices:
            device.migration.observers.append(self._saw_arc)

    def begin(self, call: Notification) -> Line:
        """Start to collect what a call, answered by this thread, turns out to be."""
        self._current.line = line = Line(call)
        return line

    def end(self, line: Line, result: int) -> None:
        """Write the line, before the program can go on."""
        if not line.on:
            return
        row: dict[str, object] = {
            "time": round(time.monotonic() - self._start, 6),
            "thread": line.call.tid,
            "fd": None if line.is_path else line.call.args[0] & 0xFFFF_FFFF,
            "on": line.on,
            "request": line.request,
            "arcs": list(line.arcs),
            "result": max(result, -1),
            "errno": errno.errorcode.get(-result, str(-result)) if result < 0 else None,
        }
        self._write(json.dumps(row) if self._as_json else _render(row))

    def _write(self, text: str) -> None:
        with self._lock:
            if self._out is None:
                return
            try:
                self._out.write(text + "\n")
                self._out.flush()
            except (OSError, ValueError) as failure:
                self._out = None
                log.warning("the trace ends here, it cannot be written: %s", failure)

    def _saw_arc(self, event: ArcEvent) -> None:
        line: Line | None = getattr(self._current, "line", None)
        if line is not None:
            line.arcs.append(str(event))


def open_trace(path: Path) -> TextIO:
    """Open a file for a trace: without a buffer, whose rest would fail once more at the close."""
    return io.TextIOWrapper(path.open("wb", buffering=0), encoding="utf-8", write_through=True)


def _detail(name: str, arg: int, caller: SyscallCaller) -> str:
    if name == "VFIO_DEVICE_MIG_SET_STATE":
        return _state(caller.read(arg + vfio.MigSetState.device_state.offset, 4))
    if name in PLAIN:
        return str(arg)
    if name == "VFIO_GROUP_GET_DEVICE_FD":
        return read_name(arg, caller).decode("ascii", "backslashreplace")
    if name != "VFIO_DEVICE_FEATURE":
        return ""
    _, flags = HEADER.unpack(caller.read(arg, HEADER.size))
    words = [word for bit, word in OPERATIONS if flags & bit]
    index = flags & vfio.VFIO_DEVICE_FEATURE_MASK
    words.append(feature_name(index))
    is_set = flags & vfio.VFIO_DEVICE_FEATURE_SET and not flags & vfio.VFIO_DEVICE_FEATURE_PROBE
    if index == vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE and is_set:
        words.append(_state(caller.read(arg + HEADER.size, 4)))
    return " ".join(words)


def _state(data: bytes) -> str:
    number = int.from_bytes(data, "little")
    return State(number).name if number < len(State) else str(number)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _render(row: dict[str, object]) -> str:
    fd = "" if row["fd"] is None else f" fd {row['fd']}"
    arcs = row["arcs"]
    taken = f"  [{', '.join(arcs)}]" if isinstance(arcs, list) and arcs else ""
    failed = f" {row['errno']}" if row["errno"] else ""
    return (
        f"{row['time']:11.6f} {row['thread']} {row['on']}{fd} {row['request']}"
        f" = {row['result']}{failed}{taken}"
    )
