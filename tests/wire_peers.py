"""Both ends of a vfio-user connection for tests: agreed on a version, and fed with bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vfiomig.wire import Capabilities, ClientConnection, Reply, ServerConnection

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vfiomig.wire import Buffers, Connection, Request

MIB = 1 << 20
ALL = Capabilities(
    max_msg_fds=16,
    max_data_xfer_size=MIB,
    mig_stream=1,
    migration_pgsize=4096,
    write_multiple=True,
    pgsizes=4096,
    max_dma_maps=65535,
)
REPLY, NO_REPLY, ERROR = 0x1, 0x10, 0x20


def octets(text: str) -> bytes:
    """Bytes spelled in hexadecimal, with blanks and line ends where they help."""
    return bytes.fromhex("".join(text.split()))


def message(
    msg_id: int, command: int, payload: bytes = b"", flags: int = 0, error: int = 0
) -> bytes:
    """Write a message by hand."""
    return struct.pack("<HHIII", msg_id, command, 16 + len(payload), flags, error) + payload


def joined(buffers: Buffers) -> bytes:
    """What the peer gets when ``buffers`` are sent."""
    return b"".join(bytes(buffer) for buffer in buffers)


@dataclass
class Arrived:
    """A message with all of its bytes, which do not change any more."""

    message: Request | Reply
    body: bytes
    data: bytes
    fds: list[int]

    @property
    def errno(self) -> int:
        """Of a refused request what it is answered with, of a reply what it says."""
        if self.message.refusal is not None:
            return self.message.refusal.errno or 0
        return self.message.errno if isinstance(self.message, Reply) else 0

    def told(self) -> tuple[object, ...]:
        """Everything that the peer said."""
        said = self.message
        kind = type(said).__name__
        return kind, said.msg_id, said.command, self.errno, self.body, self.data, self.fds


@dataclass
class Feeder:
    """Receives for a connection, and takes the data of long messages itself."""

    connection: Connection
    arrived: list[Arrived] = field(default_factory=list)
    #: Descriptors that belonged to nothing.
    stray: list[int] = field(default_factory=list)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Receive bytes that were sent in one call, with these descriptors."""
        connection = self.connection
        while data:
            if connection.missing:
                size = min(connection.missing, len(data))
                self.arrived[-1].data += data[:size]
                connection.took(size)
                self.stray += fds  # the kernel closes them where nobody asks for any
            else:
                buffer = connection.buffer()
                size = min(len(buffer), len(data))
                buffer[:size] = data[:size]
                self.stray += connection.received(size, fds)
                while (found := connection.next()) is not None:
                    body, head = bytes(found.body), bytes(found.data)
                    self.arrived.append(Arrived(found, body, head, list(found.fds)))
            data, fds = data[size:], ()


def arrivals(connection: Connection, pieces: Iterable[bytes]) -> list[Arrived]:
    """Receive these pieces; return the messages that they make."""
    feeder = Feeder(connection)
    for piece in pieces:
        feeder.feed(piece)
    return feeder.arrived


def arrival(connection: Connection, *pieces: bytes) -> Arrived:
    """Receive these pieces, which are one message."""
    (found,) = arrivals(connection, pieces)
    return found


def asked(connection: Connection, *pieces: bytes) -> Request:
    """Receive one message that is a request."""
    found = arrival(connection, *pieces).message
    assert not isinstance(found, Reply)
    return found


def answered(connection: Connection, *pieces: bytes) -> Reply:
    """Receive one message that is a reply."""
    found = arrival(connection, *pieces).message
    assert isinstance(found, Reply)
    return found


def agreed(
    client_says: Capabilities = ALL, server_says: Capabilities = ALL
) -> tuple[ClientConnection, ServerConnection]:
    """Return a client and a server that have agreed on a version."""
    client, server = ClientConnection(client_says), ServerConnection(server_says)
    proposal = asked(server, joined(client.propose_version().buffers))
    answer = answered(client, joined(server.answer_version(proposal)))
    client.accept_version(answer)
    return client, server
