"""VFIO_DEVICE_RESET, deferred and not, and the last close: docs/protocol.md, "reset"."""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING

import pytest

from in_process import (
    DEADLINE,
    LANDED,
    V6,
    Gate,
    Produces,
    Program,
    Scripted,
    failing,
    in_thread,
    refusal,
    wait_until,
)
from vfiomig.abi import vfio
from vfiomig.core import transfer as core_transfer
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.fsm import LEGAL_SETS, State, states_of

if TYPE_CHECKING:
    from vfiomig.abi.ioctls import Dialect

ALL = LEGAL_SETS[-1]
STATES = [State.ERROR, *states_of(ALL)]
SHOWN = [(LANDED, state) for state in STATES] + [(V6, state) for state in STATES if state < 5]
FEATURE = vfio.VFIO_DEVICE_FEATURE


def at(state: State, dialect: Dialect = LANDED) -> tuple[Program, Scripted, int]:
    device = Scripted()
    program = Program(device, dialect)
    if state is State.ERROR:
        program.served.migration.fail()
        fd = -1
    else:
        fd = program.go(state)
    device.log.clear()
    return program, device, fd


@pytest.mark.parametrize(("dialect", "state"), SHOWN)
def test_a_reset_leads_from_every_state_to_running(state: State, dialect: Dialect) -> None:
    program, device, fd = at(state, dialect)
    with program:
        assert program.reset() == 0
        assert program.state() is State.RUNNING
        ran = state in {State.RUNNING, State.PRE_COPY}
        assert device.log == ["reset"] + ["start"] * (not ran)
        if fd != -1:
            assert program.caller.table[fd].dead
        # A full session works afterwards.
        assert program.read_all(program.go(State.STOP_COPY)) == b"the state"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EAGAIN, errno.EIO])
@pytest.mark.parametrize("state", STATES)
def test_a_reset_that_the_device_refuses_tells_its_errno(state: State, number: int) -> None:
    program, device, fd = at(state)
    with program:
        device.fails["reset"] = refusal(number)
        assert program.reset() == number
        # A session has been ended for it, and a state without its session is none.
        assert program.state() is (State.ERROR if fd != -1 else state)
        device.fails.clear()
        assert program.reset() == 0
        assert program.state() is State.RUNNING


@pytest.mark.parametrize("state", [state for state in STATES if state not in {2, 6}])
def test_a_device_that_was_reset_but_does_not_start_is_in_error(state: State) -> None:
    program, device, _ = at(state)
    with program:
        device.fails["start"] = refusal(errno.EIO)
        assert program.reset() == errno.EIO
        assert program.state() is State.ERROR


def test_a_bug_in_reset_leads_to_error() -> None:
    program, device, _ = at(State.STOP)
    with program:
        device.fails["reset"] = KeyError()
        assert program.reset() == errno.EIO
        assert program.state() is State.ERROR


def test_a_reset_mends_a_failure_that_was_noted_before_it() -> None:
    with Program(Produces(failing(ZeroDivisionError()))) as program:
        fd = program.go(State.STOP_COPY)
        migf = program.caller.table[fd]
        for _ in range(20):
            assert program.read(fd, 1) in {-errno.EIO, -errno.ENODEV}
            assert program.reset() == 0
            migf.join()
            assert program.state() is State.RUNNING
            fd = program.go(State.STOP_COPY)
            migf = program.caller.table[fd]


def test_a_failure_that_is_noted_while_a_reset_waits_for_a_session_is_mended_by_it() -> None:
    gate = Gate()
    with Program(Produces(gate)) as program:
        fd = program.go(State.STOP_COPY)
        program.start_read(fd, 1)
        gate.wait()
        resetting = in_thread(program.reset)
        wait_until(lambda: program.caller.table[fd].dead)
        program.served.migration.fail()
        gate.open()
        resetting.join(DEADLINE)
        assert program.state() is State.RUNNING


# Deferred.


class Held:
    """A device whose next arc hangs in ``hook``, in a thread of its own."""

    def __init__(self, target: State, hook: str, origin: State = State.RUNNING) -> None:
        self.device = Scripted()
        self.program = Program(self.device)
        self.program.go(origin)
        self.hold = self.device.holds[hook] = threading.Event()
        before = self.device.entered[hook]
        self.replies: list[tuple[int, int, int]] = []
        self.thread = in_thread(lambda: self.replies.append(self.program.set_state(target)))
        self.device.wait_for(hook, before + 1)

    def finish(self) -> tuple[int, int, int]:
        self.hold.set()
        self.thread.join(DEADLINE)
        return self.replies[0]


def test_a_reset_does_not_wait_for_an_arc_and_is_done_by_whoever_takes_it() -> None:
    held = Held(State.STOP_COPY, "save")
    with held.program as program:
        assert program.reset() == 0
        assert not held.replies, "the arc is under way still"
        assert "reset" not in held.device.log
        errno_, state, fd = held.finish()
        assert (errno_, state) == (0, State.STOP_COPY)
        assert fd != -1
        # The request succeeded with a descriptor, which is dead, and the device runs.
        assert program.state() is State.RUNNING
        assert program.read(fd, 1) == -errno.ENODEV
        assert held.device.log[-2:] == ["reset", "start"]


def test_a_deferred_reset_is_done_once_however_often_it_was_asked_for() -> None:
    held = Held(State.STOP, "stop")
    with held.program as program:
        assert [program.reset() for _ in range(3)] == [0, 0, 0]
        held.finish()
        assert program.state() is State.RUNNING
        assert held.device.log.count("reset") == 1


def test_a_deferred_reset_follows_a_failing_arc_as_well() -> None:
    held = Held(State.STOP, "stop")
    with held.program as program:
        held.device.fails["stop"] = refusal(errno.EIO, fatal=True)
        assert program.reset() == 0
        assert held.finish()[0] == errno.EIO
        assert program.state() is State.RUNNING


def test_a_deferred_reset_that_fails_leaves_error_because_its_caller_was_told_success() -> None:
    held = Held(State.STOP, "stop")
    with held.program as program:
        held.device.fails["reset"] = refusal(errno.EIO)
        assert program.reset() == 0
        held.finish()
        assert program.state() is State.ERROR


def test_a_get_that_carries_the_reset_out_still_tells_the_older_state() -> None:
    class Told(Program):
        def get_with_a_reset_inside(self) -> State:
            migration = self.served.migration
            unlock, resets = migration._unlock, [self.reset]

            def reset_then_unlock() -> None:
                while resets:
                    assert resets.pop()() == 0  # the lock is held: noted
                unlock()

            migration._unlock = reset_then_unlock  # type: ignore[method-assign]
            try:
                return self.state()
            finally:
                migration._unlock = unlock  # type: ignore[method-assign]

    with Told() as program:
        program.go(State.STOP)
        assert program.get_with_a_reset_inside() is State.STOP
        assert program.state() is State.RUNNING


def test_many_resets_and_transitions_at_once_never_deadlock() -> None:
    device = Scripted(early=[b"early"])
    with Program(device) as program:
        over = threading.Event()

        def moves(*states: State) -> None:
            while not over.is_set():
                for state in states:
                    reply = program.set_state(state)
                    if reply.fd > 0 and reply.errno == 0:
                        program.read(reply.fd, 4)

        def resets() -> None:
            while not over.is_set():
                program.reset()
                program.state()

        threads = [
            in_thread(lambda: moves(State.STOP_COPY, State.RUNNING)),
            in_thread(lambda: moves(State.PRE_COPY, State.STOP_COPY, State.STOP)),
            in_thread(resets),
            in_thread(resets),
        ]
        time.sleep(0.3)
        over.set()
        for thread in threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()
        assert program.reset() == 0
        assert program.state() is State.RUNNING


def test_a_get_waits_for_the_arc_and_says_so_first() -> None:
    held = Held(State.STOP, "stop")
    with held.program as program:
        waits = program.caller.waits
        states: list[State] = []
        asking = in_thread(lambda: states.append(program.state()))
        wait_until(lambda: program.caller.waits > waits)
        assert not states
        held.finish()
        asking.join(DEADLINE)
        assert states == [State.STOP]


# The last close.


@pytest.mark.parametrize(("dialect", "state"), SHOWN)
def test_the_next_open_finds_running(state: State, dialect: Dialect) -> None:
    program, device, fd = at(state, dialect)
    with program:
        program.close()
        levels = {State.STOP: "stop", State.STOP_COPY: "stop", State.RESUMING: "stop"}
        assert ("stop" in device.log) is (state not in levels)
        assert ("reset" in device.log) is (state is not State.RUNNING)
        if fd != -1:
            assert program.caller.table[fd].dead
        device.log.clear()
        program.file = program.served.open()
        if dialect is LANDED:
            assert program.bind().errno == 0
        assert device.log == ["start"]
        assert program.state() is State.RUNNING


def test_a_closed_device_answers_nothing_and_a_second_release_is_nothing() -> None:
    with Program() as program:
        program.close()
        assert program.at(FEATURE, 0) == errno.EINVAL
        program.close()


def test_hooks_that_fail_at_the_last_close_do_not_keep_the_next_open_from_running() -> None:
    program, device, _ = at(State.STOP_COPY)
    with program:
        device.fails["reset"] = ZeroDivisionError()
        device.fails["stop"] = refusal(errno.EIO, fatal=True)
        program.close()
        device.fails.clear()
        program.reopen()
        assert program.state() is State.RUNNING


def test_a_last_close_waits_for_an_arc_and_ends_its_session() -> None:
    held = Held(State.STOP_COPY, "save")
    with held.program as program:
        closing = in_thread(program.file.release)
        held.finish()
        closing.join(DEADLINE)
        assert [migf.dead for migf in program.caller.table.values()] == [True]
        program.reopen()
        assert program.state() is State.RUNNING


def test_a_hook_that_hangs_does_not_keep_a_close_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_transfer, "JOIN_SECONDS", 0.02)
    gate = Gate()
    with Program(Produces(gate)) as program:
        fd = program.go(State.STOP_COPY)
        program.start_read(fd, 1)
        gate.wait()
        program.reopen()
        assert program.state() is State.RUNNING
        gate.open()


@pytest.mark.parametrize("fatal", [False, True])
def test_a_device_that_does_not_start_fails_the_binding_and_may_be_tried_again(
    *, fatal: bool
) -> None:
    device = Scripted()
    program = Program(device, bound=False)
    with program:
        device.fails["start"] = refusal(errno.ENXIO, fatal=fatal)
        assert program.bind().errno == errno.ENXIO
        assert program.at(FEATURE, 0) == errno.EINVAL
        device.fails.clear()
        assert program.bind().errno == 0
        assert program.state() is State.RUNNING


def test_a_device_that_does_not_start_fails_the_open_in_v6() -> None:
    device = Scripted()
    device.fails["start"] = refusal(errno.ENXIO)
    served = VfioDevice(device, dialect=V6)
    with pytest.raises(OSError, match="does not start") as failure:
        served.open()
    assert failure.value.errno == errno.ENXIO
    device.fails.clear()
    served.open().release()


def test_in_v6_all_opens_share_one_state_and_the_last_close_counts() -> None:
    device = Scripted()
    with Program(device, V6) as program:
        other = program.served.open()
        fd = program.go(State.STOP_COPY)
        other.release()
        assert program.state() is State.STOP_COPY
        assert program.read_all(fd) == b"the state"
    assert device.log.count("start") == 1
    assert device.log.count("reset") == 1


def test_a_failure_in_the_code_of_a_closed_session_is_not_the_next_users() -> None:
    gate = Gate(then=ZeroDivisionError())
    with Program(Produces(gate)) as program:
        fd = program.go(State.STOP_COPY)
        program.start_read(fd, 1)
        gate.wait()
        closing = in_thread(program.file.release)
        wait_until(lambda: program.caller.table[fd].dead)
        gate.open()
        closing.join(DEADLINE)
        program.reopen()
        assert program.state() is State.RUNNING
