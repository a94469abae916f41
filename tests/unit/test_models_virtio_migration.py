"""``virtio_blk`` moves to another device: its rings, its requests, and what is on its disk."""

from __future__ import annotations

import mmap
import random
import struct
import threading
import zlib
from typing import TYPE_CHECKING

import pytest

from pattern_streams import load, sealed, state_of
from vfiomig import State
from vfiomig.client import open_device
from vfiomig.errors import StateRejected
from vfiomig.models.virtio_blk import VirtioBlk
from vfiomig.models.virtio_disk import BLOCK, MemoryDisk
from virtio_driver import (
    BASE,
    EVENT_IDX,
    FLUSH,
    FLUSHES,
    IN,
    MEMORY,
    NEEDS_RESET,
    OK,
    OUT,
    VERSION_1,
    Bench,
    Driver,
    Guest,
)  # fmt: skip

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig import DeviceClient

SIZE = 1 << 20
DATA = random.Random(5).randbytes(8192)


def moved(source: Bench, device: VirtioBlk) -> Bench:
    """Stop the source, and go on with another device and the same guest memory."""
    source.device.stop()
    load(device, state_of(source.device))
    return Bench(device, source.guest)


def early_part(device: VirtioBlk) -> bytes:
    """What pre-copy offers up to its temporary end."""
    parts = []
    for buffer in device.precopy():
        if not buffer:
            break
        parts.append(bytes(buffer))
    return b"".join(parts)


def content(device: VirtioBlk) -> bytes:
    assert isinstance(device._disk, MemoryDisk)
    return bytes(device._disk.content(0, device._disk.blocks))


# Whole migrations.


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX | FLUSH])
def test_a_guest_goes_on_with_another_device(features: int) -> None:
    with Bench(VirtioBlk(size=SIZE)) as source:
        driver = Driver(source, source.guest)
        driver.start(features=features)
        driver.write(5, DATA)
        with moved(source, VirtioBlk(size=SIZE)) as destination:
            driver.bar = destination
            assert driver.status == 15
            assert driver.read(5, len(DATA)) == DATA
            driver.write(900, DATA[:512])
            assert driver.read(900, 512) == DATA[:512]


def test_requests_that_nobody_took_are_answered_once_on_the_other_side() -> None:
    with Bench(VirtioBlk(size=SIZE)) as source:
        driver = Driver(source, source.guest)
        driver.start()
        driver.write(0, DATA[:512])
        source.device.quiesce()
        waiting = [driver.build(OUT, 1 + at, DATA[at : at + 512]) for at in range(4)]
        for request in waiting:
            driver.offer(request)
        driver.kick(always=True)
        with moved(source, VirtioBlk(size=SIZE)) as destination:
            assert not content(source.device)[512:].strip(b"\0")
            driver.bar = destination
            driver.wait(*waiting)  # nobody notifies: the start looks by itself
            assert [request.status for request in waiting] == [OK] * 4
            assert driver.next_used == 5
            for at in range(4):
                assert driver.read(1 + at, 512) == DATA[at : at + 512]
            assert driver.pending == {}


def test_a_request_that_is_under_way_is_finished_by_stop(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    entered, go_on = threading.Event(), threading.Event()
    device = VirtioBlk(path=str(path))

    def slow() -> None:
        entered.set()
        assert go_on.wait(10)

    device._disk.flush = slow  # type: ignore[method-assign]  # storage that takes its time
    with Bench(device) as source:
        driver = Driver(source, source.guest)
        driver.start()
        first, second = driver.build(FLUSHES, 0), driver.build(OUT, 0, DATA[:512])
        driver.offer(first)
        driver.offer(second)
        driver.kick()
        assert entered.wait(10)
        stopping = threading.Thread(target=device.stop)
        stopping.start()
        stopping.join(0.05)
        assert stopping.is_alive()
        go_on.set()
        stopping.join(10)
        assert driver.collect() == [first]
        with moved(source, VirtioBlk(path=str(path))) as destination:
            driver.bar = destination
            driver.wait(second)
    assert path.read_bytes()[:512] == DATA[:512]


def test_every_acknowledged_write_is_there_after_many_moves_under_load() -> None:
    """The guest is stopped in the middle of whatever it does, as a machine is."""
    bench = Bench(VirtioBlk(size=SIZE))
    driver = Driver(bench, bench.guest)
    driver.start(size=32)
    rng = random.Random(6)
    disk: dict[int, bytes] = {}
    in_flight: dict[int, tuple[int, bytes]] = {}
    for round_ in range(12):
        for _ in range(60):
            while len(driver.free) < 4:
                settle(driver, in_flight, disk)
            busy = {sector for sector, _ in in_flight.values()}
            sector = rng.choice([at for at in range(64) if at not in busy])
            data = rng.randbytes(512)
            request = driver.build(OUT, sector, data, indirect=rng.random() < 0.5)
            in_flight[id(request)] = sector, data
            driver.offer(request)
            if rng.random() < 0.6:
                driver.kick()
        if round_ % 3 == 0:
            bench.device.quiesce()
        previous = bench
        bench = moved(previous, VirtioBlk(size=SIZE))
        driver.bar = bench
    with bench:
        driver.kick()
        while in_flight:
            settle(driver, in_flight, disk)
        for sector, data in disk.items():
            assert driver.read(sector, 512) == data


def settle(driver: Driver, in_flight: dict[int, tuple[int, bytes]], disk: dict[int, bytes]) -> None:
    driver.kick()
    for request in driver.collect():
        assert request.status == OK
        sector, data = in_flight.pop(id(request))
        disk[sector] = data


def test_memory_that_dma_filled_arrives_by_the_dirty_log_alone() -> None:
    """The other machine has the memory of the start, and what the log says of the device."""
    with Bench(VirtioBlk(size=SIZE)) as source:
        driver = Driver(source, source.guest)
        driver.start()
        driver.write(0, DATA)
        requests = [driver.build(IN, at, room=4096, indirect=True) for at in range(8)]
        copy = Guest()
        log = source.log()
        for request in requests:
            driver.offer(request)
        copy.bytes[:] = source.guest.bytes
        driver.kick()
        driver.wait(*requests)
        source.device.stop()
        pages = log.report(BASE, MEMORY, 4096)
        for page in range(MEMORY // 4096):
            if pages[page // 8] >> page % 8 & 1:
                span = slice(page * 4096, page * 4096 + 4096)
                copy.bytes[span] = source.guest.bytes[span]
        avail = slice(driver.avail, driver.avail + 4096)  # the driver's own writes
        copy.bytes[avail] = source.guest.bytes[avail]
        assert copy.bytes == source.guest.bytes


class Regions:
    """BAR 4 of a device that a client has open."""

    def __init__(self, client: DeviceClient) -> None:
        self.client = client

    def read(self, offset: int, length: int) -> bytes:
        return self.client.read_region(4, offset, length)

    def write(self, offset: int, data: bytes) -> None:
        assert self.client.write_region(4, offset, data) == len(data)


def test_through_core_and_client_with_a_guest_that_writes_all_the_time() -> None:
    guest = Guest(mmap.mmap(-1, MEMORY))
    with (
        open_device(VirtioBlk(size=SIZE)) as client,
        open_device(VirtioBlk(size=SIZE)) as other,
    ):
        client.map(BASE, guest.bytes)
        other.map(BASE, guest.bytes)
        for one in (client, other):
            one.set_bus_master(True)
        driver = Driver(Regions(client), guest)
        driver.start(size=32)
        warm, paused = threading.Event(), threading.Event()
        acknowledged: list[int] = []

        def work() -> None:
            while not paused.is_set():
                number = len(acknowledged)
                driver.write(number % 256, number.to_bytes(512, "little"))
                acknowledged.append(number)
                if number > 100:
                    warm.set()

        machine = threading.Thread(target=work)
        machine.start()
        saving = client.set_state(State.PRE_COPY)
        loading = other.set_state(State.RESUMING)
        assert warm.wait(30)
        for _ in range(3):
            for chunk in saving:
                loading.write_all(chunk)
        paused.set()
        machine.join(30)
        client.set_state(State.STOP_COPY)
        for chunk in saving:
            loading.write_all(chunk)
        other.set_state(State.RUNNING)
        driver.bar = Regions(other)
        for number in acknowledged[-256:]:
            assert driver.read(number % 256, 512) == number.to_bytes(512, "little")


# The stream.


def test_a_restored_device_saves_the_same_bytes() -> None:
    with Bench(VirtioBlk(size=SIZE)) as source:
        driver = Driver(source, source.guest)
        driver.start()
        driver.write(700, DATA)
        source.device.stop()
        stream = state_of(source.device)
        copy = VirtioBlk(size=SIZE)
        load(copy, stream)
        assert state_of(copy) == stream
        assert content(copy) == content(source.device)
        assert BLOCK < len(stream) < 2 * BLOCK + 1000  # only what was written


def test_sizes_that_are_told_are_those_that_come() -> None:
    with Bench(VirtioBlk(size=SIZE + 512)) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()
        device = bench.device
        for sector in (0, 300, 2048):  # the last block is a short one
            driver.write(sector, DATA[:512])
        told = device.state_size()
        assert sum(device.precopy_info()[:2]) > 2 * BLOCK
        initial = device.precopy_info().initial_bytes
        early = early_part(device)
        assert len(early) == initial
        assert device.precopy_info() == (0, 0, False)
        driver.write(300, DATA[512:1024])
        assert device.precopy_info()[0] == 0
        assert device.precopy_info()[1] > BLOCK
        device.stop()
        left = device.state_size()
        rest = state_of(device)
        assert len(rest) == left
        device.step(State.STOP_COPY, State.STOP)
        again = state_of(device)
        device.step(State.STOP_COPY, State.STOP)
        assert len(again) == told == device.state_size()
        copy = VirtioBlk(size=SIZE + 512)
        load(copy, early + rest)
        assert content(copy) == content(device)


def test_pre_copy_sends_again_what_was_written_again() -> None:
    with Bench(VirtioBlk(size=SIZE)) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()
        device = bench.device
        driver.write(0, DATA[:512])
        stream = iter(device.precopy())
        parts = []
        for round_ in range(4):
            while buffer := next(stream):
                parts.append(bytes(buffer))
            driver.write(round_ * 200, DATA[round_ : round_ + 512])
        device.stop()
        parts += [bytes(buffer) for buffer in device.save()]
        copy = VirtioBlk(size=SIZE)
        load(copy, b"".join(parts))
        assert content(copy) == content(device)


def test_pollers_hear_of_writes_at_the_temporary_end() -> None:
    with Bench(VirtioBlk(size=SIZE)) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()
        told = []
        bench.device._on_data_ready = lambda: told.append(1)
        driver.write(0, DATA[:512])
        stream = iter(bench.device.precopy())
        while next(stream):
            pass
        assert told == []
        driver.read(0, 512)
        assert told == []
        driver.write(0, DATA[:512])
        assert told == [1]


def test_a_file_is_no_part_of_the_state(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(DATA * 128)
    device = VirtioBlk(path=str(path))
    assert len(early_part(device)) + len(state_of(device)) < 300
    with pytest.raises(StateRejected, match="kind of disk"):
        load(VirtioBlk(size=SIZE), state_of(VirtioBlk(path=str(path))))


def test_an_interrupt_that_may_have_been_lost_is_sent_again() -> None:
    with Bench(VirtioBlk(size=SIZE)) as source:
        driver = Driver(source, source.guest)
        driver.start(vectors=(0, 1))
        with moved(source, VirtioBlk(size=SIZE)) as destination:
            assert destination.heard.messages == [1]
            destination.device.stop()
            destination.device.start()
            assert destination.heard.messages == [1]


def test_the_pin_is_as_high_as_it_was() -> None:
    with Bench(VirtioBlk(size=SIZE)) as source:
        driver = Driver(source, source.guest)
        driver.start(vectors=None)
        driver.write(0, DATA[:512])
        with moved(source, VirtioBlk(size=SIZE)) as destination:
            driver.bar = destination
            assert destination.heard.high()
            assert driver.get(0x1000, 1) == 1
            assert not destination.heard.high()


def test_a_device_that_broke_down_arrives_broken_down() -> None:
    with Bench(VirtioBlk(size=SIZE)) as source:
        driver = Driver(source, source.guest)
        driver.start()
        driver.offer_head(99)
        driver.kick(always=True)
        with moved(source, VirtioBlk(size=SIZE)) as destination:
            driver.bar = destination
            assert driver.status & NEEDS_RESET
            driver.start()
            driver.write(0, DATA[:512])


def test_half_a_negotiation_arrives_as_it_was() -> None:
    with Bench(VirtioBlk(size=SIZE)) as source:
        driver = Driver(source, source.guest)
        driver.negotiate()
        driver.put(22, 2, 5)
        registers = driver.bar.read(0, 56)
        with moved(source, VirtioBlk(size=SIZE)) as destination:
            assert destination.read(0, 56) == registers


def test_a_reset_keeps_the_disk_but_not_a_part_of_another_one() -> None:
    with Bench(VirtioBlk(size=SIZE)) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()
        driver.write(0, DATA)
        bench.device.reset()
        stream = state_of(bench.device)
        other = VirtioBlk(size=SIZE)
        with pytest.raises(StateRejected):
            load(other, stream[:-1])
        other.reset()
        assert not content(other).strip(b"\0")
        load(other, stream)
        other.reset()
        assert content(other)[: len(DATA)] == DATA


# States that are refused.


def good_stream() -> bytes:
    with Bench(VirtioBlk(size=4096)) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()
        driver.write(0, DATA[:512])
        bench.device.stop()
        return state_of(bench.device)


def test_a_state_that_is_cut_anywhere_is_refused() -> None:
    stream = good_stream()
    device = VirtioBlk(size=4096)
    for end in [*range(0, len(stream), 61), *range(len(stream) - 100, len(stream))]:
        with pytest.raises(StateRejected):
            load(device, stream[:end])
    load(device, stream)


def test_a_state_with_a_flipped_bit_is_refused() -> None:
    stream = good_stream()
    device = VirtioBlk(size=4096)
    for at in [*range(0, len(stream), 61), *range(100), *range(len(stream) - 100, len(stream))]:
        damaged = bytearray(stream)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(StateRejected):
            load(device, damaged)


def test_a_state_with_bytes_behind_it_is_refused() -> None:
    with pytest.raises(StateRejected, match="follow"):
        load(VirtioBlk(size=4096), good_stream() + b"x")


def test_a_state_of_another_size_is_refused() -> None:
    with pytest.raises(StateRejected, match="size"):
        load(VirtioBlk(size=8192), good_stream())


def test_features_that_this_device_lacks_are_refused() -> None:
    with Bench(VirtioBlk(size=4096, iommu=True)) as bench:
        Driver(bench, bench.guest).start()
        bench.device.stop()
        stream = state_of(bench.device)
    with pytest.raises(StateRejected, match="features"):
        load(VirtioBlk(size=4096), stream)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (1 + 22, 2, "queues"),
        (1 + 24, 3, "size 3"),
        (1 + 30, 1, "not answered"),
        (1 + 34, 8, "enables"),
    ],
    ids=["queues", "size", "requests", "address"],
)
def test_a_transport_that_cannot_be_is_refused(at: int, value: int, words: str) -> None:
    """As somebody who knows the format would forge it."""
    device = VirtioBlk(size=4096)
    with Bench(device) as bench:
        Driver(bench, bench.guest).start()
        bench.device.stop()
        transport = bytearray(device.save_transport())
    struct.pack_into("<H", transport, at, value)
    with pytest.raises(StateRejected, match=words):
        load(device, with_transport(bytes(transport)))


@pytest.mark.parametrize("change", [-1, 1, 11, 13])
def test_a_transport_of_another_length_is_refused(change: int) -> None:
    transport = VirtioBlk(size=4096).save_transport()
    forged = transport[:change] if change < 0 else transport + b"\1" * change
    with pytest.raises(StateRejected, match=f"the tail of the state has {len(forged)} bytes"):
        load(VirtioBlk(size=4096), with_transport(forged))


def with_transport(transport: bytes) -> bytes:
    """A state of a small disk with another tail."""
    device = VirtioBlk(size=4096)
    stream = state_of(device)
    head = sealed(struct.pack("<4sIII", b"TAIL", 0, len(transport), zlib.crc32(transport)))
    return stream[: len(stream) - device.transport_size() - 20] + head + transport


@pytest.mark.parametrize(
    "record", [(b"BLKS", 1, 1), (b"BLKS", 0, 0), (b"WHAT", 0, 1), (b"TAIL", 0, 1 << 20)]
)
def test_records_that_make_no_sense_are_refused(record: tuple[bytes, int, int]) -> None:
    stream = state_of(VirtioBlk(size=4096))
    header = stream[: struct.calcsize("<8s16sI8sIQ") + 4]
    forged = header + sealed(struct.pack("<4sIII", *record, 0)) + bytes(BLOCK)
    with pytest.raises(StateRejected, match=r"makes no sense|blocks"):
        load(VirtioBlk(size=4096), forged)
