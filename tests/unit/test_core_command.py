"""What the command register and D3hot keep a function from, and the window onto its regions."""

from __future__ import annotations

import errno
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from in_process import DEADLINE, IOMMUFD, Program
from pci_card import POWER, Card
from vfiomig.abi import pci, vfio
from vfiomig.core.regions import region_offset
from vfiomig.device import Device, Region, RegionWindow
from vfiomig.errors import DeviceError
from vfiomig.iommu import DmaPort, IoSpace, Mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = region_offset(vfio.VFIO_PCI_CONFIG_REGION_INDEX)
COMMAND = CONFIG + pci.PCI_COMMAND
IO, MEMORY, MASTER = pci.PCI_COMMAND_IO, pci.PCI_COMMAND_MEMORY, pci.PCI_COMMAND_MASTER
BAR0, BAR1, BAR2 = map(region_offset, range(3))
POWER_STATE = CONFIG + POWER + pci.PCI_PM_CTRL
D0, D3HOT = b"\0", b"\3"


class Memory:
    """Memory of a guest, of one page."""

    def __init__(self) -> None:
        self.data = bytearray(4096)

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.data[address : address + length])

    def read_into(self, address: int, view: memoryview) -> int:
        view[:] = self.data[address : address + len(view)]
        return len(view)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self.data[address : address + len(data)] = data


@pytest.fixture
def program() -> Iterator[Program]:
    with Program(Card()) as program:
        yield program


def card(program: Program) -> Card:
    assert isinstance(program.served.device, Card)
    return program.served.device


def command(program: Program, value: int) -> None:
    program.file.pwrite(COMMAND, value.to_bytes(2, "little"))


def refused(program: Program, offset: int) -> None:
    for access in (
        lambda: program.file.pread(offset, 4),
        lambda: program.file.pwrite(offset, b"lost"),
    ):
        with pytest.raises(OSError, match="is not decoded") as failure:
            access()
        assert failure.value.errno == errno.EIO


def test_an_opened_device_answers_and_is_no_bus_master() -> None:
    class Declared(Card):
        pci = Card.pci.__class__(0x1234, 0x5678, command=MASTER)

    program = Program(Declared(), bound=False)
    try:
        asked = bytes(vfio.BindIommufd(argsz=16, iommufd=IOMMUFD))[:16]
        assert program.ioctl(vfio.VFIO_DEVICE_BIND_IOMMUFD, asked).errno == 0
        assert program.file.pread(COMMAND, 2) == bytes([IO | MEMORY, 0])
        assert program.file.pread(BAR0, 4) == bytes(4)
        assert program.file.pread(BAR1, 4) == bytes(4)
    finally:
        program.close()


def test_memory_that_is_not_decoded_is_eio_and_the_device_hears_nothing(program: Program) -> None:
    program.file.pwrite(BAR1, b"kept")
    command(program, IO | MASTER)
    refused(program, BAR1)
    refused(program, BAR2)
    refused(program, BAR2 + 0x100)  # the MSI-X table
    refused(program, BAR2 + 0x1000)  # mapped pages
    assert not program.file.pread(BAR1, 0)
    assert card(program).accesses == []
    assert program.file.pread(BAR0, 4) == bytes(4)  # it is in I/O space
    program.reset()
    refused(program, BAR1)  # the register outlives a reset
    command(program, MEMORY)
    assert program.file.pread(BAR1, 4) == b"kept"


def test_nobody_answers_for_io_that_is_not_decoded(program: Program) -> None:
    program.file.pwrite(BAR0, b"kept")
    command(program, MEMORY)
    assert program.file.pread(BAR0, 8) == b"\xff" * 8
    assert program.file.pwrite(BAR0, b"lost") == 4
    with pytest.raises(OSError, match="in no region"):
        program.file.pread(BAR0 + 8, 1)
    command(program, IO | MEMORY)
    assert program.file.pread(BAR0, 8) == b"kept\0\0\0\0"


def test_in_d3hot_only_configuration_space_answers(program: Program) -> None:
    program.served.device.dma.space = space = IoSpace()
    space.map(Mapping(0, 4096, Memory(), 0, readable=True, writable=True))
    program.file.pwrite(POWER_STATE, D3HOT)
    refused(program, BAR1)
    assert program.file.pread(BAR0, 4) == b"\xff" * 4
    with pytest.raises(DeviceError, match="may not master the bus"):
        program.served.device.dma.read(0, 4)
    program.file.pwrite(POWER_STATE, D0)
    assert program.file.pread(BAR1, 4) == bytes(4)
    assert program.file.pread(BAR0, 4) == bytes(4)
    assert program.served.device.dma.read(0, 4) == bytes(4)


def test_the_next_user_finds_the_regions_decoded(program: Program) -> None:
    command(program, 0)
    program.reopen()
    assert program.file.pread(BAR1, 4) == bytes(4)


# Bus mastering.


def test_a_device_that_is_no_bus_master_reaches_no_memory(program: Program) -> None:
    dma, memory = program.served.device.dma, Memory()
    dma.space = space = IoSpace()
    space.map(Mapping(0, 4096, memory, 0, readable=True, writable=True))
    dma.write(0, b"first")
    program.master(on=False)
    for access in (
        lambda: dma.read(0, 4),
        lambda: dma.read_into(0, bytearray(4)),
        lambda: dma.write(0, b"lost"),
    ):
        with pytest.raises(DeviceError, match="may not master the bus") as failure:
            access()
        assert failure.value.errno == errno.EFAULT
    assert dma.space is space
    program.master()
    assert dma.read(0, 5) == b"first"


def test_what_is_attached_meanwhile_counts_once_it_masters_again() -> None:
    port, memory = DmaPort(), Memory()
    first, second = IoSpace(), IoSpace()
    second.map(Mapping(0, 4096, memory, 0, readable=True, writable=True))
    port.space = first
    port.master(False)
    port.space = second
    with pytest.raises(DeviceError):
        port.write(0, b"x")
    port.master(True)
    port.write(0, b"x")
    assert memory.data[:1] == b"x"


def test_no_access_is_under_way_when_mastering_was_turned_off() -> None:
    class Slow(Memory):
        def __init__(self) -> None:
            super().__init__()
            self.entered, self.go_on = threading.Event(), threading.Event()

        def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
            self.entered.set()
            assert self.go_on.wait(DEADLINE)
            super().write(address, data)

    port, memory = DmaPort(), Slow()
    port.space = space = IoSpace()
    space.map(Mapping(0, 4096, memory, 0, readable=True, writable=True))
    writer = threading.Thread(target=port.write, args=(0, b"late"))
    off = threading.Thread(target=port.master, args=(False,))
    writer.start()
    assert memory.entered.wait(DEADLINE)
    off.start()
    off.join(0.05)
    assert off.is_alive()
    memory.go_on.set()
    off.join(DEADLINE)
    writer.join(DEADLINE)
    assert memory.data[:4] == b"late"


# The window.


class Windowed(Device):
    """A window onto one region with handlers, one that is read-only, and one of 2 bytes less."""

    pci_capabilities = (RegionWindow(),)
    bar0 = Region(size=64)
    bar1 = Region(size=16, writable=False)
    bar2 = Region(size=16, readable=False)

    def __init__(self) -> None:
        self.accesses: list[tuple[int, int | bytes]] = []

    @bar0.reader
    def read_bar0(self, offset: int, length: int) -> bytes:
        self.accesses.append((offset, length))
        return bytes(range(offset + 1, offset + 1 + length))

    @bar0.writer
    def write_bar0(self, offset: int, data: bytes) -> None:
        self.accesses.append((offset, data))


WINDOW = CONFIG + 0x40
DATA = WINDOW + 16


class Looking(Program):
    def __init__(self) -> None:
        self.card = Windowed()
        super().__init__(self.card)

    def look(self, bar: int, offset: int, length: int) -> None:
        self.file.pwrite(WINDOW + 4, bytes([bar]))
        self.file.pwrite(WINDOW + 8, struct.pack("<II", offset, length))


@pytest.fixture
def looking() -> Iterator[Looking]:
    with Looking() as looking:
        yield looking


def test_the_window_is_a_vendor_capability(looking: Looking) -> None:
    assert looking.file.pread(WINDOW, 20) == b"\x09\0\x14\x05".ljust(20, b"\0")
    looking.look(0xFE, 0x1234_5678, 0x9ABC_DEF0)
    assert looking.file.pread(WINDOW, 16) == bytes.fromhex("09001405 fe000000 78563412 f0debc9a")
    assert looking.card.accesses == []


@pytest.mark.parametrize("decoded", [True, False])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_an_access_of_the_data_is_one_of_the_region(
    looking: Looking, length: int, decoded: bool
) -> None:
    command(looking, MEMORY * decoded)
    looking.look(0, 8, length)
    assert looking.file.pread(DATA, 4) == bytes([9, 10, 11, 12][:length]).ljust(4, b"\0")
    assert looking.file.pread(DATA, length) == bytes([9, 10, 11, 12][:length])
    looking.file.pwrite(DATA, b"data"[:length])
    assert looking.card.accesses == [(8, length), (8, length), (8, b"data"[:length])]


def test_an_access_that_goes_beyond_the_data_reaches_the_region_once(looking: Looking) -> None:
    looking.look(0, 4, 4)
    assert looking.file.pread(WINDOW + 12, 8) == struct.pack("<I", 4) + b"\5\6\7\x08"
    looking.file.pwrite(WINDOW + 8, struct.pack("<II", 12, 2) + b"abcd")
    assert looking.card.accesses == [(4, 4), (12, b"ab")]
    looking.file.pwrite(DATA + 1, b"X")  # the rest is what it was
    assert looking.card.accesses[-1] == (12, b"aX")


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [(0, 64, 4), (0, 62, 4), (0, 2, 4), (0, 0, 0), (0, 0, 3), (0, 0, 8), (3, 0, 4), (7, 0, 4)],
)
def test_a_window_onto_nothing_reads_as_zeros(
    looking: Looking, bar: int, offset: int, length: int
) -> None:
    looking.look(bar, offset, length)
    assert looking.file.pread(DATA, 4) == bytes(4)
    assert looking.file.pwrite(DATA, b"lost") == 4
    assert looking.card.accesses == []


def test_a_window_opens_nothing_that_is_closed(looking: Looking) -> None:
    looking.look(1, 0, 4)
    looking.file.pwrite(DATA, b"lost")
    assert looking.file.pread(DATA, 4) == bytes(4)
    looking.look(2, 0, 4)
    looking.file.pwrite(DATA, b"kept")
    assert looking.file.pread(DATA, 4) == bytes(4)
    assert bytes(looking.card.bar2[:4]) == b"kept"
