"""Logs of DMA that tell too much or too little."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING, Any

from devices.drilled import Drilled
from mutants.bench import (
    PROBE,
    REPORT,
    START,
    STOP_LOG,
    Payload,
    end,
    look,
    mutant,
    outcome,
    readable,
    served_as,
)
from vfiomig import State
from vfiomig.abi import vfio
from vfiomig.core import dma_logging
from vfiomig.core.migration import Migration
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.iommu import DirtyLog
from vfiomig.memory import MemoryFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from mutants.bench import Bench, Call
    from vfiomig.abi.uapi import UapiStruct


# DMA logging.


@mutant("LOG-3", "dma.all-of-it-or-nothing")
def there_is_no_report(bench: Bench) -> None:
    bench.answer(lambda asked: asked.flags == PROBE | REPORT, errno.ENOTTY)


@mutant("LOG-5", "dma.start-needs-a-range")
def a_log_of_nothing_is_started(bench: Bench) -> None:
    bench.ioctl(start_answers(lambda control: not control.num_ranges))


def start_answers(when: Callable[[vfio.DmaLoggingControl], bool]) -> Call:
    """Let START succeed with what it has to refuse."""

    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        asked = look(number, argument)
        if asked is None or asked.flags != START or not readable(argument, 32):
            return call(on, number, argument)
        payload = Payload(ctypes.addressof(argument))
        control = vfio.DmaLoggingControl.from_address(payload.address)
        return 0 if when(control) else call(on, number, argument)

    return tamper


@mutant("LOG-6", "dma.start-takes-256-ranges")
def a_page_of_ranges_is_not_the_limit(bench: Bench) -> None:
    bench.patch(dma_logging, "MAX_RANGES", 1000)


@mutant("LOG-6", "dma.start-takes-256-ranges")
def a_page_of_ranges_is_too_many(bench: Bench) -> None:
    bench.patch(dma_logging, "MAX_RANGES", 255)


@mutant("LOG-7", "dma.start-with-what-cannot-be-read-is-efault", others=1)
def ranges_in_no_memory_are_einval(bench: Bench) -> None:
    bench.swap(lambda asked: asked == (32, START), {errno.EFAULT: errno.EINVAL})


def without_check(wrong: int) -> Callable[..., None]:
    """The check of a range, but for the refusals with one errno."""
    original = dma_logging._check_range

    def check(*request: Any) -> None:
        try:
            original(*request)
        except OSError as refusal:
            if refusal.errno != wrong:
                raise

    return check


@mutant("LOG-8", "dma.start-takes-whole-pages", others=1)
def parts_of_pages_are_logged(bench: Bench) -> None:
    bench.patch(dma_logging, "_check_range", without_check(errno.EINVAL))


@mutant("LOG-9", "dma.a-range-stays-below-the-top")
def ranges_go_round(bench: Bench) -> None:
    bench.patch(dma_logging, "_check_range", without_check(errno.EOVERFLOW))


@mutant("LOG-10", "dma.ranges-do-not-overlap")
def only_a_range_behind_an_earlier_one_overlaps(bench: Bench) -> None:
    original = dma_logging._check_range

    def check(iova: int, length: int, page_size: int, earlier: list[tuple[int, int]]) -> None:
        original(iova, length, page_size, [one for one in earlier if one[0] <= iova])

    bench.patch(dma_logging, "_check_range", check)


@mutant("LOG-11", "dma.start-is-refused-while-logging")
def a_log_can_be_started_twice(bench: Bench) -> None:
    original = VfioDevice.start_dirty_log

    def start(mine: VfioDevice, log: DirtyLog) -> None:
        mine.stop_dirty_log()
        original(mine, log)

    bench.patch(VfioDevice, "start_dirty_log", start)


@mutant("LOG-2", "dma.after-a-reset-it-can-be-started-anew")
def a_reset_wedges_the_log(bench: Bench) -> None:
    wedged: list[int] = []
    original, start = Migration.reset, VfioDevice.start_dirty_log

    def reset(mine: Migration) -> int:
        wedged[:] = [1] * (bench.served.dirty_log is not None)
        return original(mine)

    def start_dirty_log(mine: VfioDevice, log: DirtyLog) -> None:
        if wedged:
            raise OSError(errno.EINVAL, "already")
        start(mine, log)

    bench.patch(Migration, "reset", reset)
    bench.patch(VfioDevice, "start_dirty_log", start_dirty_log)


@mutant("LOG-15", "dma.stop-ends-the-reports", others=1)
def reports_go_on_after_stop(bench: Bench) -> None:
    stopped: list[int] = []

    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        asked = look(number, argument)
        logging = bench.served.dirty_log is not None
        if asked is not None and asked.flags == STOP_LOG:
            stopped[:] = [1] * logging
        if asked == (40, REPORT) and not logging and stopped:
            return 0
        return call(on, number, argument)

    bench.ioctl(tamper)


@mutant("LOG-12", "dma.start-that-cannot-answer-is-undone")
def a_start_that_failed_goes_on(bench: Bench) -> None:
    original = dma_logging.start

    def start(device: VfioDevice, operation: int, payload: int, caller: Any) -> None:
        try:
            original(device, operation, payload, caller)
        except MemoryFault:
            if caller.check(payload, 24, writable=False):
                device.start_dirty_log(DirtyLog([(0, 1 << 40)]))
            raise

    served_as(bench, "DMA_LOGGING_START", start)


@mutant("LOG-13", "dma.start-tells-the-page-size-in-use")
def the_page_size_is_not_told(bench: Bench) -> None:
    bench.afterwards(
        lambda asked: asked == (32, START),
        lambda payload, result: None if result else payload.put(0, 0, 8),
    )


@mutant("LOG-15", "dma.stop-may-be-repeated", others=1)
def a_second_stop_is_refused(bench: Bench) -> None:
    def stop(device: VfioDevice, *request: object) -> None:
        if device.dirty_log is None:
            raise OSError(errno.EINVAL, "not started")
        device.stop_dirty_log()

    served_as(bench, "DMA_LOGGING_STOP", stop)


@mutant("LOG-19", "dma.report-needs-a-log", others=2)
def a_report_without_a_log_is_empty(bench: Bench) -> None:
    bench.swap(
        lambda asked: asked == (40, REPORT) and bench.served.dirty_log is None, {errno.EINVAL: 0}
    )


@mutant("LOG-16", "dma.report-with-what-cannot-be-read-is-efault", others=1)
def a_report_of_nothing_is_einval(bench: Bench) -> None:
    bench.swap(lambda asked: asked == (40, REPORT), {errno.EFAULT: errno.EINVAL})


@mutant("LOG-17", "dma.report-wants-a-page-size")
def any_page_size_will_do(bench: Bench) -> None:
    bench.swap(
        lambda asked: asked == (40, REPORT) and bench.served.dirty_log is not None,
        {errno.EINVAL: 0},
    )


@mutant("LOG-18", "dma.a-report-stays-below-the-top")
def a_report_goes_round(bench: Bench) -> None:
    bench.swap(lambda asked: asked == (40, REPORT), {errno.EOVERFLOW: 0})


@mutant("CHOICE-6", "dma.a-bitmap-that-cannot-be-written-is-efault")
def bits_are_dropped_silently(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        whole = look(number, argument) == (40, REPORT) and readable(argument, 40)
        result = outcome(lambda: call(on, number, argument))
        return 0 if whole and result == errno.EFAULT else end(result)

    bench.ioctl(tamper)


@mutant("LOG-23", "dma.bits-are-only-set")
def a_report_overwrites_the_bitmap(bench: Bench) -> None:
    def report_into(
        mine: DirtyLog, iova: int, length: int, page_size: int, memory: Any, address: int
    ) -> None:
        memory.write(address, mine.report(iova, length, page_size))

    bench.patch(DirtyLog, "report_into", report_into)


@mutant("LOG-24", "dma.bits-are-only-set")
def a_report_writes_a_word_too_many(bench: Bench) -> None:
    original = DirtyLog.report_into

    def report_into(mine: DirtyLog, *request: Any) -> None:
        original(mine, *request)
        *_, memory, address = request
        memory.write(address + 8, bytes(8))

    bench.patch(DirtyLog, "report_into", report_into)


@mutant("LOG-2", "dma.states-do-not-matter-to-the-log")
def stopping_the_device_stops_its_log(bench: Bench) -> None:
    class Forgetful(Drilled):
        def stop(self) -> None:
            bench.served.stop_dirty_log()

    bench.device = Forgetful


@mutant("LOG-22", "dma.a-report-tells-what-was-written", others=1)
def bits_count_from_the_start_of_the_log(bench: Bench) -> None:
    original = DirtyLog._take_locked

    def take(mine: DirtyLog, iova: int, length: int, page_size: int) -> Any:
        words, told = original(mine, iova, length, page_size)
        shift = (iova - mine.ranges[0][0]) // page_size
        return {at: word << shift & (1 << 64) - 1 for at, word in words.items()}, told

    bench.patch(DirtyLog, "_take_locked", take)


@mutant("LOG-21", "dma.a-report-takes-what-it-tells", others=1)
def a_report_forgets_nothing(bench: Bench) -> None:
    original = DirtyLog.report_into
    bench.patch(
        DirtyLog,
        "report_into",
        lambda mine, *request: original(mine, *request, clear=False),
    )


@mutant("LOG-21", "dma.a-report-takes-what-it-tells")
def a_report_forgets_everything(bench: Bench) -> None:
    original = DirtyLog.report_into

    def report_into(mine: DirtyLog, *request: Any) -> None:
        original(mine, *request)
        for low, high in mine.ranges:
            mine.forget(low, high - low)

    bench.patch(DirtyLog, "report_into", report_into)


@mutant("LOG-25", "dma.a-report-in-other-units-covers-the-same")
def units_are_always_pages(bench: Bench) -> None:
    original = DirtyLog._take_locked
    bench.patch(
        DirtyLog,
        "_take_locked",
        lambda mine, iova, length, page_size: original(mine, iova, length, 4096),
    )


@mutant("LOG-1", "dma.a-report-tells-what-was-written")
def a_write_over_an_edge_marks_one_page(bench: Bench) -> None:
    original = DirtyLog.mark
    bench.patch(DirtyLog, "mark", lambda mine, iova, length: original(mine, iova, 1))


@mutant("LOG-1", "dma.a-new-log-begins-empty")
def a_new_log_remembers_the_last(bench: Bench) -> None:
    """The first page of the log before, if nothing came between the two."""
    former: list[DirtyLog] = []
    start, reset = VfioDevice.start_dirty_log, Migration.reset

    def start_again(mine: VfioDevice, log: DirtyLog) -> None:
        if former and former[-1].ranges == log.ranges:
            log.mark(log.ranges[0][0], 1)
        former.append(log)
        start(mine, log)

    def forget(mine: Migration) -> int:
        former.clear()
        return reset(mine)

    bench.patch(VfioDevice, "start_dirty_log", start_again)
    bench.patch(Migration, "reset", forget)


@mutant("LOG-13", "dma.start-asks-little-of-what-it-is-given")
def start_wants_a_power_of_two(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        asked = look(number, argument)
        if asked == (32, START) and readable(argument, 32):
            size = Payload(ctypes.addressof(argument)).get(0, 8)
            if size & (size - 1):
                return end(errno.EINVAL)
        return call(on, number, argument)

    bench.ioctl(tamper)


@mutant("LOG-2", "dma.states-do-not-matter-to-the-log")
def leaving_stop_copy_stops_the_log(bench: Bench) -> None:
    """As one driver does it."""

    class Leaving(Drilled):
        def step(self, origin: State, target: State) -> None:
            super().step(origin, target)
            if (origin, target) == (State.STOP_COPY, State.STOP):
                bench.served.stop_dirty_log()

    bench.device = Leaving
