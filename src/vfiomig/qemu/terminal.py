"""The host's end of a guest's serial port: read as expect does, under deadlines.

Theory of operation
-------------------
What the guest says goes to a file and what it is told comes from a FIFO, because QEMU's serial
port feels its host. Into a socket or pipe that nobody empties it stops sending, with bytes in its
FIFO; these are part of the machine's state and migrate, but the stopped source sends them as well
as soon as there is room, and they are seen twice. A file takes everything at once, so what a
stopped machine has said is complete, and whoever has something else to do need not read.

Waiting is inotify on the file and a pidfd of QEMU, which says that nothing more can come.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import time
from typing import TYPE_CHECKING, Final

from vfiomig.errors import GuestEnded, GuestTimeout

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ("Terminal",)

_IN_MODIFY: Final = 0x2
_CHUNK: Final = 1 << 20
_OVERLAP: Final = 4096
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Terminal:
    """A serial port, with what the guest said there and nobody has taken yet."""

    def __init__(self, said: Path, told: Path, name: str) -> None:
        """Create the file ``said`` and the FIFO ``told``; ``name`` is what errors call it."""
        self._name = name
        self._said = os.open(said, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.mkfifo(told, 0o600)
        # Open for reading as well, so that neither side waits for the other and none sees an end.
        self._told = os.open(told, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._inotify = _watch(said)
        self._pidfd = -1
        self._untaken = bytearray()

    def attach(self, pid: int) -> None:
        """Take the end of process ``pid``, QEMU or its launcher, for the end of the guest."""
        self._pidfd = os.pidfd_open(pid)

    def send(self, data: bytes, *, timeout: float = 10) -> None:
        """Send all of ``data``, which the guest may take its time to read."""
        deadline = time.monotonic() + timeout
        rest = memoryview(data)
        while rest:
            self._wait(self._told, select.POLLOUT, deadline, f"does not take {data[:80]!r}")
            rest = rest[os.write(self._told, rest) :]

    def expect(self, pattern: bytes, *, timeout: float = 30) -> re.Match[bytes]:
        """Wait for ``pattern`` and return its match, taking everything up to its end.

        See :meth:`take` for the limits of a pattern and what is raised.
        """
        return self.take(pattern, timeout=timeout)[1]

    def take(self, pattern: bytes, *, timeout: float = 30) -> tuple[bytes, re.Match[bytes]]:
        """Wait for ``pattern``; return what came before it, and its match.

        A match may be 4 KiB long, so that much data need not be searched again and again.

        Raises:
            GuestTimeout: when it has not come after ``timeout`` seconds.
            GuestEnded: when nothing can come any more.
        """
        compiled = re.compile(pattern, re.DOTALL)
        deadline = time.monotonic() + timeout
        searched = 0
        while True:
            ended = self._has_ended()  # before the last look, after which nothing comes
            self._read()
            text = bytes(self._untaken)
            if match := compiled.search(text, max(0, searched - _OVERLAP)):
                del self._untaken[: match.end()]
                return text[: match.start()], match
            if ended:
                raise GuestEnded(f"{self._name} {self._lacks(pattern)} before its end")
            searched = len(text)
            self._wait(self._inotify, select.POLLIN, deadline, self._lacks(pattern))
            _empty(self._inotify)

    def drain(self) -> bytes:
        """Take everything that the guest has said, without waiting."""
        self._read()
        taken = bytes(self._untaken)
        self._untaken.clear()
        return taken

    def close(self) -> None:
        """Close it; once more is harmless."""
        for number in (self._said, self._told, self._inotify, self._pidfd):
            if number >= 0:
                os.close(number)
        self._said = self._told = self._inotify = self._pidfd = -1

    def _read(self) -> None:
        while data := os.read(self._said, _CHUNK):
            self._untaken += data

    def _has_ended(self) -> bool:
        return bool(_poll([(self._pidfd, select.POLLIN)], 0))

    def _wait(self, fd: int, events: int, deadline: float, failure: str) -> None:
        remaining = deadline - time.monotonic()
        ready = _poll([(fd, events), (self._pidfd, select.POLLIN)], max(0, remaining))
        if not ready:
            raise GuestTimeout(f"{self._name} {failure} in time")
        if events == select.POLLOUT and fd not in ready:
            raise GuestEnded(f"{self._name} {failure}: it has ended")

    def _lacks(self, pattern: bytes) -> str:
        return f"sent no {pattern!r}, but {bytes(self._untaken[-200:])!r},"


def _watch(path: Path) -> int:
    inotify: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if inotify < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"inotify: {os.strerror(number)}")
    if _libc.inotify_add_watch(inotify, os.fsencode(path), _IN_MODIFY) < 0:
        number = ctypes.get_errno()
        os.close(inotify)
        raise OSError(number, f"inotify: {os.strerror(number)}")
    return inotify


def _empty(inotify: int) -> None:
    """Take the events; what they say is in the file."""
    try:
        while os.read(inotify, 4096):
            pass
    except BlockingIOError:
        pass


def _poll(wanted: list[tuple[int, int]], timeout: float) -> set[int]:
    poll = select.poll()
    for fd, events in wanted:
        poll.register(fd, events)
    return {fd for fd, _ in poll.poll(timeout * 1000)}
