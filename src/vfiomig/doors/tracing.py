"""The file of a trace: one line for every request, for people or as JSON, whatever the door.

A line that cannot be written (the disk is full, the reader of a pipe is gone) ends the trace with
one warning; the program's requests are answered as before.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import threading
import time
from typing import TYPE_CHECKING, TextIO

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import feature_name
from vfiomig.fsm import State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ("TraceFile", "feature_words", "open_trace", "state_name")

log = logging.getLogger("vfiomig.doors")

OPERATIONS = (
    (vfio.VFIO_DEVICE_FEATURE_PROBE, "PROBE"),
    (vfio.VFIO_DEVICE_FEATURE_GET, "GET"),
    (vfio.VFIO_DEVICE_FEATURE_SET, "SET"),
)


class TraceFile:
    """Writes to ``out``; times are seconds since it was made."""

    def __init__(self, out: TextIO, *, as_json: bool) -> None:
        self._out: TextIO | None = out
        self._as_json = as_json
        self._start = time.monotonic()
        self._lock = threading.Lock()

    def write(
        self,
        who: Mapping[str, object],
        on: str,
        request: str,
        result: int,
        arcs: Sequence[str] = (),
    ) -> None:
        """Write a line: who asks, of what, for what, and a result or a negative errno."""
        row: dict[str, object] = {
            "time": round(time.monotonic() - self._start, 6),
            **who,
            "on": on,
            "request": request,
            "arcs": list(arcs),
            "result": max(result, -1),
            "errno": errno.errorcode.get(-result, str(-result)) if result < 0 else None,
        }
        text = json.dumps(row) if self._as_json else _render(row, arcs)
        with self._lock:
            if self._out is None:
                return
            try:
                self._out.write(text + "\n")
                self._out.flush()
            except (OSError, ValueError) as failure:
                self._out = None
                log.warning("the trace ends here, it cannot be written: %s", failure)


def open_trace(path: Path) -> TextIO:
    """Open a file for a trace: without a buffer, whose rest would fail once more at the close."""
    return io.TextIOWrapper(path.open("wb", buffering=0), encoding="utf-8", write_through=True)


def feature_words(flags: int, payload: bytes) -> str:
    """Tell what a VFIO_DEVICE_FEATURE asks for; ``payload`` is what stands behind its header."""
    words = [word for bit, word in OPERATIONS if flags & bit]
    index = flags & vfio.VFIO_DEVICE_FEATURE_MASK
    words.append(feature_name(index))
    sets = flags & vfio.VFIO_DEVICE_FEATURE_SET and not flags & vfio.VFIO_DEVICE_FEATURE_PROBE
    if sets and index == vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE:
        words.append(state_name(payload[:4]))
    return " ".join(words)


def state_name(data: bytes) -> str:
    """Name the state that a struct has in these bytes."""
    number = int.from_bytes(data, "little")
    return State(number).name if number < len(State) else str(number)


def _render(row: Mapping[str, object], arcs: Sequence[str]) -> str:
    if "client" in row:
        who = f"client {row['client']} {row['on']}"
    else:
        who = f"{row['thread']} {row['on']}" + (f" fd {row['fd']}" if row["fd"] is not None else "")
    taken = f"  [{', '.join(arcs)}]" if arcs else ""
    failed = f" {row['errno']}" if row["errno"] else ""
    return f"{row['time']:11.6f} {who} {row['request']} = {row['result']}{failed}{taken}"
