"""Both ends of a vfio-user connection for tests: agreed on a version, and fed with bytes."""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vfiomig.errors import WireError
from vfiomig.wire import Capabilities, ClientConnection, Reply, ServerConnection, replies, requests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vfiomig.wire import Buffers, Connection, Limits, Request

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


#: What looks into the payload of a request, by command.
REQUEST_PARSERS: dict[int, Callable[[Request, Limits], object]] = {
    2: lambda request, _: requests.dma_map_untrusted(request),
    3: lambda request, _: requests.dma_unmap_untrusted(request),
    4: lambda request, _: requests.device_info_untrusted(request),
    5: lambda request, _: requests.region_info_untrusted(request),
    7: lambda request, _: requests.irq_info_untrusted(request),
    8: lambda request, _: requests.set_irqs_untrusted(request),
    9: requests.region_read_untrusted,
    10: lambda request, _: requests.region_write_untrusted(request),
    11: requests.dma_read_untrusted,
    12: lambda request, _: requests.dma_write_untrusted(request),
    15: lambda request, _: requests.write_multi_untrusted(request),
    16: lambda request, _: requests.feature_untrusted(request),
    17: requests.mig_data_untrusted,
    18: requests.mig_data_untrusted,
    0x8079: lambda request, _: requests.precopy_info_untrusted(request),
}
#: And into that of a reply; the numbers are what was asked for.
REPLY_PARSERS: dict[int, Callable[[Reply], object]] = {
    3: lambda reply: replies.dma_unmap_untrusted(reply, 8),
    4: replies.device_info_untrusted,
    5: replies.region_info_untrusted,
    7: replies.irq_info_untrusted,
    9: lambda reply: replies.region_read_untrusted(reply, 4),
    10: lambda reply: replies.region_write_untrusted(reply, 4),
    11: lambda reply: replies.dma_read_untrusted(reply, 0x1000, 4),
    12: lambda reply: replies.dma_write_untrusted(reply, 0x1000, 4),
    15: replies.write_multi_untrusted,
    16: lambda reply: replies.feature_untrusted(reply, 8),
    17: lambda reply: replies.mig_read_untrusted(reply, 4096),
    0x8079: replies.precopy_info_untrusted,
}


def outstanding(end: Connection) -> int:
    """How many requests have no reply yet."""
    return len(end._outstanding)


def look_into(found: Request | Reply, limits: Limits) -> None:
    """Read a message as whoever got it would; anything but `WireError` comes out."""
    with suppress(WireError):
        if isinstance(found, Reply):
            if found.command in REPLY_PARSERS:
                REPLY_PARSERS[found.command](found)
        elif found.command in REQUEST_PARSERS:
            REQUEST_PARSERS[found.command](found, limits)
