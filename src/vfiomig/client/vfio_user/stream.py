"""The socket of a connection: bytes move at once or not at all, and only waiting takes time.

Nothing waits but ``wait_readable`` and ``wait_writable``. They may be interrupted or run out, and
the stream is where it was before. Whoever is interrupted in any other call cannot know how many
bytes have moved.
"""

from __future__ import annotations

import math
import os
import select
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from vfiomig.descriptors import RIGHTS_ROOM, passed_descriptors, rights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.wire import Buffers, Connection

__all__ = ("Stream",)

AT_ONCE = socket.MSG_DONTWAIT
RECEIVE = AT_ONCE | socket.MSG_CMSG_CLOEXEC


class Stream:
    """One connected socket. One thread receives at a time, and one sends."""

    def __init__(self, connected: socket.socket) -> None:
        """Take the socket over."""
        self._socket = connected
        # A poll object must not be used by two threads at once.
        self._readable = _poller(connected, select.POLLIN)
        self._writable = _poller(connected, select.POLLOUT)

    def fileno(self) -> int:
        return self._socket.fileno()

    def wait_readable(self, deadline: float) -> None:
        """Wait until something can be received, the end of the stream included.

        Raises:
            TimeoutError: nothing came before ``deadline`` (monotonic).
        """
        _wait(self._readable, deadline)

    def wait_writable(self, deadline: float) -> None:
        """Wait until something can be sent; see ``wait_readable``."""
        _wait(self._writable, deadline)

    def receive(self, connection: Connection) -> bool:
        """Give ``connection`` what is there; ``False`` at the end of the stream.

        Descriptors that belong to no message are closed.
        """
        try:
            count, ancillary, flags, _ = self._socket.recvmsg_into(
                [connection.buffer()], RIGHTS_ROOM, RECEIVE
            )
        except BlockingIOError:
            return True
        fds = passed_descriptors(ancillary) if ancillary else ()
        for fd in connection.received(count, fds, lost=bool(flags & socket.MSG_CTRUNC)):
            os.close(fd)
        return count > 0

    def receive_into(self, view: memoryview) -> int:
        """Receive what is there, 0 bytes at the end of the stream; descriptors are dropped."""
        return self._socket.recv_into(view, flags=AT_ONCE)

    def send(self, buffers: Buffers, fds: Sequence[int]) -> int:
        """Send what there is room for, and return how many bytes; ``fds`` go with the first."""
        try:
            return self._socket.sendmsg(buffers, rights(fds), AT_ONCE)
        except BlockingIOError:
            return 0

    def shut_down(self) -> None:
        """End the connection and wake whoever waits here; numbers stay valid until ``close``."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def _poller(connected: socket.socket, events: int) -> select.poll:
    poller = select.poll()
    poller.register(connected, events)
    return poller


def _wait(poller: select.poll, deadline: float) -> None:
    # What is always ready must not put the deadline off: there may be no end to what comes.
    while (left := deadline - time.monotonic()) > 0:
        if poller.poll(min(math.ceil(left * 1000), 0x7FFFFFFF)):
            return
    raise TimeoutError
