"""VFIO_DEVICE_RESET: from every state to RUNNING, and what it does to sessions and to others."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from vfiomig.checks.check import Chapter
from vfiomig.checks.dangers import STALE_WRITE
from vfiomig.checks.evidence import Inapplicable, errno_text, state_text
from vfiomig.checks.facts import Shows
from vfiomig.checks.sessions import READER
from vfiomig.client.transport import NO_FD
from vfiomig.fsm import SAVING_GROUP, SessionKind, State, path, required, session_kind

if TYPE_CHECKING:
    from vfiomig.checks.check import Columns
    from vfiomig.checks.raw import Reply
    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

CHAPTER = Chapter(
    "reset",
    "VFIO_DEVICE_RESET: from every state to RUNNING, and what becomes of sessions.",
    {"section": "VFIO_DEVICE_RESET"},
)


def reset(subject: Subject) -> None:
    """Reset the device; one that cannot be reset has nothing to show here."""
    before = len(subject.mended)
    result = subject.reset()
    in_vain = len(subject.mended) > before  # there is a reset, and the client's help was not enough
    if result == errno.EINVAL and not in_vain:
        raise Inapplicable("the device has no reset (RESET-3)")
    subject.evidence.expect_errno("RESET", result, 0)
    prefer_nothing_mended(subject, subject.mended[before:])


def prefer_nothing_mended(subject: Subject, found: list[str]) -> None:
    """Note what the client had to do so that the device runs."""
    rule = "FAULT-7" if subject.facts.is_server else "FAULT-29"
    saw = "; ".join(found) or "nothing"
    subject.evidence.prefer("what the client mended", not found, "nothing", saw, rule)


def expect_running(subject: Subject, before: int) -> None:
    """Compare the state after a reset; servers outside the kernel are known to keep it."""
    kept = {before: "FAULT-7"} if subject.facts.is_server else {}
    subject.expect_state(State.RUNNING, known=kept)


def from_state(state: State, subject: Subject) -> None:
    data_fd = subject.enter(state)
    reset(subject)
    expect_running(subject, state)
    if data_fd == NO_FD:
        return
    kind = session_kind(state)
    if kind is SessionKind.SAVING:
        result, _ = subject.read(data_fd, 16)
        subject.evidence.expect_transfer(
            f"a read of the data_fd of {state.name} after RESET", result, errno.ENODEV
        )
    result = subject.request(State.STOP_COPY).errno
    subject.evidence.expect_errno("STOP_COPY after RESET", result, 0)


for _state in State:
    _row: Columns = {"needs": required(_state)} if _state else {}
    CHAPTER.add(
        f"from_{_state.name}".lower(),
        f"A reset leads from {_state.name} to RUNNING, ends a session that is open, and leaves a "
        "device that can be saved.",
        ("RESET-1", "RESET-2", *(("ERROR-6",) if not _state else ())),
        partial(from_state, _state),
        **_row,
    )


@CHAPTER.check("RESET-2", "SESSION-4", danger=STALE_WRITE, shows=Shows.MEANING)
def a_reset_ends_a_load(subject: Subject) -> None:
    """After a reset in RESUMING writes to its data_fd are ENODEV."""
    data_fd = subject.session(State.RESUMING)
    reset(subject)
    result = subject.write(data_fd, b"x")
    subject.evidence.expect_transfer(
        "a write to the data_fd of RESUMING after RESET", result, errno.ENODEV
    )


@CHAPTER.check("RESET-1")
def a_second_reset_is_as_good(subject: Subject) -> None:
    """A device in RUNNING can be reset, again and again."""
    for _ in range(3):
        reset(subject)
        expect_running(subject, State.RUNNING)


@CHAPTER.check("RESET-2", "SESSION-4", shows=Shows.MEANING)
def a_reader_wakes_at_a_reset(subject: Subject) -> None:
    """A thread that reads on and on gets ENODEV when the device is reset."""
    data_fd = subject.session(State.STOP_COPY)
    reader = subject.read_on_beside(data_fd)
    reset(subject)
    last = reader.result(READER)
    subject.evidence.expect_transfer("its last read", last, errno.ENODEV)


@CHAPTER.check("RESET-2")
def after_a_reset_a_whole_session_works(subject: Subject) -> None:
    """After a reset in each state with a session the device saves, and loads what it saved."""
    for state in subject.session_states:
        subject.begin()
        subject.session(state)
        reset(subject)
        subject.expect_taken(
            subject.stopped_state(), f"its own state, after a reset in {state.name}"
        )
        subject.close_all()


@CHAPTER.check("RESET-5", "RESET-6", "RESET-7")
def a_reset_may_meet_a_change_of_state(subject: Subject) -> None:
    """A reset and a request for STOP_COPY at the same time both return, in either order.

    The request may report success with a descriptor although the device is RUNNING and the
    descriptor dead; but nothing else is open, and the device goes on to work. Hardware may also
    fail the arc during which it is reset.
    """
    for _ in subject.rounds():
        subject.begin()
        request = subject.beside(lambda: subject.request(State.STOP_COPY))
        reset(subject)
        reply = request.result("the request for STOP_COPY")
        subject.raw.get_state()  # the one that carries a reset out tells the older state
        _expect_either(subject, reply)
        subject.close_all()
    subject.begin()
    subject.evidence.expect_errno("STOP", subject.request(State.STOP).errno, 0)


def _expect_either(subject: Subject, reply: Reply) -> None:
    """Compare what is there after a race with one of its two orders."""
    state, failure = subject.state(), errno_text(reply.errno)
    subject.evidence.prefer(
        "the request for STOP_COPY", not reply.errno, "success", failure, "FAIL-2: a device's errno"
    )
    way = (arc.target for arc in path(subject.caps, State.RUNNING, State.STOP_COPY) or ())
    others = [target for target in way if (target is State.STOP_COPY) is (not reply.errno)]
    subject.evidence.expect_state("the state after both", state, State.RUNNING, *others)
    data_fd = subject.given(reply)
    if data_fd == NO_FD:
        return
    lives = subject.lives(data_fd)
    saw = f"{state_text(state)}, and the session is {'alive' if lives else 'over'}"
    pairs = "STOP_COPY, and the session is alive, or RUNNING, and it is over"
    what = "the state, and the session that came"
    subject.evidence.expect_that(what, lives is (state in SAVING_GROUP), pairs, saw)


@CHAPTER.check("RESET-5")
def a_reset_may_meet_a_reset(subject: Subject) -> None:
    """Two resets at the same time both return, and the device is in RUNNING.

    One of them may be told that the device is locked for the other (EAGAIN).
    """
    for _ in subject.rounds():
        subject.go(State.STOP)
        other = subject.beside(subject.raw.reset)
        first = subject.reset()
        if first == errno.EINVAL:
            raise Inapplicable("the device has no reset (RESET-3)")
        subject.evidence.expect_errno("one reset", first, 0, errno.EAGAIN)
        second = other.result("the other reset")
        subject.evidence.expect_errno("the other reset", second, 0, errno.EAGAIN)
        subject.raw.get_state()
        expect_running(subject, State.STOP)


@CHAPTER.check("SET-LANDED-10", "RESET-2", shows=Shows.EXHAUSTION)
def a_session_without_a_descriptor_ends_too(subject: Subject) -> None:
    """A reset ends a session whose descriptor was never given out."""
    with subject.without_descriptors():
        reply = subject.request(State.STOP_COPY)
    if reply.errno != errno.EMFILE:
        raise Inapplicable(f"without a descriptor the request answers {errno_text(reply.errno)}")
    reset(subject)
    expect_running(subject, State.STOP_COPY)
    result = subject.request(State.STOP_COPY).errno
    subject.evidence.expect_errno("STOP_COPY after RESET", result, 0)
