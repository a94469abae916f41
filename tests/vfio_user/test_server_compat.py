"""A server in the manner of libvfio-user: each row of its table, and what stays as it was."""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from raw_vfio_user import (
    DMA_MAP,
    FEATURE,
    FULL,
    GET,
    GET_INFO,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    MIB,
    MIG_DATA_READ,
    MIG_DATA_WRITE,
    PLAIN,
    PRE_COPY,
    REGION_READ,
    REGION_WRITE,
    REGION_WRITE_MULTI,
    REPLY,
    RESET,
    RESUMING,
    RUNNING,
    SET,
    SET_IRQS,
    STATE,
    STOP,
    STOP_COPY,
    VERSION,
    Raw,
    client_of,
)
from suite_devices import MAGIC, Card
from vfiomig.doors.vfio_user import Server
from vfiomig.doors.vfio_user.compat import BEHAVIOURS
from vfiomig.models.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig.device import Device

ERROR_REPLY = REPLY | 0x20


@contextmanager
def library(device: Device) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="vfiomig-") as folder:
        path = f"{folder}/s"
        with Server(device, path, behaviour=BEHAVIOURS["libvfio-user"]):
            yield path


@pytest.fixture
def client() -> Iterator[Raw]:
    with library(Card()) as path, Raw.connect(path, PLAIN) as raw:
        yield raw


def test_it_says_of_itself_what_the_library_says() -> None:
    with library(Card()) as path, Raw.connect(path, None) as client:
        body = client.good(VERSION, struct.pack("<HH", 0, 5) + FULL)
        assert body == struct.pack("<HH", 0, 2) + (
            b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,'
            b'"migration":{"pgsize":4096}}}\0'
        )
        assert client.call(0x8079, bytes(24)).errno == errno.EINVAL


@pytest.mark.parametrize(("more", "alive"), [(8, True), (9, False)])
def test_a_message_has_at_most_a_mebibyte_and_32_bytes(more: int, alive: bool) -> None:
    with library(Pattern(size=4 * MIB)) as path, Raw.connect(path, PLAIN) as client:
        assert client.set_state(RESUMING) == 0
        size = MIB + more
        body = struct.pack("<II", 8 + size, size)
        client.send(MIG_DATA_WRITE, body + bytes(size if alive else 0), size=24 + size)
        reply = client.receive()
        assert reply is not None
        assert reply.errno == errno.EINVAL  # zeros are no state either
        assert (client.receive_or_end(GET_INFO) is not None) is alive


@pytest.mark.parametrize("state", [STOP, STOP_COPY])
def test_a_stopped_device_answers_little(client: Raw, state: int) -> None:
    assert client.set_state(state) == 0
    for command, body in (
        (GET_INFO, struct.pack("<4I", 16, 0, 0, 0)),
        (GET_REGION_INFO, struct.pack("<4I2Q", 32, 0, 0, 0, 0, 0)),
        (GET_IRQ_INFO, struct.pack("<4I", 16, 0, 0, 0)),
        (SET_IRQS, struct.pack("<5I", 20, 33, 0, 0, 0)),
        (DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, 4096)),
        (RESET, b""),
    ):
        assert client.call(command, body).errno == errno.EINVAL
    access = struct.pack("<QII", 0, 0, 4)
    number = errno.EINVAL if state == STOP_COPY else 0
    assert client.call(REGION_READ, access).errno == number
    assert client.call(REGION_WRITE, access + bytes(4)).errno == number
    assert client.state() == state
    reading = client.call(MIG_DATA_READ, struct.pack("<II", 12, 4))
    assert reading.errno == (0 if state == STOP_COPY else errno.EINVAL)
    assert client.set_state(RUNNING) == 0
    assert client.call(GET_INFO, struct.pack("<4I", 16, 0, 0, 0)).errno == 0


def test_what_there_is_not_is_einval(client: Raw) -> None:
    assert client.feature(9, GET, room=8).errno == errno.EINVAL
    assert client.feature(77, GET, room=8).errno == errno.EINVAL
    assert client.read_state(4).errno == errno.EINVAL
    assert client.write_state(b"data") == errno.EINVAL
    assert client.call(REGION_WRITE_MULTI, struct.pack("<Q", 0)).errno == errno.EINVAL


def test_errors_have_the_payload_of_success(client: Raw) -> None:
    body = struct.pack("<QII", 0, 3, 10)
    assert client.call(REGION_READ, body).body == body + bytes(10)
    assert client.call(REGION_WRITE, body + b"0123456789").body == body
    request = struct.pack("<IIIi", 16, STATE | SET, 99, -1)
    failed = client.call(FEATURE, request)
    assert (failed.errno, failed.body) == (errno.EINVAL, request)
    assert client.feature(77, GET).body == b""


def test_reads_of_the_state_are_padded(client: Raw) -> None:
    assert client.set_state(PRE_COPY) == 0
    reply = client.read_state(100)
    assert struct.unpack_from("<II", reply.body) == (8 + 4, 4)
    assert reply.body[8:] == MAGIC + bytes(96)
    reply = client.read_state(100)
    assert struct.unpack_from("<II", reply.body) == (8, 0)
    assert reply.body[8:] == bytes(100)


def test_a_reset_keeps_the_state(client: Raw) -> None:
    for state in (PRE_COPY, RUNNING, RESUMING):
        assert client.set_state(state) == 0
        assert client.call(RESET).errno == 0
        assert client.state() == state


def test_a_reset_lets_the_device_forget_what_was_loaded() -> None:
    with library(Pattern(size=4096)) as path, Raw.connect(path, PLAIN) as client:
        assert client.set_state(STOP_COPY) == 0
        reply = client.read_state(1 << 16)
        saved = reply.body[8:][: struct.unpack_from("<II", reply.body)[1]]
        assert client.set_state(RESUMING) == 0
        assert client.write_state(saved[:100]) == 0
        assert client.set_state(RUNNING) == errno.EINVAL
        assert (client.call(RESET).errno, client.state()) == (0, RESUMING)
        assert client.write_state(saved) == 0
        assert client.set_state(RUNNING) == 0


def test_a_reset_of_a_running_device_resets_it(client: Raw) -> None:
    assert client.write_region(0, 0, b"kept until") == 0
    client.good(RESET)
    assert client.read_region(0, 0, 10) == bytes(10)


def test_the_state_and_the_session_stay_for_the_next_client() -> None:
    with library(Card()) as path:
        with Raw.connect(path, PLAIN) as first:
            assert first.write_region(0, 0, b"all of it") == 0
            assert first.set_state(STOP_COPY) == 0
            assert first.read_state(4).body[8:] == MAGIC
        with Raw.connect(path, PLAIN) as second:
            assert second.state() == STOP_COPY
            assert second.call(GET_INFO, struct.pack("<4I", 16, 0, 0, 0)).errno == errno.EINVAL
            assert second.read_state(13).body[12:] == b"all of it"
            assert second.set_state(RUNNING) == 0
        with Raw.connect(path, PLAIN) as third:
            assert third.state() == RUNNING
            assert third.read_region(0, 0, 9) == b"all of it"


def test_memory_and_interrupts_do_not_stay() -> None:
    with library(Card()) as path:
        body = struct.pack("<IIQQQ", 32, 3, 0, 0, 4096)
        eventfd = os.eventfd(0, os.EFD_CLOEXEC)
        for _ in range(2):
            with Raw.connect(path, PLAIN) as client:
                client.good(DMA_MAP, body)
                irqs = struct.pack("<5I", 20, 36, 4, 0, 1)
                assert client.call(SET_IRQS, irqs, [eventfd]).errno == 0
        os.close(eventfd)


def test_it_migrates_from_and_to_the_other_kind() -> None:

    with library(Pattern(size=2 * MIB)) as path, Raw.connect(path, PLAIN) as source:
        assert source.write_region(0, 0, b"moved") == 0
        assert source.set_state(STOP_COPY) == 0
        state = bytearray()
        while True:
            reply = source.read_state(MIB)
            _, size = struct.unpack_from("<II", reply.body)
            if not size:
                break
            state += reply.body[8 : 8 + size]
        with client_of(Pattern(size=2 * MIB)) as target:
            assert target.set_state(RESUMING) == 0
            for at in range(0, len(state), MIB):
                assert target.write_state(bytes(state[at : at + MIB])) == 0
            assert target.set_state(RUNNING) == 0
            assert target.read_region(0, 0, 5) == b"moved"
