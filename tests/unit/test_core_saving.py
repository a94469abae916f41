"""The saving session, read through its data_fd: docs/protocol.md, "sessions"."""

from __future__ import annotations

import errno
import logging
import threading
from random import Random
from typing import TYPE_CHECKING

import pytest

from in_process import (
    DEADLINE,
    Gate,
    Produces,
    Program,
    Scripted,
    failing,
    in_thread,
    refusal,
    wait_until,
    watched,
)
from vfiomig.core import transfer as core_transfer
from vfiomig.fsm import SessionKind, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfiomig.device import Buffer

ENODEV, ENOMSG = -errno.ENODEV, -errno.ENOMSG


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait only a moment for a hook that a test lets hang."""
    monkeypatch.setattr(core_transfer, "JOIN_SECONDS", 0.02)


def stop_copy(*buffers: Buffer) -> tuple[Program, int]:
    program = Program(Produces(lambda: buffers))  # type: ignore[arg-type, return-value]
    return program, program.go(State.STOP_COPY)


# In STOP_COPY.


def test_the_end_is_told_by_zero_and_stays() -> None:
    program, fd = stop_copy(b"abc", b"de")
    with program:
        assert program.caller.table[fd].kind is SessionKind.SAVING
        assert program.read(fd, 100) == b"abcde"
        assert [program.read(fd, 100) for _ in range(3)] == [b""] * 3


def test_a_read_takes_what_it_asks_for_across_buffers() -> None:
    program, fd = stop_copy(b"abc", b"", b"defg", b"", b"")
    with program:
        assert [program.read(fd, 2) for _ in range(5)] == [b"ab", b"cd", b"ef", b"g", b""]


def test_a_device_without_any_state_delivers_nothing() -> None:
    program, fd = stop_copy()
    with program:
        assert program.read(fd, 1) == b""


@pytest.mark.parametrize("buffer", [bytearray(b"xyz"), memoryview(b"xyz"), memoryview(b"axyz")[1:]])
def test_any_contiguous_buffer_will_do(buffer: Buffer) -> None:
    program, fd = stop_copy(buffer)
    with program:
        assert program.read_all(fd) == b"xyz"


def test_a_read_of_nothing_gives_nothing_and_waits_for_nothing() -> None:
    gate = Gate()
    with Program(Produces(gate, list)) as program:
        fd = program.go(State.PRE_COPY)
        assert program.read(fd, 0) == b""
        assert program.read(fd, 1) == ENOMSG
        assert program.read(fd, 0) == b""
        program.go(State.STOP_COPY)
        assert program.read(fd, 0) == b""
        assert not gate.reached
        program.go(State.STOP)
        assert program.read(fd, 0) == ENODEV


def test_nothing_runs_at_the_arc_but_the_making_of_the_stream() -> None:
    device = Scripted()
    with Program(device) as program:
        fd = program.go(State.STOP_COPY)
        assert device.log[-1] == "save"
        program.read(fd, 1)
        assert device.log[-1] == "produce"


def test_a_buffer_is_let_go_when_it_was_read_so_that_the_device_can_resize_it() -> None:
    state = bytearray(b"0123")

    def save() -> Iterator[Buffer]:
        yield state

    with Program(Produces(save)) as program:  # type: ignore[arg-type]
        fd = program.go(State.STOP_COPY)
        assert program.read(fd, 4) == b"0123"
        state.extend(b"4")
        program.go(State.STOP)
        fd = program.go(State.STOP_COPY)
        assert program.read(fd, 2) == b"01"
        program.go(State.STOP)
        state.extend(b"5")


# Faults and withdrawal.


def test_bytes_before_a_fault_count_and_the_rest_is_not_lost() -> None:
    program, fd = stop_copy(b"0123456789")
    with program:
        assert program.start_read(fd, 10, fault_at=4).data == b"0123"
        assert program.start_read(fd, 6, fault_at=0).wait() == -errno.EFAULT
        assert program.read(fd, 6) == b"456789"


def test_a_fault_in_the_second_buffer_counts_the_first() -> None:
    program, fd = stop_copy(b"01", b"234567", b"89")
    with program:
        assert program.start_read(fd, 10, fault_at=5).data == b"01234"
        assert program.start_read(fd, 9, fault_at=0).wait() == -errno.EFAULT
        assert program.read(fd, 9) == b"56789"


def test_a_waiting_read_can_be_taken_back_and_loses_nothing() -> None:
    gate = Gate(b"ab", then=b"cd")
    with Program(Produces(gate)) as program:
        fd = program.go(State.STOP_COPY)
        migf = program.caller.table[fd]
        first, second = program.start_read(fd, 10), program.start_read(fd, 10)
        gate.wait()
        assert migf.withdraw(second)
        assert second.wait() == -errno.EINTR
        assert migf.withdraw(first)
        assert first.data == b"ab"
        assert not migf.withdraw(first)
        third = program.start_read(fd, 10)
        gate.open()
        assert third.data == b"cd"


def test_an_error_is_kept_for_the_next_read_when_the_one_it_hit_was_taken_back() -> None:
    gate = Gate(then=refusal(errno.EXDEV))
    with Program(Produces(gate)) as program:
        fd = program.go(State.STOP_COPY)
        taken_back = program.start_read(fd, 1)
        gate.wait()
        assert program.caller.table[fd].withdraw(taken_back)
        gate.open()
        assert program.read(fd, 1) == -errno.EXDEV
        assert program.read(fd, 1) == ENODEV


# Errors of the author's code.


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINVAL, errno.ENOTCONN])
def test_an_error_is_the_errno_of_the_read_that_asked_and_ends_the_session(number: int) -> None:
    with Program(Produces(failing(refusal(number), b"abcd"))) as program:
        fd = program.go(State.STOP_COPY)
        assert program.read(fd, 4) == b"abcd"
        assert [program.read(fd, 4) for _ in range(3)] == [-number, ENODEV, ENODEV]
        assert program.state() is State.STOP_COPY
        program.go(State.STOP)


def test_an_error_behind_some_bytes_is_for_the_next_read() -> None:
    with Program(Produces(failing(refusal(errno.EIO), b"abcd"))) as program:
        fd = program.go(State.STOP_COPY)
        reads = [program.read(fd, 100) for _ in range(3)]
        assert reads == [b"abcd", -errno.EIO, ENODEV]


def test_pollers_learn_that_an_error_has_ended_the_session() -> None:
    with Program(Produces(failing(refusal(errno.EIO), b"abcd"))) as program:
        fd = program.go(State.STOP_COPY)
        seen = watched(program.caller.table[fd])
        assert program.read(fd, 100) == b"abcd"
        assert not program.caller.table[fd].dead
        assert program.read(fd, 100) == -errno.EIO
        wait_until(lambda: seen and seen[-1][1])


@pytest.mark.parametrize("number", [0, -5, 512, 4096, 1 << 40])
def test_a_number_that_is_no_errno_becomes_eio(number: int) -> None:
    with Program(Produces(failing(refusal(number)))) as program:
        assert program.read(program.go(State.STOP_COPY), 1) == -errno.EIO


@pytest.mark.parametrize("bug", [ZeroDivisionError, OSError, SystemExit, StopAsyncIteration])
def test_a_bug_is_logged_answers_eio_and_leads_to_error(
    bug: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    with Program(Produces(failing(bug(), b"a"))) as program:
        fd = program.go(State.STOP_COPY)
        assert program.read(fd, 1) == b"a"
        assert program.read(fd, 1) == -errno.EIO
        wait_until(lambda: program.state() is State.ERROR)
        assert program.read(fd, 1) == ENODEV
        assert "save() raised; the device goes to ERROR" in caplog.text
        assert program.reset() == 0
        assert program.state() is State.RUNNING


@pytest.mark.parametrize("wrong", [[1.5], ["text"], [None], 7, None])
def test_a_stream_of_anything_but_bytes_is_a_bug(wrong: object) -> None:
    with Program(Produces(lambda: wrong)) as program:  # type: ignore[arg-type, return-value]
        reply = program.set_state(State.STOP_COPY)
        if reply.errno:
            assert reply.errno == errno.EIO
        else:
            assert program.read(reply.fd, 1) == -errno.EIO
        wait_until(lambda: program.state() is State.ERROR)


def test_a_fatal_refusal_is_the_reads_errno_and_leads_to_error() -> None:
    with Program(Produces(failing(refusal(errno.ENXIO, fatal=True)))) as program:
        assert program.read(program.go(State.STOP_COPY), 1) == -errno.ENXIO
        wait_until(lambda: program.state() is State.ERROR)


def test_without_a_thread_for_the_session_a_read_is_eagain_and_may_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    device = Scripted(early=[b"early"])
    with Program(device) as program:
        saving = program.go(State.PRE_COPY)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            assert program.read(saving, 1) == -errno.EAGAIN
            assert program.info(saving)[0] == errno.EAGAIN
        assert program.read(saving, 5) == b"early"
        resuming = program.go(State.RESUMING)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            assert program.write(resuming, b"x") == -errno.EAGAIN
            assert program.set_state(State.STOP).errno == errno.EAGAIN
        assert program.state() is State.RESUMING
        program.go(State.STOP)
        assert device.loaded == [b""]


# The temporary end.


def test_the_temporary_end_is_enomsg_and_more_may_come() -> None:
    more: list[bytes] = [b"first"]

    def precopy() -> Iterator[bytes]:
        while True:
            yield more.pop() if more else b""

    with Program(Produces(lambda: [b"rest"], precopy)) as program:
        fd = program.go(State.PRE_COPY)
        assert program.read(fd, 5) == b"first"
        assert [program.read(fd, 5) for _ in range(2)] == [ENOMSG] * 2
        more.append(b"second")
        assert program.read(fd, 6) == b"second"
        program.go(State.PRE_COPY_P2P)
        assert program.read(fd, 5) == ENOMSG
        program.go(State.STOP_COPY)
        assert program.read_all(fd) == b"rest"


def test_a_short_read_is_followed_by_one_enomsg_without_asking_again() -> None:
    asked: list[int] = []

    def precopy() -> Iterator[bytes]:
        while True:
            asked.append(1)
            yield b"abc" if len(asked) in {1, 3} else b""

    with Program(Produces(precopy=precopy)) as program:
        fd = program.go(State.PRE_COPY)
        assert program.read(fd, 10) == b"abc"
        assert len(asked) == 2
        assert program.read(fd, 10) == ENOMSG
        assert len(asked) == 2
        assert program.read(fd, 10) == b"abc"


def test_a_precopy_that_has_ended_stays_at_the_temporary_end() -> None:
    with Program(Produces(lambda: [b"rest"], lambda: [b"early"])) as program:
        fd = program.go(State.PRE_COPY)
        assert [program.read(fd, 5) for _ in range(3)] == [b"early", ENOMSG, ENOMSG]
        program.go(State.STOP_COPY)
        assert program.read_all(fd) == b"rest"


def test_stop_copy_continues_with_what_was_left_unread_then_the_rest() -> None:
    with Program(Produces(lambda: [b"rest"], lambda: [b"early", b" later "])) as program:
        fd = program.go(State.PRE_COPY)
        assert program.read(fd, 2) == b"ea"
        program.go(State.STOP_COPY)
        assert program.read_all(fd) == b"rly later rest"
        assert program.read(fd, 1) == b""


def test_enomsg_never_appears_in_stop_copy_after_a_short_read() -> None:
    with Program(Produces(lambda: [b"rest"], lambda: [b"early"])) as program:
        fd = program.go(State.PRE_COPY)
        assert program.read(fd, 100) == b"early"
        program.go(State.STOP_COPY)
        assert [program.read(fd, 100) for _ in range(2)] == [b"rest", b""]


def test_a_read_that_waits_in_precopy_goes_on_into_stop_copy() -> None:
    gate = Gate(then=b"")
    with Program(Produces(lambda: [b"rest"], gate)) as program:
        fd = program.go(State.PRE_COPY)
        reader = program.start_read(fd, 4)
        gate.wait()
        program.go(State.STOP_COPY)
        gate.open()
        assert reader.data == b"rest"
        assert program.read(fd, 1) == b""


def test_a_read_at_the_temporary_end_when_stop_copy_comes_never_ends_the_session() -> None:
    for _ in range(30):
        ended = threading.Event()

        def precopy(ended: threading.Event = ended) -> Iterator[bytes]:
            while not ended.is_set():
                yield b""

        with Program(Produces(lambda: [b"rest"], precopy)) as program:
            fd = program.go(State.PRE_COPY)
            got: list[bytes | int] = []

            def reads(program: Program = program, fd: int = fd, got: list[object] = got) -> None:  # type: ignore[assignment]
                while (result := program.read(fd, 10)) == ENOMSG:
                    pass
                got.append(result)

            reader = in_thread(reads)
            program.go(State.STOP_COPY)
            ended.set()
            reader.join(DEADLINE)
            assert got == [b"rest"]


# The end of a session.

LEAVING: list[tuple[str, Callable[[Program], object]]] = [
    ("leaving", lambda program: program.go(State.STOP)),
    ("reset", lambda program: program.reset()),
    ("last close", lambda program: program.file.release()),
    ("error", lambda program: program.served.migration.fail()),
]


@pytest.mark.parametrize("leave", [pytest.param(way, id=name) for name, way in LEAVING])
def test_an_old_descriptor_answers_enodev_for_ever(leave: Callable[[Program], object]) -> None:
    program, fd = stop_copy(b"abc", b"def")
    with program:
        assert program.read(fd, 1) == b"a"
        leave(program)
        assert [program.read(fd, size) for size in (1, 100, 0)] == [ENODEV] * 3
        assert program.caller.table[fd].dead


@pytest.mark.parametrize("leave", [pytest.param(way, id=name) for name, way in LEAVING])
@pytest.mark.usefixtures("short_patience")
def test_blocked_readers_wake_at_once_while_the_hook_still_hangs(
    leave: Callable[[Program], object],
) -> None:
    gate = Gate(b"a", then=b"b")
    with Program(Produces(gate)) as program:
        fd = program.go(State.STOP_COPY)
        readers = [program.start_read(fd, 10), program.start_read(fd, 1), program.start_read(fd, 5)]
        gate.wait()
        leave(program)
        assert [reader.wait() for reader in readers] == [ENODEV] * 3
        assert not gate.closed
        gate.open()
        wait_until(lambda: gate.closed)
        assert [reader.answers for reader in readers] == [[ENODEV]] * 3


def test_a_hook_that_hangs_in_precopy_does_not_stand_in_the_way_of_a_transition() -> None:
    gate = Gate(then=b"x")
    with Program(Produces(precopy=gate)) as program:
        fd = program.go(State.PRE_COPY)
        reader = program.start_read(fd, 10)
        gate.wait()
        program.go(State.RUNNING)
        assert reader.wait() == ENODEV
        gate.open()


@pytest.mark.usefixtures("short_patience")
def test_a_bug_in_the_code_of_an_old_session_is_logged_and_harms_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate(then=ZeroDivisionError())
    with Program(Produces(gate)) as program:
        fd = program.go(State.STOP_COPY)
        program.start_read(fd, 1)
        gate.wait()
        assert program.reset() == 0
        gate.open()
        program.caller.table[fd].join()
        wait_until(lambda: "its session is over already" in caplog.text)
        assert program.state() is State.RUNNING


def test_a_generator_is_closed_in_its_own_thread_when_its_session_ends() -> None:
    threads: list[str] = []

    def save() -> Iterator[bytes]:
        try:
            yield b"abc"
            yield b"def"
        finally:
            threads.append(threading.current_thread().name)

    with Program(Produces(save)) as program:
        fd = program.go(State.STOP_COPY)
        program.read(fd, 1)
        program.go(State.STOP)
        program.caller.table[fd].join()
        assert threads == ["vfiomig-vfio0-saving"]


def test_a_precopy_that_is_left_behind_for_the_rest_is_closed_without_a_deadlock() -> None:
    device = Produces(lambda: [b"rest"])

    def precopy() -> Iterator[bytes]:
        try:
            while True:
                yield b""
        finally:
            device.data_ready()  # takes the session's lock

    device._precopy = precopy
    with Program(device) as program:
        fd = program.go(State.PRE_COPY)
        assert program.read(fd, 1) == ENOMSG
        program.go(State.STOP_COPY)
        assert program.read_all(fd) == b"rest"


def test_a_new_session_has_a_descriptor_of_its_own_and_starts_anew() -> None:
    program, first = stop_copy(b"abcdef")
    with program:
        assert program.read(first, 3) == b"abc"
        program.go(State.STOP)
        second = program.go(State.STOP_COPY)
        assert second != first
        assert program.read(first, 1) == ENODEV
        assert program.read_all(second) == b"abcdef"


def test_a_session_that_nobody_reads_ends_without_ever_running() -> None:
    gate = Gate()
    with Program(Produces(gate)) as program:
        before = threading.active_count()
        program.go(State.STOP_COPY)
        program.go(State.RUNNING)
        assert threading.active_count() == before
        assert not gate.reached


# Several readers.


def test_concurrent_readers_share_one_stream_with_one_position() -> None:
    data = Random(1).randbytes(16384)
    pieces = [data[at : at + 700] for at in range(0, len(data), 700)]
    program, fd = stop_copy(*pieces)
    with program:
        taken: list[bytes] = []

        def reads(size: int) -> None:
            while (chunk := program.read(fd, size)) != b"":
                assert isinstance(chunk, bytes)
                taken.append(chunk)

        threads = [in_thread(lambda size=size: reads(size)) for size in (64, 333, 1024, 5000)]  # type: ignore[misc]
        for thread in threads:
            thread.join(DEADLINE)
        # Each piece is there once and in one piece, and together they are everything.
        places = sorted((data.index(chunk), len(chunk)) for chunk in taken)
        reached = [0, *(at + length for at, length in places)]
        assert reached == [*(at for at, _ in places), len(data)]


# Poll.


def test_a_saving_descriptor_is_readable_but_at_the_temporary_end() -> None:
    more: list[bytes] = [b"early"]

    def precopy() -> Iterator[bytes]:
        while True:
            yield more.pop() if more else b""

    device = Produces(lambda: [b"rest"], precopy)
    with Program(device) as program:
        fd = program.go(State.PRE_COPY)
        migf, seen = program.caller.table[fd], watched(program.caller.table[fd])
        assert migf.ready
        program.read(fd, 5)
        assert migf.ready  # nobody knows yet that there is no more
        assert program.read(fd, 5) == ENOMSG
        wait_until(lambda: seen and seen[-1] == (False, False))
        more.append(b"again")
        device.data_ready()
        assert seen[-1] == (True, False)
        assert migf.ready
        assert program.read(fd, 100) == b"again"
        wait_until(lambda: not migf.ready)
        program.go(State.STOP_COPY)
        assert seen[-1] == (True, False)
        assert program.read_all(fd) == b"rest"
        assert migf.ready  # the permanent end reads as 0
        program.go(State.STOP)
        assert seen[-1][1]


def test_the_info_request_finds_new_data_for_pollers_too() -> None:
    more: list[bytes] = []

    def precopy() -> Iterator[bytes]:
        while True:
            yield more.pop() if more else b""

    with Program(Produces(precopy=precopy)) as program:
        fd = program.go(State.PRE_COPY)
        migf = program.caller.table[fd]
        assert program.read(fd, 1) == ENOMSG
        wait_until(lambda: not migf.ready)
        more.append(b"new")
        assert program.info(fd)[0] == 0
        assert migf.ready


def test_data_ready_without_a_session_is_nothing() -> None:
    device = Scripted()
    device.data_ready()
    with Program(device) as program:
        device.data_ready()
        program.go(State.RESUMING)
        device.data_ready()


def test_the_thread_of_a_session_says_what_it_is_for(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    caplog.set_level(logging.DEBUG)
    with Program(Produces(gate)) as program:
        fd = program.go(State.STOP_COPY)
        program.start_read(fd, 1)
        gate.wait()
        assert "vfiomig-vfio0-saving" in [thread.name for thread in threading.enumerate()]
        gate.open()
