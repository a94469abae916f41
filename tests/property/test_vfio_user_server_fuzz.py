"""Whatever a client sends: well-formed replies or the end of the connection, and a server that lives.

A client sends a sequence of messages, good ones, bad ones and bytes, cut wherever it likes, and
then shuts its side down. All that comes back is replies to what it asked, each at most once, and
requests for its memory. Afterwards the device runs, the next client is served, and nothing of ours
has failed.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.engine import Engine
from raw_vfio_user import (
    DMA_READ,
    DMA_WRITE,
    ERROR,
    FULL,
    HEADER,
    REPLY,
    RUNNING,
    Message,
    Raw,
    served,
)
from vfiomig import Region
from vfiomig.device import Msix

if TYPE_CHECKING:
    from collections.abc import Iterator

U16 = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 0xFFFF])
U32 = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 20, 24, 32, 33, 36, 40, 4096, 0x10002, 0x20002])
U32 |= st.sampled_from([0x20006, 0x10008, 0x20007, 1 << 20, 16 << 20, 1 << 31, (1 << 32) - 1])
U64 = st.sampled_from([0, 1, 8, 16, 4096, 8192, 1 << 20, 1 << 40, 1 << 63, (1 << 64) - 1])
NUMBERS = (*range(20), 0x8079, 0x8078, 0xFFFF)
FLAGS = st.sampled_from([0] * 12 + [0x10, 0x10, 1, 0x21, 2, 15, 0xF00])
STATES = st.integers(0, 9)


def packed(layout: str, *fields: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    return st.tuples(*fields).map(lambda values: struct.pack(layout, *values))


def body(command: int) -> st.SearchStrategy[bytes]:
    """A payload that is likely to mean something."""
    few = st.binary(max_size=40)
    shapes: dict[int, st.SearchStrategy[bytes]] = {
        2: packed("<IIQQQ", st.just(32), U32, U64, U64, U64),
        3: packed("<IIQQ", st.sampled_from([24, 48]), st.integers(0, 3), U64, U64),
        4: packed("<4I", U32, U32, U32, U32),
        5: packed("<4I2Q", U32, U32, U32, U32, U64, U64),
        7: packed("<4I", U32, U32, U32, U32),
        8: packed("<5I", st.sampled_from([20, 24, 40]), U32, st.integers(0, 5), U32, U32),
        9: packed("<QII", U64, st.integers(0, 9), U32),
        10: st.one_of(
            packed("<QIIQ", st.sampled_from([0, 8, 16]), st.just(0), st.just(8), U64),
            packed("<QIIH", st.just(4), st.just(7), st.just(2), st.sampled_from([0, 2, 6, 0x406])),
            packed("<QII", U64, st.integers(0, 9), U32),
        ),
        15: packed("<QQIIQ", st.integers(0, 2), U64, st.integers(0, 9), st.integers(0, 9), U64),
        16: st.one_of(
            packed("<IIIi", st.just(16), st.just(0x20002), STATES, st.just(-1)),
            packed("<IIQIIQQ", st.just(40), U32, U64, st.integers(0, 2), st.just(0), U64, U64),
            packed("<IIQQQ", U32, U32, U64, U64, U64),
        ),
        17: packed("<II", U32, U32),
        18: packed("<II", st.just(24), st.just(16)).map(lambda head: head + bytes(16)),
        0x8079: packed("<IIQQ", U32, U32, U64, U64),
    }
    return st.one_of(shapes.get(command, few), few)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    command = draw(st.sampled_from(NUMBERS))
    payload = draw(body(command)) if draw(st.booleans()) else draw(body(16))
    size = 16 + len(payload)
    if draw(st.integers(0, 15)) == 0:
        size = draw(U32)
    head = HEADER.pack(draw(st.integers(0, 9)), command, size, draw(FLAGS), draw(U32))
    return head + payload


Step = tuple[bytes, int]
STEPS = st.lists(
    st.tuples(
        st.one_of(messages(), messages(), messages(), st.binary(max_size=64)), st.integers(0, 2)
    ),
    max_size=25,
)


class Target(Engine):
    """Reaches memory and interrupts, and migrates."""

    interrupt_pin = 1
    pci_capabilities = (Msix(vectors=4, table=(1, 0), pending=(1, 2048)),)
    bar1 = Region(size=4 * 4096, mapped=((4096, 4096),))

    def reset(self) -> None:
        self.result = 0


@pytest.fixture(scope="module")
def path() -> Iterator[str]:
    with served(Target()) as path:
        yield path


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS, agrees=st.integers(0, 9), cut=st.integers(1, 2000))
def test_a_server_outlives_every_client(
    path: str, caplog: pytest.LogCaptureFixture, steps: list[Step], agrees: int, cut: int
) -> None:
    with Raw.connect(path, FULL if agrees else None) as client:
        came: list[Message] = []
        reader = threading.Thread(target=receive_all, args=(client, came))
        reader.start()
        send(client, steps, cut)
        reader.join(30)
        assert not reader.is_alive(), "the server neither answers nor hangs up"
    for message in came:
        check(message)
    sent = sum(len(data) for data, _ in steps)
    assert len([m for m in came if m.flags]) <= sent // 16 + 1
    with Raw.connect(path) as good:
        assert good.state() == RUNNING
        assert len(good.read_region(7, 0, 64)) == 64
    failed = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in failed] == []
    caplog.clear()


def send(client: Raw, steps: list[Step], cut: int) -> None:
    """Send it all, in pieces of at most ``cut`` bytes, or as much as the server takes."""
    eventfd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        for data, fds in steps:
            for at in range(0, len(data), cut):
                piece = data[at : at + cut]
                if fds and not at:
                    socket.send_fds(client.sock, [piece], [eventfd] * fds)
                else:
                    client.sock.sendall(piece)
        client.sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it has hung up
    finally:
        os.close(eventfd)


def receive_all(client: Raw, into: list[Message]) -> None:
    while (message := client.receive()) is not None:
        into.append(message)


def check(message: Message) -> None:
    """It is a reply, or a request for memory."""
    if not message.flags:
        assert message.command in {DMA_READ, DMA_WRITE}
        return
    assert message.flags in {REPLY, REPLY | ERROR}
    assert bool(message.errno) is bool(message.flags & ERROR)
    assert not message.errno or not message.body
