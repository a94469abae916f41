"""``virtio_blk`` over vfio-user, and a driver of it behind each kind of client."""

from __future__ import annotations

import mmap
import os
import select
import struct
from typing import TYPE_CHECKING

import pytest

from raw_vfio_user import (
    DMA_MAP,
    DMA_READ,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    RESET,
    Message,
    Raw,
    client_of,
    served,
)
from vfiomig.descriptors import Fd
from vfiomig.models.virtio_blk import VirtioBlk
from virtio_driver import BASE, DRIVER_OK, ISR, MEMORY, NEEDS_RESET, Driver, Guest, Request

if TYPE_CHECKING:
    from collections.abc import Iterator

BAR, CONFIG, COMMAND = 4, 7, 4
MEMORY_AND_MASTER = b"\6\0"
SIZE = 1 << 20
READ_AND_WRITE = 3
DATA = bytes(range(256)) * 16


class OneAtATime:
    """A client's access to the BAR as QEMU has it: while it waits for one it answers no DMA."""

    def __init__(self, client: Raw, guest: Guest) -> None:
        self.client = client
        self.guest = guest
        self._asked: list[Message] = []

    def read(self, offset: int, length: int) -> bytes:
        return self._call(REGION_READ, struct.pack("<QII", offset, BAR, length)).body[16:]

    def write(self, offset: int, data: bytes) -> None:
        self._call(REGION_WRITE, struct.pack("<QII", offset, BAR, len(data)) + data)

    def _call(self, command: int, body: bytes) -> Message:
        number = self.client.send(command, body)
        while (message := self._receive()).command != command:
            self._asked.append(message)
        assert (message.msg_id, message.errno) == (number, 0)
        return message

    def _receive(self) -> Message:
        message = self.client.receive()
        assert message is not None
        return message

    def answer(self) -> None:
        """Answer the DMA that was asked for so far."""
        while select.select([self.client.sock], [], [], 0)[0]:
            self._asked.append(self._receive())
        for asked in self._asked:
            address, length = struct.unpack_from("<QQ", asked.body)
            at, data = address - BASE, b""
            if asked.command == DMA_READ:
                data = bytes(self.guest.bytes[at : at + length])
            else:
                self.guest.bytes[at : at + length] = asked.body[16:]
            reply = asked.body[:16] + data
            self.client.send(asked.command, reply, flags=REPLY, msg_id=asked.msg_id)
        self._asked.clear()


class PinDriver(Driver):
    """A driver that looks for the interrupt pin's reason, as one without MSI-X does."""

    bar: OneAtATime

    def collect(self) -> list[Request]:
        self.bar.answer()
        self.bar.read(ISR, 1)
        return super().collect()


@pytest.fixture
def guest() -> Iterator[tuple[Guest, Fd]]:
    """Memory that can be mapped, and its descriptor."""
    with Fd(os.memfd_create("guest", os.MFD_CLOEXEC)) as memory:
        os.truncate(memory.fileno(), MEMORY)
        with mmap.mmap(memory.fileno(), MEMORY) as mapped:
            yield Guest(mapped), memory


def map_all(client: Raw, memory: Fd | None) -> None:
    assert client.write_region(CONFIG, COMMAND, MEMORY_AND_MASTER) == 0
    body = struct.pack("<IIQQQ", 32, READ_AND_WRITE, 0, BASE, MEMORY)
    client.good(DMA_MAP, body, [] if memory is None else [memory.fileno()])


@pytest.mark.parametrize("mapped", [True, False], ids=["by mapping", "by messages"])
def test_registers_are_read_while_the_disk_waits_for_its_dma(
    guest: tuple[Guest, Fd], mapped: bool
) -> None:
    with client_of(VirtioBlk(size=SIZE)) as client:
        map_all(client, guest[1] if mapped else None)
        driver = PinDriver(OneAtATime(client, guest[0]), guest[0])
        driver.start(vectors=None)
        for sector in range(0, 80, 8):
            driver.write(sector, DATA[sector:] + DATA[:sector])
        for sector in range(0, 80, 8):
            assert driver.read(sector, len(DATA)) == DATA[sector:] + DATA[:sector]
        assert driver.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK


def test_a_disk_whose_driver_was_killed_leaves_the_next_ones_memory_alone(
    guest: tuple[Guest, Fd], caplog: pytest.LogCaptureFixture
) -> None:
    with served(VirtioBlk(size=SIZE)) as path:
        with Raw.connect(path) as client:
            map_all(client, guest[1])
            driver = PinDriver(OneAtATime(client, guest[0]), guest[0])
            driver.start(vectors=None)
            driver.write(0, DATA)
            driver.offer(driver.build(0, 0, room=len(DATA)))  # nobody is told of it
        guest[0].bytes[:] = before = bytes([0xEE]) * MEMORY
        with Raw.connect(path) as client:
            body = struct.pack("<IIQQQ", 32, READ_AND_WRITE, 0, BASE, MEMORY)
            client.good(DMA_MAP, body, [guest[1].fileno()])
            client.good(RESET)
            assert guest[0].bytes[:] == before
            assert client.write_region(CONFIG, COMMAND, MEMORY_AND_MASTER) == 0
            driver = PinDriver(OneAtATime(client, guest[0]), guest[0])
            driver.start(vectors=None)
            assert driver.read(0, len(DATA)) == DATA
    assert not caplog.records
