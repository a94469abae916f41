"""What a test leaves behind in its process: descriptors, threads, children.

Theory of operation
-------------------
A snapshot before a test is compared with the process after it. What ends by itself in the next
moments (a thread on its way out, a child that was just killed) gets a short grace. A descriptor
that is gone though the test did not open it is reported as well: a second close of a number
closes what somebody else has opened under it since.

The check must not be felt: a snapshot is one directory listing, the list of threads and, while
there is no child at all, one system call.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ("Snapshot", "left_behind", "take_snapshot")

#: On a busy machine; without anything left behind nobody waits.
_GRACE_S: Final = 5.0
_POLL_S: Final = 0.005

# linux/wait.h; children made by clone() without SIGCHLD count too.
_WALL: Final = 0x40000000

#: Leaks that were reported once, so that whoever closes them later isn't blamed for it.
_reported: set[tuple[int, str]] = set()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a process holds at one moment."""

    descriptors: frozenset[tuple[int, str]]
    threads: frozenset[threading.Thread]
    children: frozenset[int]


def take_snapshot() -> Snapshot:
    """Note what this process holds now."""
    return Snapshot(_descriptors(), frozenset(threading.enumerate()), _children())


def left_behind(before: Snapshot) -> list[str]:
    """Return a sentence for each thing that is still there, or is gone, since ``before``."""
    deadline = time.monotonic() + _GRACE_S
    now = take_snapshot()
    while _differs(before, now) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        now = take_snapshot()
    return _sentences(before, now)


def _differs(before: Snapshot, now: Snapshot) -> bool:
    return (
        now.descriptors != before.descriptors
        or not now.threads <= before.threads
        or not now.children <= before.children
    )


def _sentences(before: Snapshot, now: Snapshot) -> list[str]:
    opened = now.descriptors - before.descriptors
    closed = before.descriptors - now.descriptors - _reported
    _reported.update(opened)
    return [
        *(f"descriptor {fd} ({target}) is still open: close it" for fd, target in sorted(opened)),
        *(
            f"descriptor {fd} ({target}) was closed, and the test had not opened it"
            for fd, target in sorted(closed)
        ),
        *(
            f"thread {thread.name!r} is still running: stop and join it"
            for thread in now.threads - before.threads
        ),
        *(_child_sentence(pid) for pid in sorted(now.children - before.children)),
    ]


def is_open(number: int) -> bool:
    """Tell whether a descriptor is there."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _descriptors() -> frozenset[tuple[int, str]]:
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        # The descriptor of the listing itself is closed by now.
        with suppress(FileNotFoundError):
            found.add((int(link.name), str(link.readlink())))
    return frozenset(found)


def _children() -> frozenset[int]:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL)
    except ChildProcessError:
        return frozenset()
    own = os.getpid()
    return frozenset(
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _parent(entry) == own
    )


def _parent(process: Path) -> int | None:
    try:
        stat = (process / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # "pid (command) state parent ...", and a command may contain anything.
    return int(stat.rpartition(")")[2].split()[1])


def _child_sentence(pid: int) -> str:
    with suppress(OSError):
        words = Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode()
        if words:
            return f"child process {pid} is still running: end it and wait for it ({words.strip()})"
    return f"child process {pid} has ended and nobody waited for it"
