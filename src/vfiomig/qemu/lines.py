"""A socket to a program that talks in lines, under deadlines."""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING, Final

from vfiomig.errors import GuestEnded, GuestTimeout

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("Lines",)

_CHUNK: Final = 65536


class Lines:
    """A byte stream in both directions, with what was received and nobody has taken yet."""

    def __init__(self, socket_: socket.socket, name: str) -> None:
        """Take ``socket_`` over; ``name`` is what errors call it."""
        socket_.setblocking(False)
        self._socket = socket_
        self._name = name
        self._untaken = bytearray()

    def send(self, data: bytes, descriptors: Sequence[int] = (), *, timeout: float = 10) -> None:
        """Send all of ``data``, and ``descriptors`` with its first byte."""
        deadline = time.monotonic() + timeout
        rest = memoryview(data)
        while rest:
            self._wait(select.POLLOUT, deadline, f"does not take {data[:80]!r}")
            try:
                if descriptors:
                    sent = socket.send_fds(self._socket, [rest], descriptors)
                    descriptors = ()
                else:
                    sent = self._socket.send(rest)
            except (BrokenPipeError, ConnectionResetError):
                raise GuestEnded(f"{self._name} is closed at its other end") from None
            rest = rest[sent:]

    def line(self, *, timeout: float = 30) -> bytes:
        """Wait for a whole line of any length and return it without its end.

        Raises:
            GuestTimeout: when it has not come after ``timeout`` seconds.
            GuestEnded: when nothing can come any more.
        """
        deadline = time.monotonic() + timeout
        start = 0
        while (end := self._untaken.find(b"\n", start)) < 0:
            start = len(self._untaken)
            self._receive(deadline)
        line = bytes(self._untaken[:end])
        del self._untaken[: end + 1]
        return line

    def close(self) -> None:
        """Close it; once more is harmless."""
        self._socket.close()

    def _receive(self, deadline: float) -> None:
        self._wait(select.POLLIN, deadline, "sent no line")
        try:
            data = self._socket.recv(_CHUNK)
        except ConnectionResetError:
            data = b""
        if not data:
            raise GuestEnded(f"{self._name} sent no line before its end")
        self._untaken += data

    def _wait(self, events: int, deadline: float, failure: str) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            raise GuestTimeout(f"{self._name} {failure} in time")
