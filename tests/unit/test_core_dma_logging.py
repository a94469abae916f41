"""DMA_LOGGING_START, STOP and REPORT: docs/protocol.md, "dma-logging"."""

from __future__ import annotations

import ctypes
import errno
import threading

import pytest

from in_process import DEADLINE, GET, PAGE, SET, Pages, Program, Scripted, in_thread
from vfiomig.abi import vfio
from vfiomig.fsm import State
from vfiomig.iommu import IoSpace, Mapping

START = SET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
STOP = SET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
REPORT = GET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
FEATURE = vfio.VFIO_DEVICE_FEATURE
END = 1 << 64
BASE = 0x100000
MIB = 1 << 20


class Memory:
    """A program's memory that the device can write all over."""

    def read(self, address: int, length: int) -> bytes:
        return bytes(length)

    def read_into(self, address: int, view: memoryview) -> int:
        return len(view)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        pass


class Logging(Program):
    """A program whose device has 64 MiB of memory to write to, from ``BASE`` on."""

    def __init__(self, device: Scripted | None = None) -> None:
        super().__init__(device)
        space = IoSpace()
        space.map(Mapping(BASE, 64 * MIB, Memory(), 0, readable=True, writable=True))
        self.dma = self.served.device.dma
        self.dma.space = space

    def log_start(
        self,
        *ranges: tuple[int, int],
        page_size: int = PAGE,
        num_ranges: int | None = None,
        at: int | None = None,
    ) -> tuple[int, int]:
        rows = (vfio.DmaLoggingRange * max(1, len(ranges)))(
            *(vfio.DmaLoggingRange(iova=iova, length=length) for iova, length in ranges)
        )
        control = vfio.DmaLoggingControl(
            page_size=page_size,
            num_ranges=len(ranges) if num_ranges is None else num_ranges,
            ranges=ctypes.addressof(rows) if at is None else at,
        )
        answer = self.feature(START, bytes(control))
        return answer.errno, vfio.DmaLoggingControl.parse(answer.data).page_size

    def log_stop(self) -> int:
        return self.feature(STOP).errno

    def log_report(
        self,
        iova: int,
        length: int,
        page_size: int = PAGE,
        bitmap: bytes | None = None,
        at: int | None = None,
    ) -> tuple[int, bytes]:
        bits = -(-length // page_size) if page_size else 0
        size = min(-(-bits // 64) * 8, MIB)
        memory = ctypes.create_string_buffer(bitmap or bytes(size), max(size, len(bitmap or b"")))
        address = ctypes.addressof(memory) if at is None else at
        asked = vfio.DmaLoggingReport(iova=iova, length=length, page_size=page_size, bitmap=address)
        answer = self.feature(REPORT, bytes(asked))
        assert answer.data == bytes(asked), "the payload is input"
        return answer.errno, memory.raw

    def dirty(self, iova: int, length: int, page_size: int = PAGE) -> set[int]:
        """Report, and return the numbers of the bits."""
        result, bitmap = self.log_report(iova, length, page_size)
        assert result == 0
        return {bit for bit in range(len(bitmap) * 8) if bitmap[bit >> 3] >> (bit & 7) & 1}


# START.


def test_start_reads_its_payload_first() -> None:
    with Logging() as program, Pages("rw") as pages:
        header = bytes(vfio.DeviceFeature(argsz=32, flags=START))
        program.caller.write(pages.page(1) - 31, header)
        assert program.at(FEATURE, pages.page(1) - 31) == errno.EFAULT


@pytest.mark.parametrize(
    ("count", "result"),
    [(0, errno.EINVAL), (1, 0), (256, 0), (257, errno.E2BIG), (1 << 31, errno.E2BIG)],
)
def test_start_takes_as_many_ranges_as_fit_a_page(count: int, result: int) -> None:
    with Logging() as program:
        ranges = [(BASE + at * PAGE, PAGE) for at in range(min(count, 257))]
        assert program.log_start(*ranges, num_ranges=count)[0] == result
        assert program.log_start((BASE, PAGE))[0] == (errno.EINVAL if not result else 0)


@pytest.mark.parametrize(
    ("ranges", "result"),
    [
        ([(BASE + 1, PAGE)], errno.EINVAL),
        ([(BASE, PAGE - 1)], errno.EINVAL),
        ([(0, END - PAGE)], 0),
        ([(PAGE, END - PAGE)], errno.EOVERFLOW),
        ([(END - PAGE, PAGE)], errno.EOVERFLOW),
        ([(END - PAGE, 2 * PAGE)], errno.EOVERFLOW),
        ([(END - 2 * PAGE, PAGE)], 0),
        ([(BASE, PAGE), (BASE, PAGE)], errno.EINVAL),
        ([(BASE, 2 * PAGE), (BASE + PAGE, 2 * PAGE)], errno.EINVAL),
        ([(BASE + PAGE, PAGE), (BASE, 4 * PAGE)], errno.EINVAL),
        ([(BASE + PAGE, PAGE), (BASE, PAGE), (BASE + 2 * PAGE, PAGE)], 0),
        ([(BASE, 0)], 0),
        ([(BASE, 0), (BASE, PAGE)], 0),
        # In turn: the first wrong range decides.
        ([(END - PAGE, PAGE), (BASE + 1, PAGE)], errno.EOVERFLOW),
        ([(BASE + 1, PAGE), (END - PAGE, PAGE)], errno.EINVAL),
    ],
)
def test_start_checks_each_range_in_turn(ranges: list[tuple[int, int]], result: int) -> None:
    with Logging() as program:
        assert program.log_start(*ranges)[0] == result


def test_a_range_that_cannot_be_read_is_a_fault_when_its_turn_comes() -> None:
    with Logging() as program, Pages("rw") as pages:
        good = bytes(vfio.DmaLoggingRange(iova=BASE, length=PAGE))
        program.caller.write(pages.page(1) - 16, good)
        assert program.log_start(num_ranges=2, at=pages.page(1) - 16)[0] == errno.EFAULT
        assert program.log_start(num_ranges=1, at=pages.page(1) - 16)[0] == 0
    with Logging() as program, Pages("rw") as pages:
        wrong = bytes(vfio.DmaLoggingRange(iova=BASE + 1, length=PAGE))
        program.caller.write(pages.page(1) - 16, wrong)
        assert program.log_start(num_ranges=2, at=pages.page(1) - 16)[0] == errno.EINVAL
        assert program.log_start(num_ranges=1, at=0)[0] == errno.EFAULT


@pytest.mark.parametrize(
    ("page_size", "ranges", "result", "used"),
    [
        (PAGE, [(BASE, PAGE)], 0, PAGE),
        (1, [(BASE + 1, 3)], 0, PAGE),
        (MIB, [(BASE, MIB)], 0, MIB),
        (MIB, [(BASE, PAGE)], errno.EINVAL, MIB),
        # No power of two is asked for, and the test is a mask: 0x3000 - 1 is 0x2FFF.
        (0x3000, [(0x9000, 0x1000)], 0, PAGE),
        (0x3000, [(0x2000, 0x1000)], errno.EINVAL, 0x3000),
        (0, [(0, 0)], 0, PAGE),
        (0, [(BASE, PAGE)], errno.EINVAL, 0),
        (1 << 63, [(0, 1 << 63)], 0, 1 << 63),
    ],
)
def test_the_page_size_is_a_wish_and_comes_back_as_what_is_used(
    page_size: int, ranges: list[tuple[int, int]], result: int, used: int
) -> None:
    with Logging() as program:
        assert program.log_start(*ranges, page_size=page_size) == (result, used)


def test_logging_is_started_once_and_the_ranges_are_looked_at_first() -> None:
    with Logging() as program:
        assert program.log_start((BASE, PAGE)) == (0, PAGE)
        assert program.log_start((BASE, PAGE))[0] == errno.EINVAL
        assert program.log_start((END - PAGE, PAGE))[0] == errno.EOVERFLOW


def test_a_start_that_cannot_be_written_back_has_not_started() -> None:
    row = vfio.DmaLoggingRange(iova=BASE, length=PAGE)
    control = vfio.DmaLoggingControl(page_size=PAGE, num_ranges=1, ranges=ctypes.addressof(row))
    with Logging() as program, Pages("rw") as pages:
        request = bytes(vfio.DeviceFeature(argsz=32, flags=START)) + bytes(control)
        assert program.at(FEATURE, pages.read_only(request)) == errno.EFAULT
        assert program.log_report(BASE, PAGE)[0] == errno.EINVAL
        assert program.log_start((BASE, PAGE))[0] == 0


# STOP.


def test_stop_is_no_error_without_a_start() -> None:
    with Logging() as program:
        assert [program.log_stop() for _ in range(2)] == [0, 0]
        program.log_start((BASE, PAGE))
        program.dma.write(BASE, b"x")
        assert [program.log_stop() for _ in range(2)] == [0, 0]
        assert program.log_report(BASE, PAGE)[0] == errno.EINVAL
        program.log_start((BASE, PAGE))
        assert program.dirty(BASE, PAGE) == set()


# REPORT.


@pytest.mark.parametrize("page_size", [0, 1, 2048, 4095, 4097, 0x3000, (1 << 63) + 4096])
def test_a_report_wants_a_power_of_two_from_4096_on_before_anything_else(page_size: int) -> None:
    with Logging() as program:
        assert program.log_report(END - PAGE, PAGE, page_size, bytes(8))[0] == errno.EINVAL


@pytest.mark.parametrize(
    ("iova", "length", "started", "result"),
    [
        (END - PAGE, PAGE, True, errno.EOVERFLOW),
        (END - PAGE, PAGE, False, errno.EOVERFLOW),
        (END - 1, END - 1, True, errno.EOVERFLOW),
        (END - 2 * PAGE, PAGE, True, 0),
        (0, END - PAGE, False, errno.EINVAL),
        (BASE, PAGE, False, errno.EINVAL),
    ],
)
def test_a_report_checks_overflow_before_whether_logging_is_on(
    iova: int, length: int, started: bool, result: int
) -> None:
    with Logging() as program:
        if started:
            program.log_start((BASE, PAGE))
        assert program.log_report(iova, length, bitmap=bytes(8))[0] == result


def test_a_report_reads_its_payload_although_it_is_a_get() -> None:
    with Logging() as program, Pages("rw") as pages:
        header = bytes(vfio.DeviceFeature(argsz=40, flags=REPORT))
        program.caller.write(pages.page(1) - 39, header)
        assert program.at(FEATURE, pages.page(1) - 39) == errno.EFAULT


def test_a_report_tells_and_clears() -> None:
    with Logging() as program:
        program.log_start((BASE, 16 * PAGE))
        program.dma.write(BASE + 3 * PAGE + 5, b"x")
        program.dma.write(BASE + 8 * PAGE - 1, b"xy")
        assert program.dirty(BASE, 16 * PAGE) == {3, 7, 8}
        assert program.dirty(BASE, 16 * PAGE) == set()


def test_reads_leave_no_trace_and_writes_outside_the_ranges_neither() -> None:
    with Logging() as program:
        program.log_start((BASE + PAGE, PAGE))
        program.dma.read(BASE, 3 * PAGE)
        program.dma.write(BASE, bytes(PAGE))
        program.dma.write(BASE + 2 * PAGE, bytes(PAGE))
        assert program.dirty(BASE, 4 * PAGE) == set()
        program.dma.write(BASE, bytes(4 * PAGE))
        assert program.dirty(BASE, 4 * PAGE) == {1}


def test_bits_are_counted_from_the_reports_own_iova() -> None:
    with Logging() as program:
        program.log_start((BASE, 1024 * PAGE))
        for first in (0, 1, 5, 64, 127):
            program.dma.write(BASE + 200 * PAGE, b"x")
            assert program.dirty(BASE + first * PAGE, 300 * PAGE) == {200 - first}
        program.dma.write(BASE + 2 * PAGE, b"x")
        # An iova that is no page: the unit touches two of the report's pages.
        assert program.dirty(BASE + PAGE + 100, 4 * PAGE) == {0, 1}


def test_bits_are_only_ever_set() -> None:
    with Logging() as program:
        program.log_start((BASE, 128 * PAGE))
        program.dma.write(BASE + 2 * PAGE, b"x")
        before = bytes.fromhex("8100000000000000ff00000000000001")
        result, after = program.log_report(BASE, 128 * PAGE, bitmap=before)
        assert result == 0
        assert after == bytes([before[0] | 4]) + before[1:]


@pytest.mark.parametrize(
    ("page_size", "bits"),
    [(PAGE, {1, 5}), (2 * PAGE, {0, 2}), (4 * PAGE, {0, 1}), (8 * PAGE, {0}), (1 << 40, {0})],
)
def test_a_report_may_use_another_page_size_than_start(page_size: int, bits: set[int]) -> None:
    with Logging() as program:
        program.log_start((BASE, 8 * PAGE))
        program.dma.write(BASE + PAGE, b"x")
        program.dma.write(BASE + 5 * PAGE, b"x")
        assert program.dirty(BASE, 8 * PAGE, page_size) == bits


def test_a_report_forgets_only_its_own_range() -> None:
    with Logging() as program:
        program.log_start((BASE, 8 * PAGE))
        program.dma.write(BASE, bytes(8 * PAGE))
        assert program.dirty(BASE + 2 * PAGE, 2 * PAGE) == {0, 1}
        assert program.dirty(BASE, 8 * PAGE) == {0, 1, 4, 5, 6, 7}


def test_a_unit_that_a_report_covers_in_part_is_told_again() -> None:
    with Logging() as program:
        program.log_start((BASE, PAGE))
        program.dma.write(BASE, b"x")
        assert program.dirty(BASE, PAGE // 2) == {0}
        assert program.dirty(BASE, PAGE) == {0}
        assert program.dirty(BASE, PAGE) == set()


def test_a_report_of_the_whole_address_space_costs_what_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Logging() as program:
        program.log_start((BASE, 16 * PAGE))
        program.dma.write(BASE + PAGE, b"x")
        # A bitmap of 2^49 bytes, of which the caller has the part with the bit.
        # What it does not have stays unread and unwritten.
        monkeypatch.setattr(program.caller, "check", lambda *args, **more: True)
        result, bitmap = program.log_report(BASE, END - BASE - 1)
        assert (result, bitmap[0], any(bitmap[1:])) == (0, 2, False)


@pytest.mark.parametrize("dirty", [False, True])
def test_a_bitmap_that_cannot_be_written_is_a_fault_and_nothing_is_forgotten(
    *, dirty: bool
) -> None:
    with Logging() as program, Pages("rw", "r") as pages:
        program.log_start((BASE, 16 * MIB))
        if dirty:
            program.dma.write(BASE, b"x")
            program.dma.write(BASE + 8 * MIB, b"x")
        for address in (0, 1 << 63, pages.page(1), pages.page(1) - 8):
            assert program.log_report(BASE, 16 * MIB, at=address)[0] == errno.EFAULT
        assert program.dirty(BASE, 16 * MIB) == ({0, 2048} if dirty else set())


def test_a_bitmap_that_faults_half_way_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Logging() as program, Pages("rw") as pages:
        monkeypatch.setattr(program.caller, "check", lambda *args, **more: True)
        program.log_start((BASE, 16 * MIB))
        program.dma.write(BASE, b"x")
        program.dma.write(BASE + 8 * MIB, b"x")
        assert program.log_report(BASE, 16 * MIB, at=pages.page(1) - 8)[0] == errno.EFAULT
        assert program.dirty(BASE, 16 * MIB) == {0, 2048}


def test_a_report_of_nothing_succeeds() -> None:
    with Logging() as program:
        program.log_start((BASE, PAGE))
        program.dma.write(BASE, b"x")
        assert program.log_report(BASE, 0, bitmap=bytes(8)) == (0, bytes(8))
        assert program.dirty(BASE, PAGE) == {0}


# Logging and everything else.


def test_logging_goes_on_through_states_failures_and_resets_up_to_the_last_close() -> None:
    with Logging() as program:
        program.log_start((BASE, PAGE))
        program.dma.write(BASE, b"x")
        program.go(State.STOP_COPY)
        program.served.migration.fail()
        assert program.reset() == 0
        assert program.dirty(BASE, PAGE) == {0}
        program.reopen()
        assert program.log_report(BASE, PAGE)[0] == errno.EINVAL
        assert program.dma.logs == ()


def test_what_a_device_writes_while_it_stops_is_in_the_last_report() -> None:
    class Flushes(Scripted):
        def stop(self) -> None:
            self.dma.write(BASE + 7 * PAGE, b"the last of it")

    with Logging(Flushes()) as program:
        program.log_start((BASE, 8 * PAGE))
        program.go(State.STOP)
        assert program.dirty(BASE, 8 * PAGE) == {7}
        program.go(State.RUNNING)


def test_nothing_is_lost_beside_a_writer() -> None:
    pages = 512
    with Logging() as program:
        program.log_start((BASE, pages * PAGE))
        over = threading.Event()
        written: set[int] = set()

        def writes() -> None:
            page = 0
            while not over.is_set():
                page = (page * 5 + 1) % pages
                program.dma.write(BASE + page * PAGE, b"x")
                written.add(page)

        threads = [in_thread(writes) for _ in range(2)]
        told: set[int] = set()
        for _ in range(200):
            told |= program.dirty(BASE, pages * PAGE)
        over.set()
        for thread in threads:
            thread.join(DEADLINE)
        told |= program.dirty(BASE, pages * PAGE)
        assert written <= told
        assert program.dirty(BASE, pages * PAGE) == set()


@pytest.mark.parametrize("attempt", range(20))
def test_two_starts_at_once_start_one_log(attempt: int) -> None:
    with Logging() as program:
        barrier = threading.Barrier(3)
        results: list[int] = []

        def starts() -> None:
            barrier.wait(DEADLINE)
            results.append(program.log_start((BASE, PAGE))[0])

        threads = [in_thread(starts) for _ in range(3)]
        for thread in threads:
            thread.join(DEADLINE)
        assert sorted(results) == [0, errno.EINVAL, errno.EINVAL]
