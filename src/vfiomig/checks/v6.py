"""VFIO_DEVICE_MIG_SET_STATE, the one request of the protocol's first form."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.checks.check import V6, Chapter
from vfiomig.checks.discovery import flags_text
from vfiomig.checks.evidence import Inapplicable, errno_text
from vfiomig.checks.facts import Shows
from vfiomig.checks.pages import Pages
from vfiomig.checks.raw import GET, PROBE, SET, UNSET_FD, Reply
from vfiomig.fsm import State

if TYPE_CHECKING:
    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

NUMBER = vfio.VFIO_DEVICE_MIG_SET_STATE
#: With these the request has not reached the device, or its answer not the user.
CORE_ONLY = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EFAULT})


CHAPTER = Chapter(
    "v6",
    "VFIO_DEVICE_MIG_SET_STATE, the one request of the protocol's first form.",
    {"section": "VFIO_DEVICE_MIG_SET_STATE", "dialects": V6},
)


def ask(subject: Subject, what: str, **fields: int) -> tuple[int, vfio.MigSetState]:
    """Make the request with fields of one's own; return the errno and the struct afterwards."""
    argument = vfio.MigSetState(
        **{"argsz": 16, "device_state": State.STOP, "data_fd": UNSET_FD, **fields}
    )
    asked = argument.device_state
    step = subject.evidence.step(what)
    result = subject.raw.on_device(NUMBER, argument)
    subject.evidence.outcome(step, errno_text(result))
    subject.adopt(Reply(result, argument.device_state, argument.data_fd), asked)
    return result, argument


@CHAPTER.check("SET-V6-3")
def a_small_argsz_is_eopnotsupp(subject: Subject) -> None:
    """An argsz below 16 is EOPNOTSUPP, not EINVAL, and nothing is written or done."""
    for argsz in (0, 8, 15):
        result, argument = ask(subject, f"SET STOP, argsz {argsz}", argsz=argsz)
        subject.evidence.expect_errno(f"SET STOP, argsz {argsz}", result, errno.EOPNOTSUPP)
        subject.evidence.expect(f"data_fd, which held {UNSET_FD}", argument.data_fd, UNSET_FD)
    subject.expect_state(State.RUNNING)


@CHAPTER.check("SET-V6-3", "DIALECT-5")
def nonzero_flags_are_eopnotsupp(subject: Subject) -> None:
    """Any flag is EOPNOTSUPP, and nothing is written or done: so this is a harmless probe."""
    for flags in (1, 0x8000_0000):
        result, argument = ask(subject, f"SET STOP, flags {flags:#x}", flags=flags)
        subject.evidence.expect_errno(f"SET STOP, flags {flags:#x}", result, errno.EOPNOTSUPP)
        what = "device_state, which held STOP"
        subject.evidence.expect_state(what, argument.device_state, State.STOP)
    subject.expect_state(State.RUNNING)


@CHAPTER.check("SET-V6-16")
def a_larger_argsz_is_accepted(subject: Subject) -> None:
    """An argsz above 16 is accepted, and comes back as it was."""
    for argsz in (17, 4096, 0xFFFF_FFFF):
        result, argument = ask(subject, f"SET STOP, argsz {argsz}", argsz=argsz)
        subject.evidence.expect_errno(f"SET STOP, argsz {argsz}", result, 0)
        subject.evidence.expect("argsz afterwards", argument.argsz, argsz)


@CHAPTER.check("SET-V6-2", "SET-V6-10", shows=Shows.FAULTS)
def an_argument_that_is_not_there_is_efault(subject: Subject) -> None:
    """An argument that cannot be read is EFAULT, and the state stays."""
    with Pages("rw", "") as pages:
        for what, address in (
            ("SET with a null pointer", 0),
            ("SET with half an argument", pages.end(0, 8)),
        ):
            subject.evidence.step(what)
            result = subject.raw.on_device(NUMBER, vfio.MigSetState.from_address(address))
            subject.evidence.expect_errno(what, result, errno.EFAULT)
    subject.expect_state(State.RUNNING)


@CHAPTER.check("SET-V6-13", "SET-V6-11")
def a_request_for_error_tells_the_state(subject: Subject) -> None:
    """A request for ERROR is EINVAL, does nothing, and writes where the device is."""
    for state in subject.states:
        subject.begin()
        subject.enter(state)
        result, argument = ask(subject, "SET ERROR", device_state=State.ERROR)
        what = f"SET ERROR in {state.name}"
        subject.evidence.expect_errno(what, result, errno.EINVAL)
        subject.evidence.expect_state(f"device_state after {what}", argument.device_state, state)
        subject.evidence.expect(f"data_fd after {what}", argument.data_fd, -1)
        subject.close_all()


@CHAPTER.check("SET-V6-11", "SET-V6-6")
def a_refusal_tells_the_state(subject: Subject) -> None:
    """With EINVAL device_state is where the device is, not what was asked for."""
    for origin, target in ((State.RUNNING, 5), (State.STOP, 8), (State.STOP_COPY, 0xFFFF_FFFF)):
        subject.go(origin)
        result, argument = ask(subject, f"SET {target:#x}", device_state=target)
        what = f"SET {target:#x} in {origin.name}"
        subject.evidence.expect_errno(what, result, errno.EINVAL)
        subject.evidence.expect_state(f"device_state after {what}", argument.device_state, origin)


@CHAPTER.check("SET-V6-5", "SET-V6-10", "SET-V6-11")
def a_failure_of_the_device_has_an_errno_of_its_own(subject: Subject) -> None:
    """A change that the device fails is not EOPNOTSUPP, ENOTTY or EFAULT: those are the core's.

    With them device_state means nothing; with any other errno it is where the device is.
    """
    state = subject.some_state()
    subject.write_all(subject.session(State.RESUMING), state[: len(state) // 2])
    result, argument = ask(subject, "SET STOP with half a state written")
    if not result:
        raise Inapplicable("the device takes half a state")
    what = "SET STOP with half a state written"
    wanted = "an errno, but EOPNOTSUPP, ENOTTY or EFAULT"
    subject.evidence.expect_that(what, result not in CORE_ONLY, wanted, errno_text(result))
    what = f"device_state after {what}"
    subject.evidence.expect_state(what, argument.device_state, subject.state())


@CHAPTER.check("SET-V6-6", "SET-V6-9")
def argsz_and_flags_come_back_as_they_were(subject: Subject) -> None:
    """The whole struct is written back, with argsz and flags as they were given."""
    for target in (State.STOP, State.STOP_COPY, 9):
        _, argument = ask(subject, f"SET {int(target)}", device_state=target, argsz=20)
        subject.evidence.expect(f"argsz after SET {int(target)}", argument.argsz, 20)
        subject.evidence.expect(f"flags after SET {int(target)}", argument.flags, 0)


@CHAPTER.check("QUERY-V6-1", "CHOICE-4")
def the_capability_set_is_one(subject: Subject) -> None:
    """MIGRATION answers 1, whatever the device could do beyond."""
    subject.evidence.step("GET of MIGRATION")
    answer = subject.raw.feature(GET | vfio.VFIO_DEVICE_FEATURE_MIGRATION, bytes(8))
    subject.evidence.expect_errno("GET of MIGRATION", answer.errno, 0)
    flags = int.from_bytes(answer.payload, "little")
    subject.evidence.expect("the flags that MIGRATION answers", flags, 1)


@CHAPTER.check("CHOICE-4", "NEXT-5")
def later_states_are_none(subject: Subject) -> None:
    """RUNNING_P2P, PRE_COPY and PRE_COPY_P2P do not exist: their numbers are EINVAL."""
    for origin in (State.RUNNING, State.STOP):
        subject.go(origin)
        for target in (5, 6, 7):
            reply = subject.request(target)
            what = f"SET {target} in {origin.name}"
            subject.evidence.expect_errno(what, reply.errno, errno.EINVAL)
            subject.expect_state(origin)


@CHAPTER.check("DIALECT-1", "DIALECT-3")
def the_features_of_the_other_dialect_are_unknown(subject: Subject) -> None:
    """MIG_DEVICE_STATE, MIG_DATA_SIZE and DMA logging are unknown indices."""
    for index, operation in ((2, GET | SET), (9, GET), (6, SET), (12, SET)):
        what = flags_text(PROBE | operation | index)
        subject.evidence.step(what)
        result = subject.raw.feature(PROBE | operation | index).errno
        subject.evidence.expect_errno(what, result, errno.EINVAL, errno.ENOTTY)


@CHAPTER.check("DIALECT-2", "SESSION-11")
def a_data_fd_knows_no_request(subject: Subject) -> None:
    """0x3B79 on a data_fd is ENOTTY, and changes no state."""
    data_fd = subject.session(State.STOP_COPY)
    argument = vfio.MigSetState(argsz=24, device_state=State.STOP)
    subject.evidence.step("0x3B79 on the data_fd")
    result = subject.raw.ioctl(data_fd, NUMBER, argument)
    subject.evidence.expect_errno("0x3B79 on a data_fd", result, errno.ENOTTY)
    subject.expect_state(State.STOP_COPY)
