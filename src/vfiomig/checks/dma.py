"""DMA logging: how it is started and stopped, and what a report says.

A checker cannot make a device write memory; where its author gives it that lever, the bits of the
reports are checked as well.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.checks.check import LANDED, Chapter
from vfiomig.checks.evidence import errno_text
from vfiomig.checks.facts import Shows
from vfiomig.checks.pages import Pages
from vfiomig.checks.raw import GET, PROBE, SET
from vfiomig.checks.resets import reset
from vfiomig.fsm import State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

START = vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
STOP = vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
REPORT = vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
START_HEADER = "VFIO_DEVICE_FEATURE_DMA_LOGGING_START"
REPORT_HEADER = "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT"

CHAPTER = Chapter(
    "dma",
    "DMA logging: how it is started and stopped, and what a report says.",
    {
        "section": START_HEADER,
        "dialects": LANDED,
        "feature": START,
        "without_migration": True,
    },
)

PAGE = 4096
#: Pages of a word of a bitmap: there are drivers that log and report whole words only.
WORD = 64 * PAGE
#: What is reported; some of what is logged, since there are devices with a least length.
LENGTH = WORD
IOVA = 1 << 21
WHOLE = ((IOVA, 1 << 21),)
TOP = 1 << 64
#: mtty has the requests and no log behind them.
STUB = {errno.EOPNOTSUPP: "a stub of a log, as mtty's"}


def start(
    subject: Subject,
    ranges: Sequence[tuple[int, int]] = WHOLE,
    page_size: int = PAGE,
    *,
    count: int | None = None,
    address: int | None = None,
) -> tuple[int, int]:
    """Start logging; return the errno, and the page size that came back."""
    table = bytearray(
        b"".join(bytes(vfio.DmaLoggingRange(iova=at, length=size)) for at, size in ranges)
    )
    place = (ctypes.c_char * len(table)).from_buffer(table) if table else None
    control = vfio.DmaLoggingControl(
        page_size=page_size,
        num_ranges=len(ranges) if count is None else count,
        ranges=address if address is not None else ctypes.addressof(place) if place else 0,
    )
    of = "1 range" if control.num_ranges == 1 else f"{control.num_ranges} ranges"
    step = subject.evidence.step(f"START of {of}, page size {page_size:#x}")
    answer = subject.raw.feature(SET | START, bytes(control))
    subject.evidence.outcome(step, errno_text(answer.errno))
    return answer.errno, vfio.DmaLoggingControl.parse(answer.payload).page_size


def stop(subject: Subject) -> int:
    step = subject.evidence.step("STOP of logging")
    result = subject.raw.feature(SET | STOP).errno
    subject.evidence.outcome(step, errno_text(result))
    return result


def report(
    subject: Subject,
    iova: int = IOVA,
    length: int = LENGTH,
    page_size: int = PAGE,
    bitmap: bytearray | None = None,
    address: int | None = None,
) -> int:
    """Ask for a report into ``bitmap``, or to whatever lies at ``address``."""
    bits = bytearray(4096) if bitmap is None else bitmap
    if address is None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(bits))
    asked = vfio.DmaLoggingReport(iova=iova, length=length, page_size=page_size, bitmap=address)
    step = subject.evidence.step(f"REPORT of {iova:#x} +{length:#x}, page size {page_size:#x}")
    result = subject.raw.feature(GET | REPORT, bytes(asked)).errno
    subject.evidence.outcome(step, errno_text(result))
    return result


@contextmanager
def logging(subject: Subject, what: str = "START") -> Iterator[None]:
    """Log while the block runs."""
    result, _ = start(subject)
    subject.evidence.expect_errno(what, result, 0)
    try:
        yield
    finally:
        stop(subject)


def expect_refused(subject: Subject, what: str, result: int, wanted: int, *others: int) -> None:
    """Compare a refusal of START; what was started by mistake is stopped."""
    stop(subject)
    subject.evidence.expect_errno(what, result, wanted, *others)


@CHAPTER.check("LOG-3")
def all_of_it_or_nothing(subject: Subject) -> None:
    """A device with DMA_LOGGING_START has STOP and REPORT too."""
    for name, flags in (("STOP", SET | STOP), ("REPORT", GET | REPORT)):
        subject.evidence.step(f"PROBE of {name}")
        result = subject.raw.feature(PROBE | flags).errno
        subject.evidence.expect_errno(f"PROBE of {name}", result, 0)


# START.


@CHAPTER.check("LOG-5")
def start_needs_a_range(subject: Subject) -> None:
    """START with no range is EINVAL."""
    result, _ = start(subject, ())
    expect_refused(subject, "START of no range", result, errno.EINVAL)


@CHAPTER.check("LOG-6")
def start_takes_256_ranges(subject: Subject) -> None:
    """START with more ranges than fit a page, which are 256, is E2BIG; 256 are taken."""
    many = [(at * 2 * WORD, WORD) for at in range(257)]
    result, _ = start(subject, many)
    expect_refused(subject, "START of 257 ranges", result, errno.E2BIG)
    result, _ = start(subject, many[:256])
    stop(subject)
    subject.evidence.expect_errno("START of 256 ranges", result, 0)


@CHAPTER.check("LOG-4", "LOG-7", shows=Shows.FAULTS)
def start_with_what_cannot_be_read_is_efault(subject: Subject) -> None:
    """A payload, or a range, that cannot be read is EFAULT."""
    with Pages("rw", "") as pages:
        address = pages.end(0, 8)
        header = vfio.DeviceFeature.from_address(address)
        header.argsz, header.flags = 32, SET | START
        what = "START with the payload in no memory"
        subject.evidence.step(what)
        result = subject.raw.feature_at(address)
        expect_refused(subject, what, result, errno.EFAULT)
        size = vfio.DmaLoggingRange.SIZE
        ctypes.memmove(
            pages.end(0, size), bytes(vfio.DmaLoggingRange(iova=IOVA, length=PAGE)), size
        )
        for what, place, count in (
            ("START of a range that is in no memory", pages.page(1), 1),
            ("START of two ranges, the second in no memory", pages.end(0, size), 2),
        ):
            result, _ = start(subject, (), count=count, address=place)
            expect_refused(subject, what, result, errno.EFAULT)


@CHAPTER.check("LOG-8")
def start_takes_whole_pages(subject: Subject) -> None:
    """A range that does not begin and end at multiples of page_size is EINVAL."""
    for bad in ((IOVA + 1, PAGE), (IOVA, PAGE + 8), (IOVA + 2048, 2048)):
        result, _ = start(subject, (bad,))
        what = f"START of {bad[0]:#x} +{bad[1]:#x} in pages of {PAGE}"
        expect_refused(subject, what, result, errno.EINVAL)
    odd = (IOVA + PAGE, PAGE)
    result, _ = start(subject, (odd,), 2 * PAGE)
    what = f"START of {odd[0]:#x} +{odd[1]:#x} in pages of {2 * PAGE}"
    expect_refused(subject, what, result, errno.EINVAL)


@CHAPTER.check("LOG-9")
def a_range_stays_below_the_top(subject: Subject) -> None:
    """A range that reaches 2^64, or goes round, is EOVERFLOW."""
    for bad in ((TOP - PAGE, PAGE), (TOP - PAGE, 2 * PAGE)):
        result, _ = start(subject, (bad,))
        expect_refused(subject, f"START of {bad[0]:#x} +{bad[1]:#x}", result, errno.EOVERFLOW)


@CHAPTER.check("LOG-10")
def ranges_do_not_overlap(subject: Subject) -> None:
    """A range that overlaps an earlier one is EINVAL, whichever comes first; a neighbour is not."""
    low, high = (IOVA, 2 * PAGE), (IOVA + PAGE, 2 * PAGE)
    for pair in ((low, high), (high, low), (low, low)):
        result, _ = start(subject, pair)
        shown = " and ".join(f"{at:#x} +{size:#x}" for at, size in pair)
        expect_refused(subject, f"START of {shown}, which overlap", result, errno.EINVAL)
    result, _ = start(subject, ((IOVA, WORD), (IOVA + WORD, WORD)))
    stop(subject)
    subject.evidence.expect_errno("START of two ranges side by side", result, 0)


@CHAPTER.check("LOG-11")
def start_is_refused_while_logging(subject: Subject) -> None:
    """A second START is EINVAL, and the first goes on."""
    with logging(subject):
        result, _ = start(subject)
        subject.evidence.expect_errno(
            "a second START", result, errno.EINVAL, known={0: "LOG-11: mtty's is a stub"}
        )
        subject.evidence.expect_errno("REPORT", report(subject), 0, known=STUB)


@CHAPTER.check("LOG-12", shows=Shows.FAULTS)
def start_that_cannot_answer_is_undone(subject: Subject) -> None:
    """START in memory that cannot be written is EFAULT, and nothing is logged then."""
    table = bytearray(bytes(vfio.DmaLoggingRange(iova=IOVA, length=LENGTH)))
    place = (ctypes.c_char * len(table)).from_buffer(table)
    control = vfio.DmaLoggingControl(page_size=PAGE, num_ranges=1, ranges=ctypes.addressof(place))
    header = vfio.DeviceFeature(argsz=32, flags=SET | START)
    with Pages("rw") as pages:
        address = pages.read_only(bytes(header) + bytes(control))
        subject.evidence.step("START in read-only memory")
        result = subject.raw.feature_at(address)
    subject.evidence.expect_errno("START in read-only memory", result, errno.EFAULT)
    after = report(subject)
    expect_refused(
        subject, "REPORT after a START that failed", after, errno.EINVAL, errno.EOPNOTSUPP
    )


@CHAPTER.check("LOG-13")
def start_tells_the_page_size_in_use(subject: Subject) -> None:
    """page_size comes back as a power of two that a REPORT accepts, whatever was wished for."""
    for wish in (PAGE, 2 * PAGE, 1 << 21):
        result, size = start(subject, ((1 << 27, 1 << 27),), wish)
        stop(subject)
        subject.evidence.expect_errno(f"START with a page_size of {wish}", result, 0)
        good = size >= PAGE and not size & (size - 1)
        what = f"page_size after START with {wish}"
        subject.evidence.expect_that(what, good, "a power of two from 4096 on", str(size))


@CHAPTER.check("LOG-13", "LOG-8")
def start_asks_little_of_what_it_is_given(subject: Subject) -> None:
    """START takes a page_size that is no power of two, and a range of no length."""
    for what, ranges, page_size in (
        ("a page_size of 12288", ((1 << 20, 1 << 16),), 3 * PAGE),
        ("a range of length 0", ((IOVA, 0), (IOVA + PAGE, PAGE)), PAGE),
    ):
        result, _ = start(subject, ranges, page_size)
        stop(subject)
        saw = errno_text(result)
        subject.evidence.prefer(
            f"START with {what}", not result, "success", saw, "LOG-13: a driver may refuse"
        )


# STOP.


@CHAPTER.check("LOG-15", section="VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP")
def stop_may_be_repeated(subject: Subject) -> None:
    """STOP succeeds when nothing is logged."""
    for _ in range(2):
        subject.evidence.expect_errno("STOP with nothing logged", stop(subject), 0)


@CHAPTER.check("LOG-15", "LOG-19", section="VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP")
def stop_ends_the_reports(subject: Subject) -> None:
    """After STOP a REPORT is EINVAL, and START works again."""
    with logging(subject):
        pass
    after = report(subject)
    subject.evidence.expect_errno("REPORT after STOP", after, errno.EINVAL, known=STUB)
    with logging(subject):
        pass


# REPORT.


@CHAPTER.check("LOG-16", shows=Shows.FAULTS, section=REPORT_HEADER)
def report_with_what_cannot_be_read_is_efault(subject: Subject) -> None:
    """A REPORT reads its payload, although it is a GET, and is EFAULT if that cannot be done."""
    with logging(subject), Pages("rw", "") as pages:
        address = pages.end(0, 8)
        header = vfio.DeviceFeature.from_address(address)
        header.argsz, header.flags = 40, GET | REPORT
        what = "REPORT with the payload in no memory"
        subject.evidence.step(what)
        result = subject.raw.feature_at(address)
        subject.evidence.expect_errno(what, result, errno.EFAULT)


@CHAPTER.check("LOG-17", section=REPORT_HEADER)
def report_wants_a_page_size(subject: Subject) -> None:
    """A page_size that is no power of two, or below 4096, is EINVAL; another than START's is not."""
    with logging(subject):
        for size in (0, 1, 2048, 4097, 12288):
            result = report(subject, page_size=size)
            what = f"REPORT with a page_size of {size}"
            subject.evidence.expect_errno(what, result, errno.EINVAL)
        for size in (PAGE, 4 * PAGE):
            result = report(subject, page_size=size)
            what = f"REPORT with a page_size of {size}"
            subject.evidence.expect_errno(what, result, 0, known=STUB)


@CHAPTER.check("LOG-18", section=REPORT_HEADER)
def a_report_stays_below_the_top(subject: Subject) -> None:
    """A REPORT of a range that reaches 2^64, or goes round, is EOVERFLOW."""
    with logging(subject):
        for iova, length in ((TOP - PAGE, PAGE), (TOP - PAGE, 2 * PAGE)):
            result = report(subject, iova, length)
            what = f"REPORT of {iova:#x} +{length:#x}"
            subject.evidence.expect_errno(what, result, errno.EOVERFLOW)


@CHAPTER.check("LOG-19", section=REPORT_HEADER)
def report_needs_a_log(subject: Subject) -> None:
    """A REPORT before START is EINVAL."""
    stop(subject)
    result = report(subject)
    subject.evidence.expect_errno("REPORT with no log", result, errno.EINVAL, known=STUB)


@CHAPTER.check("LOG-20", "CHOICE-6", shows=Shows.FAULTS, section=REPORT_HEADER)
def a_bitmap_that_cannot_be_written_is_efault(subject: Subject) -> None:
    """A REPORT to a bitmap that cannot be written is EFAULT; Linux drops the bits silently."""
    with logging(subject), Pages("rw", "") as pages:
        result = report(subject, address=pages.page(1))
        known = {0: "FAULT-4", **STUB}
        what = "REPORT to a bitmap in no memory"
        subject.evidence.expect_errno(what, result, errno.EFAULT, known=known)


@CHAPTER.check("LOG-23", "LOG-24", section=REPORT_HEADER)
def bits_are_only_set(subject: Subject) -> None:
    """A REPORT clears no bit of the bitmap, and writes nothing behind its last word."""
    with logging(subject):
        bitmap = bytearray(b"\xff" * 8 + b"\x5a" * 24)
        subject.evidence.expect_errno("REPORT", report(subject, bitmap=bitmap), 0, known=STUB)
    what = "the bitmap of 64 pages, which was all ones"
    subject.evidence.expect(what, bytes(bitmap[:8]), b"\xff" * 8, show=bytes.hex)
    what = "the bytes behind the bitmap"
    subject.evidence.expect(what, bytes(bitmap[8:]), b"\x5a" * 24, show=bytes.hex)


@CHAPTER.check("LOG-2", section=REPORT_HEADER, without_migration=False)
def states_do_not_matter_to_the_log(subject: Subject) -> None:
    """Logging goes on through changes of state: a REPORT works in every one."""
    last = (State.STOP_COPY, State.RESUMING)
    with logging(subject):
        for state in (*(s for s in subject.states if s not in last), State.STOP_COPY):
            subject.go(State.RUNNING)
            subject.go(state)
            what = f"REPORT in {state.name}"
            subject.evidence.expect_errno(what, report(subject), 0, known=STUB)
        subject.go(State.STOP)
        known = {**STUB, errno.EINVAL: "FAULT-32"}
        what = "REPORT in STOP after STOP_COPY"
        subject.evidence.expect_errno(what, report(subject), 0, known=known)


@CHAPTER.check("LOG-2", "ERROR-7", section="VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP")
def after_a_reset_it_can_be_started_anew(subject: Subject) -> None:
    """Whatever a reset made of the log: STOP succeeds after it, START too, and REPORT."""
    with logging(subject):
        reset(subject)
        subject.evidence.expect_errno("STOP after a reset", stop(subject), 0)
    with logging(subject, "START after a reset"):
        subject.evidence.expect_errno("REPORT", report(subject), 0, known=STUB)


# What the reports say.


@contextmanager
def memory_at(subject: Subject, iova: int, length: int) -> Iterator[None]:
    """Let the device reach memory at ``iova`` while the block runs."""
    memory = mmap.mmap(-1, length)
    subject.evidence.step(f"map {length:#x} bytes at {iova:#x}")
    subject.client.map(iova, memory)
    try:
        yield
    finally:
        subject.client.unmap(iova, length)
        memory.close()


def device_writes(subject: Subject, iova: int, data: bytes) -> None:
    subject.evidence.step(f"the device writes {len(data)} bytes to {iova:#x}")
    assert subject.levers.write_by_dma is not None
    subject.levers.write_by_dma(subject, iova, data)


def reported(subject: Subject, iova: int, length: int, page_size: int = PAGE) -> list[int]:
    """Ask for a report; return the numbers of the bits that are set."""
    bitmap = bytearray(512)
    subject.evidence.expect_errno("REPORT", report(subject, iova, length, page_size, bitmap), 0)
    number = int.from_bytes(bitmap, "little")
    return [bit for bit in range(number.bit_length()) if number >> bit & 1]


@CHAPTER.check("LOG-1", "LOG-22", lever="write_by_dma", section=REPORT_HEADER)
def a_report_tells_what_was_written(subject: Subject) -> None:
    """Each page that the device wrote has its bit, counted from the report's own iova."""
    with memory_at(subject, IOVA, LENGTH), logging(subject):
        device_writes(subject, IOVA, b"first")
        device_writes(subject, IOVA + 3 * PAGE - 2, b"over")
        device_writes(subject, IOVA + LENGTH - 1, b"!")
        bits = reported(subject, IOVA, LENGTH)
        subject.evidence.expect("numbers of the bits that are set", bits, [0, 2, 3, 63])
        device_writes(subject, IOVA + 5 * PAGE, b"again")
        bits = reported(subject, IOVA + 4 * PAGE, 4 * PAGE)
        subject.evidence.expect("numbers of the bits, from the fifth page on", bits, [1])


@CHAPTER.check("LOG-21", lever="write_by_dma", section=REPORT_HEADER)
def a_report_takes_what_it_tells(subject: Subject) -> None:
    """A report clears the marks of its range, and no others."""
    with memory_at(subject, IOVA, LENGTH), logging(subject):
        device_writes(subject, IOVA, b"one")
        device_writes(subject, IOVA + LENGTH // 2, b"two")
        for what, length, wanted in (
            ("bits of the first half", LENGTH // 2, [0]),
            ("bits of the first half, asked again", LENGTH // 2, []),
            ("bits of the whole, after that", LENGTH, [32]),
        ):
            subject.evidence.expect(what, reported(subject, IOVA, length), wanted)


@CHAPTER.check("LOG-25", lever="write_by_dma", section=REPORT_HEADER)
def a_report_in_other_units_covers_the_same(subject: Subject) -> None:
    """In units of 4 pages each unit with a written page has its bit."""
    with memory_at(subject, IOVA, LENGTH), logging(subject):
        device_writes(subject, IOVA + 5 * PAGE, b"x")
        device_writes(subject, IOVA + 15 * PAGE, b"x")
        bits = reported(subject, IOVA, LENGTH, 4 * PAGE)
        subject.evidence.expect("numbers of the bits, each for 4 pages", bits, [1, 3])


@CHAPTER.check("LOG-1", "LOG-15", lever="write_by_dma", section=START_HEADER)
def a_new_log_begins_empty(subject: Subject) -> None:
    """What was written before START is in no report."""
    with memory_at(subject, IOVA, LENGTH):
        with logging(subject):
            device_writes(subject, IOVA, b"x")
        device_writes(subject, IOVA + PAGE, b"x")
        with logging(subject):
            device_writes(subject, IOVA + 2 * PAGE, b"x")
            bits = reported(subject, IOVA, LENGTH)
            subject.evidence.expect("numbers of the bits in the new log", bits, [2])
