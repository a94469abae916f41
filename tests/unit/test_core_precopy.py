"""VFIO_MIG_GET_PRECOPY_INFO and its version 2: docs/protocol.md, "pre-copy"."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from in_process import (
    DEADLINE,
    PROBE,
    SET,
    V6,
    Gate,
    Pages,
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
from vfiomig.device import PrecopyInfo
from vfiomig.fsm import LEGAL_SETS, Capability, State

if TYPE_CHECKING:
    from collections.abc import Iterator

OPT_IN = SET | vfio.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2
REINIT = vfio.VFIO_PRECOPY_INFO_REINIT
UNTOUCHED = (11, 22)


def in_precopy(device: Scripted, state: State = State.PRE_COPY) -> tuple[Program, int]:
    program = Program(device)
    return program, program.go(state)


# The order of checks.


def test_any_other_request_of_a_data_fd_is_enotty_before_anything_is_read() -> None:
    program, fd = in_precopy(Scripted())
    with program:
        for number in (0, 0x3B6F, 0x3B75, 0x3B7A, 0x5401):
            assert program.info_at(fd, 0, number) == errno.ENOTTY


def test_a_resuming_descriptor_knows_no_request() -> None:
    with Program() as program:
        fd = program.go(State.RESUMING)
        assert program.info_at(fd, 0) == errno.ENOTTY


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_a_device_without_precopy_knows_no_request(caps: Capability) -> None:
    with Program(Scripted(caps)) as program:
        fd = program.go(State.STOP_COPY)
        wanted = errno.EFAULT if Capability.PRE_COPY in caps else errno.ENOTTY
        assert program.info_at(fd, 0) == wanted


def test_v6_knows_no_request_of_a_data_fd() -> None:
    with Program(Scripted(), V6) as program:
        assert program.info_at(program.go(State.STOP_COPY), 0) == errno.ENOTTY


def test_an_argument_that_cannot_be_read_is_a_fault_before_argsz() -> None:
    program, fd = in_precopy(Scripted())
    with program, Pages("rw", "") as pages:
        assert program.info_at(fd, pages.page(1) - 23) == errno.EFAULT
        program.go(State.RUNNING)
        assert program.info_at(fd, pages.page(1) - 23) == errno.EFAULT


@pytest.mark.parametrize("argsz", [0, 8, 16, 23])
def test_argsz_comes_before_the_state(argsz: int) -> None:
    program, fd = in_precopy(Scripted())
    with program:
        assert program.info(fd, argsz=argsz) == (errno.EINVAL, 0, *UNTOUCHED)


@pytest.mark.parametrize("argsz", [24, 25, 4096])
def test_a_larger_argsz_is_accepted(argsz: int) -> None:
    program, fd = in_precopy(Scripted(early=[b"12345"]))
    with program:
        assert program.info(fd, argsz=argsz) == (0, 0, 5, 0)


@pytest.mark.parametrize("elsewhere", [State.RUNNING, State.STOP_COPY, State.STOP, State.RESUMING])
def test_the_state_comes_before_the_descriptors_own_life(elsewhere: State) -> None:
    program, fd = in_precopy(Scripted())
    with program:
        program.go(elsewhere)
        assert program.info(fd) == (errno.EINVAL, 0, *UNTOUCHED)


def test_an_old_descriptor_is_einval_at_first_and_enodev_in_a_later_precopy() -> None:
    program, old = in_precopy(Scripted(early=[b"12345"]))
    with program:
        program.go(State.RUNNING)
        assert program.info(old)[0] == errno.EINVAL
        new = program.go(State.PRE_COPY)
        assert program.info(old) == (errno.ENODEV, 0, *UNTOUCHED)
        assert program.info(new) == (0, 0, 5, 0)


@pytest.mark.parametrize("state", [State.PRE_COPY, State.PRE_COPY_P2P])
def test_the_devices_errno_is_the_callers(state: State) -> None:
    device = Scripted()
    program, fd = in_precopy(device, state)
    with program:
        device.fails["precopy_info"] = refusal(errno.ENOTCONN)
        assert program.info(fd) == (errno.ENOTCONN, 0, *UNTOUCHED)
        assert program.state() is state


def test_an_answer_that_cannot_be_written_is_a_fault() -> None:
    program, fd = in_precopy(Scripted())
    with program, Pages("rw") as pages:
        argument = pages.read_only(bytes(vfio.PrecopyInfo(argsz=24)))
        assert program.info_at(fd, argument) == errno.EFAULT


@pytest.mark.parametrize("answer", [7, (1,), ("a", "b"), (1, 2, 3, 4)])
def test_an_answer_that_means_nothing_is_a_bug_of_the_device(answer: object) -> None:
    device = Scripted()
    program, fd = in_precopy(device)
    with program:
        device.info = answer  # type: ignore[assignment]
        assert program.info(fd)[0] == errno.EIO
        assert program.state() is State.ERROR


# The numbers.


def test_the_flags_are_an_echo_without_the_opt_in() -> None:
    device = Scripted()
    device.info = PrecopyInfo(1, 2, reinit=True)
    program, fd = in_precopy(device)
    with program:
        for flags in (0, 1, 0xFFFF_FFFF):
            assert program.info(fd, flags)[:2] == (0, flags)


def test_without_an_estimate_the_next_buffer_is_what_is_told() -> None:
    more = [b"second", b"", b"the first"]

    def precopy() -> Iterator[bytes]:
        while more:
            yield more.pop()

    program, fd = in_precopy(Produces(precopy=precopy))
    with program:
        assert program.info(fd) == (0, 0, 9, 0)
        assert program.read(fd, 4) == b"the "
        assert program.info(fd) == (0, 0, 5, 0)
        assert program.read(fd, 5) == b"first"
        assert program.info(fd) == (0, 0, 0, 0)  # the temporary end
        assert program.info(fd) == (0, 0, 0, 6)  # asked again: what came later is dirty
        assert program.read(fd, 6) == b"second"
        assert program.info(fd) == (0, 0, 0, 0)


def test_an_estimate_is_added_to_what_is_at_hand() -> None:
    device = Scripted(early=[b"0123456789"])
    device.info = (100, 7)
    program, fd = in_precopy(device)
    with program:
        assert program.info(fd) == (0, 0, 100, 7)
        program.read(fd, 4)
        device.info = (90, 7)
        assert program.info(fd) == (0, 0, 96, 7)


def test_without_the_opt_in_initial_bytes_never_rises_again() -> None:
    device = Scripted()
    program, fd = in_precopy(device)
    with program:
        told = []
        for answer in ((50, 0), (60, 5), PrecopyInfo(100, 0, reinit=True), (20, 1), (30, 0)):
            device.info = answer
            told.append(program.info(fd)[2:])
        assert told == [(50, 0), (50, 15), (50, 50), (20, 1), (20, 10)]


def test_with_the_opt_in_a_reinit_is_told_and_the_numbers_start_anew() -> None:
    device = Scripted()
    program, fd = in_precopy(device)
    with program:
        assert program.feature(OPT_IN).errno == 0
        assert program.feature(OPT_IN).errno == 0
        told = []
        for answer in ((50, 0), (60, 5), PrecopyInfo(100, 0, reinit=True), (90, 1), (95, 0)):
            device.info = answer
            told.append(program.info(fd, flags=0xFF)[1:])
        assert told == [(0, 50, 0), (0, 50, 15), (REINIT, 100, 0), (0, 90, 1), (0, 90, 5)]


def test_bytes_that_are_unread_at_a_reinit_are_initial_again() -> None:
    device = Produces(precopy=lambda: iter([b"first", b"", b"later", b"", b""]))
    program, fd = in_precopy(device)
    with program:
        program.feature(OPT_IN)
        assert program.read(fd, 9) == b"first"
        assert program.read(fd, 2) == -errno.ENOMSG
        assert program.read(fd, 2) == b"la"
        device.info = PrecopyInfo(10, 0, reinit=False)
        assert program.info(fd)[2:] == (10, 3)
        device.info = PrecopyInfo(40, 0, reinit=True)
        assert program.info(fd)[1:] == (REINIT, 43, 0)


def test_numbers_are_fitted_into_64_bits() -> None:
    device = Scripted()
    program, fd = in_precopy(device)
    with program:
        device.info = (-3, 1 << 70)
        assert program.info(fd)[2:] == (0, (1 << 64) - 1)


def test_both_zero_is_the_temporary_end() -> None:
    program, fd = in_precopy(Scripted(early=[b"abc"]))
    with program:
        assert program.info(fd)[2:] == (3, 0)
        assert program.read(fd, 3) == b"abc"
        assert program.info(fd)[2:] == (0, 0)
        assert program.read(fd, 3) == -errno.ENOMSG


def test_an_error_that_the_query_ran_into_is_kept_for_the_next_read() -> None:
    program, fd = in_precopy(Produces(precopy=failing(refusal(errno.EXDEV))))
    with program:
        assert program.info(fd) == (0, 0, 0, 0)
        assert program.read(fd, 1) == -errno.EXDEV
        assert program.read(fd, 1) == -errno.ENODEV
        assert program.info(fd)[0] == errno.ENODEV


# The opt-in.


def test_the_opt_in_holds_over_states_and_resets_up_to_the_last_close() -> None:
    device = Scripted()
    device.info = PrecopyInfo(1, 0, reinit=True)
    with Program(device) as program:
        program.feature(OPT_IN)
        program.reset()
        program.go(State.STOP)
        fd = program.go(State.PRE_COPY)
        assert program.info(fd, flags=6)[1] == REINIT
        program.reopen()
        fd = program.go(State.PRE_COPY)
        assert program.info(fd, flags=6)[1] == 6


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_the_opt_in_is_einval_without_precopy_and_to_a_probe_as_well(caps: Capability) -> None:
    with Program(Scripted(caps)) as program:
        wanted = 0 if Capability.PRE_COPY in caps else errno.EINVAL
        assert program.feature(PROBE | OPT_IN).errno == wanted
        assert program.feature(OPT_IN).errno == wanted


# The query and everything else.


def test_the_query_does_not_hold_up_a_transition_when_the_device_hangs() -> None:
    gate = Gate(then=b"late")
    program, fd = in_precopy(Produces(precopy=gate))
    with program:
        answers: list[int] = []
        query = in_thread(lambda: answers.append(program.info(fd)[0]))
        gate.wait()
        program.go(State.RUNNING)
        query.join(DEADLINE)
        assert answers == [errno.EINVAL]  # the state comes first
        gate.open()


def test_the_query_waits_its_turn_behind_a_blocked_reader() -> None:
    gate = Gate(then=b"0123456789")
    program, fd = in_precopy(Produces(precopy=gate))
    with program:
        reader = program.start_read(fd, 4)
        gate.wait()
        told: list[tuple[int, int, int, int]] = []
        query = in_thread(lambda: told.append(program.info(fd)))
        gate.open()
        query.join(DEADLINE)
        assert reader.data == b"0123"
        assert told == [(0, 0, 6, 0)]


def test_a_reset_while_the_query_waits_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_transfer, "JOIN_SECONDS", 0.02)
    gate = Gate()
    program, fd = in_precopy(Produces(precopy=gate))
    with program:
        answers: list[int] = []
        query = in_thread(lambda: answers.append(program.info(fd)[0]))
        gate.wait()
        results: list[int] = []
        resetting = in_thread(lambda: results.append(program.reset()))
        query.join(DEADLINE)
        gate.open()
        resetting.join(DEADLINE)
        assert results == [0]
        assert answers[0] in {errno.EINVAL, errno.ENODEV}
        wait_until(lambda: program.state() is State.RUNNING)
