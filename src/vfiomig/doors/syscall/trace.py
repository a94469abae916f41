"""One line for every request that the door answered, for people or as JSON."""

from __future__ import annotations

import errno
import json
import struct
import threading
import time
from typing import TYPE_CHECKING, TextIO

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import FdKind, feature_name, request_name
from vfiomig.fsm import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.core.migration import ArcEvent
    from vfiomig.core.vfio_device import VfioDevice
    from vfiomig.doors.syscall.caller import SyscallCaller
    from vfiomig.doors.syscall.door import Turn
    from vfiomig.doors.syscall.notify import Notification

__all__ = ("Trace",)

OPERATIONS = (
    (vfio.VFIO_DEVICE_FEATURE_PROBE, "PROBE"),
    (vfio.VFIO_DEVICE_FEATURE_GET, "GET"),
    (vfio.VFIO_DEVICE_FEATURE_SET, "SET"),
)
HEADER = struct.Struct("<II")


class Trace:
    """Writes to ``out``; times are seconds since it was made."""

    def __init__(self, out: TextIO, devices: Sequence[VfioDevice], *, as_json: bool) -> None:
        self._out = out
        self._as_json = as_json
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._local = threading.local()
        for device in devices:
            device.migration.observers.append(self._saw_arc)

    def begin(self, turn: Turn) -> None:
        """Start to collect what a call turns out to be."""
        turn.traced = []
        self._local.arcs = []

    def end(self, call: Notification, traced: Sequence[str], result: int) -> None:
        """Write the line; ``traced`` is what the call is made on, and what it asks."""
        on, asks = traced[0], traced[1]
        arcs = [str(event) for event in getattr(self._local, "arcs", ())]
        row: dict[str, object] = {
            "time": round(time.monotonic() - self._start, 6),
            "thread": call.tid,
            "fd": None if on.startswith("/") else call.args[0] & 0xFFFF_FFFF,
            "on": on,
            "request": asks,
            "arcs": arcs,
            "result": max(result, -1),
            "errno": errno.errorcode.get(-result, str(-result)) if result < 0 else None,
        }
        line = json.dumps(row) if self._as_json else _render(row)
        with self._lock:
            self._out.write(line + "\n")
            self._out.flush()

    def request(self, kind: FdKind, number: int, call: Notification, caller: SyscallCaller) -> str:
        """Name a request, with the part of its argument that tells what it is about."""
        name = request_name(kind, number)
        try:
            detail = _detail(name, call.args[2], caller)
        except OSError:
            detail = f"{call.args[2]:#x}"
        return f"{name}({detail})"

    def _saw_arc(self, event: ArcEvent) -> None:
        arcs = getattr(self._local, "arcs", None)
        if arcs is not None:
            arcs.append(event)


def _detail(name: str, arg: int, caller: SyscallCaller) -> str:
    if name == "VFIO_DEVICE_MIG_SET_STATE":
        return _state(caller.read(arg + vfio.MigSetState.device_state.offset, 4))
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


def _render(row: dict[str, object]) -> str:
    fd = "" if row["fd"] is None else f" fd {row['fd']}"
    arcs = row["arcs"]
    taken = f"  [{', '.join(arcs)}]" if isinstance(arcs, list) and arcs else ""
    failed = f" {row['errno']}" if row["errno"] else ""
    return (
        f"{row['time']:11.6f} {row['thread']} {row['on']}{fd} {row['request']}"
        f" = {row['result']}{failed}{taken}"
    )
