"""What one end sends is what the other end gets, however it is cut on the way."""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vfiomig.wire import COMMANDS, ClientConnection, Reply, Request, Role, ServerConnection
from vfiomig.wire.version import KEYS, Capabilities
from wire_peers import Feeder, agreed, arrival, asked, joined, message, outstanding

if TYPE_CHECKING:
    from collections.abc import Sequence

BY_CLIENT = [row for row in COMMANDS if row.asks is Role.CLIENT and row.name != "VERSION"]
LENGTHS = st.sampled_from([0, 1, 15, 16, 17, 100, 4000, 4063, 4064, 4065, 4096, 5000, 12_345])
CUTS = st.lists(st.integers(1, 6000), min_size=1, max_size=12)


def pieces(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Cut at these sizes, over and over."""
    found, at, number = [], 0, 0
    while at < len(data):
        size = sizes[number % len(sizes)]
        found.append(data[at : at + size])
        at, number = at + size, number + 1
    return found


@settings(max_examples=150)
@given(
    plan=st.lists(
        st.tuples(st.sampled_from(BY_CLIENT), LENGTHS, st.booleans(), st.booleans()), max_size=8
    ),
    there=CUTS,
    back=CUTS,
)
def test_requests_and_replies_arrive_as_they_were_sent(
    plan: list[tuple[object, int, bool, bool]], there: list[int], back: list[int]
) -> None:
    client, server = agreed()
    feeder, answers = Feeder(server), Feeder(client)
    sent, stream = [], b""
    for row, length, no_reply, _ in plan:
        data = os.urandom(length)
        head = bytes(row.request_size)  # type: ignore[attr-defined]  # a Command
        out = client.request(row.number, head, data, no_reply=no_reply)  # type: ignore[attr-defined]
        sent.append((out.msg_id, row.number, head + data))  # type: ignore[attr-defined]
        stream += joined(out.buffers)
    for piece in pieces(stream, there):
        feeder.feed(piece)
    came = [
        (one.message.msg_id, one.message.command, one.body + one.data) for one in feeder.arrived
    ]
    assert came == sent
    assert server.between_messages

    stream, expected = b"", []
    for (row, length, no_reply, fails), one in zip(plan, feeder.arrived, strict=True):
        assert isinstance(one.message, Request)
        data = os.urandom(length)
        if fails:
            stream += joined(server.error(one.message, 5))
        else:
            stream += joined(server.reply(one.message, bytes(row.reply_size), data))  # type: ignore[attr-defined]
        if not no_reply:
            payload = b"" if fails else bytes(row.reply_size) + data  # type: ignore[attr-defined]
            expected.append((one.message.msg_id, 5 * fails, payload))
    for piece in pieces(stream, back):
        answers.feed(piece)
    got = [(one.message.msg_id, one.errno, one.body + one.data) for one in answers.arrived]
    assert got == expected
    assert all(isinstance(one.message, Reply) for one in answers.arrived)
    assert outstanding(client) == 0
    assert client.between_messages


@settings(max_examples=150)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=8),
    takes=st.lists(st.booleans(), min_size=1, max_size=4),
    cuts=CUTS,
)
def test_what_is_not_taken_of_one_message_is_not_found_in_the_next(
    lengths: list[int], takes: list[bool], cuts: list[int]
) -> None:
    server = agreed()[1]
    stream = b"".join(
        message(n, 10, bytes(16) + b"\xff" * length) for n, length in enumerate(lengths)
    )
    seen: list[tuple[int, int, bytes]] = []
    for piece in pieces(stream, cuts):
        data = piece
        while data:
            if server.missing and takes[len(seen) % len(takes)]:
                size = min(server.missing, len(data))
                server.took(size)
            else:
                buffer = server.buffer()
                size = min(len(buffer), len(data))
                buffer[:size] = data[:size]
                server.received(size)
                while (found := server.next()) is not None:
                    seen.append((found.msg_id, found.data_size, bytes(found.body)))
            data = data[size:]
    assert seen == [(n, length, bytes(16)) for n, length in enumerate(lengths)]
    assert server.between_messages


@st.composite
def sends(draw: st.DrawFn) -> tuple[list[bytes], list[tuple[int, int, bool]]]:
    """Messages, and how they are sent: (from, to, with a descriptor), each within one message."""
    messages = [
        message(n, 2, bytes(32 + draw(st.sampled_from([0, 0, 1, 40, 5000]))))
        for n in range(draw(st.integers(1, 6)))
    ]
    calls, at = [], 0
    for text in messages:
        end = at + len(text)
        while at < end:
            size = draw(st.sampled_from([1, 3, 15, 16, 17, 48, 6000]))
            calls.append((at, min(at + size, end), draw(st.booleans())))
            at = min(at + size, end)
            if len(calls) % 8 == 0:  # not one byte at a time through thousands
                calls.append((at, end, draw(st.booleans())))
                at = end
    return messages, [call for call in calls if call[0] < call[1]]


@settings(max_examples=150)
@given(plan=sends(), reads=st.lists(st.integers(1, 5000), min_size=1, max_size=6))
def test_descriptors_belong_to_the_message_they_were_sent_with(
    plan: tuple[list[bytes], list[tuple[int, int, bool]]], reads: list[int]
) -> None:
    messages, calls = plan
    stream = b"".join(messages)
    owner = [n for n, text in enumerate(messages) for _ in text]
    server = agreed()[1]
    near, far = socket.socketpair()
    expected: dict[int, int] = {}
    got: dict[int, int] = {}
    with near, far:
        for start, stop, has in calls:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [near.fileno()]))]
            near.sendmsg([stream[start:stop]], rights if has else [])
            if has:
                expected[owner[start]] = expected.get(owner[start], 0) + 1
        near.shutdown(socket.SHUT_WR)
        number = 0
        while True:
            room = server.buffer()[: reads[number % len(reads)]]
            number += 1
            count, ancillary, _, _ = far.recvmsg_into([room], 1024)
            if not count:
                break
            fds = array.array("i", b"".join(data for _, _, data in ancillary))
            assert server.received(count, list(fds)) == ()
            while (found := server.next()) is not None:
                if found.fds:
                    got[found.msg_id] = len(found.fds)
                for fd in found.fds:
                    os.close(fd)
    assert server.close() == []
    assert got == expected


def capabilities(key: object) -> st.SearchStrategy[object]:
    numbers = key.numbers  # type: ignore[attr-defined]  # a Key
    if numbers is None:
        return st.none() | st.booleans()
    return st.none() | st.integers(numbers[0], min(numbers[-1], 1 << 63))


SAID = st.fixed_dictionaries({key.attribute: capabilities(key) for key in KEYS}).map(
    lambda said: Capabilities(**said)  # type: ignore[arg-type]  # as KEYS says
)


@settings(max_examples=200)
@given(client_says=SAID, server_says=SAID)
@example(
    client_says=Capabilities(mig_stream=1),
    server_says=Capabilities(max_msg_fds=0, max_data_xfer_size=5, mig_stream=1),
)
def test_any_two_ends_agree(client_says: Capabilities, server_says: Capabilities) -> None:
    client, server = ClientConnection(client_says), ServerConnection(server_says)
    proposal = joined(client.propose_version().buffers)
    answer = joined(server.answer_version(asked(server, proposal)))
    assert len(answer) <= len(proposal)
    reply = arrival(client, answer).message
    assert isinstance(reply, Reply)
    ours = client.accept_version(reply)
    theirs = server.limits
    assert theirs is not None
    assert theirs.peer == client_says
    assert ours.mig_stream == theirs.mig_stream
    assert ours.mig_stream <= (client_says.mig_stream is not None)
    # Neither end sends what the other one refuses.
    assert ours.data_out <= theirs.data_in
    assert theirs.data_out <= ours.data_in
    assert ours.fds_out <= theirs.fds_in
    assert theirs.fds_out <= ours.fds_in
