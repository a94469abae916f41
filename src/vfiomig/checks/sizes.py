"""MIG_DATA_SIZE: an estimate that can be asked for in every state."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.checks.check import LANDED, Chapter
from vfiomig.checks.facts import Shows
from vfiomig.checks.pages import Pages
from vfiomig.checks.raw import GET
from vfiomig.fsm import State

if TYPE_CHECKING:
    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

SIZE = vfio.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE

CHAPTER = Chapter(
    "size",
    "MIG_DATA_SIZE: an estimate that can be asked for in every state.",
    {"section": "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE", "dialects": LANDED, "feature": SIZE},
)


def ask(subject: Subject, when: str) -> int:
    subject.evidence.step(f"GET of MIG_DATA_SIZE {when}")
    answer = subject.raw.feature(GET | SIZE, bytes(8))
    subject.evidence.expect_errno(f"GET of MIG_DATA_SIZE {when}", answer.errno, 0)
    return int.from_bytes(answer.payload, "little")


@CHAPTER.check("SIZE-2", "SIZE-1")
def it_can_be_asked_in_every_state(subject: Subject) -> None:
    """GET of MIG_DATA_SIZE succeeds in every state, and changes none."""
    for state in subject.states:
        subject.begin()
        subject.enter(state)
        ask(subject, f"in {state.name}")
        subject.expect_state(state)
        subject.close_all()


@CHAPTER.check("SIZE-2")
def asking_takes_nothing_from_a_stream(subject: Subject) -> None:
    """GET of MIG_DATA_SIZE in the middle of a session leaves the stream where it was."""
    state = subject.stopped_state()
    data_fd = subject.session(State.STOP_COPY)
    first = subject.read_some(data_fd, state)
    ask(subject, "in STOP_COPY")
    _, then = subject.read(data_fd, 32)
    subject.expect_start_of(state, "the stream around the request", first, then)


@CHAPTER.check("SIZE-1", "FAULT-20")
def it_is_no_errno(subject: Subject) -> None:
    """The length is below 2^63: one driver lets a negative errno through as a huge number."""
    for state in (State.RUNNING, State.STOP, State.STOP_COPY):
        subject.go(state)
        length = ask(subject, f"in {state.name}")
        subject.evidence.prefer(
            "stop_copy_length", length < 1 << 63, "below 2^63", f"{length:#x}", "FAULT-20"
        )


@CHAPTER.check("SIZE-1", "SIZE-3")
def it_covers_what_is_delivered(subject: Subject) -> None:
    """The estimate of a stopped device is not less than what STOP_COPY then delivers."""
    subject.go(State.STOP)
    estimate = ask(subject, "in STOP")
    delivered = len(subject.drain(subject.session(State.STOP_COPY)))
    what = f"stop_copy_length, before STOP_COPY delivered {delivered} bytes"
    subject.evidence.prefer(
        what, estimate >= delivered, "as much, or more", str(estimate), "SIZE-3: an estimate"
    )


@CHAPTER.check("SIZE-1", shows=Shows.FAULTS)
def a_size_that_cannot_be_written_is_efault(subject: Subject) -> None:
    """GET of MIG_DATA_SIZE into memory that cannot be written is EFAULT."""
    header = bytes(vfio.DeviceFeature(argsz=16, flags=GET | SIZE))
    with Pages("rw", "") as pages:
        edge = pages.end(0, len(header))
        ctypes.memmove(edge, header, len(header))
        what = "GET of MIG_DATA_SIZE with the payload in no memory"
        subject.evidence.step(what)
        subject.evidence.expect_errno(what, subject.raw.feature_at(edge), errno.EFAULT)
