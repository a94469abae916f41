"""Whichever way a client or the server goes, the other end is done at once and nothing stays."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from devices.engine import READ, Engine
from raw_vfio_user import (
    CONFIG,
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    FEATURE,
    FULL,
    GET,
    GET_INFO,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    HEADER,
    MIB,
    MIG_DATA_READ,
    MIG_DATA_WRITE,
    PRECOPY_INFO,
    REGION_READ,
    REGION_WRITE,
    REGION_WRITE_MULTI,
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
    served,
)
from suite_devices import Card
from vfiomig import Device, DeviceError
from vfiomig.descriptors import Fd
from vfiomig.doors.vfio_user import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vfiomig import StateReader

SECONDS = 10.0
#: A good message of each command.
MESSAGES = {
    "VERSION": (VERSION, struct.pack("<HH", 0, 2) + FULL),
    "DMA_MAP": (DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, 4096)),
    "DMA_UNMAP": (DMA_UNMAP, struct.pack("<IIQQ", 24, 2, 0, 0)),
    "GET_INFO": (GET_INFO, struct.pack("<4I", 16, 0, 0, 0)),
    "GET_REGION_INFO": (GET_REGION_INFO, struct.pack("<4I2Q", 32, 0, 0, 0, 0, 0)),
    "GET_IRQ_INFO": (GET_IRQ_INFO, struct.pack("<4I", 16, 0, 4, 0)),
    "SET_IRQS": (SET_IRQS, struct.pack("<5I", 20, 36, 4, 0, 1)),
    "REGION_READ": (REGION_READ, struct.pack("<QII", 0, 0, 4)),
    "REGION_WRITE": (REGION_WRITE, struct.pack("<QII", 0, 0, 4) + b"data"),
    "REGION_WRITE_MULTI": (REGION_WRITE_MULTI, struct.pack("<Q", 0)),
    "RESET": (RESET, b""),
    "FEATURE": (FEATURE, struct.pack("<IIIi", 16, STATE | SET, STOP_COPY, -1)),
    "MIG_DATA_READ": (MIG_DATA_READ, struct.pack("<II", 1008, 1000)),
    "MIG_DATA_WRITE": (MIG_DATA_WRITE, struct.pack("<II", 200_008, 200_000) + bytes(200_000)),
    "PRECOPY_INFO": (PRECOPY_INFO, struct.pack("<IIQQ", 24, 0, 0, 0)),
}


@pytest.fixture(scope="module")
def path() -> Iterator[str]:
    with served(Card()) as path:
        yield path


def finds_it_running(path: str) -> None:
    with Raw.connect(path) as client:
        assert client.state() == RUNNING


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("state", [RUNNING, STOP_COPY, RESUMING])
def test_a_client_may_leave_at_any_byte_of_any_message(path: str, name: str, state: int) -> None:
    command, body = MESSAGES[name]
    message = HEADER.pack(1, command, 16 + len(body), 0, 0) + body
    size = len(message)
    for cut in sorted({0, 1, 15, 16, 17, min(24, size), size // 2, size - 1, size}):
        with Raw.connect(path, None if command == VERSION else FULL) as client:
            if command != VERSION:
                assert client.set_state(state) == 0
            client.sock.sendall(message[:cut])
        finds_it_running(path)


def test_descriptors_of_a_message_that_never_became_whole_are_closed(path: str) -> None:
    command, body = MESSAGES["SET_IRQS"]
    message = HEADER.pack(1, command, 16 + len(body), 0, 0) + body
    with Fd(os.eventfd(0, os.EFD_CLOEXEC)) as eventfd:
        for cut in (1, 10, 16, 30):
            with Raw.connect(path) as client:
                socket.send_fds(client.sock, [message[:cut]], [eventfd.fileno()] * 3)
            finds_it_running(path)


def test_descriptors_of_a_request_that_came_instead_of_an_answer_are_closed() -> None:
    engine = Engine()
    message = HEADER.pack(1, MIG_DATA_WRITE, 16 + 8 + MIB, 0, 0) + struct.pack("<II", 8 + MIB, MIB)
    with served(engine) as path, Fd(os.eventfd(0, os.EFD_CLOEXEC)) as eventfd:
        with Raw.connect(path) as client:
            client.good(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, 4096))
            assert client.write_region(CONFIG, 4, b"\6\0") == 0
            assert client.write_region(0, 8, struct.pack("<Q", 16)) == 0
            client.send(REGION_WRITE, struct.pack("<QIIQ", 16, 0, 8, READ))
            asked = client.receive()
            assert asked is not None
            assert asked.command == DMA_READ
            socket.send_fds(client.sock, [message + bytes(9000)], [eventfd.fileno()] * 3)
        finds_it_running(path)


@pytest.mark.parametrize("state", range(1, 8))
def test_a_client_may_leave_in_any_state(path: str, state: int) -> None:
    with Raw.connect(path) as client:
        assert client.set_state(state) == 0
    finds_it_running(path)


def test_a_client_may_leave_with_replies_unread(path: str) -> None:
    with Raw.connect(path) as client:
        for _ in range(20):
            client.send(REGION_READ, struct.pack("<QII", 0, 0, 4096))
    finds_it_running(path)


# The server goes.


@pytest.fixture
def ends_by_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Let nothing but the end itself end what is under way: no time is over before the test's."""
    for name in ("line.STALLED", "line.DMA_SECONDS"):
        monkeypatch.setattr(f"vfiomig.doors.vfio_user.{name}", 1000.0)
    monkeypatch.setattr("vfiomig.doors.vfio_user.server.END_SECONDS", 30.0)
    yield
    assert "given up" not in caplog.text


class Sluggish(Device):
    """Its sessions wait for ``go``."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def save(self) -> Iterator[bytes]:
        yield b"x" * (8 * MIB)
        self.go.wait(SECONDS)

    def load(self, state: StateReader) -> None:
        state.read(10)
        self.go.wait(SECONDS)


def idle(client: Raw) -> None:
    """Ask for nothing."""


def within_a_header(client: Raw) -> None:
    client.sock.sendall(b"1234567")


def within_a_write(client: Raw) -> None:
    assert client.set_state(RESUMING) == 0
    client.send(MIG_DATA_WRITE, struct.pack("<II", 8 + MIB, MIB) + bytes(10_000), size=24 + MIB)


def waiting_for_state(client: Raw) -> None:
    assert client.set_state(STOP_COPY) == 0
    client.good(MIG_DATA_READ, struct.pack("<II", 8 + 8 * MIB, 8 * MIB))
    client.send(MIG_DATA_READ, struct.pack("<II", 108, 100))


def waiting_with_a_write(client: Raw) -> None:
    assert client.set_state(RESUMING) == 0
    client.send(MIG_DATA_WRITE, struct.pack("<II", 8 + 5000, 5000) + bytes(5000))


def not_reading(client: Raw) -> None:
    assert client.set_state(STOP_COPY) == 0
    client.send(MIG_DATA_READ, struct.pack("<II", 8 + 8 * MIB, 8 * MIB))
    client.sock.recv(1)


@pytest.mark.parametrize(
    "do",
    [idle, within_a_header, within_a_write, waiting_for_state, waiting_with_a_write, not_reading],
)
@pytest.mark.usefixtures("ends_by_itself")
def test_a_server_ends_at_once_whatever_its_client_does(
    tmp_path: Path, do: Callable[[Raw], None]
) -> None:
    device = Sluggish()
    with Server(device, tmp_path / "s"):
        client = Raw.connect(tmp_path / "s")
        do(client)
        device.go.set()
    with client:
        while client.sock.recv(1 << 20):
            pass
    assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("ends_by_itself")
def test_a_server_ends_at_once_while_a_client_owes_an_answer(tmp_path: Path) -> None:
    engine = Engine()
    with Server(engine, tmp_path / "s"):
        client = Raw.connect(tmp_path / "s")
        client.good(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, 4096))
        assert client.write_region(CONFIG, 4, b"\6\0") == 0  # it may do DMA
        assert client.write_region(0, 8, struct.pack("<Q", 16)) == 0
        client.send(REGION_WRITE, struct.pack("<QIIQ", 16, 0, 8, READ))
        asked = client.receive()
        assert asked is not None
        assert asked.command == DMA_READ
    client.close()


def test_a_hook_that_hangs_does_not_keep_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Hanging(Device):
        def __init__(self) -> None:
            self.go, self.hangs = threading.Event(), threading.Event()

        def stop(self) -> None:
            self.hangs.set()
            self.go.wait(SECONDS)

    monkeypatch.setattr("vfiomig.doors.vfio_user.server.END_SECONDS", 0.1)
    device = Hanging()
    server = Server(device, tmp_path / "s")
    with server, Raw.connect(tmp_path / "s") as client:
        client.send(FEATURE, struct.pack("<IIIi", 16, STATE | SET, STOP, -1))
        assert device.hangs.wait(SECONDS)
    assert "given up as it is" in caplog.text
    device.go.set()
    assert server.wait(SECONDS)


def test_a_device_that_refuses_to_start_refuses_the_client_and_the_next_may_try() -> None:
    class Moody(Device):
        refusals = 1

        def start(self) -> None:
            if self.refusals:
                self.refusals -= 1
                raise DeviceError(errno.EBUSY)

    with served(Moody()) as path:
        with Raw.connect(path, None) as client:
            refused = client.call(VERSION, struct.pack("<HH", 0, 2) + FULL)
            assert refused.errno == errno.EBUSY
            assert client.receive() is None
        finds_it_running(path)


def test_a_server_without_clients_starts_no_device(tmp_path: Path) -> None:
    class Starting(Device):
        started = 0

        def start(self) -> None:
            self.started += 1

    device = Starting()
    path = str(tmp_path / "s")
    with Server(device, path):
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(path)
        finds_it_running(path)
    assert device.started == 1


def test_the_answers_to_a_client_that_shuts_its_side_down_still_come(path: str) -> None:
    with Raw.connect(path) as client:
        number = client.send(FEATURE, struct.pack("<II", 16, STATE | GET))
        client.sock.shutdown(1)
        reply = client.receive()
        assert reply is not None
        assert reply.msg_id == number
        assert client.receive() is None
