"""What a device sees of an arc, how arcs fail, and devices that do whole requests themselves."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import pytest

from in_process import LANDED, V6, Program, Scripted, refusal, wait_until
from vfiomig.device import PrecopyInfo
from vfiomig.fsm import LEGAL_SETS, Arc, Capability, State, arcs_of, path, states_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vfiomig.abi.ioctls import Dialect
    from vfiomig.core.migration import ArcEvent
    from vfiomig.device import StateReader

ALL = LEGAL_SETS[-1]
S = State

#: What a device is asked on each arc, after ``step``, in this order.
HOOKS: dict[tuple[State, State], list[str]] = {
    (S.RUNNING, S.RUNNING_P2P): ["quiesce"],
    (S.RUNNING_P2P, S.RUNNING): ["start"],
    (S.RUNNING_P2P, S.STOP): ["stop"],
    (S.STOP, S.RUNNING_P2P): ["quiesce"],
    (S.STOP, S.STOP_COPY): ["save"],
    (S.STOP_COPY, S.STOP): [],
    (S.STOP, S.RESUMING): [],
    (S.RESUMING, S.STOP): ["load", "loaded"],
    (S.RUNNING, S.PRE_COPY): ["precopy"],
    (S.PRE_COPY, S.RUNNING): [],
    (S.RUNNING_P2P, S.PRE_COPY_P2P): ["precopy"],
    (S.PRE_COPY_P2P, S.RUNNING_P2P): [],
    (S.PRE_COPY, S.PRE_COPY_P2P): ["quiesce"],
    (S.PRE_COPY_P2P, S.PRE_COPY): ["start"],
    (S.PRE_COPY_P2P, S.STOP_COPY): ["stop", "save"],
    # Where P2P is missing:
    (S.RUNNING, S.STOP): ["stop"],
    (S.STOP, S.RUNNING): ["start"],
    (S.PRE_COPY, S.STOP_COPY): ["stop", "save"],
}
ARCS = [
    pytest.param(caps, arc, id=f"{int(caps)}-{arc}") for caps in LEGAL_SETS for arc in arcs_of(caps)
]
PAIRS = [
    pytest.param(caps, origin, target, id=f"{int(caps)}-{origin.name}-{target.name}")
    for caps in LEGAL_SETS
    for origin in states_of(caps)
    for target in states_of(caps)
    if path(caps, origin, target)
]


def at(caps: Capability, origin: State) -> tuple[Program, Scripted, int]:
    """Bring a device to ``origin`` and forget how."""
    device = Scripted(caps)
    program = Program(device)
    fd = program.go(origin)
    device.log.clear()
    return program, device, fd


# The hooks of an arc.


@pytest.mark.parametrize(("caps", "arc"), ARCS)
def test_an_arc_calls_step_and_then_its_hooks(caps: Capability, arc: Arc) -> None:
    program, device, _ = at(caps, arc.origin)
    with program:
        program.go(arc.target)
        assert device.log == ["step", *HOOKS[arc.origin, arc.target]]


@pytest.mark.parametrize(("caps", "origin", "target"), PAIRS)
def test_a_combination_is_its_arcs_one_after_the_other(
    caps: Capability, origin: State, target: State
) -> None:
    program, device, _ = at(caps, origin)
    events: list[ArcEvent] = []
    with program:
        program.served.migration.observers.append(events.append)
        program.go(target)
        arcs = path(caps, origin, target)
        assert arcs is not None
        assert [event.arc for event in events] == list(arcs)
        assert {event.requested for event in events} == {target}
        assert {event.errno for event in events} == {0}
        hooks = [["step", *HOOKS[arc.origin, arc.target]] for arc in arcs]
        assert device.log == [hook for row in hooks for hook in row]


def test_an_event_says_what_an_arc_was_and_how_far_its_session_got() -> None:
    program, device, fd = at(ALL, State.STOP_COPY)
    events: list[ArcEvent] = []
    with program:
        program.served.migration.observers.append(events.append)
        program.read(fd, 5)
        program.go(State.STOP)
        device.fails["save"] = refusal(errno.EBUSY)
        program.set_state(State.STOP_COPY)
        assert [str(event) for event in events] == [
            "STOP_COPY -> STOP",
            "STOP -> STOP_COPY failed with EBUSY",
        ]
        assert (events[0].device, events[0].nbytes) == ("vfio0", 5)
        assert events[0].seconds >= 0


def test_the_first_user_starts_a_device_and_the_last_stops_it() -> None:
    device = Scripted()
    program = Program(device, bound=False)
    assert device.log == []
    program.bind()
    assert device.log == ["start"]
    program.close()
    assert device.log == ["start", "stop"]


# Failing arcs.

ERRNOS = [errno.EIO, errno.EBUSY, errno.EFAULT, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENODEV, 1]


@pytest.mark.parametrize("number", ERRNOS)
@pytest.mark.parametrize(("caps", "arc"), ARCS)
def test_an_arc_may_fail_with_any_errno_and_the_device_stays(
    caps: Capability, arc: Arc, number: int
) -> None:
    program, device, fd = at(caps, arc.origin)
    with program:
        device.fails[arc.origin, arc.target] = refusal(number)
        assert program.set_state(arc.target) == (number, arc.target, -1)
        assert program.state() is arc.origin
        if fd != -1:
            assert not program.caller.table[fd].dead
        device.fails.clear()
        program.go(arc.target)


@pytest.mark.parametrize(("caps", "arc"), ARCS)
def test_each_hook_of_an_arc_may_fail_it_and_the_device_stays(caps: Capability, arc: Arc) -> None:
    hooks = [h for h in HOOKS[arc.origin, arc.target] if h not in {"load", "loaded"}]
    for hook in hooks:
        program, device, fd = at(caps, arc.origin)
        with program:
            device.fails[hook] = refusal(errno.EXDEV)
            assert program.set_state(arc.target).errno == errno.EXDEV
            assert program.state() is arc.origin
            if fd != -1:
                assert not program.caller.table[fd].dead
            device.fails.clear()
            program.go(arc.target)


@pytest.mark.parametrize(("caps", "arc"), ARCS)
@pytest.mark.parametrize("problem", [refusal(errno.EXDEV, fatal=True), ZeroDivisionError()])
def test_a_fatal_failure_or_a_bug_leads_to_error(
    caps: Capability, arc: Arc, problem: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    program, device, fd = at(caps, arc.origin)
    with program:
        device.fails["step"] = problem
        bug = isinstance(problem, ZeroDivisionError)
        wanted = errno.EIO if bug else errno.EXDEV
        assert program.set_state(arc.target) == (wanted, arc.target, -1)
        assert program.state() is State.ERROR
        assert ("step() raised; the device goes to ERROR" in caplog.text) is bug
        if fd != -1:
            assert program.caller.table[fd].dead
        device.fails.clear()
        assert program.set_state(State.RUNNING).errno == errno.EINVAL
        assert program.reset() == 0
        program.go(arc.target)


@pytest.mark.parametrize(("caps", "origin", "target"), PAIRS)
def test_a_combination_stops_where_an_arc_fails_and_nothing_is_rolled_back(
    caps: Capability, origin: State, target: State
) -> None:
    arcs = path(caps, origin, target)
    assert arcs is not None
    for number, arc in enumerate(arcs):
        program, device, fd = at(caps, origin)
        with program:
            device.fails[arc.origin, arc.target] = refusal(errno.EBUSY)
            assert program.set_state(target) == (errno.EBUSY, target, -1)
            assert program.state() is arc.origin
            if fd != -1:
                assert program.caller.table[fd].dead is any(a.closes for a in arcs[:number])


def test_the_run_level_is_put_back_when_the_session_cannot_be_opened() -> None:
    for caps, levels in (
        (ALL, ["stop", "save", "quiesce"]),
        (LEGAL_SETS[2], ["stop", "save", "start"]),
    ):
        origin = State.PRE_COPY_P2P if caps is ALL else State.PRE_COPY
        program, device, fd = at(caps, origin)
        with program:
            device.fails["save"] = refusal(errno.ENOMEM)
            assert program.set_state(State.STOP_COPY).errno == errno.ENOMEM
            assert device.log == ["step", *levels]
            assert program.state() is origin
            device.fails.clear()
            program.go(State.STOP_COPY)
            assert program.read_all(fd) == b"the state"


def test_a_run_level_that_cannot_be_put_back_leaves_no_state_but_error() -> None:
    program, device, fd = at(ALL, State.PRE_COPY_P2P)
    with program:
        device.fails["save"] = refusal(errno.ENOMEM)
        device.fails["quiesce"] = refusal(errno.EIO)
        assert program.set_state(State.STOP_COPY).errno == errno.ENOMEM
        assert program.state() is State.ERROR
        assert program.caller.table[fd].dead


def test_a_fatal_failure_to_open_the_session_does_not_touch_the_run_level() -> None:
    program, device, _ = at(ALL, State.PRE_COPY_P2P)
    with program:
        device.fails["save"] = refusal(errno.ENOMEM, fatal=True)
        assert program.set_state(State.STOP_COPY).errno == errno.ENOMEM
        assert device.log == ["step", "stop", "save"]
        assert program.state() is State.ERROR


@pytest.mark.parametrize("number", [0, -5, 512, 1 << 40])
def test_a_number_that_is_no_errno_becomes_eio(number: int) -> None:
    program, device, _ = at(ALL, State.RUNNING)
    with program:
        device.fails["step"] = refusal(number)
        assert program.set_state(State.STOP).errno == errno.EIO
        assert program.state() is State.RUNNING


# Whole control.

Given = tuple[object, object, object]


class Controlled(Scripted):
    """Answers requests with what the test put into ``answers``, first things first."""

    def __init__(self, *answers: Given | Exception) -> None:
        super().__init__()
        self.answers = list(answers)
        self.requests: list[int] = []

    def migration_set_state(self, requested: int) -> Given:  # type: ignore[override]
        self.requests.append(requested)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def take(into: list[bytes]) -> Callable[[StateReader], None]:
    return lambda state: into.append(state.read(100))


def test_a_device_with_whole_control_sees_the_raw_number_and_no_other_hook() -> None:
    device = Controlled((S.RUNNING, errno.EINVAL, None), (S.STOP, 0, None))
    with Program(device) as program:
        assert program.set_state(0xFFFF_FFFF).errno == errno.EINVAL
        program.go(State.STOP)
        assert device.requests == [0xFFFF_FFFF, State.STOP]
        assert device.log == ["start"]


def test_its_sessions_are_like_any_other() -> None:
    loaded: list[bytes] = []
    device = Controlled(
        (S.STOP_COPY, 0, iter([b"abc", b"def"])),
        (S.STOP_COPY, 0, None),
        (S.RESUMING, 0, take(loaded)),
        (S.STOP, 0, None),
    )
    with Program(device) as program:
        saving = program.go(State.STOP_COPY)
        assert program.go(State.STOP_COPY) == -1
        assert program.read_all(saving, 4) == b"abcdef"
        resuming = program.go(State.RESUMING)
        assert program.read(saving, 1) == -errno.ENODEV
        assert program.write(resuming, b"xyz") == 3
        program.go(State.STOP)
        assert program.write(resuming, b"late") == -errno.ENODEV


def test_one_stream_serves_precopy_and_stop_copy() -> None:
    stream = iter([b"early", b"", b"", b"late"])
    device = Controlled((S.PRE_COPY, 0, stream), (S.PRE_COPY_P2P, 0, None), (S.STOP_COPY, 0, None))
    device.info = PrecopyInfo(5, 0)
    with Program(device) as program:
        fd = program.go(State.PRE_COPY)
        assert program.info(fd)[2:] == (5, 0)
        assert program.read(fd, 10) == b"early"
        program.go(State.PRE_COPY_P2P)
        assert program.read(fd, 10) == -errno.ENOMSG
        assert program.read(fd, 10) == -errno.ENOMSG
        program.go(State.STOP_COPY)
        assert [program.read(fd, 10) for _ in range(3)] == [b"late", b"", b""]


def test_a_session_may_be_replaced_inside_the_saving_group_if_the_device_says_so() -> None:
    device = Controlled((S.PRE_COPY, 0, [b"one"]), (S.STOP_COPY, 0, [b"two"]))
    with Program(device) as program:
        first = program.go(State.PRE_COPY)
        second = program.go(State.STOP_COPY)
        assert program.read(first, 1) == -errno.ENODEV
        assert program.read_all(second) == b"two"


def test_a_refusal_leaves_the_state_and_the_session() -> None:
    device = Controlled((S.STOP_COPY, 0, [b"abc"]), refusal(errno.EBUSY))
    with Program(device) as program:
        fd = program.go(State.STOP_COPY)
        assert program.set_state(State.STOP).errno == errno.EBUSY
        assert program.state() is State.STOP_COPY
        assert program.read(fd, 3) == b"abc"


def test_a_failure_half_way_ends_the_session_that_was_left() -> None:
    device = Controlled((S.STOP_COPY, 0, [b"abc"]), (S.STOP, errno.EIO, None))
    with Program(device) as program:
        fd = program.go(State.STOP_COPY)
        assert program.set_state(State.RUNNING).errno == errno.EIO
        assert program.state() is State.STOP
        assert program.read(fd, 3) == -errno.ENODEV


@pytest.mark.parametrize("requested", [State.STOP_COPY, State.STOP, State.RUNNING])
def test_a_session_that_does_not_belong_to_the_target_is_dropped(
    requested: State, caplog: pytest.LogCaptureFixture
) -> None:
    with Program(Controlled((S.STOP, 0, [b"abc"]))) as program:
        assert program.set_state(requested).errno == errno.EINVAL
        assert program.state() is State.STOP
        assert program.caller.table == {}
        assert "before its state is reached" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        (99, 0, None),
        ("STOP", 0, None),
        (S.STOP, "EIO", None),
        (S.STOP, 0),
        None,
        ZeroDivisionError(),
        (S.RESUMING, 0, [b"bytes"]),
        (S.STOP_COPY, 0, take([])),
        (S.STOP_COPY, 0, 5),
    ],
)
def test_an_answer_that_means_nothing_is_a_bug(
    answer: Given | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with Program(Controlled(answer)) as program:
        requested = answer[0] if isinstance(answer, tuple) and len(answer) == 3 else State.STOP
        reply = program.set_state(requested if isinstance(requested, State) else State.STOP)
        assert reply.errno == errno.EIO
        assert program.state() is State.ERROR
        assert "the device goes to ERROR" in caplog.text


@pytest.mark.parametrize("given", [-5, 600])
def test_a_failure_that_is_no_errno_becomes_eio(given: int) -> None:
    with Program(Controlled((S.RUNNING, given, None))) as program:
        assert program.set_state(State.STOP).errno == errno.EIO
        assert program.state() is State.RUNNING


def test_a_device_in_error_may_choose_what_it_answers_there() -> None:
    device = Controlled((S.ERROR, errno.EIO, None), (S.ERROR, errno.EIO, None))
    with Program(device) as program:
        assert program.set_state(State.STOP).errno == errno.EIO
        assert program.state() is State.ERROR
        assert program.set_state(State.RUNNING).errno == errno.EIO
        assert program.reset() == 0
        assert program.state() is State.RUNNING


@pytest.mark.parametrize("dialect", [LANDED, V6])
def test_a_state_that_is_left_unset_counts_as_error(dialect: Dialect) -> None:
    device = Controlled((S.STOP_COPY, 0, [b"abc"]), (None, errno.EBUSY, None))
    with Program(device, dialect) as program:
        fd = program.go(State.STOP_COPY)
        told = State.ERROR if dialect is V6 else State.STOP
        assert program.set_state(State.STOP) == (errno.EBUSY, told, -1)
        assert program.read(fd, 1) == -errno.ENODEV
        assert program.served.migration.state() is State.ERROR


def test_the_errors_of_its_streams_are_the_reads(caplog: pytest.LogCaptureFixture) -> None:
    def stream() -> Iterable[bytes]:
        yield b"a"
        raise ZeroDivisionError

    caplog.set_level(logging.CRITICAL)
    with Program(Controlled((S.STOP_COPY, 0, stream()))) as program:
        fd = program.go(State.STOP_COPY)
        assert [program.read(fd, 1) for _ in range(2)] == [b"a", -errno.EIO]
        wait_until(lambda: program.state() is State.ERROR)
