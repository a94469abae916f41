"""The resuming session, written through its data_fd: docs/protocol.md, "sessions", CHOICE-3."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import pytest

from in_process import DEADLINE, Loads, Program, Scripted, in_thread, refusal, wait_until, watched
from vfiomig.core import transfer as core_transfer
from vfiomig.errors import DeviceError, StateRejected
from vfiomig.fsm import SessionKind, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.device import StateReader

ENODEV, ENOMEM = -errno.ENODEV, -errno.ENOMEM


class Resuming(Program):
    """A program whose device is in RESUMING; ``fd`` is its data_fd."""

    def __init__(self, load: Callable[[StateReader], None] | None = None) -> None:
        self.device = Scripted() if load is None else Loads(load)
        super().__init__(self.device)
        self.fd = self.go(State.RESUMING)

    def send(self, data: bytes) -> int:
        return self.write(self.fd, data)


class Collector:
    """A ``load`` that reads in pieces of ``size`` and raises ``problem`` in the end."""

    def __init__(self, size: int, problem: BaseException | None = None, limit: int = -1) -> None:
        self.size = size
        self.problem = problem
        self.limit = limit
        self.pieces: list[bytes] = []

    def __call__(self, state: StateReader) -> None:
        while piece := state.read(self.size):
            self.pieces.append(piece)
            if len(self.pieces) == self.limit:
                break
            if len(piece) < self.size:
                break
        if self.problem is not None:
            raise self.problem


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait only a moment for a hook that a test lets hang."""
    monkeypatch.setattr(core_transfer, "JOIN_SECONDS", 0.02)


# The stream.


def test_what_is_written_is_loaded_and_the_verdict_is_the_arcs() -> None:
    with Resuming() as program:
        assert program.caller.table[program.fd].kind is SessionKind.RESUMING
        assert [program.send(data) for data in (b"abc", b"", b"defg")] == [3, 0, 4]
        assert program.device.loaded == []
        program.go(State.STOP)
        assert program.device.loaded == [b"abcdefg"]
        assert program.send(b"x") == ENODEV


def test_a_session_without_a_write_is_an_empty_stream() -> None:
    with Resuming() as program:
        program.go(State.STOP)
        assert program.device.loaded == [b""]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_the_reader_sees_no_boundaries_of_writes(size: int) -> None:
    load = Collector(size)
    with Resuming(load) as program:
        for data in (b"01", b"2345", b"6", b"789"):
            assert program.send(data) == len(data)
        program.go(State.RUNNING)
        assert b"".join(load.pieces) == b"0123456789"
        assert [len(piece) for piece in load.pieces[:-1]] == [size] * (len(load.pieces) - 1)


def test_readinto_fills_its_buffer_and_is_short_only_at_the_end() -> None:
    counts: list[int] = []
    target = bytearray(8)

    def load(state: StateReader) -> None:
        counts.append(state.readinto(target))
        counts.append(state.readinto(memoryview(target)[:4]))
        counts.append(state.readinto(bytearray()))

    with Resuming(load) as program:
        assert program.send(b"0123456789") == 10
        program.go(State.STOP)
        assert counts == [8, 2, 0]
        assert target == b"89234567"


def test_a_write_returns_when_the_device_has_taken_its_bytes() -> None:
    checked = threading.Event()
    proceed = threading.Event()

    def load(state: StateReader) -> None:
        state.read(4)
        checked.set()
        assert proceed.wait(DEADLINE)
        state.read(4)

    with Resuming(load) as program:
        write = program.start_write(program.fd, b"0123")
        assert checked.wait(DEADLINE)
        assert write.waiting
        proceed.set()
        assert write.wait() == 4
        program.go(State.STOP)


def test_concurrent_writers_are_put_in_a_row() -> None:
    load = Collector(1000)
    with Resuming(load) as program:
        blocks = [bytes([number]) * 500 for number in range(8)]
        threads = [in_thread(lambda block=block: program.send(block)) for block in blocks]  # type: ignore[misc]
        for thread in threads:
            thread.join(DEADLINE)
        program.go(State.STOP)
        stream = b"".join(load.pieces)
        assert sorted(stream[at : at + 500] for at in range(0, 4000, 500)) == blocks


# Faults and withdrawal.


def test_bytes_before_a_fault_count() -> None:
    with Resuming() as program:
        assert program.start_write(program.fd, b"0123456789", fault_at=4).wait() == 4
        assert program.start_write(program.fd, b"456789", fault_at=0).wait() == -errno.EFAULT
        assert program.send(b"456789") == 6
        program.go(State.STOP)
        assert program.device.loaded == [b"0123456789"]


def test_a_fault_where_the_reader_had_to_be_asked_counts_too() -> None:
    load = Collector(3)
    with Resuming(load) as program:
        assert program.start_write(program.fd, b"0123456789", fault_at=8).wait() == 8
        assert program.start_write(program.fd, b"89ab", fault_at=0).wait() == -errno.EFAULT
        assert program.send(b"89") == 2
        program.go(State.STOP)
        assert b"".join(load.pieces) == b"0123456789"


def test_a_waiting_write_can_be_taken_back_but_not_one_that_the_device_has() -> None:
    with Resuming() as program:
        program.device.holds["load"] = threading.Event()
        migf = program.caller.table[program.fd]
        first, second = (program.start_write(program.fd, data) for data in (b"01", b"23"))
        program.device.wait_for("load")
        assert migf.withdraw(second)
        assert second.wait() == -errno.EINTR
        program.device.holds["load"].set()
        assert first.wait() == 2
        assert not migf.withdraw(first)
        program.go(State.STOP)
        assert program.device.loaded == [b"01"]


# Refusals.


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC, errno.ENODEV, errno.EOPNOTSUPP])
def test_what_load_raises_is_the_errno_of_the_write_that_it_is_about(number: int) -> None:
    with Resuming(Collector(4, refusal(number), limit=2)) as program:
        assert program.send(b"0123") == 4
        assert program.send(b"4567") == -number
        assert program.send(b"89") == ENODEV
        assert program.send(b"") == ENODEV
        assert program.state() is State.RESUMING


def test_all_writes_that_wait_get_the_errno_of_the_refusal() -> None:
    with Resuming() as program:
        program.device.holds["load"] = threading.Event()
        program.device.fails["load"] = refusal(errno.EXDEV)
        writes = [program.start_write(program.fd, data) for data in (b"01", b"23")]
        program.device.wait_for("load")
        program.device.holds["load"].set()
        assert [write.wait() for write in writes] == [-errno.EXDEV] * 2


def test_a_failed_load_stays_failed_and_only_a_reset_helps() -> None:
    with Resuming(Collector(4, StateRejected("a foreign header"), limit=1)) as program:
        assert program.send(b"0123") == -errno.EINVAL
        for target in (State.STOP, State.RUNNING, State.STOP):
            assert program.set_state(target) == (errno.EINVAL, target, -1)
            assert program.state() is State.RESUMING
        assert program.set_state(State.RESUMING) == (0, State.RESUMING, -1)
        assert program.send(b"4567") == ENODEV
        assert program.reset() == 0
        assert program.state() is State.RUNNING


def test_a_refusal_at_the_end_is_the_arcs_errno_and_the_device_stays() -> None:
    with Resuming() as program:
        program.device.fails["loaded"] = StateRejected("it is short")
        assert program.send(b"half") == 4
        assert program.set_state(State.RUNNING) == (errno.EINVAL, State.RUNNING, -1)
        assert program.state() is State.RESUMING
        assert program.send(b"the rest") == ENODEV
        program.device.fails.clear()
        assert program.set_state(State.STOP).errno == errno.EINVAL
        assert program.reset() == 0
        assert program.state() is State.RUNNING


@pytest.mark.parametrize("number", [errno.EIO, errno.EPROTO, errno.ENOTTY])
def test_a_refusal_at_the_end_may_choose_its_errno(number: int) -> None:
    with Resuming() as program:
        program.device.fails["loaded"] = StateRejected("so", errno=number)
        assert program.set_state(State.STOP).errno == number


def test_a_fatal_refusal_at_the_end_leads_to_error() -> None:
    with Resuming() as program:
        program.device.fails["loaded"] = StateRejected("so", fatal=True)
        program.send(b"data")
        assert program.set_state(State.STOP).errno == errno.EINVAL
        assert program.state() is State.ERROR
        assert program.send(b"x") == ENODEV


def test_a_reset_after_a_fatal_refusal_is_not_undone_by_the_sessions_thread() -> None:
    for _ in range(50):
        with Resuming() as program:
            program.device.fails["loaded"] = StateRejected("so", fatal=True)
            program.send(b"data")
            assert program.set_state(State.STOP).errno == errno.EINVAL
            assert program.reset() == 0
            program.caller.table[program.fd].join()
            assert program.state() is State.RUNNING


@pytest.mark.parametrize(
    "problem", [refusal(errno.ENXIO, fatal=True), KeyError("a bug"), SystemExit()]
)
def test_a_fatal_refusal_or_a_bug_answers_the_write_before_it_leads_to_error(
    problem: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    with Resuming(Collector(4, problem, limit=1)) as program:
        wanted = errno.ENXIO if isinstance(problem, DeviceError) else errno.EIO
        assert program.send(b"0123") == -wanted
        wait_until(lambda: program.state() is State.ERROR)
        assert program.send(b"0123") == ENODEV
        assert ("load() raised" in caplog.text) is (wanted == errno.EIO)


def test_a_bug_at_the_end_is_eio_and_leads_to_error() -> None:
    with Resuming() as program:
        program.device.fails["loaded"] = ZeroDivisionError()
        assert program.set_state(State.STOP).errno == errno.EIO
        assert program.state() is State.ERROR


def test_a_buffer_that_cannot_be_written_is_the_loads_own_bug() -> None:
    with Resuming(lambda state: state.readinto(b"read only")) as program:  # type: ignore[arg-type]
        assert program.send(b"0123") == -errno.EIO
        wait_until(lambda: program.state() is State.ERROR)


# The end of the state, as the device sees it.


def test_bytes_past_the_end_of_the_state_are_refused_with_enomem() -> None:
    with Resuming(Collector(4, limit=1)) as program:
        assert program.send(b"0123") == 4
        wait_until(lambda: program.send(b"4") == ENOMEM)
        assert program.send(b"") == 0
        assert program.set_state(State.STOP).errno == 0


def test_a_write_across_the_end_of_the_state_is_short_and_the_next_one_enomem() -> None:
    with Resuming(Collector(4, limit=1)) as program:
        assert program.send(b"0123456") == 4
        assert program.send(b"456") == ENOMEM
        program.go(State.RUNNING)


def test_a_load_that_wants_nothing_refuses_the_first_byte() -> None:
    with Resuming(lambda state: None) as program:
        assert program.send(b"0") == ENOMEM
        program.go(State.STOP)


# The end of a session.

ENDS: list[tuple[str, Callable[[Program], object]]] = [
    ("reset", lambda program: program.reset()),
    ("last close", lambda program: program.file.release()),
    ("error", lambda program: program.served.migration.fail()),
]


@pytest.mark.parametrize("end", [pytest.param(way, id=name) for name, way in ENDS])
@pytest.mark.usefixtures("short_patience")
def test_blocked_writers_wake_at_once_while_the_hook_still_hangs(
    end: Callable[[Program], object],
) -> None:
    with Resuming() as program:
        hold = program.device.holds["load"] = threading.Event()
        writes = [program.start_write(program.fd, data) for data in (b"012", b"34")]
        program.device.wait_for("load")
        end(program)
        assert [write.wait() for write in writes] == [ENODEV] * 2
        assert [program.send(data) for data in (b"5", b"")] == [ENODEV] * 2
        hold.set()
        program.caller.table[program.fd].join()
        assert [write.answers for write in writes] == [[ENODEV]] * 2


def test_a_load_that_waits_for_bytes_learns_that_its_session_is_over() -> None:
    seen: list[BaseException] = []

    def load(state: StateReader) -> None:
        try:
            state.read(100)
        except DeviceError as over:
            seen.append(over)
            raise ValueError("what an author makes of it") from over

    with Resuming(load) as program:
        program.send(b"some")
        assert program.reset() == 0
        assert program.state() is State.RUNNING
        assert [getattr(problem, "errno", None) for problem in seen] == [errno.ENODEV]


def test_half_loaded_data_is_discarded_by_a_reset_and_the_next_load_starts_anew() -> None:
    with Resuming() as program:
        program.send(b"half")
        assert program.reset() == 0
        assert program.device.loaded == []
        fd = program.go(State.RESUMING)
        assert program.send(b"old") == ENODEV
        assert program.write(fd, b"whole") == 5
        program.go(State.RUNNING)
        assert program.device.loaded == [b"whole"]


def test_a_write_while_the_verdict_is_made_comes_too_late() -> None:
    with Resuming() as program:
        hold = program.device.holds["loaded"] = threading.Event()
        program.send(b"data")
        arc = in_thread(lambda: program.go(State.STOP))
        program.device.wait_for("loaded")
        assert program.send(b"late") == ENODEV
        hold.set()
        arc.join(DEADLINE)
        assert program.state() is State.STOP


def test_poll_finds_a_resuming_descriptor_writable_and_then_dead() -> None:
    with Resuming() as program:
        migf = program.caller.table[program.fd]
        seen = watched(migf)
        assert migf.ready
        assert not migf.dead
        program.go(State.STOP)
        assert seen[-1] == (True, True)
