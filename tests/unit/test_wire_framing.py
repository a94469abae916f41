"""Where a message ends: any split, any number at once, sizes that cannot be, replies to nothing."""

from __future__ import annotations

import errno
import struct

import pytest

from vfiomig.errors import WireError
from vfiomig.wire import Capabilities, ClientConnection, Reply, Request, ServerConnection, rest
from vfiomig.wire.receiving import READ_AHEAD
from wire_peers import (
    ALL,
    ERROR,
    MIB,
    NO_REPLY,
    REPLY,
    Feeder,
    agreed,
    answered,
    arrival,
    arrivals,
    asked,
    joined,
    message,
    octets,
    outstanding,
)

VERSION, GET_INFO, READ, WRITE, DMA_READ, RESET, FEATURE, MIG_READ, MIG_WRITE = (
    1, 4, 9, 10, 11, 13, 16, 17, 18,
)  # fmt: skip


def access(offset: int, region: int, count: int) -> bytes:
    return struct.pack("<QII", offset, region, count)


def write(msg_id: int, data: bytes, flags: int = 0) -> bytes:
    return message(msg_id, WRITE, access(0, 0, len(data)) + data, flags)


def read(msg_id: int) -> bytes:
    return message(msg_id, READ, access(0, 7, 4))


#: Short ones, one with nothing but a header, one whose data exceed what is read ahead, one that
#: must be there as a whole and exceeds it too.
STREAM = (
    message(1, GET_INFO, struct.pack("<4I", 16, 0, 0, 0)),
    write(2, b"abc"),
    message(3, RESET),
    write(4, bytes(range(256)) * 20),
    message(5, FEATURE, struct.pack("<2I", 9008, 0x20006) + b"\5" * 9000),
    read(6),
)
MEANT = [arrival(agreed()[1], piece).told() for piece in STREAM]


def test_what_the_stream_means() -> None:
    kinds = [(kind, msg_id, len(body), len(data)) for kind, msg_id, _, _, body, data, _ in MEANT]  # type: ignore[arg-type]  # bytes
    assert kinds == [
        ("Request", 1, 16, 0),
        ("Request", 2, 16, 3),
        ("Request", 3, 0, 0),
        ("Request", 4, 16, 5120),
        ("Request", 5, 9008, 0),
        ("Request", 6, 16, 0),
    ]
    assert MEANT[3][5] == bytes(range(256)) * 20


@pytest.mark.parametrize("size", [1, 2, 7, 16, 17, 33, 100, READ_AHEAD - 1, READ_AHEAD, 1 << 20])
def test_pieces_of_any_size_make_the_same_messages(size: int) -> None:
    stream = b"".join(STREAM)
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert [found.told() for found in arrivals(agreed()[1], pieces)] == MEANT


@pytest.mark.parametrize("which", range(len(STREAM)))
def test_a_message_may_be_split_at_every_offset(which: int) -> None:
    text = STREAM[which]
    # Every offset near either end, and some of the long middle.
    step = max(1, len(text) // 300)
    for at in {*range(1, min(80, len(text))), *range(1, len(text), step), len(text) - 1}:
        assert arrival(agreed()[1], text[:at], text[at:]).told() == MEANT[which], at


@pytest.mark.parametrize("which", range(len(STREAM)))
def test_a_message_that_is_cut_at_any_offset_never_becomes_one(which: int) -> None:
    text = STREAM[which]
    for at in {*range(min(60, len(text))), *range(0, len(text), 500)}:
        server = agreed()[1]
        feeder = Feeder(server)
        feeder.feed(text[:at])
        assert server.missing or not feeder.arrived
        assert server.between_messages == (at == 0)


def test_a_hundred_messages_in_one_segment_are_a_hundred_messages() -> None:
    server = agreed()[1]
    buffer = server.buffer()
    text = b"".join(read(number) for number in range(100))
    buffer[: len(text)] = text
    server.received(len(text))
    found = []
    while (request := server.next()) is not None:
        found.append(request)
    # All of their views hold at once: nothing has asked for the buffer in between.
    assert [request.msg_id for request in found] == list(range(100))
    assert {bytes(request.body) for request in found} == {access(0, 7, 4)}
    assert server.between_messages


def test_the_buffer_is_used_again_and_not_larger_than_its_messages_need() -> None:
    server = agreed()[1]
    first = server.buffer()
    assert len(first) == READ_AHEAD
    feeder = Feeder(server)
    feeder.feed(STREAM[4][:READ_AHEAD])
    assert len(server.buffer()) == len(STREAM[4]) - READ_AHEAD, "exactly what is missing of it"
    feeder.feed(STREAM[4][READ_AHEAD:])
    assert server.buffer() is first


def test_a_message_that_is_announced_and_never_sent_costs_no_more_than_its_size() -> None:
    server = agreed()[1]
    Feeder(server).feed(struct.pack("<HHIII", 1, FEATURE, MIB, 0, 0))
    assert len(server.buffer()) == MIB - 16


# Data that are taken by the receiver.


def test_long_data_are_handed_out_with_their_head_and_taken_elsewhere() -> None:
    server = agreed()[1]
    data = bytes(range(256)) * 4096
    text = message(1, MIG_WRITE, struct.pack("<2I", 8 + MIB, MIB) + data)
    buffer = server.buffer()
    buffer[:] = text[:READ_AHEAD]
    server.received(READ_AHEAD)
    request = server.next()
    assert isinstance(request, Request)
    assert (len(request.body), request.data_size) == (8, MIB)
    assert request.data == text[24:READ_AHEAD]
    assert server.missing == len(text) - READ_AHEAD
    assert server.next() is None
    server.took(100_000)
    assert server.missing == len(text) - READ_AHEAD - 100_000
    server.took(server.missing)
    assert answered_by(server, read(2)) == (2, READ)


@pytest.mark.parametrize("taken", [0, 1, 5000])
def test_data_that_nobody_takes_are_dropped_as_they_arrive(taken: int) -> None:
    server = agreed()[1]
    text = write(1, bytes(20_000))
    feeder = Feeder(server)
    feeder.feed(text[:READ_AHEAD])
    server.took(taken)
    remaining = text[READ_AHEAD + taken :] + read(2)
    while remaining:
        buffer = server.buffer()
        size = min(len(buffer), len(remaining))
        buffer[:size] = remaining[:size]
        server.received(size)
        remaining = remaining[size:]
        assert remaining == b"" or server.next() is None
    last = server.next()
    assert last is not None
    assert (last.msg_id, last.command) == (2, READ)


@pytest.mark.parametrize("count", [-1, 21])
def test_nobody_takes_more_than_is_missing(count: int) -> None:
    server = agreed()[1]
    feeder = Feeder(server)
    feeder.feed(write(1, bytes(READ_AHEAD))[:-20])
    with pytest.raises(ValueError, match="20 bytes are missing"):
        server.took(count)


def answered_by(connection: ServerConnection, text: bytes) -> tuple[int, int]:
    found = asked(connection, text)
    return found.msg_id, found.command


def test_data_that_fit_are_there_with_their_message() -> None:
    server = agreed()[1]
    text = write(1, bytes(READ_AHEAD - 32))
    assert len(text) == READ_AHEAD
    found = Feeder(server)
    for at in range(0, len(text), 1000):
        found.feed(text[at : at + 1000])
        assert not server.missing
    assert len(found.arrived[0].message.data) == READ_AHEAD - 32


# Framing that cannot be trusted.


def break_with(connection: ServerConnection | ClientConnection, text: bytes) -> WireError:
    """Send what ends the connection; it stays ended whatever comes afterwards."""
    with pytest.raises(WireError) as caught:
        arrivals(connection, [text])
    with pytest.raises(WireError):
        connection.next()
    assert caught.value.errno == errno.EINVAL
    return caught.value


@pytest.mark.parametrize("size", [0, 1, 15, MIB + 65, 1 << 31, (1 << 32) - 1])
def test_a_size_that_cannot_be_ends_the_connection_after_an_error(size: int) -> None:
    server = agreed()[1]
    error = break_with(server, struct.pack("<HHIII", 7, READ, size, 0, 0))
    assert f"{size} bytes" in str(error)
    assert joined(server.farewell) == octets("0700 0900 10000000 21000000 16000000")


@pytest.mark.parametrize("size", [16, MIB + 64])
def test_the_sizes_beside_them_can_be(size: int) -> None:
    server = agreed()[1]
    assert arrivals(server, [struct.pack("<HHIII", 7, FEATURE, size, 0, 0)]) is not None
    assert server.farewell == ()


def test_what_may_be_sent_at_most_is_what_was_offered() -> None:
    offer = Capabilities(max_data_xfer_size=16 * MIB)
    server = agreed(server_says=offer)[1]
    data = struct.pack("<2I", 8 + 16 * MIB, 16 * MIB)
    request = asked(server, message(1, MIG_WRITE, data + bytes(16 * MIB)))
    assert request.data_size == 16 * MIB


@pytest.mark.parametrize("kind", range(2, 16))
def test_a_type_that_is_none_ends_the_connection(kind: int) -> None:
    for connection in agreed():
        error = break_with(connection, message(3, RESET, flags=kind))
        assert f"type {kind}" in str(error)
        assert joined(connection.farewell) == octets("0300 0d00 10000000 21000000 16000000")


def test_nobody_gets_an_error_who_wants_no_reply() -> None:
    server = agreed()[1]
    break_with(server, message(3, RESET, flags=NO_REPLY | 2))
    assert server.farewell == ()


@pytest.mark.parametrize("flags", [0x40, 0x80, 0xFFFFFF00 | ERROR])
def test_flags_that_mean_nothing_mean_nothing(flags: int) -> None:
    request = asked(agreed()[1], message(3, RESET, flags=flags))
    assert request.refusal is None
    assert joined(agreed()[1].error(request, errno.EIO))


# What must be refused and can be stepped over.


@pytest.mark.parametrize(("command", "head"), [(WRITE, 16), (MIG_WRITE, 8)])
def test_data_beyond_what_was_agreed_on_are_refused_although_the_message_is_not(
    command: int, head: int
) -> None:
    for size in (MIB - 1, MIB):
        assert arrival(agreed()[1], message(1, command, bytes(head + size))).errno == 0
    over = message(1, command, bytes(head + MIB + 1))
    found = arrivals(agreed()[1], [over, read(2)])
    assert [one.errno for one in found] == [errno.EINVAL, 0]


@pytest.mark.parametrize("command", [0, 1, 6, 11, 12, 14, 19, 255, 0x8078, 0xFFFF])
@pytest.mark.parametrize("size", [0, 1, 100, 50_000])
def test_a_command_that_a_server_has_not_is_refused_and_the_next_one_served(
    command: int, size: int
) -> None:
    found = arrivals(agreed()[1], [message(1, command, bytes(size)), read(2)])
    assert [one.errno for one in found] == [errno.EINVAL, 0]
    assert found[0].body == b""


MINIMA = {
    2: 32, 3: 24, 4: 16, 5: 32, 7: 16, 8: 20, 9: 16, 10: 16, 13: 0, 15: 8, 16: 8, 17: 8, 18: 8,
    0x8079: 24,
}  # fmt: skip


@pytest.mark.parametrize("command", MINIMA)
def test_a_request_that_is_too_short_is_refused_and_the_next_one_served(command: int) -> None:
    for size in range(MINIMA[command]):
        found = arrivals(agreed()[1], [message(1, command, bytes(size)), read(2)])
        assert [one.errno for one in found] == [errno.EINVAL, 0]
    assert arrival(agreed()[1], message(1, command, bytes(MINIMA[command]))).errno == 0


def test_the_extensions_command_exists_only_where_it_was_agreed_on() -> None:
    old = Capabilities(max_data_xfer_size=MIB)
    text = message(1, 0x8079, bytes(24))
    assert arrival(agreed()[1], text).errno == 0
    for client, server in (agreed(client_says=old), agreed(server_says=old)):
        assert arrival(server, text).errno == errno.EINVAL
        with pytest.raises(ValueError, match="no MIG_GET_PRECOPY_INFO"):
            client.request(0x8079, bytes(24))


@pytest.mark.parametrize("command", [READ, RESET, 2, DMA_READ, 0])
def test_a_client_is_not_asked_for_what_a_server_is(command: int) -> None:
    client = agreed()[0]
    found = arrival(client, message(1, command, bytes(32)))
    assert found.errno == (0 if command == DMA_READ else errno.EINVAL)


# Before the version.


def test_the_first_request_is_version_or_the_last() -> None:
    for text in (read(9), message(9, 14), message(9, VERSION, b"\0\0\2")):
        server = ServerConnection(ALL)
        break_with(server, text)
        assert joined(server.farewell)[:2] == b"\x09\0"
        assert joined(server.farewell)[4:] == octets("10000000 21000000 16000000")


def test_a_client_is_not_asked_before_it_knows_the_version() -> None:
    client = ClientConnection(ALL)
    client.propose_version()
    break_with(client, message(1, DMA_READ, bytes(16)))


def test_version_is_agreed_on_once() -> None:
    assert arrival(agreed()[1], message(1, VERSION, b"\0\0\2\0")).errno == errno.EINVAL


def test_nothing_is_asked_before_the_version() -> None:
    with pytest.raises(ValueError, match="VERSION comes before DEVICE_RESET"):
        ClientConnection(ALL).request(RESET)


def test_a_proposal_is_not_endless() -> None:
    server = ServerConnection(ALL)
    break_with(server, struct.pack("<HHIII", 1, VERSION, (1 << 16) + 17, 0, 0))


# Replies.


def test_replies_find_their_requests_in_any_order() -> None:
    client = agreed()[0]
    ids = [client.request(RESET).msg_id for _ in range(5)]
    assert outstanding(client) == 5
    order = [ids[n] for n in (3, 0, 4, 2, 1)]
    found = arrivals(client, [b"".join(message(one, RESET, flags=REPLY) for one in order)])
    assert [one.message.msg_id for one in found] == order
    assert outstanding(client) == 0


def test_a_reply_that_nobody_asked_for_ends_the_connection() -> None:
    for client, server in [agreed()]:
        assert "nobody asked" in str(break_with(client, message(9, RESET, flags=REPLY)))
        assert "nobody asked" in str(break_with(server, message(9, DMA_READ, flags=REPLY)))
        assert client.farewell == server.farewell == ()


def test_a_second_reply_is_one_that_nobody_asked_for() -> None:
    client = agreed()[0]
    out = client.request(RESET)
    reply = message(out.msg_id, RESET, flags=REPLY)
    answered(client, reply)
    break_with(client, reply)


def test_a_reply_to_another_command_ends_the_connection() -> None:
    client = agreed()[0]
    out = client.request(RESET)
    error = break_with(client, message(out.msg_id, GET_INFO, bytes(16), REPLY))
    assert "to a DEVICE_RESET: DEVICE_GET_INFO" in str(error)


def test_who_wants_no_reply_gets_none() -> None:
    client, server = agreed()
    out = client.request(RESET, no_reply=True)
    assert outstanding(client) == 0
    request = asked(server, joined(out.buffers))
    assert server.reply(request, b"head", b"data") == ()
    assert server.error(request, errno.EIO) == ()
    break_with(client, message(out.msg_id, RESET, flags=REPLY))


@pytest.mark.parametrize("payload", [b"", b"x", bytes(24), bytes(20_000)])
@pytest.mark.parametrize("command", [READ, MIG_READ, FEATURE, RESET])
def test_the_payload_of_an_error_is_stepped_over(command: int, payload: bytes) -> None:
    client = agreed()[0]
    out = client.request(command, bytes(16))
    text = message(out.msg_id, command, payload, REPLY | ERROR, errno.EIO)
    after = client.request(RESET)
    found = arrivals(client, [text + message(after.msg_id, RESET, flags=REPLY)])
    assert [(one.errno, one.body, one.data) for one in found[:1]] == [(errno.EIO, b"", b"")]
    assert found[1].message.msg_id == after.msg_id


@pytest.mark.parametrize(
    ("said", "meant"),
    [(1, 1), (errno.ENOMSG, errno.ENOMSG), (4095, 4095), (0, 22), (4096, 22), ((1 << 32) - 1, 22)],
)
def test_an_errno_that_is_none_is_einval(said: int, meant: int) -> None:
    client = agreed()[0]
    out = client.request(RESET)
    text = message(out.msg_id, RESET, flags=REPLY | ERROR, error=said)
    assert answered(client, text).errno == meant


def test_an_errno_without_the_flag_is_none() -> None:
    client = agreed()[0]
    out = client.request(RESET)
    assert answered(client, message(out.msg_id, RESET, flags=REPLY, error=5)).errno == 0


def test_both_ends_ask_at_the_same_time_with_the_same_numbers() -> None:
    client, server = agreed()
    wants = client.request(READ, access(0, 7, 4))
    memory = server.request(DMA_READ, struct.pack("<QQ", 0x1000, 4))
    at_client = arrivals(client, [joined(memory.buffers)])
    at_server = arrivals(server, [joined(wants.buffers)])
    dma, mmio = at_client[0].message, at_server[0].message
    assert isinstance(dma, Request)
    assert isinstance(mmio, Request)
    got = arrival(server, joined(client.reply(dma, dma.body, b"\1\2\3\4")))
    assert (got.message.msg_id, got.data) == (memory.msg_id, b"\1\2\3\4")
    got = arrival(client, joined(server.reply(mmio, mmio.body, b"mmio")))
    assert (got.message.msg_id, got.data) == (wants.msg_id, b"mmio")


def test_the_numbers_of_outstanding_requests_are_passed_over() -> None:
    client = agreed()[0]
    first = client.request(RESET).msg_id
    seen = {first}
    for _ in range(70_000):
        out = client.request(RESET)
        assert out.msg_id != first
        seen.add(out.msg_id)
        answered(client, message(out.msg_id, RESET, flags=REPLY))
    assert seen == set(range(1 << 16))


def test_requests_without_end_are_refused_here() -> None:
    client = agreed()[0]
    for _ in range(1 << 16):
        client.request(RESET)
    with pytest.raises(ValueError, match="65536 requests are outstanding"):
        client.request(RESET)


# Sending.


def test_data_are_sent_from_where_they_are() -> None:
    client, server = agreed()
    data, more = memoryview(bytearray(4096)), bytes(50)
    out = client.request(MIG_WRITE, struct.pack("<2I", 4154, 4146), data, more)
    assert out.buffers[1] is data
    assert out.buffers[2] is more
    request = asked(server, joined(out.buffers))
    assert request.data_size == 4146
    buffers = server.reply(request, b"", data, more)
    assert buffers[1] is data
    assert buffers[2] is more
    assert len(joined(buffers)) == 16 + 4146


def test_a_short_reply_is_one_buffer() -> None:
    client, server = agreed()
    request = asked(server, joined(client.request(RESET).buffers))
    (buffer,) = server.reply(request, b"head", memoryview(b"data"), b"more")
    assert buffer[16:] == b"headdatamore"


@pytest.mark.parametrize(("length", "fds"), [(MIB + 1, 0), (0, 17)])
def test_what_the_peer_would_refuse_is_not_sent(length: int, fds: int) -> None:
    client = agreed()[0]
    with pytest.raises(ValueError, match="send several"):
        client.request(MIG_WRITE, bytes(8), bytes(length), fds=range(fds))
    assert outstanding(client) == 0


def test_an_end_asks_for_nothing_that_it_is_asked_for() -> None:
    client, server = agreed()
    with pytest.raises(ValueError, match="a client does not ask for DMA_READ"):
        client.request(DMA_READ, bytes(16))
    with pytest.raises(ValueError, match="a server does not ask for DEVICE_RESET"):
        server.request(RESET)


def test_what_is_left_of_buffers_is_their_end() -> None:
    buffers = (b"head", bytearray(b""), memoryview(b"data"), b"more")
    text = joined(buffers)
    for sent in range(len(text) + 1):
        assert joined(rest(buffers, sent)) == text[sent:]
    assert rest(buffers, len(text)) == ()


def test_a_reply_knows_its_kind() -> None:
    client, server = agreed()
    out = client.request(RESET)
    request = asked(server, joined(out.buffers))
    reply = arrival(client, joined(server.reply(request))).message
    assert isinstance(reply, Reply)
    assert not isinstance(request, Reply)
