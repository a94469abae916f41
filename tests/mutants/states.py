"""Wrong arcs, and wrong arguments afterwards."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING, Any

from mutants.bench import (
    SET,
    SET_STATE,
    Payload,
    end,
    look,
    mutant,
    readable,
    served_as,
)
from vfiomig import State
from vfiomig.core import mig_features
from vfiomig.core.migration import Migration, Outcome
from vfiomig.core.saving import SavingMigf
from vfiomig.fsm import session_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from mutants.bench import Bench, Call, SetState
    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.core.vfio_device import VfioDevice


# States.


@mutant("PATH-4", "states.stop-copy-to-pre-copy")
def stop_copy_leads_back_to_pre_copy(bench: Bench) -> None:
    pair = State.STOP_COPY, State.PRE_COPY
    bench.paths({pair: (State.STOP, State.RUNNING_P2P, State.RUNNING, State.PRE_COPY)})


@mutant("PATH-3", "states.pre-copy-to-stop-copy")
def the_header_is_taken_by_its_word(bench: Bench) -> None:
    way = State.RUNNING, State.RUNNING_P2P, State.STOP, State.STOP_COPY
    bench.paths({(State.PRE_COPY, State.STOP_COPY): way})


@mutant("ARC-4", "states.stop-to-running-p2p")
def a_path_stops_one_arc_late(bench: Bench) -> None:
    bench.paths({(State.STOP, State.RUNNING_P2P): (State.RUNNING_P2P, State.RUNNING)})


@mutant("ERROR-1", "states.stop-to-error")
def error_can_be_asked_for(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if (mine._state, target) == (State.STOP, 0):
            mine._enter_error_locked()
        return original(mine, target)

    bench.set_state(set_state)


@mutant("NEXT-5", "states.running-to-none")
def the_count_of_states_is_one(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if (mine._state, target) == (State.RUNNING, 8):
            return Outcome(mine._state, 0, None)
        return original(mine, target)

    bench.set_state(set_state)


@mutant("NEXT-5", "states.running-p2p-to-none")
def numbers_are_compared_signed(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if mine._state is State.RUNNING_P2P and target == 0xFFFF_FFFF:
            return original(mine, State.STOP)
        return original(mine, target)

    bench.set_state(set_state)


@mutant("NEXT-6", "states.stop-copy-to-stop-copy")
def the_current_state_is_entered_again(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if mine._state is State.STOP_COPY and target == State.STOP_COPY:
            original(mine, State.STOP)
        return original(mine, target)

    bench.set_state(set_state)


@mutant("SET-LANDED-12", "states.stop-copy-to-none", others=3)
def a_refusal_ends_the_session(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        found = original(mine, target)
        if found.errno == errno.EINVAL and mine._state is State.STOP_COPY:
            mine._end_session_locked()
        return found

    bench.set_state(set_state)


@mutant("ERROR-3", "states.error-to-running", others=1)
def a_request_leads_out_of_error(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if mine._state is State.ERROR and target == State.RUNNING:
            mine._state = State.RUNNING
        return original(mine, target)

    bench.set_state(set_state)


@mutant("CAP-3", "states.stop-to-pre-copy", caps="stop-copy+p2p")
def a_state_that_there_is_not_is_taken_for_another(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        full = mine._state is State.STOP and target == State.PRE_COPY
        return original(mine, State.RUNNING if full else target)

    bench.set_state(set_state)


@mutant("ARC-6", "states.stop-copy-to-stop", others=4)
def a_session_outlives_its_states(bench: Bench) -> None:
    original = Migration._end_session_locked

    def end_session(mine: Migration) -> None:
        if mine._state is State.STOP_COPY:
            mine._migf = None  # nobody will end it
        original(mine)

    bench.patch(Migration, "_end_session_locked", end_session)


@mutant("ARC-7", "states.stop-to-resuming", others=6)
def resuming_comes_without_a_descriptor(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        before = mine._state
        found = original(mine, target)
        if target == State.RESUMING and before is State.STOP:
            return found._replace(migf=None)
        return found

    bench.set_state(set_state)


# The argument of a request, and failures half way.


@mutant("SET-LANDED-9", "combinations.a-refusal-writes-both-fields", others=1)
def a_refusal_tells_the_state_as_in_v6(bench: Bench) -> None:
    def change(payload: Payload, result: int) -> None:
        if result == errno.EINVAL:
            payload.put(0, bench.migration._state)

    bench.afterwards(lambda asked: asked == (16, SET_STATE), change)


@mutant("SET-LANDED-4", "combinations.a-refusal-writes-both-fields", others=1)
def a_refusal_leaves_data_fd_alone(bench: Bench) -> None:
    bench.afterwards(
        lambda asked: asked == (16, SET_STATE),
        lambda payload, result: payload.put(4, -77) if result == errno.EINVAL else None,
    )


@mutant("SET-LANDED-4", "combinations.success-without-a-session-writes-minus-one", others=1)
def success_writes_zero_to_data_fd(bench: Bench) -> None:
    def change(payload: Payload, result: int) -> None:
        if not result and session_kind(bench.migration._state) is None:
            payload.put(4, 0)

    bench.afterwards(lambda asked: asked == (16, SET_STATE), change)


@mutant("SET-LANDED-8", "combinations.success-writes-the-target")
def success_tells_the_first_arc(bench: Bench) -> None:
    def change(payload: Payload, result: int) -> None:
        if not result and payload.get(0) == State.STOP_COPY:
            payload.put(0, State.STOP)

    bench.afterwards(lambda asked: asked == (16, SET_STATE), change)


@mutant("SET-LANDED-2", "combinations.the-data-fd-of-a-request-is-ignored")
def a_data_fd_that_is_not_open_is_ebadf(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        if look(number, argument) == (16, SET_STATE) and readable(argument, 16):
            data_fd = Payload(ctypes.addressof(argument)).get(4)
            return end(errno.EBADF) if data_fd == 0x7FFF_FFFF else call(on, number, argument)
        return call(on, number, argument)

    bench.ioctl(tamper)


@mutant("NEXT-6", "combinations.asking-for-the-current-state-moves-no-byte")
def asking_again_rewinds_the_stream(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if mine._state is State.STOP_COPY and target == State.STOP_COPY:
            assert isinstance(mine._migf, SavingMigf)
            mine._migf._view = memoryview(b"rewound")
        return original(mine, target)

    bench.set_state(set_state)


@mutant("SET-LANDED-12", "combinations.a-refused-request-leaves-the-stream-alone")
def a_refusal_skips_bytes(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if mine._state is State.STOP_COPY and target == 8:
            assert isinstance(mine._migf, SavingMigf)
            mine._migf._view = mine._migf._view[1:]
        return original(mine, target)

    bench.set_state(set_state)


def reads_fail_after(target: int, failure: int) -> Callable[[Bench], None]:
    """A request in STOP_COPY that has no effect, but for the reads that come behind it."""

    def body(bench: Bench) -> None:
        asked: list[int] = []

        def set_state(original: SetState, mine: Migration, wanted: int) -> Outcome:
            asked[:] = [1] * (mine._state is State.STOP_COPY and wanted == target)
            return original(mine, wanted)

        def read(call: Call, data_fd: int, buffer: memoryview) -> int:
            return end(failure) if asked else call(data_fd, buffer)

        bench.set_state(set_state)
        bench.reads.append(read)

    body.__name__ = f"a_request_for_{target}_is_the_end_of_the_stream"
    return body


mutant("NEXT-6", "combinations.asking-for-the-current-state-moves-no-byte")(
    reads_fail_after(State.STOP_COPY, errno.EIO)
)
mutant("SET-LANDED-12", "combinations.a-refused-request-leaves-the-stream-alone")(
    reads_fail_after(0xFFFF_FFFF, errno.EREMOTEIO)
)


@mutant("FAIL-3", "combinations.a-failing-combination-stops-where-it-failed")
def a_failure_is_rolled_back(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        found = original(mine, target)
        if found.errno and mine._state is State.RESUMING and target == State.RUNNING:
            mine._end_session_locked()
            mine._state = State.RUNNING
        return found

    bench.set_state(set_state)


@mutant("SET-LANDED-2", "combinations.an-argument-that-cannot-be-read-does-nothing")
def the_device_moves_before_the_argument_is_read(bench: Bench) -> None:
    original = mig_features.device_state

    def device_state(device: VfioDevice, operation: int, payload: int, caller: Any) -> None:
        if operation == SET and not caller.check(payload, 8, writable=False):
            device.migration.set_state(State.STOP)
        original(device, operation, payload, caller)

    served_as(bench, "MIG_DEVICE_STATE", device_state)


@mutant("SESSION-6", "combinations.old-descriptors-do-not-stand-in-the-way")
def old_descriptors_are_ebusy(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        opened = getattr(mine, "sessions_opened", 0)
        if target == State.STOP_COPY and mine._state is State.STOP:
            if opened >= 2:
                return Outcome(mine._state, errno.EBUSY, None)
            mine.sessions_opened = opened + 1  # type: ignore[attr-defined]
        return original(mine, target)

    bench.set_state(set_state)
    original_reset = Migration.reset

    def reset(mine: Migration) -> int:
        mine.sessions_opened = 0  # type: ignore[attr-defined]
        return original_reset(mine)

    bench.patch(Migration, "reset", reset)


@mutant("STATE-11", "combinations.a-change-is-finished-when-its-request-returns", others=1)
def a_state_falls_back_by_itself(bench: Bench) -> None:
    original = Migration.state

    def state(mine: Migration, *blocks: Any) -> State:
        told = original(mine, *blocks)
        if told is State.RUNNING_P2P:
            mine._state = State.RUNNING
        return told

    bench.patch(Migration, "state", state)


@mutant("SESSION-2", "combinations.the-saving-group-keeps-one-session")
def p2p_gives_a_new_descriptor(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        found = original(mine, target)
        if target == State.PRE_COPY_P2P and not found.errno:
            return found._replace(migf=mine._migf)
        return found

    bench.set_state(set_state)


@mutant("SESSION-3", "combinations.leaving-a-session-state-by-a-combination-ends-its-session")
def a_combination_leaves_the_session_behind_it_open(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if mine._state is State.STOP_COPY and target == State.RESUMING:
            mine._migf = None  # nobody will end it
        return original(mine, target)

    bench.set_state(set_state)


@mutant(
    "CAP-3", "combinations.a-state-that-the-device-lacks-is-refused", caps="stop-copy+p2p", others=1
)
def a_state_that_there_is_not_leads_back_to_running(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        lacked = mine._state is State.RUNNING_P2P and target == State.PRE_COPY
        return original(mine, State.RUNNING if lacked else target)

    bench.set_state(set_state)


@mutant("SET-LANDED-12", "combinations.after-a-refusal-the-device-goes-on")
def a_refusal_stops_the_device_unseen(bench: Bench) -> None:
    """As one driver does it: the state reads as before, and only a reset helps."""
    stopped: list[int] = []

    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if stopped and target == State.STOP_COPY:
            return Outcome(mine._state, errno.EIO, None)
        if mine._state is State.RUNNING and target == 0xFFFF_FFFF:
            stopped.append(target)
        return original(mine, target)

    original_reset = Migration.reset

    def reset(mine: Migration) -> int:
        stopped.clear()
        return original_reset(mine)

    bench.set_state(set_state)
    bench.patch(Migration, "reset", reset)
