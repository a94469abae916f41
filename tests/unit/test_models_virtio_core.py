"""``virtio_blk`` served by the core: its capabilities, vectors and states as a program has them."""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

import pytest

from in_process import Program
from vfiomig.abi import pci, vfio
from vfiomig.core.regions import region_offset
from vfiomig.device import RegionWindow
from vfiomig.fsm import State
from vfiomig.iommu import IoSpace, Mapping
from vfiomig.models.virtio_blk import VirtioBlk
from virtio_driver import BASE, MEMORY, OUT, Driver, Guest

if TYPE_CHECKING:
    from collections.abc import Iterator

INTX, MSIX = 0, 2
NONE, EVENTFD = 1, 4
MASK, TRIGGER = 8, 32
CONFIG, BAR4 = region_offset(7), region_offset(4)
SIZE = 1 << 20


class Registers:
    """BAR 4 through the descriptor, as the ``bar`` of a ``Driver``."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def read(self, offset: int, length: int) -> bytes:
        return self.machine.file.pread(BAR4 + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        assert self.machine.file.pwrite(BAR4 + offset, data) == len(data)


class Machine(Program):
    """A program that has the device, with guest memory behind it."""

    def __init__(self, guest: Guest) -> None:
        device = VirtioBlk(size=SIZE)
        super().__init__(device)
        device.dma.space = IoSpace()
        device.dma.space.map(Mapping(BASE, MEMORY, guest, 0, readable=True, writable=True))
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]

    def set_irqs(self, index: int, flags: int, *eventfds: int) -> None:
        raw = struct.pack(f"={len(eventfds)}i", *eventfds)
        header = vfio.IrqSet(argsz=20 + len(raw), flags=flags, index=index, count=len(eventfds))
        assert self.ioctl(vfio.VFIO_DEVICE_SET_IRQS, bytes(header) + raw).errno == 0

    def heard(self, vector: int, deadline: float = 10) -> int:
        """How often the vector was signalled since the last look; waits for the first."""
        end = time.monotonic() + deadline
        while True:
            try:
                return os.eventfd_read(self.eventfds[vector])
            except BlockingIOError:
                if time.monotonic() >= end:
                    return 0
                time.sleep(0.001)

    def close(self) -> None:
        super().close()
        for eventfd in self.eventfds:
            os.close(eventfd)
        self.eventfds.clear()


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
def machine(guest: Guest) -> Iterator[Machine]:
    with Machine(guest) as machine:
        yield machine


def test_a_driver_finds_its_structures_through_the_descriptor(machine: Machine) -> None:
    config = machine.file.pread(CONFIG, 256)
    assert config[:4] == bytes.fromhex("f41a4210")
    assert config[pci.PCI_INTERRUPT_PIN] == 1
    at, kinds, found = config[pci.PCI_CAPABILITY_LIST], [], []
    while at:
        found.append(config[at])
        if config[at] == pci.PCI_CAP_ID_VNDR:
            kinds.append(config[at + 3])
            assert config[at + 4] == (4 if kinds[-1] != 5 else 0)
        at = config[at + 1]
    assert sorted(kinds) == [1, 2, 3, 4, 5]
    assert found.count(pci.PCI_CAP_ID_MSIX) == 1


def test_a_request_signals_the_eventfd_of_its_vector(machine: Machine, guest: Guest) -> None:
    machine.set_irqs(MSIX, EVENTFD | TRIGGER, *machine.eventfds)
    driver = Driver(Registers(machine), guest)
    driver.start()
    driver.write(0, b"x" * 512)
    assert machine.heard(1) == 1
    driver.offer_head(99)
    driver.kick(always=True)
    assert machine.heard(0) == 1


def test_without_msix_the_pin_is_signalled_and_masked_until_then(
    machine: Machine, guest: Guest
) -> None:
    machine.set_irqs(INTX, EVENTFD | TRIGGER, machine.eventfds[0])
    driver = Driver(Registers(machine), guest)
    driver.start(vectors=None)
    driver.write(0, b"x" * 512)
    driver.write(1, b"y" * 512)
    assert machine.heard(0) == 1
    assert driver.get(0x1000, 1) == 1


def test_the_msix_table_is_no_part_of_the_devices_registers(machine: Machine) -> None:
    entry = struct.pack("<QII", 0xFEE0_0000, 0x41, 0)
    Registers(machine).write(0x4000, entry)
    assert Registers(machine).read(0x4000, 16) == entry
    assert Registers(machine).read(0x5000, 8) == bytes(8)


def test_a_vfio_reset_leaves_no_driver_and_the_whole_disk(machine: Machine, guest: Guest) -> None:
    driver = Driver(Registers(machine), guest)
    driver.start()
    driver.write(9, b"k" * 512)
    assert machine.reset() == 0
    assert driver.status == 0
    driver.start()
    assert driver.read(9, 512) == b"k" * 512


def test_every_state_of_a_migration_with_requests_that_wait(machine: Machine, guest: Guest) -> None:
    driver = Driver(Registers(machine), guest)
    driver.start()
    driver.write(3, b"a" * 512)
    saving = machine.go(State.PRE_COPY)
    driver.write(4, b"b" * 512)
    machine.go(State.PRE_COPY_P2P)
    waiting = driver.build(OUT, 5, b"c" * 512)
    driver.offer(waiting)
    driver.kick(always=True)
    assert driver.collect() == []
    machine.go(State.STOP_COPY)
    stream = machine.read_all(saving, 1 << 20)
    with Machine(guest) as other:
        other.set_irqs(MSIX, EVENTFD | TRIGGER, *other.eventfds)
        loading = other.go(State.RESUMING)
        assert other.write(loading, stream) == len(stream)
        other.go(State.STOP)
        driver.bar = Registers(other)
        assert driver.collect() == []
        other.go(State.RUNNING)
        driver.wait(waiting)
        assert waiting.status == 0
        assert other.heard(1) >= 1
        for sector, byte in ((3, b"a"), (4, b"b"), (5, b"c")):
            assert driver.read(sector, 512) == byte * 512
        machine.go(State.STOP)


# Firmware.


class ThroughTheWindow(Registers):
    """BAR 4 of the disk as firmware reaches it that cannot map BARs."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        at = machine.served.configuration.places[RegionWindow]
        self.window = CONFIG + at

    def _look(self, offset: int, length: int) -> None:
        self.machine.file.pwrite(self.window + 4, b"\4")
        self.machine.file.pwrite(self.window + 8, struct.pack("<II", offset, length))

    def read(self, offset: int, length: int) -> bytes:
        pieces = []
        for at in range(0, length, 4):
            size = min(4, length - at)
            self._look(offset + at, size)
            pieces.append(self.machine.file.pread(self.window + 16, size))
        return b"".join(pieces)

    def write(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), 4):
            piece = data[at : at + 4]
            self._look(offset + at, len(piece))
            self.machine.file.pwrite(self.window + 16, piece)


def test_firmware_reads_the_disk_through_configuration_space_alone() -> None:
    guest = Guest()
    with Machine(guest) as machine:
        machine.file.pwrite(CONFIG + pci.PCI_COMMAND, bytes([pci.PCI_COMMAND_MASTER, 0]))
        driver = Driver(ThroughTheWindow(machine), guest)
        driver.start(vectors=None)
        driver.write(3, b"boot sector".ljust(512, b"!"))
        assert driver.read(3, 512) == b"boot sector".ljust(512, b"!")
        with pytest.raises(OSError, match="is not decoded"):
            Registers(machine).read(0, 4)


def test_firmware_that_migrates_between_saying_where_and_looking_looks_there(
    machine: Machine, guest: Guest
) -> None:
    before = ThroughTheWindow(machine)
    machine.file.pwrite(CONFIG + pci.PCI_BASE_ADDRESS_0 + 16, struct.pack("<I", 0xFE000000))
    before._look(0x2000, 4)  # the disk's size in sectors, in the device's own configuration
    with Machine(guest) as other:
        after = ThroughTheWindow(other)
        after._look(0x0000, 2)
        move(machine, other)
        assert other.file.pread(after.window + 16, 4) == struct.pack("<I", SIZE // 512)
        assert other.file.pread(after.window, 16) == machine.file.pread(before.window, 16)
        bar = CONFIG + pci.PCI_BASE_ADDRESS_0 + 16
        assert other.file.pread(bar, 4) == b"\4\0\0\0", "the user restores what a bus defines"


def test_a_state_from_before_the_window_was_in_it_is_taken(machine: Machine, guest: Guest) -> None:
    """So is one of a guest that has no use for the window, by whoever knows of none."""
    window = ThroughTheWindow(machine)
    without = machine.served.device.state_size()
    window._look(0x2000, 4)
    assert machine.served.device.state_size() == without + 12
    with Machine(guest) as other:
        move(other, machine)
        assert machine.file.pread(window.window + 4, 12) == bytes(12)
        assert machine.served.device.state_size() == without


def move(source: Machine, destination: Machine) -> None:
    saving = source.go(State.STOP_COPY)
    told = source.served.device.state_size()
    stream = source.read_all(saving, 1 << 20)
    assert len(stream) == told
    loading = destination.go(State.RESUMING)
    assert destination.write(loading, stream) == len(stream)
    destination.go(State.RUNNING)
