"""Two threads at one device: requests that meet, and a reader beside them."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.checks.check import LANDED, Chapter
from vfiomig.checks.evidence import errno_text, state_text
from vfiomig.checks.facts import Shows
from vfiomig.checks.sessions import READER
from vfiomig.fsm import State, path

if TYPE_CHECKING:
    from vfiomig.checks.raw import Reply
    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

CHAPTER = Chapter(
    "threads",
    "Two threads at one device: requests that meet, and a reader beside them.",
    {"section": "enum vfio_device_mig_state"},
)


@CHAPTER.check("FAIL-1", "STATE-10")
def two_changes_of_state_happen_one_after_the_other(subject: Subject) -> None:
    """Requests for STOP and STOP_COPY at the same time both succeed, in one of the two orders."""
    for _ in subject.rounds():
        subject.go(State.RUNNING)
        other = subject.beside(lambda: subject.request(State.STOP_COPY))
        reply = subject.request(State.STOP)
        second = other.result("the request for STOP_COPY")
        subject.evidence.expect_errno("STOP beside STOP_COPY", reply.errno, 0)
        subject.evidence.expect_errno("STOP_COPY beside STOP", second.errno, 0)
        state = subject.state()
        subject.evidence.expect_state("the state after both", state, State.STOP, State.STOP_COPY)
        lives = subject.lives(subject.expect_given(second))
        subject.evidence.expect_that(
            "the session of STOP_COPY",
            lives is (state == State.STOP_COPY),
            "alive in STOP_COPY, over in STOP",
            f"{'alive' if lives else 'over'} in {state_text(state)}",
        )
        subject.close_all()


@CHAPTER.check("FAIL-1", "PATH-7", dialects=LANDED)
def a_query_sees_no_state_between(subject: Subject) -> None:
    """GET during a combination transition tells where it began or where it ends.

    The walk holds one lock, so no state of the path shows.
    """
    arcs = path(subject.caps, State.RUNNING, State.STOP_COPY) or ()
    between = {arc.target for arc in arcs[:-1]}
    seen: set[int] = set()
    done: list[Reply] = []

    def watch() -> None:
        while not done:
            seen.add(subject.raw.get_state().device_state)
            subject.check_deadline()

    watcher = subject.beside(watch)
    try:
        for _ in subject.rounds():
            subject.go(State.STOP_COPY, State.RUNNING)
            subject.close_all()
    finally:
        done.append(subject.raw.get_state())
    watcher.result("the thread that asks")
    shown = ", ".join(sorted(map(state_text, seen)))
    subject.evidence.expect_that(
        "states that were told meanwhile", not seen & between, "RUNNING and STOP_COPY", shown
    )


@CHAPTER.check("SESSION-8", "SAVE-1")
def two_readers_share_one_stream(subject: Subject) -> None:
    """Two threads that read one session get each byte once between them."""
    length = len(subject.stopped_state())
    data_fd = subject.session(State.STOP_COPY)
    size = max(16, min(1 << 20, length // 32))

    def count() -> int:
        buffer = bytearray(size)
        total = 0
        while (got := subject.raw.read(data_fd, buffer)) > 0:
            total += got
            subject.need_time()
        return got or total

    subject.evidence.step("read in two threads")
    other = subject.beside(count)
    first, second = count(), other.result("the other reader")
    for reader, total in (("one reader", first), ("the other", second)):
        saw = errno_text(-total) if total < 0 else f"{total} bytes"
        subject.evidence.expect_that(
            f"reads of {reader} to the end", total >= 0, "the end of the state", saw
        )
    together = first + second
    saw = f"{first} + {second} = {together}"
    subject.evidence.prefer(
        "bytes that both got",
        together == length,
        str(length),
        saw,
        "SESSION-8, unless lengths differ",
    )


@CHAPTER.check("SESSION-4", "SAVE-5", shows=Shows.MEANING)
def a_reader_does_not_hold_up_requests(subject: Subject) -> None:
    """While a thread reads, the state can be asked for, and changed."""
    data_fd = subject.session(State.STOP_COPY)

    reader = subject.read_on_beside(data_fd)
    subject.expect_state(State.STOP_COPY)
    result = subject.request(State.STOP).errno
    subject.evidence.expect_errno("STOP while a thread reads", result, 0)
    last = reader.result(READER)
    subject.evidence.expect_transfer("its last read", last, errno.ENODEV)


@CHAPTER.check("SESSION-5")
def a_session_can_be_closed_beside_a_change(subject: Subject) -> None:
    """A data_fd that is closed while its state is left does no harm."""
    for _ in subject.rounds():
        data_fd = subject.session(State.STOP_COPY)
        other = subject.beside(lambda: subject.request(State.RUNNING))
        subject.close_fd(data_fd)
        reply = other.result("the request for RUNNING")
        subject.evidence.expect_errno("RUNNING beside the close", reply.errno, 0)
    saw = errno_text(subject.raw.get_state().errno)
    subject.evidence.expect("a query afterwards", saw, errno_text(0))
