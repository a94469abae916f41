"""The virtio transport as a driver meets it: capabilities, negotiation, queues, interrupts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vfiomig.abi import pci
from vfiomig.device import ConfigurationSpace, Msix
from vfiomig.models.virtio_blk import VirtioBlk
from virtio_driver import (
    ACKNOWLEDGE,
    BASE,
    COMMON,
    CONFIG,
    DRIVER,
    DRIVER_OK,
    EVENT_IDX,
    FAILED,
    FEATURES_OK,
    FLUSH,
    INDIRECT,
    ISR,
    NEEDS_RESET,
    NO_VECTOR,
    NOTIFY,
    OUT,
    VERSION_1,
    Bench,
    Driver,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench(VirtioBlk(size=1 << 20)) as bench:
        yield bench


@pytest.fixture
def driver(bench: Bench) -> Driver:
    return Driver(bench, bench.guest)


def capabilities() -> list[bytes]:
    """Walk the list in configuration space, as a driver does."""
    space = ConfigurationSpace(
        VirtioBlk.pci, VirtioBlk.regions, VirtioBlk.interrupt_pin, VirtioBlk.pci_capabilities
    )
    found: list[bytes] = []
    at = space.register(pci.PCI_CAPABILITY_LIST, 1)
    while at:
        assert at % 4 == 0
        assert len(found) < 48
        length = 12
        if space.register(at, 1) == pci.PCI_CAP_ID_VNDR:
            length = space.register(at + 2, 1)
        found.append(space.read(at, length))
        at = space.register(at + 1, 1)
    return found


# Configuration space.


def test_it_is_a_modern_virtio_block_device() -> None:
    identity = VirtioBlk.pci
    assert (identity.vendor, identity.device, identity.revision) == (0x1AF4, 0x1042, 1)
    assert identity.class_code == 0x010000


def test_the_walk_finds_every_structure_in_a_page_of_its_own() -> None:
    structures = {}
    for capability in capabilities():
        if capability[0] != pci.PCI_CAP_ID_VNDR:
            continue
        kind, bar = capability[3], capability[4]
        if kind == 5:  # a window, not a structure: the driver says onto what
            assert capability == bytes((9, capability[1], 20, 5)).ljust(20, b"\0")
            continue
        offset = int.from_bytes(capability[8:12], "little")
        length = int.from_bytes(capability[12:16], "little")
        assert bar == 4
        assert len(capability) == (20 if kind == 2 else 16)
        assert 0 <= offset < offset + length <= VirtioBlk.bar4.size
        structures[kind] = offset, length
    assert structures[1] == (COMMON, 56)
    assert structures[2] == (NOTIFY, 4)
    assert structures[3] == (ISR, 1)
    assert structures[4] == (CONFIG, 36)
    pages = [offset // 4096 for offset, _ in structures.values()]
    msix = next(one for one in VirtioBlk.pci_capabilities if isinstance(one, Msix))
    pages += [msix.table[1] // 4096, msix.pending[1] // 4096]
    assert len(set(pages)) == len(pages)


def test_there_is_a_vector_for_the_queue_and_one_for_the_configuration() -> None:
    found = [one for one in capabilities() if one[0] == pci.PCI_CAP_ID_MSIX]
    assert len(found) == 1
    assert int.from_bytes(found[0][2:4], "little") == 2 - 1
    assert VirtioBlk.interrupt_pin == 1


# Features.


def test_what_is_offered_is_accepted(driver: Driver) -> None:
    assert driver.offered() == VERSION_1 | INDIRECT | EVENT_IDX | FLUSH | 1 << 2 | 1 << 6
    assert driver.negotiate()
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK


def test_read_only_and_iommu_are_features_of_devices_that_have_them() -> None:
    with Bench(VirtioBlk(size=512, readonly=True, iommu=True)) as bench:
        offered = Driver(bench, bench.guest).offered()
    assert offered & (1 << 5)
    assert offered & (1 << 33)


@pytest.mark.parametrize("features", [0, FLUSH | INDIRECT, VERSION_1 | 1 << 12, 1 << 63])
def test_features_that_cannot_be_are_refused(driver: Driver, features: int) -> None:
    """Without VERSION_1, or with one that was not offered."""
    assert not driver.settle(features)
    driver.put(20, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert not driver.status & DRIVER_OK


def test_a_refused_driver_may_try_again(driver: Driver) -> None:
    assert not driver.settle(VERSION_1 | 1 << 12)
    assert driver.settle(VERSION_1)


def test_features_are_fixed_once_they_are_agreed(driver: Driver) -> None:
    driver.negotiate(VERSION_1)
    driver.put(8, 4, 0)
    driver.put(12, 4, 0xFFFF_FFFF)
    assert driver.get(12, 4) == 0


@pytest.mark.parametrize("select", [2, 0xFFFF_FFFF])
def test_feature_words_beyond_the_second_are_empty(driver: Driver, select: int) -> None:
    driver.put(0, 4, select)
    driver.put(8, 4, select)
    driver.put(12, 4, 0xFFFF_FFFF)
    assert driver.get(4, 4) == 0
    assert driver.get(12, 4) == 0
    assert driver.settle(VERSION_1)


# Status.


def test_status_bits_are_never_cleared_but_by_a_reset(driver: Driver) -> None:
    driver.negotiate()
    driver.put(20, 1, ACKNOWLEDGE)
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK
    driver.reset()
    assert driver.status == 0
    assert driver.get(24, 2) == 256


def test_a_driver_cannot_set_needs_reset(driver: Driver) -> None:
    driver.put(20, 1, ACKNOWLEDGE | NEEDS_RESET)
    assert driver.status == ACKNOWLEDGE


def test_a_reset_that_a_driver_need_not_wait_for_does_not_come_later(
    bench: Bench, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The status that it waits for is there at the beginning, and so it goes on."""
    worker = bench.device._worker
    with monkeypatch.context() as busy:
        for name in ("kick", "wake"):
            busy.setattr(worker, name, lambda: None)
        driver.start()
    worker.kick()
    driver.write(0, b"x" * 512)
    assert driver.read(0, 512) == b"x" * 512


def test_nothing_is_taken_before_driver_ok(driver: Driver) -> None:
    driver.reset()
    driver.negotiate()
    driver.set_up_queue(8)
    request = driver.build(OUT, 0, b"x" * 512)
    driver.offer(request)
    driver.kick(always=True)
    assert driver.collect() == []
    driver.put(20, 1, driver.status | DRIVER_OK)  # what waited is answered without a notification
    driver.wait(request)
    assert request.status == 0


def test_nothing_is_taken_after_the_driver_failed(driver: Driver) -> None:
    driver.start()
    driver.put(20, 1, FAILED)
    driver.offer(driver.build(OUT, 0, b"x" * 512))
    driver.kick(always=True)
    assert driver.collect() == []


# Queues.


def test_queue_registers_read_back_what_was_written(driver: Driver) -> None:
    driver.reset()
    driver.negotiate()
    assert driver.get(18, 2) == 1
    assert driver.get(24, 2) == 256
    assert driver.set_up_queue(64)
    assert driver.get(24, 2) == 64
    assert driver.get(30, 2) == 0
    assert driver.get(32, 8) == BASE + driver.table
    assert driver.get(40, 8) == BASE + driver.avail
    assert driver.get(48, 8) == BASE + driver.used


@pytest.mark.parametrize(
    ("register", "width", "value"),
    [(24, 2, 0), (24, 2, 3), (24, 2, 512), (32, 4, 8), (40, 4, 1), (48, 4, 2)],
)
def test_a_queue_that_cannot_be_is_not_enabled(
    driver: Driver, register: int, width: int, value: int
) -> None:
    """A size that is no power of two or too large, or an address that is not aligned."""
    driver.reset()
    driver.negotiate()
    assert not driver.set_up_queue(16, enable=0)
    driver.put(register, width, value)
    driver.put(28, 2, 1)
    assert driver.get(28, 2) == 0


def test_a_queue_is_not_enabled_before_the_features_are_agreed(driver: Driver) -> None:
    driver.reset()
    driver.put(20, 1, ACKNOWLEDGE | DRIVER)
    assert not driver.set_up_queue(16)


def test_an_enabled_queue_stays_as_it_is(driver: Driver) -> None:
    driver.start(size=16)
    for register, width, value in ((24, 2, 8), (28, 2, 0), (32, 8, 0), (40, 8, 0), (48, 8, 0)):
        before = driver.get(register, width)
        driver.put(register, width, value)
        assert driver.get(register, width) == before
    driver.write(0, b"y" * 512)


def test_a_queue_that_is_not_there_reads_as_zero(driver: Driver) -> None:
    driver.put(22, 2, 1)
    assert driver.get(22, 2) == 1
    assert driver.bar.read(24, 32) == bytes(32)
    driver.bar.write(24, b"\xff" * 32)
    driver.put(22, 2, 0)
    assert driver.get(24, 2) == 256


def test_registers_can_be_accessed_at_any_width(driver: Driver) -> None:
    whole = driver.bar.read(0, 56)
    assert b"".join(driver.bar.read(at, 1) for at in range(56)) == whole
    driver.bar.write(33, b"\x12")
    assert driver.get(32, 8) == 0x1200
    driver.bar.write(32, (0x1122334455667780).to_bytes(8, "little"))
    assert driver.get(36, 4) == 0x11223344


def test_what_no_structure_holds_reads_as_zero_and_takes_writes(driver: Driver) -> None:
    for offset in (56, 0x800, ISR + 4, CONFIG + 36, NOTIFY, 0x6000, 0x7FF8):
        driver.bar.write(offset, b"\xff" * 8)
        assert driver.bar.read(offset, 8) == bytes(8)


def test_the_device_configuration_tells_the_capacity_and_cannot_be_written(driver: Driver) -> None:
    driver.bar.write(CONFIG, b"\xff" * 8)
    assert driver.get(CONFIG, 8) == (1 << 20) // 512
    assert driver.get(CONFIG + 12, 4) == 254  # seg_max
    assert driver.get(CONFIG + 20, 4) == 512  # blk_size
    assert driver.get(21, 1) == 0  # config_generation


# Interrupts.


def test_a_request_sends_the_vector_of_its_queue(bench: Bench, driver: Driver) -> None:
    driver.start(vectors=(0, 1))
    driver.write(0, b"z" * 512)
    assert bench.heard.messages == [1]
    assert not bench.heard.high()
    assert driver.get(ISR, 1) == 0


def test_a_vector_that_is_not_there_is_refused(driver: Driver) -> None:
    driver.put(16, 2, 2)
    driver.put(26, 2, 7)
    assert driver.get(16, 2) == NO_VECTOR
    assert driver.get(26, 2) == NO_VECTOR


def test_a_queue_without_a_vector_is_silent(bench: Bench, driver: Driver) -> None:
    driver.start(vectors=(0, NO_VECTOR))
    driver.write(0, b"z" * 512)
    assert bench.heard.messages == []
    assert not bench.heard.high()


def test_without_msix_the_pin_rises_until_the_isr_is_read(bench: Bench, driver: Driver) -> None:
    driver.start(vectors=None)
    driver.write(0, b"z" * 512)
    assert bench.heard.high()
    assert driver.get(ISR, 1) == 1
    assert not bench.heard.high()
    assert driver.get(ISR, 1) == 0
    assert bench.heard.messages == []


def test_a_driver_that_wants_no_interrupt_gets_none(bench: Bench, driver: Driver) -> None:
    driver.start(features=VERSION_1)
    driver.pack(driver.avail, "H", 1)  # VIRTQ_AVAIL_F_NO_INTERRUPT
    driver.write(0, b"z" * 512)
    assert bench.heard.messages == []
    driver.pack(driver.avail, "H", 0)
    driver.write(0, b"z" * 512)
    assert bench.heard.messages == [1]


def test_with_event_idx_the_interrupt_comes_at_the_index_that_was_named(
    bench: Bench, driver: Driver
) -> None:
    driver.start()
    requests = [driver.build(OUT, number, b"z" * 512, indirect=True) for number in range(6)]
    for number, request in enumerate(requests):
        driver.pack(driver.avail + 4 + 2 * driver.size, "H", 3)  # when the fourth is used
        driver.offer(request)
        driver.kick()
        assert bench.heard.messages == ([1] if number >= 3 else [])
    driver.wait(*requests)


def test_a_device_that_needs_a_reset_says_so_in_the_isr_and_by_the_pin(
    bench: Bench, driver: Driver
) -> None:
    driver.start(vectors=None)
    driver.offer_head(99)
    driver.kick(always=True)
    assert driver.status & NEEDS_RESET
    assert bench.heard.high()
    assert driver.get(ISR, 1) == 2
