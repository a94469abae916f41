"""Whatever a peer sends: the one documented error, never another, and no descriptor lost.

Both ends are fed with bytes that mean nothing, with messages that almost mean something, and with
good ones in which a few bytes are wrong. What comes out is answered and looked into.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from vfiomig.errors import WireError
from vfiomig.wire import (
    COMMANDS,
    Capabilities,
    ClientConnection,
    Reply,
    Request,
    Role,
    ServerConnection,
)
from wire_peers import ALL, MIB, NO_REPLY, REPLY, agreed, joined, look_into, message

if TYPE_CHECKING:
    from vfiomig.wire import Connection

SMALL = Capabilities(max_data_xfer_size=20_000, max_msg_fds=3, mig_stream=1)
NUMBERS = [row.number for row in COMMANDS]
FLAGS = st.sampled_from([0, 0, 0, 1, 1, 2, 15, 0x10, 0x11, 0x20, 0x21, 0x21, 0x31, 0x100, 1 << 31])
U32 = st.sampled_from([0, 1, 2, 4, 7, 8, 16, 20, 24, 32, 48, 4096, 20_000, 1 << 31, (1 << 32) - 1])
WORDS = st.lists(U32 | st.integers(0, (1 << 32) - 1), max_size=24)


def ends() -> list[Connection]:
    """Return both ends, before and after they agreed on a version, with requests outstanding."""
    client, server = agreed(SMALL, SMALL)
    for row in COMMANDS:
        if row.name != "VERSION":
            end = client if row.asks is Role.CLIENT else server
            end.request(row.number, bytes(row.request_size))
    fresh = ClientConnection(ALL)
    fresh.propose_version()
    return [client, server, fresh, ServerConnection(ALL)]


class Descriptors:
    """Hands out numbers and wants every one of them back, once."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.back: list[int] = []

    def give(self, count: int) -> list[int]:
        fds = list(range(len(self.given), len(self.given) + count))
        self.given += fds
        return fds


def survive(connection: Connection, pieces: list[tuple[bytes, int]], *, take: bool) -> None:
    """Send (bytes, number of descriptors) and do what a server's or a client's loop does."""
    descriptors = Descriptors()
    ended: list[WireError] = []
    try:
        for piece, count in pieces:
            data, fds = piece, descriptors.give(count)
            while data:
                if connection.missing and take:
                    size = min(connection.missing, len(data))
                    connection.took(size)
                    descriptors.back += fds
                else:
                    buffer = connection.buffer()
                    assert 0 < len(buffer) <= connection._limit
                    size = min(len(buffer), len(data))
                    buffer[:size] = data[:size]
                    descriptors.back += connection.received(size, fds)
                    receive(connection, descriptors)
                data, fds = data[size:], []
            descriptors.back += fds
    except WireError as error:
        ended.append(error)
    assert all(error.errno and str(error) for error in ended)
    assert all(len(buffer) == 16 for buffer in connection.farewell)
    assert ended or not connection.farewell
    descriptors.back += connection.close()
    assert sorted(descriptors.back) == descriptors.given


def receive(connection: Connection, descriptors: Descriptors) -> None:
    while (found := connection.next()) is not None:
        descriptors.back += found.fds
        if connection.limits is not None:
            look_into(found, connection.limits)
        elif isinstance(found, Reply):
            assert isinstance(connection, ClientConnection)
            connection.accept_version(found)
        else:
            assert isinstance(connection, ServerConnection)
            connection.answer_version(found)
        assert len(found.data) <= found.data_size
        assert found.data_size - len(found.data) == connection.missing or found.refusal
        if isinstance(found, Request):
            assert bool(joined(connection.error(found, 5))) != bool(found.flags & NO_REPLY)


@st.composite
def almost_messages(draw: st.DrawFn) -> bytes:
    """A header whose fields fit together, mostly, and a payload of numbers that mean something."""
    payload = draw(
        st.binary(max_size=80)
        | WORDS.map(lambda words: struct.pack(f"<{len(words)}I", *words))
        | st.integers(0, 20_100).map(bytes)
    )
    number = draw(st.sampled_from(NUMBERS) | st.integers(0, 0xFFFF))
    wrong = draw(st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1, 16, -16, 1 << 20, 1 << 31]))
    size = (16 + len(payload) + wrong) % (1 << 32)
    header = (draw(st.integers(0, 20)), number, size, draw(FLAGS), draw(U32))
    return struct.pack("<HHIII", *header) + payload


def cut(data: bytes, sizes: list[int], counts: list[int]) -> list[tuple[bytes, int]]:
    """Cut into pieces of these sizes, the last as long as it is, with descriptors each."""
    pieces, at = [], 0
    for number, size in enumerate([*sizes, len(data)]):
        if data[at : at + size]:
            pieces.append((data[at : at + size], counts[number % len(counts)]))
        at += size
    return pieces


SIZES = st.lists(st.integers(1, 3000), max_size=8)
COUNTS = st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=1, max_size=6)


@settings(max_examples=200)
@given(data=st.binary(max_size=300), sizes=SIZES, counts=COUNTS, take=st.booleans())
def test_bytes_that_mean_nothing_give_the_one_error(
    data: bytes, sizes: list[int], counts: list[int], take: bool
) -> None:
    for connection in ends():
        survive(connection, cut(data, sizes, counts), take=take)


@settings(max_examples=200)
@given(
    messages=st.lists(almost_messages(), min_size=1, max_size=6),
    sizes=SIZES,
    counts=COUNTS,
    take=st.booleans(),
)
def test_messages_that_almost_mean_something_give_the_one_error(
    messages: list[bytes], sizes: list[int], counts: list[int], take: bool
) -> None:
    for connection in ends():
        survive(connection, cut(b"".join(messages), sizes, counts), take=take)


def good_messages(end: Connection) -> list[bytes]:
    """One good request for everything that ``end`` is asked for, and a reply to all it asked."""
    found = [
        message(n, row.number, bytes(row.request_size))
        for n, row in enumerate(COMMANDS)
        if row.asks is not end.role
    ]
    found += [
        message(msg_id, row.number, bytes(row.reply_size), REPLY)
        for msg_id, row in end._outstanding.items()
    ]
    return found


@settings(max_examples=200)
@given(
    which=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=6),
    sizes=SIZES,
    counts=COUNTS,
)
def test_good_messages_with_wrong_bytes_give_the_one_error(
    which: int, order: object, changes: list[tuple[int, int]], sizes: list[int], counts: list[int]
) -> None:
    connection = ends()[which]
    messages = good_messages(connection)
    order.shuffle(messages)  # type: ignore[attr-defined]  # random.Random
    data = bytearray(b"".join(messages))
    for at, value in changes:
        data[at % len(data)] = value
    survive(connection, cut(bytes(data), sizes, counts), take=True)


# VERSION.

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "capabilities",
                    "migration",
                    "mig_stream",
                    "pgsize",
                    "version",
                    "max_msg_fds",
                    "max_data_xfer_size",
                    "write_multiple",
                    "twin_socket",
                ]
            )
            | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
TEXTS = (
    JSON.map(lambda value: json.dumps(value).encode())
    | JSON.map(lambda value: json.dumps({"capabilities": value}).encode())
    | st.binary(max_size=60)
    | st.text(alphabet='{}[]",:0123456789.eE+-truefalsn \\u', max_size=60).map(str.encode)
)


@settings(max_examples=300)
@given(
    text=TEXTS,
    end=st.sampled_from([b"\0", b"\0", b"\0", b"", b"\0\0"]),
    version=st.sampled_from([b"\0\0\2\0", b"\0\0\0\0", b"\1\0\0\0", b"\0"]),
)
def test_any_text_about_capabilities_gives_the_one_error(
    text: bytes, end: bytes, version: bytes
) -> None:
    payload = version + text + end
    server = ServerConnection(ALL)
    survive(server, [(message(1, 1, payload), 0)], take=True)
    if server.limits is not None:
        assert server.farewell == ()
        assert server.limits.data_out <= MIB
    client = ClientConnection(ALL)
    out = client.propose_version()
    survive(client, [(message(out.msg_id, 1, payload, REPLY), 0)], take=True)


@settings(max_examples=200)
@given(text=TEXTS)
def test_an_answer_is_never_longer_than_its_proposal(text: bytes) -> None:
    server = ServerConnection(ALL)
    proposal = message(1, 1, b"\0\0\2\0" + text + b"\0")
    buffer = server.buffer()
    buffer[: len(proposal)] = proposal
    server.received(len(proposal))
    request = server.next()
    assert isinstance(request, Request)
    try:
        answer = joined(server.answer_version(request))
    except WireError:
        return
    assert len(answer) <= len(proposal)
