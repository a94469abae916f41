"""A vfio-user client that is nothing but bytes: what it sends and expects is written by hand.

``Raw`` is one connection. Layouts are spelled out from the specification and not taken from
``vfiomig.wire``, so that a mistake there is not made here too.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from vfiomig.doors.vfio_user import Server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfiomig.core.vfio_device import VfioDevice
    from vfiomig.device import Device

HEADER = struct.Struct("<HHIII")
REPLY, NO_REPLY, ERROR = 1, 0x10, 0x20
(
    VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO,
    SET_IRQS, REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, RESET, DIRTY_PAGES,
    REGION_WRITE_MULTI, FEATURE, MIG_DATA_READ, MIG_DATA_WRITE,
) = range(1, 19)  # fmt: skip
PRECOPY_INFO = 0x8079
GET, SET, PROBE = 0x10000, 0x20000, 0x40000
#: Features.
MIGRATION, STATE, START, STOP_LOGGING, REPORT, DATA_SIZE, PRECOPY_V2 = 1, 2, 6, 7, 8, 9, 12
#: States.
ERROR_STATE, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(8)
CONFIG = 7
MIB = 1 << 20
DEADLINE = 10.0

PLAIN = b'{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576}}\0'
#: With everything, and room for an answer to all of it.
FULL = (
    b'{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":16777216,"max_dma_maps":65535,'
    b'"pgsizes":4096,"write_multiple":true,"mig_stream":{"version":1},'
    b'"migration":{"pgsize":4096,"max_bitmap_size":16777216}}}\0'
)


class Message(NamedTuple):
    """What came in."""

    msg_id: int
    command: int
    flags: int
    errno: int
    body: bytes
    fds: list[int]


class Raw:
    """One connection to a server."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(DEADLINE)
        self._last_id = 0x100
        self._fds: list[int] = []

    @classmethod
    def connect(cls, path: str | os.PathLike[str], capabilities: bytes | None = FULL) -> Self:
        """Connect, and agree on a version unless there are no ``capabilities``."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(os.fspath(path))
            raw = cls(sock)
            if capabilities is not None:
                answer = raw.call(VERSION, struct.pack("<HH", 0, 2) + capabilities)
                assert answer.errno == 0, answer
        except BaseException:
            sock.close()
            raise
        return raw

    def close(self) -> None:
        self.sock.close()
        for fd in self._fds:
            with suppress(OSError):
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Messages.

    def send(
        self,
        command: int,
        body: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        size: int | None = None,
        msg_id: int | None = None,
        error: int = 0,
    ) -> int:
        """Send one message; return its number."""
        self._last_id = (self._last_id + 1) & 0xFFFF
        number = self._last_id if msg_id is None else msg_id
        length = 16 + len(body) if size is None else size
        message = HEADER.pack(number, command, length, flags, error) + body
        if fds:
            sent = socket.send_fds(self.sock, [message], list(fds))
            message = message[sent:]
        self.sock.sendall(message)
        return number

    def receive(self) -> Message | None:
        """Return the next message; nothing at the end of the connection."""
        fds: list[int] = []
        header = self._exactly(16, fds)
        if header is None:
            return None
        msg_id, command, size, flags, error = HEADER.unpack(header)
        assert size >= 16
        body = self._exactly(size - 16, fds)
        assert body is not None, "the server left within a message"
        self._fds += fds
        return Message(msg_id, command, flags, error, body, fds)

    def _exactly(self, count: int, fds: list[int]) -> bytes | None:
        data = b""
        while len(data) < count:
            try:
                piece, new, _, _ = socket.recv_fds(self.sock, count - len(data), 16)
            except ConnectionResetError:
                return None
            fds += new
            if not piece:
                return None
            data += piece
        return data

    def call(self, command: int, body: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """Ask and return the reply, which is the next message."""
        number = self.send(command, body, fds)
        reply = self.receive()
        assert reply is not None, "the server hung up"
        assert (reply.msg_id, reply.command) == (number, command)
        assert reply.flags == (REPLY | ERROR if reply.errno else REPLY)
        return reply

    def good(self, command: int, body: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Ask for what works; return the payload of the reply."""
        reply = self.call(command, body, fds)
        assert reply.errno == 0, os.strerror(reply.errno)
        return reply.body

    def receive_or_end(self, command: int) -> Message | None:
        """Send a short request and return what comes; nothing if the server has hung up."""
        try:
            self.send(command)
        except (BrokenPipeError, ConnectionResetError):
            return None
        return self.receive()

    # What most tests do.

    def feature(self, index: int, operation: int, payload: bytes = b"", room: int = 0) -> Message:
        argsz = 8 + len(payload) + room
        return self.call(FEATURE, struct.pack("<II", argsz, index | operation) + payload)

    def set_state(self, state: int) -> int:
        """Return the errno."""
        return self.feature(STATE, SET, struct.pack("<Ii", state, -1)).errno

    def state(self) -> int:
        answer = self.feature(STATE, GET, room=8)
        assert answer.errno == 0
        state, data_fd = struct.unpack("<Ii", answer.body[8:])
        assert data_fd == -1
        return int(state)

    def read_state(self, size: int) -> Message:
        return self.call(MIG_DATA_READ, struct.pack("<II", 8 + size, size))

    def write_state(self, data: bytes) -> int:
        """Return the errno."""
        return self.call(MIG_DATA_WRITE, struct.pack("<II", 8 + len(data), len(data)) + data).errno

    def read_region(self, region: int, offset: int, count: int) -> bytes:
        body = self.good(REGION_READ, struct.pack("<QII", offset, region, count))
        where, index, got = struct.unpack_from("<QII", body)
        assert (where, index, got) == (offset, region, len(body) - 16)
        return body[16:]

    def write_region(self, region: int, offset: int, data: bytes) -> int:
        """Return the errno."""
        return self.call(REGION_WRITE, struct.pack("<QII", offset, region, len(data)) + data).errno

    def whole_state(self, size: int = MIB) -> bytes:
        """Read the state to its end."""
        pieces = []
        while piece := read_data(self.read_state(size)):
            pieces.append(piece)
        return b"".join(pieces)


def read_data(reply: Message) -> bytes:
    """Return the state in a reply to MIG_DATA_READ."""
    assert reply.errno == 0, os.strerror(reply.errno)
    argsz, size = struct.unpack_from("<II", reply.body)
    assert argsz == 8 + size == len(reply.body)
    return reply.body[8:]


@contextmanager
def served(device: Device | VfioDevice) -> Iterator[str]:
    """Serve ``device`` in this process; the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="vfiomig-") as folder:
        path = str(Path(folder) / "s")
        with Server(device, path):
            yield path


@contextmanager
def client_of(device: Device | VfioDevice, capabilities: bytes | None = FULL) -> Iterator[Raw]:
    """Serve ``device`` to one client."""
    with served(device) as path, Raw.connect(path, capabilities) as client:
        yield client
