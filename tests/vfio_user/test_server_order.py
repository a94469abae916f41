"""Requests are executed one at a time and in their order, however long one of them takes."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

from raw_vfio_user import (
    DMA_MAP,
    ERROR_STATE,
    FEATURE,
    GET,
    GET_INFO,
    MIG_DATA_READ,
    PRE_COPY,
    REGION_READ,
    REGION_WRITE,
    RESET,
    RUNNING,
    SET,
    SET_IRQS,
    STATE,
    STOP,
    STOP_COPY,
    Raw,
    client_of,
    served,
)
from suite_devices import Bell, Card
from vfiomig import Device, Region, State
from vfiomig.models.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from vfiomig import StateReader

SLOW = 0.3


class Slow(Device):
    """Takes its time to stop, and notes what happens to it."""

    bar0 = Region(size=16)

    def __init__(self) -> None:
        self.notes: list[str] = []

    def step(self, origin: State, target: State) -> None:
        if target is State.STOP:
            time.sleep(SLOW)
        self.notes.append(f"{origin.name} -> {target.name}")

    def reset(self) -> None:
        self.notes.append("reset")

    @bar0.reader
    def read_bar0(self, offset: int, length: int) -> bytes:
        self.notes.append("read")
        return bytes(length)


def state_body(state: int) -> bytes:
    return struct.pack("<IIIi", 16, STATE | SET, state, -1)


def test_what_follows_a_slow_arc_waits_for_it_and_keeps_its_order() -> None:
    device = Slow()
    with client_of(device) as client:
        sent = [
            client.send(FEATURE, state_body(STOP)),
            client.send(REGION_READ, struct.pack("<QII", 0, 0, 4)),
            client.send(FEATURE, state_body(STOP_COPY)),
            client.send(RESET),
            client.send(REGION_READ, struct.pack("<QII", 0, 0, 4)),
            client.send(FEATURE, struct.pack("<II", 16, STATE | GET)),
        ]
        replies = [client.receive() for _ in sent]
        assert [reply and (reply.msg_id, reply.errno) for reply in replies] == [
            (number, 0) for number in sent
        ]
        last = replies[-1]
        assert last is not None
        assert struct.unpack_from("<I", last.body, 8) == (RUNNING,)
    assert device.notes[:5] == ["RUNNING -> STOP", "read", "STOP -> STOP_COPY", "reset", "read"]


def test_a_message_that_comes_byte_by_byte_is_one() -> None:
    with client_of(Card()) as client:
        message = struct.pack("<HHIIIQII", 7, REGION_READ, 32, 0, 0, 0, 0, 4)
        for byte in message:
            client.sock.sendall(bytes([byte]))
        reply = client.receive()
        assert reply is not None
        assert (reply.msg_id, reply.errno, len(reply.body)) == (7, 0, 20)


def test_a_hundred_requests_in_one_segment_are_a_hundred() -> None:
    with client_of(Card()) as client:
        client.sock.sendall(
            b"".join(
                struct.pack("<HHIIIQII", number, REGION_READ, 32, 0, 0, number, 0, 4)
                for number in range(100)
            )
        )
        replies = [client.receive() for _ in range(100)]
        assert [reply and reply.msg_id for reply in replies] == list(range(100))


class Failing(Device):
    """Has nothing to read until ``go``; a write to it is its end."""

    bar0 = Region(size=16)

    def __init__(self) -> None:
        self.go = threading.Event()

    def save(self) -> Iterator[bytes]:
        assert self.go.wait(10)
        yield b"late"

    def load(self, state: StateReader) -> None:
        state.read(4)

    @bar0.writer
    def write_bar0(self, offset: int, data: bytes) -> None:
        raise RuntimeError("a bug, and no refusal")


def test_a_device_that_fails_by_itself_wakes_the_read_that_waits() -> None:
    device = Failing()
    with client_of(device) as client:
        assert client.set_state(STOP_COPY) == 0
        number = client.send(MIG_DATA_READ, struct.pack("<II", 108, 100))
        failing = client.send(REGION_WRITE, struct.pack("<QIIB", 0, 0, 1, 1))
        replies = [reply for reply in (client.receive(), client.receive()) if reply is not None]
        assert {reply.msg_id: reply.errno for reply in replies} == {
            number: errno.ENODEV,
            failing: errno.EIO,
        }
        device.go.set()
        assert client.state() == ERROR_STATE
        client.good(RESET)
        assert client.state() == RUNNING


def test_a_rewriting_device_goes_through_precopy_by_messages() -> None:
    with client_of(Pattern(size=8 << 20, dirty=64 << 20)) as source:
        assert source.set_state(PRE_COPY) == 0
        moved, ends = 0, 0
        while ends < 3:
            reply = source.read_state(1 << 20)
            if reply.errno == errno.ENOMSG:
                ends += 1
                continue
            assert reply.errno == 0
            moved += len(reply.body) - 8
        assert moved > 8 << 20
        assert source.set_state(STOP_COPY) == 0
        assert len(source.whole_state()) > 0


def test_descriptors_that_find_no_room_here_fail_their_request_and_nothing_else() -> None:
    eventfds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(4)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    body = struct.pack("<5I", 20, 36, 2, 0, 4)
    with client_of(Bell()) as client:
        client.good(GET_INFO, struct.pack("<4I", 16, 0, 0, 0))
        taken = set(map(int, os.listdir("/proc/self/fd")))
        free = next(number for number in range(soft) if number not in taken)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            client.sock.settimeout(10)
            assert client.call(SET_IRQS, body, eventfds).errno == errno.EMFILE
            mapping = struct.pack("<IIQQQ", 32, 3, 0, 0, 4096)
            assert client.call(DMA_MAP, mapping, eventfds[:1]).errno == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert client.call(SET_IRQS, body, eventfds).errno == 0
    for fd in eventfds:
        os.close(fd)


def test_a_client_for_whom_no_descriptor_is_left_is_turned_away_and_the_next_is_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with served(Bell()) as path, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        lowest = os.dup(sock.fileno())
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))  # its socket and no more
        try:
            sock.connect(path)
            assert sock.recv(1) == b""
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "a client is turned away" in caplog.text
        with Raw.connect(path) as client:
            assert client.state() == RUNNING
