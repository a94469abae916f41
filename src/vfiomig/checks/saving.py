"""What a saving session delivers in STOP_COPY, and how it ends."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.checks.check import Chapter
from vfiomig.checks.evidence import Inapplicable, transfer_text
from vfiomig.checks.facts import Shows
from vfiomig.checks.pages import PAGE, Pages, buffer_at
from vfiomig.checks.stream import first_difference, flaw
from vfiomig.fsm import State

if TYPE_CHECKING:
    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

CHAPTER = Chapter(
    "saving",
    "What a saving session delivers in STOP_COPY, and how it ends.",
    {"section": "enum vfio_device_mig_state"},
)


@CHAPTER.check("SAVE-1")
def the_end_is_zero(subject: Subject) -> None:
    """A read at the end of the state returns 0, and goes on doing so."""
    data_fd = subject.session(State.STOP_COPY)
    last = subject.read_on(data_fd, subject.new_stream(kept=False))
    subject.evidence.expect_transfer("the read at the end of the state", last, 0)
    for _ in range(3):
        result, _ = subject.read(data_fd, 4096)
        subject.evidence.expect_transfer("a read after the end", result, 0)


@CHAPTER.check("SAVE-3")
def no_end_in_stop_copy_is_temporary(subject: Subject) -> None:
    """ENOMSG never comes in STOP_COPY, neither on the way nor at the end."""
    data_fd = subject.session(State.STOP_COPY)
    last = subject.read_on(data_fd, subject.new_stream(kept=False))
    what, saw = "reads in STOP_COPY, to the end", f"in the end {transfer_text(last)}"
    subject.evidence.expect_that(what, last != -errno.ENOMSG, "bytes, and 0 bytes in the end", saw)
    result, _ = subject.read(data_fd, 16)
    what, saw = "a read after the end", transfer_text(result)
    subject.evidence.expect_that(what, result != -errno.ENOMSG, "0 bytes", saw)


@CHAPTER.check("SAVE-1")
def one_byte_reads_reach_the_end_too(subject: Subject) -> None:
    """After the last byte, read alone, comes 0."""
    length = len(subject.stopped_state())
    data_fd = subject.session(State.STOP_COPY)
    stream = subject.new_stream(kept=False)
    while (
        stream.size < length - 3
        and stream.take(lambda room: subject.raw.read(data_fd, room[: length - 3 - stream.size]))
        > 0
    ):
        subject.need_time()
    counts = [subject.read(data_fd, 1)[0] for _ in range(min(3, length))]
    result, _ = subject.read(data_fd, 1)
    if result or set(counts) != {1}:
        subject.need_saves_alike()
    shown = ", ".join(map(str, counts))
    what = f"what reads of 1 byte return for the last {len(counts)} bytes"
    subject.evidence.expect_that(what, set(counts) == {1}, "1 each", shown)
    subject.evidence.expect_transfer("the read behind them", result, 0)


@CHAPTER.check("STATE-3", "STATE-4")
def a_stopped_device_does_not_change(subject: Subject) -> None:
    """Two saves with nothing but STOP between them deliver the same bytes.

    A device may put something of the moment into its stream; that is allowed.
    """
    first, second = subject.stopped_state(), subject.stopped_state()
    _prefer_same(subject, first, second, "STATE-3")


def _prefer_same(subject: Subject, before: memoryview, after: memoryview, rule: str) -> None:
    difference = first_difference(before, after)
    saw = "the same bytes" if difference is None else f"others from byte {difference} on"
    subject.evidence.prefer(
        "the second save",
        difference is None,
        "the same bytes",
        saw,
        f"{rule}, unless the stream tells more than the state",
    )


@CHAPTER.check("LOAD-1", "LOAD-3")
def what_was_saved_can_be_loaded(subject: Subject) -> None:
    """A device that was reset takes the state that it delivered."""
    state = subject.stopped_state()
    subject.reset()
    subject.expect_taken(state)


@CHAPTER.check("LOAD-1", "STATE-4")
def what_was_loaded_is_saved_again(subject: Subject) -> None:
    """Saved, loaded after a reset, and saved again, the state is the same.

    It proves little of a device that a reset leaves in that very state: only its author has others.
    """
    before = subject.stopped_state()
    subject.reset()
    data_fd = subject.session(State.RESUMING)
    subject.write_all(data_fd, before)
    subject.go(State.STOP)
    _prefer_same(subject, before, subject.stopped_state(), "STATE-4")


@CHAPTER.check("SAVE-1", "SESSION-13")
def a_state_can_be_read_to_its_half_and_left(subject: Subject) -> None:
    """STOP_COPY can be left before the end, and the next session begins at the start."""
    state = subject.stopped_state()
    data_fd = subject.session(State.STOP_COPY)
    subject.read_some(data_fd, state, 4096)
    subject.go(State.STOP)
    _, first = subject.read(subject.session(State.STOP_COPY), 64)
    subject.expect_start_of(state, "the next session", first)


# Memory that faults. Only a call of the system can say so: read() itself takes the buffer.


@CHAPTER.check("FAULT-18", "SESSION-12", shows=Shows.DESCRIPTORS)
def a_read_into_no_memory_takes_nothing(subject: Subject) -> None:
    """A read into memory that cannot be written is EFAULT, and the next one loses nothing."""
    state = subject.stopped_state()
    data_fd = subject.session(State.STOP_COPY)
    with Pages("rw", "") as pages:
        subject.evidence.step("read into no memory")
        result = subject.raw.read(data_fd, buffer_at(pages.page(1), 64))
        subject.evidence.expect_transfer("a read into no memory", result, errno.EFAULT)
    _, then = subject.read(data_fd, 64)
    _prefer_complete(subject, state, then)


@CHAPTER.check("FAULT-18", "SESSION-13", shows=Shows.DESCRIPTORS)
def a_buffer_that_ends_early_is_filled_so_far(subject: Subject) -> None:
    """A read into a buffer half of which is missing gives the first half, or EFAULT.

    Some drivers lose what they had copied before the fault.
    """
    state = subject.stopped_state()
    if len(state) < 4:
        raise Inapplicable(f"the device's state has {len(state)} bytes")
    data_fd = subject.session(State.STOP_COPY)
    half = min(PAGE, len(state) // 2)
    with Pages("rw", "") as pages:
        subject.evidence.step(f"read into {half} bytes and as many that are missing")
        buffer = buffer_at(pages.end(0, half), 2 * half)
        result = subject.raw.read(data_fd, buffer)
        got = bytes(buffer[: max(result, 0)])
    what = f"a read into {half} bytes and as many that are missing"
    fair = 0 < result <= half or result == -errno.EFAULT
    wanted = f"{half} bytes, or EFAULT"
    subject.evidence.expect_that(what, fair, wanted, transfer_text(result))
    _, then = subject.read(data_fd, 64)
    _prefer_complete(subject, state, *([got] if got else []), then)


def _prefer_complete(subject: Subject, state: memoryview, *pieces: bytes) -> None:
    found = flaw(state, pieces)
    if found:
        subject.need_saves_alike()
    saw = f"bytes are lost: {found}" if found else "nothing lost"
    what = "the stream after the fault"
    subject.evidence.prefer(what, not found, "nothing lost", saw, "FAULT-18")
