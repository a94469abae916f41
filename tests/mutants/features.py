"""Requests that are answered wrongly: features, estimates, and the request of V6."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

from devices.drilled import Drilled
from mutants.bench import (
    DATA_SIZE,
    FEATURE,
    GET_FLAGS,
    GET_STATE,
    KNOWN,
    PROBE,
    SET,
    SET_STATE,
    Payload,
    end,
    look,
    mutant,
    outcome,
    readable,
    skip_byte,
    v6_mutant,
)
from vfiomig import Capability, State
from vfiomig.abi import vfio
from vfiomig.core.migration import Migration, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from mutants.bench import Bench, Call, SetState
    from vfiomig.abi.uapi import UapiStruct


# VFIO_DEVICE_FEATURE.


@mutant("FEATURE-1", "discovery.a-header-that-cannot-be-read-is-efault")
def a_header_in_no_memory_is_einval(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        if number == FEATURE and look(number, argument) is None:
            return end(errno.EINVAL)
        return call(on, number, argument)

    bench.ioctl(tamper)


@mutant("FEATURE-2", "discovery.argsz-holds-the-header", others=1)
def a_small_argsz_is_accepted(bench: Bench) -> None:
    bench.answer(lambda asked: asked.argsz < 8, 0)


@mutant("FEATURE-3", "discovery.unknown-flags-are-refused", others=1)
def unknown_flags_are_ignored(bench: Bench) -> None:
    bench.answer(lambda asked: bool(asked.flags >> 19), 0)


@mutant("FEATURE-4", "discovery.get-and-set-together-are-refused", others=2)
def get_and_set_together_are_accepted(bench: Bench) -> None:
    bench.answer(lambda asked: asked.flags >> 16 & 7 == 3, 0)


@mutant("FEATURE-5", "discovery.an-unknown-index-is-refused", others=1)
def every_index_is_known(bench: Bench) -> None:
    bench.swap(lambda asked: asked.number not in KNOWN, {errno.ENOTTY: 0})


@mutant("FEATURE-7", "discovery.an-operation-that-a-feature-lacks-is-refused", others=1)
def a_probe_looks_at_no_operation(bench: Bench) -> None:
    bench.swap(lambda asked: asked.flags >> 16 in {5, 6} and asked.argsz >= 8, {errno.EINVAL: 0})


@mutant("FEATURE-8", "discovery.a-probe-touches-no-payload")
def a_probe_wants_its_payload(bench: Bench) -> None:
    bench.answer(lambda asked: bool(asked.flags & PROBE) and asked.argsz == 4096, errno.EFAULT)


@mutant("FEATURE-9", "discovery.a-request-without-an-operation-is-refused", others=1)
def no_operation_is_accepted(bench: Bench) -> None:
    bench.swap(lambda asked: not asked.flags >> 16, {errno.EINVAL: 0})


@mutant("FEATURE-10", "discovery.argsz-covers-the-payload", others=1)
def the_payload_is_not_sized(bench: Bench) -> None:
    bench.answer(lambda asked: asked.flags == GET_FLAGS and 8 < asked.argsz < 16, 0)


@mutant("FEATURE-11", "discovery.a-larger-argsz-is-accepted")
def the_bytes_beyond_are_cleared(bench: Bench) -> None:
    bench.afterwards(
        lambda asked: asked == (64, GET_FLAGS), lambda payload, result: payload.put(8, 0, 8)
    )


@mutant("FEATURE-11", "discovery.a-larger-argsz-is-accepted", others=1)
def a_larger_argsz_is_refused(bench: Bench) -> None:
    bench.answer(lambda asked: asked.flags == GET_FLAGS and asked.argsz > 16, errno.E2BIG)


@mutant("FEATURE-8", "discovery.a-probe-changes-nothing")
def a_probe_of_a_set_sets(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        asked = look(number, argument)
        if asked == (16, PROBE | SET_STATE) and readable(argument, 16):
            bench.migration.set_state(Payload(ctypes.addressof(argument)).get(0))
        return call(on, number, argument)

    bench.ioctl(tamper)


@mutant("FEATURE-11", "discovery.a-larger-argsz-is-accepted")
def the_state_is_set_in_16_bytes_alone(bench: Bench) -> None:
    bench.answer(lambda asked: asked.flags == SET_STATE and asked.argsz > 16, errno.EINVAL)


@mutant("SIZE-2", "size.asking-takes-nothing-from-a-stream")
def a_size_is_what_is_left_and_skips_it(bench: Bench) -> None:
    bench.afterwards(lambda asked: asked.flags == DATA_SIZE, lambda *_: skip_byte(bench))


@mutant("NEXT-6", "combinations.asking-for-the-current-state-moves-no-byte")
def a_query_skips_bytes(bench: Bench) -> None:
    bench.afterwards(lambda asked: asked.flags == GET_STATE, lambda *_: skip_byte(bench))


@mutant("FEATURE-12", "discovery.the-header-is-never-written")
def argsz_is_written_back(bench: Bench) -> None:
    bench.afterwards(
        lambda asked: asked == (4096, GET_FLAGS), lambda payload, result: payload.put(-8, 16)
    )


@mutant("CAP-1", "discovery.the-capability-set-means-something")
def a_capability_that_nobody_knows(bench: Bench) -> None:
    bench.afterwards(
        lambda asked: asked == (16, GET_FLAGS), lambda payload, result: payload.put(0, 15, 8)
    )


@mutant("CAP-2", "discovery.the-capability-set-never-changes")
def capabilities_come_and_go(bench: Bench) -> None:
    def change(payload: Payload, result: int) -> None:
        if bench.migration._state is State.STOP:
            payload.put(0, 1, 8)

    bench.afterwards(lambda asked: asked == (16, GET_FLAGS), change)


@mutant("MIGRATION-3", "discovery.an-answer-that-cannot-be-written-is-efault")
def an_unwritable_answer_is_success(bench: Bench) -> None:
    bench.swap(lambda asked: asked.flags == GET_FLAGS, {errno.EFAULT: 0})


@mutant("PRECOPY-9", "discovery.precopy-info-v2-goes-with-pre-copy", caps="stop-copy+p2p")
def v2_of_what_there_is_not(bench: Bench) -> None:
    bench.swap(lambda asked: asked.flags == PROBE | SET | 12, {errno.EINVAL: 0})


@mutant("DIALECT-2", "discovery.the-number-0x3b79-is-nothing-on-a-device")
def both_dialects_at_once(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        if number == vfio.VFIO_DEVICE_MIG_SET_STATE and isinstance(argument, vfio.MigSetState):
            return end(errno.EOPNOTSUPP)
        return call(on, number, argument)

    bench.ioctl(tamper)


@mutant("SESSION-11", "discovery.an-unknown-request-is-enotty")
def unknown_requests_are_einval(bench: Bench) -> None:
    bench.swap_number(0x3BFF, {errno.ENOTTY: errno.EINVAL})


@mutant("GET-LANDED-2", "discovery.a-query-needs-a-payload-that-can-be-read")
def a_query_reads_no_payload(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        if look(number, argument) == (16, GET_STATE) and not readable(argument, 16):
            return 0
        return call(on, number, argument)

    bench.ioctl(tamper)


@mutant("GET-LANDED-4", "discovery.the-state-is-told-in-every-state")
def a_query_leaves_data_fd_alone(bench: Bench) -> None:
    bench.afterwards(
        lambda asked: asked == (16, GET_STATE), lambda payload, result: payload.put(4, -77)
    )


@mutant("FEATURE-13", "discovery.a-probe-finds-migration", others=2)
def a_probe_names_no_operation(bench: Bench) -> None:
    bench.answer(lambda asked: asked.flags == PROBE | GET_FLAGS, errno.EINVAL)


@mutant("FEATURE-6", "discovery.without-migration-there-is-none-of-it")
def a_size_of_no_state_is_told(bench: Bench) -> None:
    class Unable(Drilled):
        def __init__(self, caps: str) -> None:
            super().__init__(caps)
            self.capabilities = Capability(0)

    bench.device = Unable
    bench.answer(lambda asked: asked.flags == PROBE | DATA_SIZE, 0)


@mutant("QUERY-V6-3", "discovery.every-combination-of-flags-has-its-answer")
def a_probe_of_set_succeeds_where_argsz_is_odd(bench: Bench) -> None:
    bench.answer(lambda asked: asked == (12, PROBE | SET | 1), 0)


@mutant("FEATURE-5", "discovery.the-first-fault-decides")
def the_index_is_looked_up_before_argsz(bench: Bench) -> None:
    bench.answer(lambda asked: asked.argsz < 8 and asked.number not in KNOWN, errno.ENOTTY)


@mutant("GET-LANDED-4", "discovery.a-query-into-read-only-memory-is-efault", others=1)
def a_state_that_cannot_be_told_is_success(bench: Bench) -> None:
    bench.swap(lambda asked: asked == (16, GET_STATE), {errno.EFAULT: 0})


@mutant("CLOSE-2", "discovery.an-untouched-device-is-in-running")
def a_device_is_opened_in_stop(bench: Bench) -> None:
    first = Migration.first_open

    def first_open(mine: Migration) -> int:
        result = first(mine)
        mine.set_state(State.STOP)
        return result

    bench.patch(Migration, "first_open", first_open)


# Estimates.


@mutant("SIZE-2", "size.it-can-be-asked-in-every-state", others=2)
def the_size_is_not_told_while_copying(bench: Bench) -> None:
    original = Migration.state_size

    def state_size(mine: Migration) -> int:
        if mine._state is State.STOP_COPY:
            raise OSError(errno.EBUSY, "copying")
        return original(mine)

    bench.patch(Migration, "state_size", state_size)


@mutant("FAULT-20", "size.it-is-no-errno")
def the_size_is_an_errno(bench: Bench) -> None:
    bench.patch(Migration, "state_size", lambda mine: (1 << 64) - errno.EIO)


@mutant("SIZE-1", "size.it-covers-what-is-delivered")
def the_size_is_too_small(bench: Bench) -> None:
    bench.patch(Migration, "state_size", lambda mine: 10)


@mutant("SIZE-1", "size.a-size-that-cannot-be-written-is-efault")
def a_size_that_cannot_be_told_is_success(bench: Bench) -> None:
    bench.swap(lambda asked: asked.flags == DATA_SIZE, {errno.EFAULT: 0})


# VFIO_DEVICE_MIG_SET_STATE.


def v6_answers(when: Callable[[vfio.MigSetState], bool], result: int) -> Call:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        is_set = number == vfio.VFIO_DEVICE_MIG_SET_STATE and isinstance(argument, vfio.MigSetState)
        if is_set and readable(argument, 16):
            assert isinstance(argument, vfio.MigSetState)
            if when(argument):
                return end(result)
        return call(on, number, argument)

    return tamper


def v6_target(argument: UapiStruct | None) -> int | None:
    """The state that is asked for; ``None`` if that cannot be read."""
    if isinstance(argument, vfio.MigSetState) and readable(argument, 16):
        return argument.device_state
    return None


@v6_mutant("SET-V6-3", "v6.a-small-argsz-is-eopnotsupp")
def a_small_argsz_is_einval_in_v6(bench: Bench) -> None:
    bench.ioctl(v6_answers(lambda argument: argument.argsz < 16, errno.EINVAL))


@v6_mutant("SET-V6-3", "v6.nonzero-flags-are-eopnotsupp")
def flags_are_ignored_in_v6(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        if isinstance(argument, vfio.MigSetState) and on == 4 and readable(argument, 16):
            argument.flags = 0
        return call(on, number, argument)

    bench.ioctl(tamper)


@v6_mutant("SET-V6-16", "v6.a-larger-argsz-is-accepted", others=1)
def a_larger_argsz_is_refused_in_v6(bench: Bench) -> None:
    bench.ioctl(v6_answers(lambda argument: argument.argsz > 16, errno.E2BIG))


@v6_mutant("SET-V6-11", "v6.a-refusal-tells-the-state", others=1)
def a_refusal_tells_the_target_in_v6(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        asked = v6_target(argument)
        result = outcome(lambda: call(on, number, argument))
        if result == errno.EINVAL and asked:
            assert isinstance(argument, vfio.MigSetState)
            argument.device_state = asked
        return end(result)

    bench.ioctl(tamper)


@v6_mutant("SET-V6-6", "v6.argsz-and-flags-come-back-as-they-were", others=1)
def argsz_is_the_size_of_the_struct_in_v6(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        try:
            return call(on, number, argument)
        finally:
            if isinstance(argument, vfio.MigSetState) and readable(argument, 16):
                argument.argsz = min(argument.argsz, 16)

    bench.ioctl(tamper)


@v6_mutant("SET-V6-13", "v6.a-request-for-error-tells-the-state", others=9)
def a_request_for_error_says_error_in_v6(bench: Bench) -> None:
    """A driver that does not say where it ended."""

    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        asked = v6_target(argument)
        result = outcome(lambda: call(on, number, argument))
        if asked == 0 and bench.migration._state is State.RESUMING:
            assert isinstance(argument, vfio.MigSetState)
            argument.device_state = 0
        return end(result)

    bench.ioctl(tamper)


@v6_mutant("QUERY-V6-1", "v6.the-capability-set-is-one")
def later_capabilities_show_in_v6(bench: Bench) -> None:
    bench.afterwards(
        lambda asked: asked == (16, GET_FLAGS), lambda payload, result: payload.put(0, 7, 8)
    )


@v6_mutant("CHOICE-4", "v6.later-states-are-none", others=1)
def later_states_exist_in_v6(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if target == State.RUNNING_P2P:
            return original(mine, State.RUNNING)
        return original(mine, target)

    bench.set_state(set_state)


@v6_mutant("DIALECT-1", "v6.the-features-of-the-other-dialect-are-unknown")
def the_size_is_told_in_v6(bench: Bench) -> None:
    bench.answer(lambda asked: asked.flags == PROBE | DATA_SIZE, 0)


@v6_mutant("DIALECT-2", "v6.a-data-fd-knows-no-request")
def a_data_fd_takes_the_request_of_the_device_in_v6(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        known = number == vfio.VFIO_DEVICE_MIG_SET_STATE and on > 4
        return end(errno.EINVAL) if known else call(on, number, argument)

    bench.ioctl(tamper)


@v6_mutant("SET-V6-5", "v6.a-failure-of-the-device-has-an-errno-of-its-own")
def a_refused_state_is_eopnotsupp_in_v6(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        asked = v6_target(argument)
        result = outcome(lambda: call(on, number, argument))
        loading = asked == State.STOP and bench.migration._state is State.RESUMING
        return end(errno.EOPNOTSUPP if result and loading else result)

    bench.ioctl(tamper)


@v6_mutant("SET-V6-2", "v6.an-argument-that-is-not-there-is-efault")
def an_argument_in_no_memory_is_eopnotsupp_in_v6(bench: Bench) -> None:
    bench.swap_number(vfio.VFIO_DEVICE_MIG_SET_STATE, {errno.EFAULT: errno.EOPNOTSUPP})
