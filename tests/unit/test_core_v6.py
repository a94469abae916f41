"""VFIO_DEVICE_MIG_SET_STATE, check by check: docs/protocol.md, "set-state-v6" and "feature-query"."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import pytest

from in_process import GET, LANDED, PROBE, SET, V6, Pages, Program, Scripted, refusal
from vfiomig.abi import vfio
from vfiomig.fsm import LEGAL_SETS, Capability, State

if TYPE_CHECKING:
    from vfiomig.abi.ioctls import Dialect
    from vfiomig.device import SessionBody

SET_STATE = vfio.VFIO_DEVICE_MIG_SET_STATE
ALL = LEGAL_SETS[-1]


def argument(state: int, argsz: int = 16, flags: int = 0, fd: int = 77) -> bytes:
    return bytes(vfio.MigSetState(argsz=argsz, device_state=state, data_fd=fd, flags=flags))


class Controlled(Scripted):
    """Answers requests itself, with what the test put into ``answer``."""

    def __init__(self, *answer: object) -> None:
        super().__init__()
        self.answer = answer

    def migration_set_state(self, requested: int) -> tuple[State | None, int, SessionBody | None]:
        self.note("migration_set_state")
        final, failure, body = self.answer
        return final, failure, body  # type: ignore[return-value]  # what it is, the test decides


def test_without_migration_the_request_is_refused_before_anything_is_read() -> None:
    with Program(Scripted(Capability(0)), V6) as program:
        assert program.at(SET_STATE, 0) == errno.EOPNOTSUPP
        answer = program.ioctl(SET_STATE, argument(State.STOP))
        assert answer == (errno.EOPNOTSUPP, argument(State.STOP))


def test_an_argument_that_cannot_be_read_is_a_fault() -> None:
    with Program(dialect=V6) as program, Pages("rw", "") as pages:
        assert program.at(SET_STATE, 0) == errno.EFAULT
        assert program.at(SET_STATE, pages.page(1)) == errno.EFAULT
        assert program.at(SET_STATE, pages.page(1) - 15) == errno.EFAULT
        assert program.state() is State.RUNNING


@pytest.mark.parametrize(
    ("argsz", "flags"), [(15, 0), (0, 0), (8, 0), (16, 1), (16, 1 << 31), (15, 1), (24, 2)]
)
def test_argsz_and_flags_are_one_test_that_says_not_supported(argsz: int, flags: int) -> None:
    with Program(dialect=V6) as program:
        asked = argument(State.STOP, argsz, flags)
        assert program.ioctl(SET_STATE, asked) == (errno.EOPNOTSUPP, asked)
        assert program.state() is State.RUNNING


@pytest.mark.parametrize("argsz", [16, 17, 24, 4096, 0xFFFF_FFFF])
def test_a_larger_argsz_is_accepted_and_the_rest_stays_as_it_is(argsz: int) -> None:
    with Program(dialect=V6) as program:
        rest = b"\xaa" * 16
        answer = program.ioctl(SET_STATE, argument(State.STOP, argsz) + rest)
        assert answer == (0, argument(State.STOP, argsz, fd=-1) + rest)


def test_a_success_without_a_session_says_minus_one() -> None:
    with Program(dialect=V6) as program:
        assert program.set_state(State.STOP) == (0, State.STOP, -1)
        assert program.set_state(State.STOP) == (0, State.STOP, -1)


def test_a_success_with_a_session_says_its_descriptor() -> None:
    with Program(dialect=V6) as program:
        reply = program.set_state(State.STOP_COPY)
        assert reply == (0, State.STOP_COPY, 10)
        assert program.read_all(10) == b"the state"
        assert program.set_state(State.STOP_COPY) == (0, State.STOP_COPY, -1)


@pytest.mark.parametrize("requested", [0, 5, 6, 7, 8, 0xFFFF_FFFF])
@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_a_target_that_v6_does_not_have_is_refused_and_the_state_told(
    caps: Capability, requested: int
) -> None:
    with Program(Scripted(caps), V6) as program:
        fd = program.go(State.STOP_COPY)
        assert program.set_state(requested) == (errno.EINVAL, State.STOP_COPY, -1)
        assert program.read_all(fd) == b"the state"


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_running_and_stop_are_one_arc_apart_whatever_the_device_could_do(caps: Capability) -> None:
    device = Scripted(caps)
    arcs: list[str] = []
    with Program(device, V6) as program:
        program.served.migration.observers.append(lambda event: arcs.append(str(event)))
        for state in (State.STOP, State.RUNNING, State.RESUMING):
            program.go(state)
        assert arcs == ["RUNNING -> STOP", "STOP -> RUNNING", "RUNNING -> STOP", "STOP -> RESUMING"]
    assert "quiesce" not in device.log


@pytest.mark.parametrize(
    ("driver", "caller"),
    [
        (errno.EOPNOTSUPP, errno.EINVAL),
        (errno.ENOTTY, errno.EINVAL),
        (errno.EFAULT, errno.EINVAL),
        (errno.EIO, errno.EIO),
        (errno.EBUSY, errno.EBUSY),
        (errno.ENODEV, errno.ENODEV),
        (errno.EMFILE, errno.EMFILE),
    ],
)
def test_errnos_that_only_the_core_may_say_become_einval(
    driver: int, caller: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = Scripted()
    with Program(device, V6) as program, caplog.at_level(logging.WARNING):
        device.fails["stop"] = refusal(driver)
        assert program.set_state(State.STOP) == (caller, State.RUNNING, -1)
    assert ("may not fail with" in caplog.text) is (driver != caller)


def test_a_failure_half_way_tells_the_state_in_between() -> None:
    device = Scripted()
    with Program(device, V6) as program:
        device.fails["save"] = refusal(errno.ENOSPC)
        assert program.set_state(State.STOP_COPY) == (errno.ENOSPC, State.STOP, -1)
        assert program.state() is State.STOP


def test_a_device_that_fails_without_a_final_state_shows_error() -> None:
    with Program(Controlled(None, errno.EBUSY, None), V6) as program:
        assert program.set_state(State.STOP) == (errno.EBUSY, State.ERROR, -1)


def test_a_device_that_leaves_the_final_state_unset_shows_error_even_in_success() -> None:
    with Program(Controlled(None, 0, None), V6) as program:
        assert program.set_state(State.STOP) == (0, State.ERROR, -1)


def test_a_session_before_the_target_is_reached_is_dropped() -> None:
    with Program(Controlled(State.STOP, 0, [b"too early"]), V6) as program:
        assert program.set_state(State.STOP_COPY) == (errno.EINVAL, State.STOP, -1)
        assert program.caller.table == {}


@pytest.mark.parametrize("failure", [0, errno.EIO])
def test_a_write_back_that_faults_hides_the_result(failure: int) -> None:
    device = Scripted()
    with Program(device, V6) as program, Pages("rw") as pages:
        if failure:
            device.fails["stop"] = refusal(failure)
        assert program.at(SET_STATE, pages.read_only(argument(State.STOP))) == errno.EFAULT
        assert program.state() is (State.RUNNING if failure else State.STOP)


@pytest.mark.parametrize("target", [State.STOP_COPY, State.RESUMING])
def test_emfile_writes_nothing_though_the_transition_has_happened(target: State) -> None:
    with Program(dialect=V6) as program:
        program.caller.full = True
        asked = argument(target)
        assert program.ioctl(SET_STATE, asked) == (errno.EMFILE, asked)
        assert program.state() is target
        # The same state gives no descriptor; leaving and entering again does.
        assert program.set_state(target) == (0, target, -1)
        program.caller.full = False
        program.go(State.STOP)
        assert program.go(target) == 10


def test_efault_gives_the_number_back_though_the_transition_has_happened() -> None:
    with Program(dialect=V6) as program, Pages("rw") as pages:
        assert program.at(SET_STATE, pages.read_only(argument(State.STOP_COPY))) == errno.EFAULT
        assert program.caller.table == {}
        assert program.state() is State.STOP_COPY
        program.go(State.STOP)
        assert program.read_all(program.go(State.STOP_COPY)) == b"the state"


@pytest.mark.parametrize("requested", [*map(int, State), 8, 0xFFFF_FFFF])
def test_from_error_every_target_is_refused_until_a_reset(requested: int) -> None:
    with Program(dialect=V6) as program:
        program.served.migration.fail()
        assert program.set_state(requested) == (errno.EINVAL, State.ERROR, -1)
        assert program.reset() == 0
        assert program.state() is State.RUNNING


@pytest.mark.parametrize("dialect", [LANDED, V6])
def test_0x3b79_on_the_device_is_a_request_of_v6_only(dialect: Dialect) -> None:
    with Program(dialect=dialect) as program:
        result = program.ioctl(0x3B79, argument(State.STOP)).errno
        assert result == (0 if dialect is V6 else errno.ENOTTY)


MIGRATION = vfio.VFIO_DEVICE_FEATURE_MIGRATION
QUERY = [
    (PROBE, 8, 0),
    (PROBE, 16, 0),
    (PROBE | GET, 8, 0),
    (PROBE | SET, 16, errno.EINVAL),
    (PROBE | GET | SET, 16, errno.EINVAL),
    (GET, 16, 0),
    (GET, 17, 0),
    (GET, 15, errno.EINVAL),
    (GET, 8, errno.EINVAL),
    (SET, 16, errno.EINVAL),
    (GET | SET, 16, errno.EINVAL),
    (0, 16, errno.EINVAL),
]


@pytest.mark.parametrize("dialect", [LANDED, V6])
@pytest.mark.parametrize(("flags", "argsz", "result"), QUERY)
def test_the_query_answers_each_combination_of_operations(
    dialect: Dialect, flags: int, argsz: int, result: int
) -> None:
    with Program(Scripted(ALL), dialect) as program:
        answer = program.feature(flags | MIGRATION, b"\xaa" * 16, argsz)
        assert answer.errno == result
        told = (1 if dialect is V6 else 7).to_bytes(8, "little")
        got = told if flags == GET and not result else b"\xaa" * 8
        assert answer.data == got + b"\xaa" * 8


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_v6_says_stop_copy_of_any_device(caps: Capability) -> None:
    with Program(Scripted(caps), V6) as program:
        assert program.feature(GET | MIGRATION, bytes(8)) == (0, (1).to_bytes(8, "little"))


def test_v6_knows_no_other_feature() -> None:
    with Program(Scripted(ALL), V6) as program:
        for index in (0, *range(2, 15), 0xFFFF):
            assert program.feature(PROBE | index).errno == errno.EINVAL, index


def test_v6_says_enotty_to_the_query_where_the_request_says_not_supported() -> None:
    with Program(Scripted(Capability(0)), V6) as program:
        assert program.feature(GET | MIGRATION, bytes(8)).errno == errno.ENOTTY
        assert program.feature(PROBE | MIGRATION).errno == errno.ENOTTY


def test_v6_needs_no_binding_and_allows_it() -> None:
    with Program(dialect=V6) as program:
        program.go(State.STOP)
        assert program.bind().errno == 0
        assert program.bind().errno == errno.EINVAL
        assert program.state() is State.STOP


def test_another_open_of_v6_does_not_stand_in_the_way_of_a_binding() -> None:
    with Program(dialect=V6) as program:
        other = program.served.open()
        assert program.bind(other).errno == 0
        assert program.bind().errno == errno.EINVAL
        other.release()
        assert program.bind().errno == 0
        assert program.state() is State.RUNNING
