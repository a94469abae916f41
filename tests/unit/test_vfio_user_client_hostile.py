"""Servers that lie, stop in the middle, or go away: one error of ours, at once, and nothing kept.

The scenario is run again and again, and each time another of the server's replies is another one
than it should be.
"""

from __future__ import annotations

import errno
import mmap
import struct
import time
from typing import TYPE_CHECKING

import pytest

import vfiomig
from c_style_server import DMA_READ, DMA_WRITE, HEADER, CStyleServer, Options
from client_scenario import REPLIES, STATE, scenario
from vfiomig import State, VfioMigError
from vfiomig.client.recovery import Outcome, recover
from vfiomig.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


PAGE = mmap.PAGESIZE


def run(path: Path, options: Options, timeout: float = 5.0) -> list[VfioMigError]:
    """Open a device and go through the scenario; return every failure."""
    socket_path = path / "device.sock"
    with CStyleServer(socket_path, STATE, options), mmap.mmap(-1, PAGE) as memory:
        try:
            dev = vfiomig.open(f"vfio-user:{socket_path}", timeout=timeout)
        except VfioMigError as error:
            return [error]
        with dev:
            return scenario(dev, memory)


class Nth:
    """Changes the reply with one number, counted from 0."""

    def __init__(self, number: int, change: Callable[[bytes], bytes]) -> None:
        self.left = number
        self.change = change

    def __call__(self, command: int, reply: bytes) -> bytes:
        self.left -= 1
        return self.change(reply) if self.left == -1 else reply


def with_header(reply: bytes, **fields: int) -> bytes:
    names = ("msg_id", "command", "size", "flags", "errno")
    told = dict(zip(names, HEADER.unpack_from(reply), strict=True)) | fields
    return HEADER.pack(*told.values()) + reply[HEADER.size :]


def shortened(by: int) -> Callable[[bytes], bytes]:
    def change(reply: bytes) -> bytes:
        keep = max(HEADER.size, len(reply) - by)
        return with_header(reply[:keep], size=keep)

    return change


def lengthened(by: int) -> Callable[[bytes], bytes]:
    return lambda reply: with_header(reply + b"\xff" * by, size=len(reply) + by)


def garbled(reply: bytes) -> bytes:
    return reply[: HEADER.size] + b"\xff" * (len(reply) - HEADER.size)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "one byte short": shortened(1),
    "half": lambda reply: shortened((len(reply) - HEADER.size + 1) // 2)(reply),
    "a header only": shortened(1 << 20),
    "one byte long": lengthened(1),
    "long": lengthened(5000),
    "all ones": garbled,
    "another id": lambda reply: with_header(reply, msg_id=(reply[0] + 1) & 0xFF),
    "another command": lambda reply: with_header(reply, command=42),
    "a request": lambda reply: with_header(reply, flags=0),
    "a size of 15": lambda reply: with_header(reply, size=15),
    "a size of 4 GiB": lambda reply: with_header(reply, size=0xFFFFFFFF),
    "an error without errno": lambda reply: with_header(reply, flags=0x21, errno=0),
    "an error of no errno": lambda reply: with_header(reply, flags=0x21, errno=0xFFFFFFFF),
    "twice": lambda reply: reply + reply,
    "noise": lambda reply: b"\xa5" * len(reply),
}
#: Changes without which nobody can go on.
FRAMING = {"another id", "another command", "a size of 15", "a size of 4 GiB", "twice", "noise"}


def test_the_scenario_needs_these_replies_and_fails_nowhere(tmp_path: Path) -> None:
    counting = Nth(-1, lambda reply: reply)
    assert run(tmp_path, Options(mangle=counting)) == []
    assert -1 - counting.left == REPLIES


@pytest.mark.parametrize("name", CHANGES)
def test_a_reply_that_lies_is_an_error_wherever_it_comes(tmp_path: Path, name: str) -> None:
    harmless = []
    for number in range(REPLIES):
        folder = tmp_path / str(number)
        folder.mkdir()
        failed = run(folder, Options(mangle=Nth(number, CHANGES[name])))
        assert all(isinstance(error, RequestError) for error in failed)
        if not failed:
            harmless.append(number)
    # Much of what is answered is never looked at, but the framing is, always; a second reply to
    # the last request comes when nobody listens any more.
    if name in FRAMING:
        assert [number for number in harmless if number < REPLIES - 1] == []


@pytest.mark.parametrize("cut", ["in the header", "in the middle", "before the last byte"])
def test_a_server_that_dies_in_a_reply_is_noticed_at_once(tmp_path: Path, cut: str) -> None:
    for number in range(REPLIES):
        folder = tmp_path / str(number)
        folder.mkdir()
        holder: list[CStyleServer] = []

        def change(reply: bytes, holder: list[CStyleServer] = holder) -> bytes:
            keep = {"in the header": 5, "in the middle": len(reply) // 2}
            assert holder[0].connection is not None
            holder[0].connection.send(reply[: keep.get(cut, len(reply) - 1)])
            holder[0].hang_up()
            raise ConnectionError

        began = time.monotonic()
        failed = run(folder, Options(mangle=Nth(number, change), before=remember(holder)), 60.0)
        assert time.monotonic() - began < 10
        assert isinstance(failed[0], RequestError)
        assert failed[0].errno == (errno.ENODEV if number else errno.ECONNRESET)


def remember(holder: list[CStyleServer]) -> Callable[[CStyleServer, int], None]:
    def before(server: CStyleServer, command: int) -> None:
        holder[:] = [server]

    return before


@pytest.mark.parametrize("number", range(0, REPLIES, 6))
def test_a_server_that_stops_in_a_reply_has_its_time_and_no_more(
    tmp_path: Path, number: int
) -> None:
    began = time.monotonic()
    failed = run(tmp_path, Options(mangle=Nth(number, lambda reply: reply[:9])), timeout=0.3)
    assert failed
    assert isinstance(failed[0], RequestError)
    assert failed[0].errno == errno.ETIMEDOUT
    assert time.monotonic() - began < 10, "once the time is over every call fails at once"


def test_thousands_of_accesses_outside_of_what_was_given_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with (
        CStyleServer(path) as server,
        vfiomig.open(f"vfio-user:{path}", timeout=10) as dev,
        mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
    ):
        memory[:] = b"m" * len(memory)
        dev.map(0x100000, memory)
        bounds = (0x100000, 0x100000 + len(memory))
        places = (0, bounds[0] - 1, bounds[1] - 1, bounds[1], 1 << 40, (1 << 64) - 2)

        def attack() -> None:
            for turn in range(3000):
                addr = places[turn % len(places)]
                count = 2 + turn % 4000
                command = DMA_WRITE if turn % 2 else DMA_READ
                body = struct.pack("<QQ", addr, count) + b"x" * (count * (turn % 2))
                with pytest.raises(OSError) as caught:
                    server.ask(command, body)
                assert caught.value.errno in {errno.EFAULT, errno.EINVAL}

        server.do(attack)
        inside = memory[PAGE : 4 * PAGE - 1]
        assert inside == b"m" * len(inside)
        assert dev.read_region(0, 0, 4) == bytes(4)
        dev.unmap(*bounds[:1], len(memory))


def test_a_read_of_more_than_was_agreed_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with (
        CStyleServer(path) as server,
        vfiomig.open(f"vfio-user:{path}", timeout=10) as dev,
        mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
    ):
        dev.map(0x100000, memory)

        def ask() -> None:
            with pytest.raises(OSError) as caught:
                server.read_memory(0x100000, (1 << 20) + 1)
            assert caught.value.errno == errno.E2BIG
            assert server.read_memory(0x100000, 1 << 20) == bytes(1 << 20)

        server.do(ask)
        dev.unmap(0x100000, 2 << 20)


def test_a_device_whose_server_is_gone_is_given_up_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with (
        CStyleServer(path) as server,
        vfiomig.open(f"vfio-user:{path}", timeout=10) as dev,
    ):
        assert dev.capabilities
        session = dev.set_state(State.STOP_COPY)
        with session:
            server.hang_up()
            with pytest.raises(vfiomig.SessionError, match=f"{path} ended the connection"):
                session.readinto(bytearray(10))
            with pytest.raises(
                vfiomig.SetStateError, match=f"{path} ended the connection"
            ) as caught:
                dev.set_state(State.STOP)
            assert (caught.value.errno, caught.value.device_state) == (errno.ENODEV, None)
            assert recover(dev, caught.value).outcome is Outcome.GIVEN_UP
