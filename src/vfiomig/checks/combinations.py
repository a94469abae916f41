"""What the argument of a request for a state holds afterwards, and what a failure leaves."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.checks.check import LANDED, Chapter
from vfiomig.checks.evidence import Inapplicable, state_text
from vfiomig.checks.facts import Shows
from vfiomig.checks.pages import Pages
from vfiomig.checks.raw import SET
from vfiomig.fsm import PRE_COPY_GROUP, Capability, State, path, session_kind

if TYPE_CHECKING:
    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

CHAPTER = Chapter(
    "combinations",
    "Requests that take several arcs or none, and where a device is after a failure.",
    {"section": "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE"},
)

STATE = vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
UNREADABLE = "a request whose argument cannot be read"
#: What a function answers that was stopped unseen.
STOPPED = {errno.EIO: "FAULT-25", errno.EPERM: "FAULT-25"}


@CHAPTER.check("SET-LANDED-4", "SET-LANDED-9", "SET-V6-6")
def a_refusal_writes_both_fields(subject: Subject) -> None:
    """A refused request leaves the target in device_state, V6 the real state, and -1 in data_fd."""
    for origin, target in ((State.STOP, 8), (State.STOP, State.ERROR), (State.RUNNING, 9)):
        subject.go(origin)
        reply = subject.request(target)
        what = f"SET {state_text(target)} in {origin.name}"
        subject.evidence.expect_errno(what, reply.errno, errno.EINVAL)
        wanted = origin if subject.is_v6 else target
        subject.evidence.expect_state(f"device_state after {what}", reply.device_state, wanted)
        subject.evidence.expect(f"data_fd after {what}", reply.data_fd, -1)


@CHAPTER.check("SET-LANDED-8", "SET-V6-9", "PATH-7")
def success_writes_the_target(subject: Subject) -> None:
    """After success device_state is the target, also of a request that took several arcs."""
    for target in (State.STOP_COPY, State.RUNNING, State.RESUMING):
        reply = subject.request(target)
        subject.evidence.expect_errno(target.name, reply.errno, 0)
        what = f"device_state after SET {target.name}"
        subject.evidence.expect_state(what, reply.device_state, target)


@CHAPTER.check("SET-LANDED-4", "SET-V6-6")
def success_without_a_session_writes_minus_one(subject: Subject) -> None:
    """A change of state that opens no session writes -1 to data_fd."""
    for target in (State.STOP, State.STOP, State.RUNNING):
        reply = subject.request(target)
        subject.evidence.expect_errno(target.name, reply.errno, 0)
        subject.evidence.expect(f"data_fd after SET {target.name}", reply.data_fd, -1)


@CHAPTER.check("SET-LANDED-2", "SET-V6-4")
def the_data_fd_of_a_request_is_ignored(subject: Subject) -> None:
    """What stands in data_fd before a request does not matter."""
    for data_fd in (0, 5, -1, 0x7FFF_FFFF):
        subject.evidence.step(f"SET STOP with data_fd {data_fd}")
        reply = subject.raw.set_state(State.STOP, data_fd)
        subject.evidence.expect_errno(f"SET STOP with data_fd {data_fd}", reply.errno, 0)
        subject.go(State.RUNNING)


@CHAPTER.check("NEXT-6")
def asking_for_the_current_state_moves_no_byte(subject: Subject) -> None:
    """A request for the state that a session is open in leaves the stream where it was.

    So does a query of the state.
    """
    state = subject.stopped_state()
    data_fd = subject.session(State.STOP_COPY)
    first = subject.read_some(data_fd, state)
    reply = subject.request(State.STOP_COPY)
    subject.evidence.expect_errno("STOP_COPY again", reply.errno, 0)
    subject.evidence.expect("data_fd of STOP_COPY again", reply.data_fd, -1)
    subject.expect_state(State.STOP_COPY)
    _, then = subject.read(data_fd, 32)
    subject.expect_start_of(state, "the stream around the request", first, then)


@CHAPTER.check("SET-LANDED-12")
def a_refused_request_leaves_the_stream_alone(subject: Subject) -> None:
    """Targets that are refused in STOP_COPY take nothing from the stream."""
    state = subject.stopped_state()
    data_fd = subject.session(State.STOP_COPY)
    first = subject.read_some(data_fd, state)
    for target in (State.ERROR, 8, 0xFFFF_FFFF):
        reply = subject.request(target)
        subject.evidence.expect_errno(f"STOP_COPY -> {target:#x}", reply.errno, errno.EINVAL)
    result, then = subject.read(data_fd, 32)
    if -result in STOPPED:
        subject.evidence.expect_errno("a read after the requests", -result, 0, known=STOPPED)
        return
    subject.expect_start_of(state, "the stream around the requests", first, then)


@CHAPTER.check("FAIL-2", "FAIL-3", "LOAD-3")
def a_failing_combination_stops_where_it_failed(subject: Subject) -> None:
    """RESUMING -> RUNNING with a state that is cut off ends in RESUMING, or in ERROR.

    Nothing is rolled back. Where the device takes half a state, a later arc may be what fails.
    """
    state = subject.some_state()
    data_fd = subject.session(State.RESUMING)
    subject.write_all(data_fd, state[: len(state) // 2])
    reply = subject.request(State.RUNNING)
    if not reply.errno:
        subject.evidence.prefer(
            "half a state and SET RUNNING", False, "a refusal", "it was taken", "FAULT-12, USER-11"
        )
        return
    way = path(subject.caps, State.RESUMING, State.RUNNING) or ()
    between = {int(arc.target): "FAULT-12, FAIL-2" for arc in way[:-1]}
    subject.expect_state(State.RESUMING, State.ERROR, known=between)
    final = subject.state()
    wanted = final if subject.is_v6 else State.RUNNING
    what = "device_state after the SET RUNNING that failed"
    subject.evidence.expect_state(what, reply.device_state, wanted)
    subject.evidence.expect("data_fd after it", reply.data_fd, -1)


@CHAPTER.check("PATH-2", "PATH-3", "SESSION-2", needs=Capability.PRE_COPY, dialects=LANDED)
def the_saving_group_keeps_one_session(subject: Subject) -> None:
    """From PRE_COPY to STOP_COPY, by whatever states, one data_fd goes on."""
    data_fd = subject.session(State.PRE_COPY)
    for target in (*(s for s in subject.states if s is State.PRE_COPY_P2P), State.STOP_COPY):
        reply = subject.request(target)
        subject.evidence.expect_errno(target.name, reply.errno, 0)
        subject.evidence.expect(f"data_fd after SET {target.name}", reply.data_fd, -1)
        subject.evidence.expect_that(
            f"the session of PRE_COPY in {target.name}",
            subject.lives(data_fd),
            "alive",
            "over (ENODEV)",
        )


@CHAPTER.check("SESSION-3", "PATH-2")
def leaving_a_session_state_by_a_combination_ends_its_session(subject: Subject) -> None:
    """STOP_COPY -> RESUMING ends the saving session and opens one that is written to."""
    old = subject.session(State.STOP_COPY)
    new = subject.session(State.RESUMING)
    subject.evidence.expect_that(
        "the session of STOP_COPY in RESUMING", not subject.lives(old), "over (ENODEV)", "alive"
    )
    result = subject.raw.read(new, bytearray(1))
    subject.evidence.expect_transfer("a read of the new data_fd", result, errno.EBADF)


@CHAPTER.check("SET-LANDED-2", "SET-V6-2", shows=Shows.FAULTS)
def an_argument_that_cannot_be_read_does_nothing(subject: Subject) -> None:
    """A request whose argument cannot be read is EFAULT, and the state stays."""
    with Pages("rw", "") as pages:
        if subject.is_v6:
            address = pages.end(0, 8)
            argument = vfio.MigSetState.from_address(address)
            subject.evidence.step("SET with half an argument")
            result = subject.raw.on_device(vfio.VFIO_DEVICE_MIG_SET_STATE, argument)
        else:
            address = pages.end(0, 8)
            header = vfio.DeviceFeature.from_address(address)
            header.argsz, header.flags = 16, SET | STATE
            subject.evidence.step("SET with the payload in no memory")
            result = subject.raw.feature_at(address)
        subject.evidence.expect_errno(UNREADABLE, result, errno.EFAULT)
    subject.expect_state(State.RUNNING)


@CHAPTER.check("SESSION-6", "NEXT-6")
def old_descriptors_do_not_stand_in_the_way(subject: Subject) -> None:
    """A device changes its state whatever data_fds of earlier sessions are still open."""
    for count in range(4):
        for target in (State.STOP_COPY, State.STOP):
            reply = subject.request(target)
            what = f"{target.name} with {count} old data_fds open"
            subject.evidence.expect_errno(what, reply.errno, 0)
    subject.expect_state(State.STOP)


@CHAPTER.check("STATE-10", "STATE-11")
def a_change_is_finished_when_its_request_returns(subject: Subject) -> None:
    """The state that a request reached is there at once, and stays."""
    order = [state for state in subject.states if state is not State.RESUMING]
    for target in (*order, State.RUNNING):
        if target in PRE_COPY_GROUP:
            subject.go(State.RUNNING)
        subject.go(target)
        subject.expect_state(target)
        subject.expect_state(target)


@CHAPTER.check("CAP-3", "SET-LANDED-12")
def a_state_that_the_device_lacks_is_refused(subject: Subject) -> None:
    """A state whose capability is missing is EINVAL from everywhere, and nothing happens."""
    missing = [state for state in State if state and state not in subject.states]
    if not missing:
        raise Inapplicable("the device has every state")
    for origin in subject.states:
        if session_kind(origin) is not None:
            continue
        subject.go(origin)
        for target in missing:
            reply = subject.request(target)
            what = f"{origin.name} -> {target.name}"
            subject.evidence.expect_errno(what, reply.errno, errno.EINVAL)
            subject.expect_state(origin)


@CHAPTER.check("SET-LANDED-12", "CAP-3")
def after_a_refusal_the_device_goes_on(subject: Subject) -> None:
    """Targets that are refused in RUNNING leave a device that can be stopped, saved and started.

    One driver stops its device when it refuses, and shows the state of before.
    """
    for target in (State.ERROR, 8, 0xFFFF_FFFF):
        reply = subject.request(target)
        subject.evidence.expect_errno(f"RUNNING -> {target:#x}", reply.errno, errno.EINVAL)
    for state in (State.STOP, State.STOP_COPY, State.RUNNING):
        reply = subject.request(state)
        what = f"SET {state.name} after that"
        subject.evidence.expect_errno(what, reply.errno, 0, known=STOPPED)
