"""What is left after the last close: nothing, and the next open finds RUNNING."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from vfiomig.checks.check import Chapter
from vfiomig.checks.dangers import CLOSE_IN_RESUMING
from vfiomig.checks.facts import Shows
from vfiomig.checks.resets import prefer_nothing_mended
from vfiomig.checks.sessions import READER
from vfiomig.fsm import SessionKind, State, required, session_kind, states_of

if TYPE_CHECKING:
    from vfiomig.checks.check import Columns
    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

CHAPTER = Chapter(
    "reopen",
    "What is left after the last close: nothing, and the next open finds RUNNING.",
    {"section": "enum vfio_device_mig_state", "shows": Shows.REOPENING},
)

AND_MEANING = Shows.REOPENING | Shows.MEANING


def kept(subject: Subject, state: State) -> dict[int, str]:
    """A state that is known to be kept over a close: by mtty, and by servers."""
    if subject.facts.kernel:
        return {state: "FAULT-29"}
    return {state: "FAULT-7"} if subject.facts.is_server else {}


def from_state(state: State, subject: Subject) -> None:
    if state is State.RESUMING:
        subject.loaded()  # a load that nobody ends
    else:
        subject.enter(state)
    subject.close_all()
    subject.reopen()
    prefer_nothing_mended(subject, subject.mended)
    subject.expect_state(State.RUNNING, known=kept(subject, state))
    if subject.state() == State.RUNNING:
        result = subject.request(State.STOP).errno
        subject.evidence.expect_errno("STOP after the device was opened", result, 0)


for _state in states_of(7):
    _row: Columns = {"needs": required(_state)}
    if _state is State.RESUMING:
        _row["danger"] = CLOSE_IN_RESUMING
    CHAPTER.add(
        f"from_{_state.name}".lower(),
        f"A device that was closed in {_state.name} is in RUNNING when it is opened again.",
        ("CLOSE-2",),
        partial(from_state, _state),
        **_row,
    )


@CHAPTER.check("SESSION-7", "CLOSE-1", "SESSION-4", shows=AND_MEANING)
def a_data_fd_outlives_its_device(subject: Subject) -> None:
    """A data_fd may stay open when the device is closed; its session is over then."""
    data_fd = subject.session(State.STOP_COPY)
    raw = subject.raw
    subject.evidence.step("close the device, and not the data_fd")
    subject.target.close()
    subject.evidence.step("read 16")
    result = raw.read(data_fd, bytearray(16))
    subject.forget_descriptors()
    raw.close(data_fd)
    subject.reopen()
    subject.evidence.expect_transfer("a read after the device was closed", result, errno.ENODEV)
    subject.expect_state(State.RUNNING, known=kept(subject, State.STOP_COPY))


@CHAPTER.check("SESSION-4", "CLOSE-1", shows=AND_MEANING)
def a_reader_wakes_at_the_last_close(subject: Subject) -> None:
    """A thread that reads on and on gets ENODEV when the device is closed."""
    data_fd = subject.session(State.STOP_COPY)
    raw = subject.raw
    reader = subject.read_on_beside(data_fd)
    subject.evidence.step("close the device")
    subject.target.close()
    subject.forget_descriptors()
    try:
        last = reader.result(READER)
    finally:
        raw.close(data_fd)
    subject.reopen()
    subject.evidence.expect_transfer("its last read", last, errno.ENODEV)


@CHAPTER.check("CLOSE-1", "CLOSE-2")
def after_a_reopen_a_whole_session_works(subject: Subject) -> None:
    """After a close in the middle of a session the device saves, and loads what it saved."""
    for state in subject.session_states:
        if session_kind(state) is SessionKind.RESUMING:
            continue
        subject.begin()
        subject.read(subject.session(state), 1)
        subject.close_all()
        subject.reopen()
        subject.begin()
        subject.expect_taken(
            subject.stopped_state(), f"its own state, after a close in {state.name}"
        )
        subject.close_all()
