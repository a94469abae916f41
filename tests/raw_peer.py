"""A client's channel with a bare socket at the other end, on which a test says what it likes."""

from __future__ import annotations

import signal
import socket
import struct
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from in_process import wait_until
from vfiomig.client.local import LocalTransfer
from vfiomig.client.vfio_user.channel import Channel, _comes
from vfiomig.client.vfio_user.connecting import OURS, greet
from vfiomig.client.vfio_user.stream import Stream, _wait
from vfiomig.wire import ClientConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADER = struct.Struct("<HHIII")
REQUEST, REPLY, ERROR = 0, 1, 0x20
DEADLINE = 10.0
#: Where a client's thread waits: for what comes, for another thread that receives it, or for a
#: device in this process.
WAITS = (_wait.__code__, _comes.__code__, LocalTransfer.wait.__code__)


class Raw(NamedTuple):
    """A message as it was received."""

    msg_id: int
    command: int
    flags: int
    errno: int
    body: bytes


class RawPeer:
    """The server's end of a connection."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        end.settimeout(DEADLINE)

    def receive(self) -> Raw:
        msg_id, command, size, flags, number = HEADER.unpack(self._exactly(HEADER.size))
        return Raw(msg_id, command, flags, number, self._exactly(size - HEADER.size))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            assert piece, "the client has left"
            data += piece
        return data

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self, to: Raw, body: bytes = b"", number: int = 0) -> None:
        flags = REPLY | ERROR * bool(number)
        self.send(message(to.command, body, to.msg_id, flags, number))


def message(
    command: int, body: bytes = b"", msg_id: int = 7, flags: int = REQUEST, number: int = 0
) -> bytes:
    return HEADER.pack(msg_id, command, HEADER.size + len(body), flags, number) + body


@contextmanager
def raw_peer(timeout: float = DEADLINE) -> Iterator[tuple[Channel, RawPeer]]:
    """Make a connection on which a version was agreed on."""
    ours, theirs = socket.socketpair()
    with theirs:
        peer = RawPeer(theirs)
        peer.send(message(1, b"\0\0\2\0", msg_id=1, flags=REPLY))
        stream = Stream(ours)
        connection = ClientConnection(OURS)
        greet("peer", stream, connection, time.monotonic() + DEADLINE)
        assert peer.receive().command == 1
        channel = Channel(stream, connection, "peer", timeout)
        try:
            yield channel, peer
        finally:
            channel.close()


class InThread(threading.Thread):
    """A call beside the test; ``result`` waits for it, and raises what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._result: object = None
        self._failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as failure:  # noqa: BLE001 - it is raised where it is asked for
            self._failure = failure

    def result(self) -> object:
        self.join(DEADLINE)
        assert not self.is_alive(), "the call does not end"
        if self._failure is not None:
            raise self._failure
        return self._result


@contextmanager
def interrupted_when(ready: Callable[[], object]) -> Iterator[None]:
    """Have Ctrl-C pressed in the middle of the block, when ``ready`` returned and it waits.

    A message may be seen here before whoever sent it has taken note that it went, and bytes may
    be in a buffer before they are counted. A client that is interrupted there gives the connection
    up, and rightly; these tests are about one that waits.
    """
    me = threading.get_ident()

    def press() -> None:
        ready()
        wait_until(lambda: sys._current_frames()[me].f_code in WAITS)
        signal.pthread_kill(me, signal.SIGINT)

    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = InThread(press)
    try:
        try:
            yield
        except KeyboardInterrupt as interrupt:
            # From Python 3.13 on it is part of a cycle, and keeps what the block had.
            interrupt.__traceback__ = None
        else:
            raise AssertionError("nothing was interrupted")
    finally:
        thread.result()
        signal.signal(signal.SIGINT, former)
