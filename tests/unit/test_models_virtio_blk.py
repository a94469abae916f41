"""``virtio_blk``: what a guest asks of its disk, and what it gets."""

from __future__ import annotations

import errno
import os
import random
import threading
import types
from typing import TYPE_CHECKING

import pytest

from in_process import wait_until
from vfiomig.errors import SpecError
from vfiomig.iommu import DmaPort
from vfiomig.models import make, virtio_disk
from vfiomig.models.virtio_blk import VirtioBlk
from virtio_driver import (
    BASE,
    EVENT_IDX,
    FLUSH,
    FLUSHES,
    GET_ID,
    IN,
    INDIRECT,
    IOERR,
    MEMORY,
    NEEDS_RESET,
    OK,
    OUT,
    UNSUPP,
    VERSION_1,
    WRITE,
    Bench,
    Driver,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20
DATA = random.Random(3).randbytes(16384)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk"
    file.write_bytes(bytes(SIZE))
    return file


@pytest.fixture(params=["memory", "file"])
def bench(request: pytest.FixtureRequest, path: Path) -> Iterator[Bench]:
    device = VirtioBlk(size=SIZE) if request.param == "memory" else VirtioBlk(path=str(path))
    with Bench(device) as bench:
        yield bench


@pytest.fixture
def driver(bench: Bench) -> Driver:
    driver = Driver(bench, bench.guest)
    driver.start(size=32)
    return driver


# Requests.


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | FLUSH])
@pytest.mark.parametrize("parts", [1, 4])
def test_what_is_written_is_read(bench: Bench, features: int, parts: int) -> None:
    driver = Driver(bench, bench.guest)
    driver.start(features=features)
    driver.write(7, DATA[:8192], parts=parts)
    assert driver.read(7, 8192, parts=parts) == DATA[:8192]
    assert driver.read(0, 512) == bytes(512)


@pytest.mark.parametrize("parts", [1, 3, 24])
def test_indirect_tables_are_followed(driver: Driver, parts: int) -> None:
    driver.write(2, DATA[:12288], parts=parts, indirect=True)
    assert driver.read(2, 12288, parts=parts, indirect=True) == DATA[:12288]


def test_a_chain_may_go_on_in_an_indirect_table(driver: Driver) -> None:
    """Descriptors of the ring, and the last of them refers to the rest."""
    driver.write(0, DATA[:512])
    request = driver.build(IN, 0, room=512)
    _, data, status = request.slots
    table = driver.buffers + request.head * driver.stride + 0x800
    for at, slot in enumerate((data, status)):
        entry = driver.table + 16 * slot
        driver.guest.bytes[table + 16 * at : table + 16 * at + 16] = driver.guest.bytes[
            entry : entry + 16
        ]
    driver.pack(table + 14, "H", 1)
    driver.describe(driver.table, data, BASE + table, 32, 4, 0)
    driver.run(request)
    assert (request.status, request.data) == (OK, DATA[:512])


def test_header_data_and_status_may_share_descriptors(driver: Driver) -> None:
    """Where the parts of a request lie is the driver's choice."""
    place = driver.buffers
    driver.pack(place, "IIQ", OUT, 0, 5)
    driver.guest.bytes[place + 16 : place + 16 + 1024] = DATA[:1024]
    driver.describe(driver.table, 0, BASE + place, 10, 1, 1)
    driver.describe(driver.table, 1, BASE + place + 10, 500, 1, 2)
    driver.describe(driver.table, 2, BASE + place + 510, 530, 1, 3)
    driver.describe(driver.table, 3, BASE + place + 0x1000, 1, WRITE, 0)
    driver.offer_head(0)
    driver.kick()
    wait_for_index(driver, 1)
    assert driver.guest.bytes[place + 0x1000] == OK
    driver.pack(place, "IIQ", IN, 0, 5)
    driver.describe(driver.table, 0, BASE + place, 16, 1, 1)
    driver.describe(driver.table, 1, BASE + place + 0x2000, 1000, 1 | WRITE, 2)
    driver.describe(driver.table, 2, BASE + place + 0x3000, 25, WRITE, 0)
    driver.offer_head(0)
    driver.kick(always=True)
    wait_for_index(driver, 2)
    got = driver.guest.bytes[place + 0x2000 : place + 0x2000 + 1000]
    got += driver.guest.bytes[place + 0x3000 : place + 0x3000 + 24]
    assert got == DATA[:1024]
    assert driver.guest.bytes[place + 0x3000 + 24] == OK


def wait_for_index(driver: Driver, index: int) -> None:
    wait_until(lambda: driver.unpack(driver.used + 2, "H") == index)


def test_flush_and_serial_number(driver: Driver) -> None:
    request = driver.run(driver.build(FLUSHES, 0))
    assert (request.status, request.written) == (OK, 1)
    request = driver.run(driver.build(GET_ID, 0, room=20))
    assert (request.status, request.written) == (OK, 21)
    assert request.data == b"vfiomig".ljust(20, b"\0")
    short = driver.run(driver.build(GET_ID, 0, room=4))
    assert (short.status, short.data) == (OK, b"vfio")


@pytest.mark.parametrize("kind", [2, 3, 5, 6, 9, 11, 13, 14, 0xFFFF_FFFF])
def test_a_request_of_another_type_is_unsupported(driver: Driver, kind: int) -> None:
    request = driver.run(driver.build(kind, 0, room=512))
    assert (request.status, request.written) == (UNSUPP, 1)


@pytest.mark.parametrize("kind", [IN, OUT])
@pytest.mark.parametrize(
    ("sector", "length"),
    [(SIZE // 512, 512), (SIZE // 512 - 1, 1024), ((1 << 64) - 1, 512), (0, 100), (1 << 55, 512)],
)
def test_what_is_not_on_the_disk_fails_and_nothing_else_does(
    driver: Driver, kind: int, sector: int, length: int
) -> None:
    out = DATA[:length] if kind == OUT else b""
    request = driver.run(driver.build(kind, sector, out, room=length))
    assert (request.status, request.written) == (IOERR, 1)
    assert driver.read(SIZE // 512 - 1, 512) == bytes(512)


@pytest.mark.parametrize("kind", [IN, OUT])
def test_data_where_no_memory_is_fails_the_request_only(driver: Driver, kind: int) -> None:
    request = driver.build(kind, 0, DATA[:512] if kind == OUT else b"", room=512)
    flags = 1 | WRITE * (kind == IN)
    driver.describe(
        driver.table, request.slots[1], BASE + MEMORY - 256, 512, flags, request.slots[2]
    )
    request.reads = []
    driver.run(request)
    assert request.status == IOERR
    driver.write(9, DATA[:512])
    assert driver.read(9, 512) == DATA[:512]


def test_many_requests_at_once_are_all_answered(driver: Driver) -> None:
    for first in range(0, 256, 16):
        requests = [
            driver.build(OUT, at, DATA[at * 8 : at * 8 + 512], indirect=True)
            for at in range(first, first + 16)
        ]
        driver.run(*requests)
        assert all(request.status == OK for request in requests)
    for at in range(256):
        assert driver.read(at, 512) == DATA[at * 8 : at * 8 + 512]


@pytest.mark.parametrize("size", [4, 8, 256])
def test_ring_indices_wrap(bench: Bench, size: int) -> None:
    """65536 is where indices begin again, and the size where positions do."""
    driver = Driver(bench, bench.guest)
    driver.start(size=size)
    queue = bench.device.common.queues[0]
    start = 0xFFFF - size
    queue.next_avail = queue.next_used = start
    driver.next_avail = driver.next_used = driver.kicked_at = start
    for ring in (driver.avail, driver.used):
        driver.pack(ring + 2, "H", start)
    driver.pack(driver.used + 4 + 8 * size, "H", start)
    driver.pack(driver.avail + 4 + 2 * size, "H", start)
    for number in range(3 * size):
        driver.write(number % 1000, DATA[number : number + 512])
        assert driver.read(number % 1000, 512) == DATA[number : number + 512]
    assert driver.next_used < start


def test_used_elements_wrap_within_one_answer(driver: Driver) -> None:
    for _ in range(driver.size - 3):
        driver.run(driver.build(FLUSHES, 0))
    requests = [driver.build(OUT, at, DATA[:512], indirect=True) for at in range(8)]
    driver.run(*requests)
    assert [request.status for request in requests] == [OK] * 8


def test_with_event_idx_a_busy_driver_hardly_notifies(driver: Driver) -> None:
    requests = [driver.build(OUT, at, DATA[:512], indirect=True) for at in range(16)]
    before = driver.kicks
    driver.run(*requests)
    assert driver.kicks == before + 1


def test_the_answer_of_a_driver_that_does_not_notify_comes_with_the_next(driver: Driver) -> None:
    first, second = (driver.build(OUT, at, DATA[:512]) for at in (0, 1))
    driver.offer(first)
    driver.offer(second)
    driver.kick()
    driver.wait(first, second)


# The disk.


def test_a_read_only_disk_takes_no_writes(path: Path) -> None:
    path.chmod(0o400)
    for device in (VirtioBlk(size=SIZE, readonly=True), VirtioBlk(path=str(path), readonly=True)):
        with Bench(device) as bench:
            driver = Driver(bench, bench.guest)
            driver.start()
            assert driver.run(driver.build(OUT, 0, DATA[:512])).status == IOERR
            assert driver.read(0, 512) == bytes(512)


def test_a_write_to_a_file_is_in_the_file(path: Path) -> None:
    with Bench(VirtioBlk(path=str(path))) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()
        driver.write(3, DATA[:4096], parts=2)
    assert path.read_bytes()[1536 : 1536 + 4096] == DATA[:4096]


@pytest.mark.parametrize("flush", [True, False])
def test_writes_of_a_driver_that_knows_no_flush_are_durable(
    path: Path, monkeypatch: pytest.MonkeyPatch, flush: bool
) -> None:
    flags: list[int] = []
    pwritev = os.pwritev

    def spy(fd: int, buffers: list[memoryview], offset: int, flag: int) -> int:
        flags.append(flag)
        return pwritev(fd, buffers, offset, flag)

    monkeypatch.setattr(os, "pwritev", spy)
    with Bench(VirtioBlk(path=str(path))) as bench:
        driver = Driver(bench, bench.guest)
        driver.start(features=VERSION_1 | FLUSH * flush)
        driver.write(0, DATA[:512])
    assert flags == [0 if flush else os.RWF_DSYNC]


def test_a_file_that_shrank_is_an_error_of_the_request(path: Path) -> None:
    with Bench(VirtioBlk(path=str(path))) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()
        driver.write(100, DATA[:512])
        os.truncate(path, 4096)
        assert driver.run(driver.build(IN, 100, room=512)).status == IOERR
        assert driver.read(0, 512) == bytes(512)


@pytest.mark.parametrize("refusal", ["EAGAIN", "short"])
def test_what_the_page_cache_does_not_hold_is_read_by_the_thread(
    path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    path.write_bytes(DATA.ljust(SIZE, b"\0"))
    preadv = os.preadv
    threads = []

    def cold(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            if refusal == "short":
                return 100
            raise OSError(getattr(errno, refusal), refusal)
        threads.append(threading.current_thread().name)
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", cold)
    with Bench(VirtioBlk(path=str(path))) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()
        for _ in range(3):
            assert driver.read(0, 4096) == DATA[:4096]
    assert threads == ["vfiomig-virtio"] * 3


class Transfers:
    """Notes which thread transfers; each takes as long by the disk's clock as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.now = self.each_takes = 0.0
        self.threads: list[str] = []
        self._real = getattr(os, name)
        monkeypatch.setattr(os, name, self._transfer)
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(virtio_disk, "time", clock)

    def _transfer(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EOPNOTSUPP, "as a tmpfs has it")
        self.threads.append(threading.current_thread().name)
        self.now += self.each_takes
        moved: int = self._real(fd, buffers, offset, flags)
        return moved


@pytest.mark.parametrize("name", ["pwritev", "preadv"])
def test_a_transfer_is_made_at_once_until_one_takes_long_and_again_a_while_later(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path.write_bytes(bytes(SIZE))
    transfers = Transfers(monkeypatch, name)
    here, apart = threading.current_thread().name, "vfiomig-virtio"
    with Bench(VirtioBlk(path=str(path))) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()

        def transfer() -> str:
            if name == "pwritev":
                driver.write(7, DATA[:512])
            else:
                driver.read(7, 512)
            (thread,) = transfers.threads
            transfers.threads.clear()
            # Whoever works when the next one comes does that as well.
            wait_until(lambda: not bench.device._worker._busy.locked())
            return thread

        assert [transfer() for _ in range(3)] == [here] * 3
        transfers.each_takes = 0.002
        assert [transfer() for _ in range(3)] == [here, apart, apart]
        transfers.now += 0.2
        transfers.each_takes = 0
        assert [transfer() for _ in range(3)] == [here] * 3


def test_a_write_that_must_be_durable_is_made_by_the_thread(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(bytes(SIZE))
    transfers = Transfers(monkeypatch, "pwritev")
    with Bench(VirtioBlk(path=str(path))) as bench:
        driver = Driver(bench, bench.guest)
        driver.start(~FLUSH)
        driver.write(7, DATA[:512])
    assert transfers.threads == ["vfiomig-virtio"]


def test_large_requests_go_through_in_rounds(path: Path) -> None:
    large = 3 * virtio_disk.PIECE // 2
    path.write_bytes(bytes(4 << 20))
    with Bench(VirtioBlk(path=str(path))) as bench:
        driver = Driver(bench, bench.guest)
        driver.stride = 1 << 21
        driver.start(size=4)
        content = random.Random(4).randbytes(large)
        driver.write(1, content, parts=1)
        driver.guest.bytes[0x400000:] = bytes(MEMORY - 0x400000)
        assert driver.read(1, large) == content


def test_a_stopped_device_holds_no_file_open_and_does_nothing(path: Path) -> None:
    device = VirtioBlk(path=str(path))
    with Bench(device) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()
        for leave in (device.stop, device.quiesce):
            leave()
            request = driver.build(OUT, 0, DATA[:512])
            driver.offer(request)
            driver.kick(always=True)
            assert driver.collect() == []
            device.start()
            driver.wait(request)
        device.stop()
        assert not [fd for fd in os.listdir("/proc/self/fd") if target(fd) == str(path)]


def target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


# Resets.


def test_a_reset_in_the_middle_leaves_a_device_for_the_next_driver(
    bench: Bench, driver: Driver
) -> None:
    driver.write(0, DATA[:512])
    for at in range(8):
        driver.offer(driver.build(OUT, 1 + at, DATA[:512]))
    driver.kick()
    driver.reset()
    driver.start(size=8)
    assert driver.read(0, 512) == DATA[:512]
    bench.device.reset()
    assert driver.status == 0
    driver.start()
    assert driver.read(0, 512) == DATA[:512]


def test_after_a_reset_the_old_rings_are_not_touched(bench: Bench, driver: Driver) -> None:
    driver.offer(driver.build(OUT, 0, DATA[:512]))
    driver.reset()
    before = bytes(bench.guest.bytes)
    driver.kick(always=True)
    bench.device.stop()
    assert bytes(bench.guest.bytes) == before


def test_a_reset_waits_for_the_request_that_is_under_way(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(self: virtio_disk.FileDisk) -> None:
        entered.set()
        assert go_on.wait(10)

    monkeypatch.setattr(virtio_disk.FileDisk, "flush", slow)
    with Bench(VirtioBlk(path=str(path))) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()
        request = driver.build(FLUSHES, 0)
        driver.offer(request)
        driver.kick()
        assert entered.wait(10)
        driver.put(20, 1, 0)
        assert driver.status  # not yet, and the writer was not kept waiting
        go_on.set()
        driver.wait(request)
        driver.reset()
        driver.start()


# What a driver must not do.


def wait_until_broken(driver: Driver) -> None:
    wait_until(lambda: driver.status & NEEDS_RESET)


def head_that_is_not_there(driver: Driver) -> None:
    driver.offer_head(driver.size)


def next_that_is_not_there(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE, 16, 1, driver.size)
    driver.offer_head(0)


def loop(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE, 16, 1, 1)
    driver.describe(driver.table, 1, BASE, 16, 1, 0)
    driver.offer_head(0)


def too_many_available(driver: Driver) -> None:
    driver.pack(driver.avail + 2, "H", driver.next_avail + driver.size + 1)


def readable_behind_writable(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE, 16, 1 | WRITE, 1)
    driver.describe(driver.table, 1, BASE, 16, 0, 0)
    driver.offer_head(0)


def no_status_byte(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE + driver.buffers, 16, 0, 0)
    driver.offer_head(0)


def empty_status_byte(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE + driver.buffers, 16, 1, 1)
    driver.describe(driver.table, 1, BASE + driver.buffers, 0, WRITE, 0)
    driver.offer_head(0)


def short_header(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE, 15, 1, 1)
    driver.describe(driver.table, 1, BASE, 1, WRITE, 0)
    driver.offer_head(0)


def header_in_no_memory(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE + MEMORY, 16, 1, 1)
    driver.describe(driver.table, 1, BASE, 1, WRITE, 0)
    driver.offer_head(0)


def status_in_no_memory(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE + driver.buffers, 16, 1, 1)
    driver.describe(driver.table, 1, (1 << 64) - 1, 1, WRITE, 0)
    driver.offer_head(0)


def table_of_odd_length(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE, 17, 4, 0)
    driver.offer_head(0)


def empty_table(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE, 0, 4, 0)
    driver.offer_head(0)


def huge_table(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE, 0xFFFF_FFF0, 4, 0)
    driver.offer_head(0)


def table_in_no_memory(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE + MEMORY, 32, 4, 0)
    driver.offer_head(0)


def table_in_a_table(driver: Driver) -> None:
    driver.describe(driver.buffers, 0, BASE, 16, 4, 0)
    driver.describe(driver.table, 0, BASE + driver.buffers, 16, 4, 0)
    driver.offer_head(0)


def table_and_next(driver: Driver) -> None:
    driver.describe(driver.table, 0, BASE, 16, 4 | 1, 1)
    driver.offer_head(0)


@pytest.mark.parametrize(
    "attack",
    [
        head_that_is_not_there, next_that_is_not_there, loop, too_many_available,
        readable_behind_writable, no_status_byte, empty_status_byte, short_header,
        header_in_no_memory, status_in_no_memory, table_of_odd_length, empty_table, huge_table,
        table_in_no_memory, table_in_a_table, table_and_next,
    ],
    ids=lambda attack: attack.__name__,
)  # fmt: skip
def test_a_driver_that_breaks_the_ring_must_reset(
    bench: Bench, driver: Driver, attack: object
) -> None:
    driver.write(0, DATA[:512])
    heard = len(bench.heard.messages)
    assert callable(attack)
    attack(driver)
    driver.kick(always=True)
    wait_until_broken(driver)
    assert bench.heard.messages[heard:] == [0]  # the vector for configuration changes
    driver.pack(driver.avail + 2, "H", 0)
    driver.kick(always=True)
    driver.start()
    assert driver.read(0, 512) == DATA[:512]


def test_an_indirect_table_that_was_not_negotiated_breaks_the_ring(bench: Bench) -> None:
    driver = Driver(bench, bench.guest)
    driver.start(features=VERSION_1 | EVENT_IDX)
    driver.offer(driver.build(IN, 0, room=512, indirect=True))
    driver.kick()
    wait_until_broken(driver)
    assert not driver.features & INDIRECT


def test_what_was_good_before_the_bad_is_answered(driver: Driver) -> None:
    good = driver.build(OUT, 0, DATA[:512], indirect=True)
    driver.offer(good)
    driver.offer_head(driver.size)
    driver.kick()
    driver.wait(good)
    assert good.status == OK
    wait_until_broken(driver)


def test_rings_in_no_memory_break_down_and_nothing_more(bench: Bench) -> None:
    for ring in ("table", "avail", "used"):
        driver = Driver(bench, bench.guest)
        good = getattr(driver, ring)
        driver.reset()
        driver.negotiate()
        driver.set_up_queue(16, enable=0)
        register = {"table": 32, "avail": 40, "used": 48}[ring]
        driver.put(register + 4, 4, 0x7FFF_FFFF)
        driver.put(28, 2, 1)
        driver.put(20, 1, 15)
        driver.offer(driver.build(FLUSHES, 0))
        driver.kick(always=True)
        wait_until_broken(driver)
        assert getattr(driver, ring) == good
        driver.start()
        driver.write(0, DATA[:512])


def test_without_an_address_space_the_device_breaks_down(bench: Bench, driver: Driver) -> None:
    space, bench.device.dma.space = bench.device.dma.space, None
    driver.kick(always=True)
    wait_until_broken(driver)
    assert isinstance(bench.device.dma, DmaPort)
    bench.device.dma.space = space


# Dirty memory.


def test_every_byte_that_the_device_writes_is_logged(bench: Bench, driver: Driver) -> None:
    log = bench.log()
    before = bytes(bench.guest.bytes)
    requests = [driver.build(IN, 0, room=4096, indirect=True)]
    requests += [driver.build(GET_ID, 0, room=20), driver.build(OUT, 0, DATA[:4096])]
    after_build = bytes(bench.guest.bytes)
    driver.run(*requests)
    bench.device.stop()
    bitmap = log.report(BASE, MEMORY, 4096)
    told = {page for page in range(MEMORY // 4096) if bitmap[page // 8] >> page % 8 & 1}
    assert before != after_build
    changed = set()
    for page in range(MEMORY // 4096):
        span = slice(page * 4096, page * 4096 + 4096)
        if bench.guest.bytes[span] != after_build[span]:
            changed.add(page)
    drivers_own = {driver.avail // 4096}
    assert changed - drivers_own <= told
    assert driver.used // 4096 in told


# The SPEC.


def test_keys_make_the_device(path: Path) -> None:
    device = make(f"virtio_blk,path={path},readonly=yes,serial=abc,caps=stop-copy")
    assert isinstance(device, VirtioBlk)
    assert isinstance(make("virtio_blk,size=64K"), VirtioBlk)
    assert make("virtio_blk,caps=none").capabilities == 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("path=/nowhere/disk", "No such file"),
        ("path=/dev/null", "a file or block device of at least 512 bytes"),
        ("path=/proc", "directory"),
        ("size=100", "multiple of 512"),
        ("size=64K,path=x", "not both"),
        ("serial=123456789012345678901", "at most 20"),
    ],
)
def test_what_is_wrong_with_the_keys_is_told(keys: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make(f"virtio_blk,{keys}")
