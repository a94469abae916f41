"""Wrong resets, and answers that cannot be given."""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING

from devices.drilled import Drilled
from mutants.bench import (
    RESET,
    SET_STATE,
    Payload,
    end,
    look,
    mutant,
    outcome,
    spoiled,
    waits_at_the_end,
)
from vfiomig import State
from vfiomig.core.migration import Migration, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from mutants.bench import Bench, Call, SetState
    from vfiomig.abi.uapi import UapiStruct


# Reset.


def refuse_reset(bench: Bench, state: State) -> None:
    original = Migration.reset
    bench.patch(
        Migration, "reset", lambda mine: errno.EIO if mine._state is state else original(mine)
    )


@mutant("RESET-1", "reset.from-stop", others=1)
def a_reset_of_a_stopped_device_leaves_it_stopped(bench: Bench) -> None:
    original = Migration.reset
    bench.patch(Migration, "reset", lambda mine: 0 if mine._state is State.STOP else original(mine))


@mutant("RESET-2", "reset.from-stop-copy", others=2, deadline=3.0)
def a_reset_leaves_the_session_open(bench: Bench) -> None:
    original = Migration.reset

    def reset(mine: Migration) -> int:
        if mine._state is State.STOP_COPY:
            mine._migf = None
        return original(mine)

    bench.patch(Migration, "reset", reset)


@mutant("RESET-2", "reset.a-reset-ends-a-load")
def a_reset_leaves_the_load_open(bench: Bench) -> None:
    def write(call: Call, data_fd: int, data: memoryview) -> int:
        return len(data) if bench.migration._state is State.RUNNING else call(data_fd, data)

    bench.writes.append(write)


@mutant("ERROR-6", "reset.from-error")
def a_reset_does_not_lead_out_of_error(bench: Bench) -> None:
    refuse_reset(bench, State.ERROR)


@mutant("RESET-1", "reset.a-second-reset-is-as-good", others=3)
def a_running_device_is_not_reset(bench: Bench) -> None:
    resets: list[int] = []

    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        if number == RESET:
            resets.append(1)
            return end(errno.EBUSY) if len(resets) > 1 else call(on, number, argument)
        if look(number, argument) == (16, SET_STATE):
            resets.clear()
        return call(on, number, argument)

    bench.ioctl(tamper)


def left_where_it_is(state: State) -> Callable[[Bench], None]:
    """A reset that does nothing in one state."""

    def body(bench: Bench) -> None:
        original = Migration.reset
        bench.patch(Migration, "reset", lambda mine: 0 if mine._state is state else original(mine))

    body.__name__ = f"a_reset_in_{state.name}_does_nothing".lower()
    return body


for _state, _others in (
    (State.RESUMING, 5),
    (State.RUNNING_P2P, 0),
    (State.PRE_COPY, 1),
    (State.PRE_COPY_P2P, 1),
):
    _check = f"reset.from-{_state.name}".lower().replace("_", "-")
    mutant("RESET-1", _check, _others)(left_where_it_is(_state))


@mutant("RESET-1", "reset.from-running", others=4)
def only_a_device_that_does_not_run_can_be_reset(bench: Bench) -> None:
    refuse_reset(bench, State.RUNNING)


@mutant("RESET-2", "reset.after-a-reset-a-whole-session-works")
def a_reset_in_a_session_spoils_the_next_load(bench: Bench) -> None:
    sessions: list[int] = []
    original = Migration.reset

    def reset(mine: Migration) -> int:
        sessions[:] = [1] * (mine._state is State.STOP_COPY)
        return original(mine)

    bench.patch(Migration, "reset", reset)
    bench.device = spoiled(sessions)


@mutant("RESET-5", "reset.a-reset-may-meet-a-reset")
def a_reset_beside_another_is_ebusy(bench: Bench) -> None:
    under_way: list[int] = []

    class Slow(Drilled):
        def reset(self) -> None:
            super().reset()
            time.sleep(0.002)

    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        if number != RESET:
            return call(on, number, argument)
        if under_way:
            return end(errno.EBUSY)
        under_way.append(1)
        try:
            return call(on, number, argument)
        finally:
            under_way.clear()

    bench.device = Slow
    bench.ioctl(tamper)


@mutant("RESET-2", "reset.a-session-without-a-descriptor-ends-too")
def a_session_that_nobody_has_outlives_a_reset(bench: Bench) -> None:
    lost: list[int] = []

    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        if number == RESET and lost:
            lost.clear()
            return 0
        result = outcome(lambda: call(on, number, argument))
        if result == errno.EMFILE:
            lost.append(1)
        return end(result)

    bench.ioctl(tamper)


WAITING = threading.Event()


@mutant("SESSION-4", "reset.a-reader-wakes-at-a-reset", deadline=3.0, release=WAITING.set)
def a_reset_leaves_a_reader_waiting(bench: Bench) -> None:
    bench.reads.append(waits_at_the_end(WAITING))


# What cannot be told.


@mutant("SET-LANDED-10", "exhaustion.no-descriptor-for-stop-copy", others=4)
def a_change_without_a_descriptor_is_undone(bench: Bench) -> None:
    bench.afterwards(lambda asked: asked == (16, SET_STATE), undo(bench, errno.EMFILE))


def undo(bench: Bench, wrong: int) -> Callable[[Payload, int], None]:
    def change(payload: Payload, result: int) -> None:
        if result == wrong and bench.migration._state is State.STOP_COPY:
            bench.migration.set_state(State.STOP)

    return change


def undone(state: State, back: State) -> Callable[[Bench], None]:
    """A change to ``state`` that is undone when there is no descriptor for it."""

    def body(bench: Bench) -> None:
        def change(payload: Payload, result: int) -> None:
            if result == errno.EMFILE and bench.migration._state is state:
                bench.migration.set_state(back)

        bench.afterwards(lambda asked: asked == (16, SET_STATE), change)

    body.__name__ = f"{state.name}_without_a_descriptor_is_undone".lower()
    return body


for _state, _back in (
    (State.PRE_COPY, State.RUNNING),
    (State.PRE_COPY_P2P, State.RUNNING_P2P),
):
    _check = f"exhaustion.no-descriptor-for-{_state.name}".lower().replace("_", "-")
    mutant("SET-LANDED-10", _check)(undone(_state, _back))


@mutant("SET-LANDED-6", "exhaustion.no-descriptor-for-resuming", others=6)
def without_a_descriptor_it_is_enomem(bench: Bench) -> None:
    bench.swap(lambda asked: asked == (16, SET_STATE), {errno.EMFILE: errno.ENOMEM})


@mutant("SET-LANDED-11", "exhaustion.emfile-writes-nothing")
def emfile_writes_minus_one(bench: Bench) -> None:
    bench.afterwards(
        lambda asked: asked == (16, SET_STATE),
        lambda payload, result: payload.put(4, -1) if result == errno.EMFILE else None,
    )


@mutant("RECOVER-6", "exhaustion.leaving-and-entering-gives-the-descriptor")
def a_lost_descriptor_is_given_later(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        found = original(mine, target)
        if target == mine._state == State.STOP_COPY:
            return found._replace(migf=mine._migf)
        return found

    bench.set_state(set_state)


@mutant("SET-LANDED-6", "exhaustion.without-descriptors-other-states-are-reached")
def stopping_wants_a_descriptor(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if target == State.STOP and not bench.opened[-1].numbers.nofile:
            return Outcome(mine._state, errno.EMFILE, None)
        return original(mine, target)

    bench.set_state(set_state)


@mutant("SET-LANDED-7", "exhaustion.a-session-that-cannot-be-told-is-open-all-the-same")
def a_session_that_cannot_be_told_is_closed(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        result = outcome(lambda: call(on, number, argument))
        if result == errno.EFAULT and bench.migration._state is State.STOP_COPY:
            bench.migration.set_state(State.STOP)
        return end(result)

    bench.ioctl(tamper)


@mutant("SET-LANDED-4", "exhaustion.an-answer-that-cannot-be-written-hides-success")
def a_stop_that_cannot_be_told_is_success(bench: Bench) -> None:
    bench.swap(
        lambda asked: asked == (16, SET_STATE) and bench.migration._state is State.STOP,
        {errno.EFAULT: 0},
    )


@mutant("SET-LANDED-4", "exhaustion.an-answer-that-cannot-be-written-hides-a-refusal")
def a_refusal_is_told_by_its_errno_alone(bench: Bench) -> None:
    bench.swap(
        lambda asked: asked == (16, SET_STATE) and bench.migration._state is State.RUNNING,
        {errno.EFAULT: errno.EINVAL},
    )
