"""One connection and its threads: who receives, what comes to whom, and how it ends."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest

from in_process import wait_until
from raw_peer import (
    ERROR,
    HEADER,
    REPLY,
    InThread,
    Raw,
    RawPeer,
    interrupted_when,
    message,
    raw_peer,
)
from vfiomig.client.vfio_user.channel import done
from vfiomig.descriptors import rights
from vfiomig.errors import RequestError
from vfiomig.wire import replies
from vfiomig.wire.layouts import MIG_DATA, REGION_ACCESS

if TYPE_CHECKING:
    from vfiomig.client.vfio_user.channel import Channel
    from vfiomig.wire import Buffers, Reply, Request

RESET, FEATURE, READ, WRITE, REGION_READ = 13, 16, 17, 18, 9
GET_INFO, DMA_READ = 4, 11


def call(channel: Channel) -> None:
    channel.call(done, RESET)


def feature(channel: Channel, number: int) -> bytes:
    """Ask with something in the request by which its reply is known."""
    head = number.to_bytes(8, "little")
    return bytes(channel.call(partial(replies.feature_untrusted, size=8), FEATURE, head))


def answer_feature(peer: RawPeer, request: Raw) -> None:
    peer.reply(request, bytes(8) + request.body)


def read(channel: Channel, buffer: bytearray) -> int:
    size = len(buffer)
    head = MIG_DATA.pack(8 + size, size)
    parse = partial(replies.mig_read_untrusted, asked=size)
    return channel.call(parse, READ, head, into=memoryview(buffer))


def data(state: bytes, padding: int = 0) -> bytes:
    return MIG_DATA.pack(8 + len(state), len(state)) + state + bytes(padding)


def number(head: int) -> bytes:
    return head.to_bytes(8, "little")


# Who gets what.


def test_a_request_needs_no_thread_beside_its_own() -> None:
    with raw_peer() as (channel, peer):
        before = threading.active_count()
        answering = InThread(lambda: answer_feature(peer, peer.receive()))
        assert feature(channel, 5) == number(5)
        answering.result()
        assert threading.active_count() == before


def test_every_thread_gets_its_own_reply_in_whatever_order_they_come() -> None:
    with raw_peer() as (channel, peer):
        threads = [InThread(partial(feature, channel, at)) for at in range(20)]
        requests = [peer.receive() for _ in threads]
        for request in reversed(requests):
            answer_feature(peer, request)
        assert [thread.result() for thread in threads] == [number(at) for at in range(20)]


def test_who_has_its_reply_passes_the_receivers_part_on() -> None:
    with raw_peer() as (channel, peer):
        first = InThread(partial(feature, channel, 1))
        one = peer.receive()
        second = InThread(partial(feature, channel, 2))
        two = peer.receive()
        answer_feature(peer, one)
        assert first.result() == number(1)
        answer_feature(peer, two)
        assert second.result() == number(2)


def test_many_replies_may_come_at_once_and_one_in_many_pieces() -> None:
    with raw_peer() as (channel, peer):
        threads = [InThread(partial(feature, channel, at)) for at in range(8)]
        requests = [peer.receive() for _ in threads]
        answers = b"".join(
            message(FEATURE, bytes(8) + request.body, request.msg_id, REPLY) for request in requests
        )
        peer.send(answers[:100])
        for at in range(100, len(answers)):
            peer.send(answers[at : at + 1])
        assert [thread.result() for thread in threads] == [number(at) for at in range(8)]


@pytest.mark.parametrize("size", [1, 4000, 4072, 4073, 5000, 1 << 20, 3 << 20])
@pytest.mark.parametrize("padding", [0, 10000])
def test_data_come_into_the_buffer_that_was_given(size: int, padding: int) -> None:
    state = os.urandom(size)
    buffer = bytearray(size + padding)
    with raw_peer() as (channel, peer):
        reading = InThread(partial(read, channel, buffer))
        request = peer.receive()
        peer.reply(request, data(state, padding))
        assert reading.result() == size
        assert buffer[:size] == state
        other = InThread(partial(feature, channel, 3))
        answer_feature(peer, peer.receive())
        assert other.result() == number(3)


def test_more_data_than_were_asked_for_leave_the_buffer_alone_and_the_stream_whole() -> None:
    with raw_peer() as (channel, peer):
        buffer = bytearray(6000)
        reading = InThread(partial(read, channel, buffer))
        peer.reply(peer.receive(), data(b"short", 20000))
        assert reading.result() == 5
        asking = InThread(partial(feature, channel, 3))
        answer_feature(peer, peer.receive())
        assert asking.result() == number(3)


def test_an_error_is_its_errno_with_or_without_a_payload() -> None:
    with raw_peer() as (channel, peer):
        for body in (b"", b"x" * 100, b"x" * 10000):
            asking = InThread(partial(call, channel))
            peer.reply(peer.receive(), body, errno.EBUSY)
            with pytest.raises(OSError) as caught:
                asking.result()
            assert (caught.value.errno, type(caught.value)) == (errno.EBUSY, OSError)


@pytest.mark.parametrize("count", [1, 3, 200])
def test_descriptors_that_nobody_asked_for_are_closed(count: int) -> None:
    with raw_peer() as (channel, peer):
        asking = InThread(partial(call, channel))
        request = peer.receive()
        peer.socket.sendmsg(
            [message(RESET, msg_id=request.msg_id, flags=REPLY)],
            rights([peer.socket.fileno()] * count),
        )
        asking.result()


# Nobody waits any more.


def test_ctrl_c_ends_the_wait_and_not_the_connection() -> None:
    with raw_peer() as (channel, peer):
        requests: list[Raw] = []
        with interrupted_when(lambda: requests.append(peer.receive())):
            feature(channel, 1)
        asking = InThread(partial(feature, channel, 2))
        answer_feature(peer, requests[0])
        answer_feature(peer, peer.receive())
        assert asking.result() == number(2)


CUT = 100_000
#: The data before the cut, which the headers of the message and of the data come before.
CAME = slice(0, CUT - HEADER.size - MIG_DATA.size)


def test_ctrl_c_in_the_middle_of_data_drops_the_rest_of_them() -> None:
    state = os.urandom(1 << 20)
    with raw_peer() as (channel, peer):
        buffer = bytearray(len(state))
        body = data(state)

        def begin() -> None:
            request = peer.receive()
            peer.send(message(READ, body, request.msg_id, REPLY)[:CUT])
            wait_until(lambda: buffer[CAME] == state[CAME])

        with interrupted_when(begin):
            read(channel, buffer)
        there = bytes(buffer)
        asking = InThread(partial(feature, channel, 2))
        peer.send((bytes(HEADER.size) + body)[CUT:])
        answer_feature(peer, peer.receive())
        assert asking.result() == number(2)
        assert buffer == there, "the buffer is its owner's again"


def test_a_receiver_that_is_interrupted_leaves_anothers_data_to_who_comes_next() -> None:
    state = os.urandom(1 << 20)
    with raw_peer() as (channel, peer):
        buffer = bytearray(len(state))
        body = data(state)
        reading: list[InThread] = []

        def begin() -> None:
            peer.receive()  # the main thread's, which receives from now on
            reading.append(InThread(partial(read, channel, buffer)))
            request = peer.receive()
            peer.send(message(READ, body, request.msg_id, REPLY)[:CUT])
            wait_until(lambda: buffer[CAME] == state[CAME])

        with interrupted_when(begin):
            call(channel)
        peer.send((bytes(HEADER.size) + body)[CUT:])
        assert reading[0].result() == len(state)
        assert buffer == state


def test_an_interrupt_while_another_receives_harms_nobody() -> None:
    with raw_peer() as (channel, peer):
        receiving = InThread(partial(feature, channel, 1))
        first = peer.receive()
        second: list[Raw] = []
        with interrupted_when(lambda: second.append(peer.receive())):
            feature(channel, 2)
        answer_feature(peer, second[0])
        answer_feature(peer, first)
        assert receiving.result() == number(1)


# How it ends.


def failures_of(channel: Channel, *numbers: int) -> list[str]:
    """See that every call fails, with one of these errnos; return what they say."""
    said = []
    for _ in range(2):
        with pytest.raises(RequestError) as caught:
            call(channel)
        assert caught.value.errno in numbers
        said.append(caught.value.strerror or "")
    return said


def test_a_server_that_leaves_is_named() -> None:
    with raw_peer() as (channel, peer):
        peer.socket.close()
        (first, again) = failures_of(channel, errno.ENODEV)
        assert "server at peer ended the connection" in first
        assert again == first


def test_a_server_that_leaves_in_the_middle_of_a_reply_wakes_everybody() -> None:
    with raw_peer() as (channel, peer):
        threads = [InThread(partial(call, channel)) for _ in range(5)]
        request = peer.receive()
        peer.send(message(RESET, msg_id=request.msg_id, flags=REPLY)[:7])
        peer.socket.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            with pytest.raises(RequestError) as caught:
                thread.result()
            assert caught.value.errno == errno.ENODEV


def test_a_server_that_does_not_answer_has_its_time_and_no_more() -> None:
    with raw_peer(timeout=0.2) as (channel, _):
        began = time.monotonic()
        threads = [InThread(partial(call, channel)) for _ in range(3)]  # each has ten seconds
        for thread in threads:
            with pytest.raises(RequestError) as caught:
                thread.result()
            assert caught.value.errno == errno.ETIMEDOUT
            assert "DEVICE_RESET within 0.2 s" in str(caught.value)
        assert time.monotonic() - began >= 0.2
        failures_of(channel, errno.ETIMEDOUT)


def test_a_server_that_takes_nothing_has_its_time_and_no_more() -> None:
    with raw_peer(timeout=0.2) as (channel, _):
        large = bytes(1 << 20)
        with pytest.raises(RequestError) as caught:
            channel.call(done, WRITE, MIG_DATA.pack(8 + len(large), len(large)), large)
        assert caught.value.errno == errno.ETIMEDOUT
        assert "did not take a message" in str(caught.value)


def test_a_server_that_asks_without_end_has_its_time_and_no_more() -> None:
    with raw_peer(timeout=0.5) as (channel, peer):
        asking = InThread(partial(call, channel))
        peer.receive()
        peer.socket.setblocking(False)
        flood = message(DMA_READ, number(0) + number(1)) * 100
        rest = flood
        while asking.is_alive():
            with suppress(OSError):
                peer.socket.recv(1 << 16)
            with suppress(OSError):
                rest = rest[peer.socket.send(rest) :] or flood
        with pytest.raises(RequestError) as caught:
            asking.result()
        assert caught.value.errno == errno.ETIMEDOUT


def test_a_server_that_answers_eintr_for_ever_is_given_up() -> None:
    with raw_peer() as (channel, peer):

        def answer() -> None:
            for _ in range(1000):
                peer.reply(peer.receive(), b"", errno.EINTR)

        answering = InThread(answer)
        for _ in range(999):
            with pytest.raises(InterruptedError):
                call(channel)
        with pytest.raises(RequestError, match="EINTR") as caught:
            call(channel)
        assert caught.value.errno == errno.EPROTO
        answering.result()


BAD = {
    "shorter than a header": message(RESET, msg_id=2, flags=REPLY)[:4] + b"\x0f\0\0\0" + bytes(8),
    "of 4 GiB": message(RESET, msg_id=2, flags=REPLY)[:4] + b"\xff" * 4 + bytes(8),
    "to nothing": message(RESET, msg_id=99, flags=REPLY),
    "to another command": message(GET_INFO, bytes(16), msg_id=2, flags=REPLY),
    "of no type": message(RESET, msg_id=2, flags=2),
}


@pytest.mark.parametrize("name", BAD)
def test_a_reply_that_means_nothing_ends_the_connection(name: str) -> None:
    with raw_peer() as (channel, peer):
        asking = InThread(partial(call, channel))
        assert peer.receive().msg_id == 2
        peer.send(BAD[name])
        with pytest.raises(RequestError) as caught:
            asking.result()
        assert caught.value.errno == errno.EPROTO
        assert "server at peer sends what means nothing" in str(caught.value)
        failures_of(channel, errno.EPROTO)
        while told := peer.socket.recv(16):  # before it is left, if it asked for something
            assert told[8] == REPLY | ERROR


def test_an_answer_with_the_wrong_content_ends_the_connection() -> None:
    with raw_peer() as (channel, peer):
        asking = InThread(partial(feature, channel, 1))
        peer.reply(peer.receive(), bytes(15))
        with pytest.raises(RequestError, match="DEVICE_FEATURE") as caught:
            asking.result()
        assert caught.value.errno == errno.EPROTO
        failures_of(channel, errno.EPROTO)


def test_closing_wakes_whoever_waits() -> None:
    with raw_peer() as (channel, peer):
        threads = [InThread(partial(call, channel)) for _ in range(3)]
        for _ in threads:
            peer.receive()
        channel.close()
        for thread in threads:
            with pytest.raises(RequestError) as caught:
                thread.result()
            assert caught.value.errno == errno.ENODEV


# What the server asks for.


def test_requests_of_the_server_are_refused_where_there_is_no_memory() -> None:
    with raw_peer() as (channel, peer):
        asking = InThread(partial(call, channel))
        request = peer.receive()
        peer.send(message(DMA_READ, number(0) + number(4), msg_id=500))
        refusal = peer.receive()
        assert (refusal.msg_id, refusal.command) == (500, DMA_READ)
        assert (refusal.flags, refusal.errno) == (REPLY | ERROR, errno.ENOTSUP)
        peer.reply(request)
        asking.result()


def test_the_attendant_answers_while_nobody_waits_and_leaves_replies_to_who_does() -> None:
    with raw_peer() as (channel, peer):
        channel.attend()
        channel.attend()
        for round_ in range(50):
            peer.send(message(DMA_READ, number(0) + number(4), msg_id=round_))
            assert peer.receive().msg_id == round_
            asking = InThread(partial(feature, channel, round_))
            request = peer.receive()
            peer.send(message(DMA_READ, number(0) + number(4), msg_id=1000 + round_))
            assert peer.receive().msg_id == 1000 + round_
            answer_feature(peer, request)
            assert asking.result() == number(round_)


def test_the_attendant_notices_the_end() -> None:
    with raw_peer() as (channel, peer):
        channel.attend()
        peer.socket.close()
        failures_of(channel, errno.ENODEV)


def test_the_attendant_is_not_woken_for_the_replies_of_others() -> None:
    with raw_peer() as (channel, peer):
        channel.attend()
        woken = 0
        attend = channel._attend

        def count() -> bool:
            nonlocal woken
            woken += 1
            return attend()

        assert channel._attendant is not None
        channel._attendant._attend = count
        answering = InThread(
            lambda: [answer_feature(peer, peer.receive()) for _ in range(200)]  # type: ignore[func-returns-value]
        )
        for at in range(200):
            assert feature(channel, at) == number(at)
        answering.result()
        assert woken == 0


def test_long_data_of_the_server_are_gathered_before_they_are_answered() -> None:
    with raw_peer() as (channel, peer):
        answered: list[bytes] = []

        def answer(request: Request, sent: memoryview) -> Buffers:
            answered.append(bytes(sent))
            return channel.connection.reply(request, number(0) + number(len(sent)))

        channel.answer = answer
        channel.attend()
        for size in (0, 1, 4064, 4065, 1 << 20):
            sent = os.urandom(size)
            peer.send(message(12, number(0) + number(size) + sent))
            assert peer.receive().body == number(0) + number(size)
            assert answered.pop() == sent


def test_region_data_need_not_be_whole_in_one_piece() -> None:
    with raw_peer() as (channel, peer):
        buffer = bytearray(9000)
        head = REGION_ACCESS.pack(0, 0, len(buffer))
        content = os.urandom(len(buffer))

        def parse(reply: Reply) -> None:
            replies.region_read_untrusted(reply, len(buffer))

        asking = InThread(lambda: channel.call(parse, REGION_READ, head, into=memoryview(buffer)))
        request = peer.receive()
        answer = message(REGION_READ, head + content, request.msg_id, REPLY)
        for at in range(0, len(answer), 1000):
            peer.send(answer[at : at + 1000])
            select.select([], [peer.socket], [], 1)
        asking.result()
        assert buffer == content
