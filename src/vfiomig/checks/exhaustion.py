"""Changes of state that happen although their answer cannot be given: no descriptor, no memory."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.checks.check import Chapter
from vfiomig.checks.evidence import errno_text, transfer_text
from vfiomig.checks.facts import Shows, open_descriptors
from vfiomig.checks.pages import Pages
from vfiomig.checks.raw import SET, UNSET_FD
from vfiomig.fsm import State, required

if TYPE_CHECKING:
    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

CHAPTER = Chapter(
    "exhaustion",
    "Changes of state that happen although their answer cannot be given: no descriptor, no memory.",
    {"section": "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE"},
)

WITH_SESSION = (State.STOP_COPY, State.RESUMING, State.PRE_COPY, State.PRE_COPY_P2P)


def request_without_descriptor(subject: Subject, state: State) -> None:
    with subject.without_descriptors():
        reply = subject.request(state)
    subject.evidence.expect_errno(f"{state.name} without a descriptor", reply.errno, errno.EMFILE)


def no_descriptor(state: State, subject: Subject) -> None:
    request_without_descriptor(subject, state)
    subject.expect_state(state)


for _state in WITH_SESSION:
    CHAPTER.add(
        f"no_descriptor_for_{_state.name}".lower(),
        f"Without a free descriptor {_state.name} is EMFILE, and the state is reached all the "
        "same.",
        ("SET-LANDED-6", "SET-LANDED-10", "SET-V6-7", "SET-V6-12"),
        partial(no_descriptor, _state),
        needs=required(_state),
        shows=Shows.EXHAUSTION,
    )


@CHAPTER.check("SET-LANDED-6", "SET-LANDED-11", "SET-V6-7", shows=Shows.EXHAUSTION)
def emfile_writes_nothing(subject: Subject) -> None:
    """With EMFILE nothing is written: data_fd holds what was stored, device_state the target."""
    with subject.without_descriptors():
        reply = subject.request(State.STOP_COPY)
    subject.evidence.expect_errno("STOP_COPY without a descriptor", reply.errno, errno.EMFILE)
    subject.evidence.expect(f"data_fd, which held {UNSET_FD}", reply.data_fd, UNSET_FD)
    what = "device_state, which held STOP_COPY"
    subject.evidence.expect_state(what, reply.device_state, State.STOP_COPY)


@CHAPTER.check("RECOVER-6", "NEXT-6", shows=Shows.EXHAUSTION)
def leaving_and_entering_gives_the_descriptor(subject: Subject) -> None:
    """After EMFILE a request for the same state gives no descriptor, but STOP and back does."""
    request_without_descriptor(subject, State.STOP_COPY)
    reply = subject.request(State.STOP_COPY)
    subject.evidence.expect_errno("STOP_COPY again", reply.errno, 0)
    subject.evidence.expect("data_fd of STOP_COPY again", reply.data_fd, -1)
    for target in (State.STOP, State.STOP_COPY):
        reply = subject.request(target)
        subject.evidence.expect_errno(target.name, reply.errno, 0)
    count, _ = subject.read(subject.expect_given(reply), 16)
    saw = transfer_text(count)
    subject.evidence.expect_that("a read of it", count >= 0, "bytes, or the end", saw)


@CHAPTER.check("SET-LANDED-6", "SESSION-3", shows=Shows.EXHAUSTION)
def without_descriptors_other_states_are_reached(subject: Subject) -> None:
    """A change of state without a session needs no descriptor."""
    subject.session(State.STOP_COPY)
    with subject.without_descriptors():
        for target in (State.STOP, State.RUNNING):
            reply = subject.request(target)
            what = f"{target.name} without a descriptor"
            subject.evidence.expect_errno(what, reply.errno, 0)


def request_in_read_only_memory(subject: Subject, target: State | int) -> int:
    """Ask for a state with an argument that can be read and not written."""
    step = subject.evidence.step(f"SET {int(target)} in read-only memory")
    with Pages("rw") as pages:
        if subject.is_v6:
            content = bytes(vfio.MigSetState(argsz=16, device_state=target, data_fd=-1))
            argument = vfio.MigSetState.from_address(pages.read_only(content))
            result = subject.raw.on_device(vfio.VFIO_DEVICE_MIG_SET_STATE, argument)
        else:
            flags = SET | vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
            header = bytes(vfio.DeviceFeature(argsz=16, flags=flags))
            content = header + bytes(vfio.MigState(device_state=target, data_fd=-1))
            result = subject.raw.feature_at(pages.read_only(content))
    subject.evidence.outcome(step, errno_text(result))
    return result


@CHAPTER.check("SET-LANDED-7", "SET-LANDED-10", "SET-V6-8", shows=Shows.FAULTS)
def a_session_that_cannot_be_told_is_open_all_the_same(subject: Subject) -> None:
    """STOP_COPY in memory that cannot be written is EFAULT, and the state is reached."""
    result = request_in_read_only_memory(subject, State.STOP_COPY)
    subject.evidence.expect_errno("STOP_COPY in read-only memory", result, errno.EFAULT)
    subject.expect_state(State.STOP_COPY)
    for target in (State.STOP, State.STOP_COPY):
        reply = subject.request(target)
        subject.evidence.expect_errno(target.name, reply.errno, 0)
    subject.expect_given(reply)


@CHAPTER.check("SET-LANDED-4", "SET-V6-6", shows=Shows.FAULTS)
def an_answer_that_cannot_be_written_hides_success(subject: Subject) -> None:
    """STOP in memory that cannot be written is EFAULT, and the device stops all the same."""
    result = request_in_read_only_memory(subject, State.STOP)
    subject.evidence.expect_errno("STOP in read-only memory", result, errno.EFAULT)
    subject.expect_state(State.STOP)


@CHAPTER.check("SET-LANDED-4", "SET-V6-6", shows=Shows.FAULTS)
def an_answer_that_cannot_be_written_hides_a_refusal(subject: Subject) -> None:
    """A refused target in memory that cannot be written is EFAULT, not EINVAL."""
    result = request_in_read_only_memory(subject, 9)
    subject.evidence.expect_errno("SET 9 in read-only memory", result, errno.EFAULT)
    subject.expect_state(State.RUNNING)


@CHAPTER.check("SET-LANDED-7", "SET-V6-8", shows=Shows.DESCRIPTORS)
def a_number_that_cannot_be_told_is_given_back(subject: Subject) -> None:
    """After EFAULT no descriptor is left in the table of the process."""
    subject.go(State.STOP)
    before = open_descriptors()
    result = request_in_read_only_memory(subject, State.STOP_COPY)
    subject.evidence.expect_errno("STOP_COPY in read-only memory", result, errno.EFAULT)
    left = sorted(open_descriptors() - before)
    subject.evidence.expect("descriptors that are new", left, [])
