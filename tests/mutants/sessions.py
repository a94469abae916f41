"""Sessions that live too long or too short, the last close, and two threads."""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING, Any

from devices.drilled import Drilled
from mutants.bench import (
    LENGTH,
    SAVING,
    SET_STATE,
    end,
    look,
    mutant,
    outcome,
    spoiled,
    waits_at_the_end,
)
from vfiomig import State, StateRejected
from vfiomig.core.migration import Migration, Outcome
from vfiomig.core.saving import SavingMigf
from vfiomig.fsm import PRE_COPY_GROUP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mutants.bench import Bench, Call, SetState
    from vfiomig import StateReader
    from vfiomig.abi.uapi import UapiStruct


# Sessions.


@mutant("SESSION-9", "sessions.the-wrong-direction-is-ebadf")
def a_saving_descriptor_takes_writes(bench: Bench) -> None:
    def write(call: Call, data_fd: int, data: memoryview) -> int:
        kind = bench.migration._migf.kind if bench.migration._migf else None
        return len(data) if kind is SAVING else call(data_fd, data)

    bench.writes.append(write)


@mutant("SESSION-11", "sessions.an-unknown-request-on-a-data-fd-is-enotty")
def a_data_fd_answers_einval(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        result = outcome(lambda: call(on, number, argument))
        return end(errno.EINVAL if on > 4 and result == errno.ENOTTY else result)

    bench.ioctl(tamper)


@mutant("SESSION-4", "sessions.a-saving-session-ends-with-its-states", others=2, deadline=3.0)
def an_aborted_session_reads_as_the_end(bench: Bench) -> None:
    def read(call: Call, data_fd: int, buffer: memoryview) -> int:
        try:
            return call(data_fd, buffer)
        except OSError as failure:
            if failure.errno != errno.ENODEV:
                raise
            return 0

    bench.reads.append(read)


@mutant("SESSION-4", "sessions.a-resuming-session-ends-with-its-state")
def writes_after_the_end_are_taken(bench: Bench) -> None:
    def write(call: Call, data_fd: int, data: memoryview) -> int:
        return len(data) if bench.migration._state is State.STOP else call(data_fd, data)

    bench.writes.append(write)


@mutant("SESSION-1", "sessions.an-old-data-fd-stays-dead")
def an_old_descriptor_reads_the_new_session(bench: Bench) -> None:
    def read(call: Call, data_fd: int, buffer: memoryview) -> int:
        current = bench.migration._migf
        table = bench.opened[-1].numbers._table
        newest = [n for n, thing in table.items() if thing is current and current.kind is SAVING]
        return call(newest[0] if newest else data_fd, buffer)

    bench.reads.append(read)


HUNG = threading.Event()


@mutant(
    "SESSION-4",
    "sessions.a-reader-wakes-when-its-session-ends",
    deadline=3.0,
    release=HUNG.set,
)
def a_blocked_reader_is_not_woken(bench: Bench) -> None:
    """A read at the end waits for more, and the end of the session leaves it there."""
    bench.reads.append(waits_at_the_end(HUNG))


@mutant("SESSION-5", "sessions.closing-a-data-fd-changes-no-state", others=1)
def closing_a_descriptor_ends_the_session(bench: Bench) -> None:
    def close(call: Callable[..., None], number: int) -> None:
        call(number)
        if number > 4 and bench.migration._state is State.STOP_COPY:
            bench.migration.set_state(State.STOP)

    bench.closes.append(close)


@mutant("SESSION-1", "sessions.a-second-session-is-as-good-as-the-first", others=3)
def a_state_is_delivered_once(bench: Bench) -> None:
    class Once(Drilled):
        delivered = False

        def save(self) -> Iterator[bytes]:
            if not self.delivered:
                yield from super().save()
                self.delivered = True

        def reset(self) -> None:
            super().reset()
            self.delivered = False

    bench.device = Once


@mutant("SESSION-1", "sessions.a-second-session-is-as-good-as-the-first")
def a_state_is_taken_once(bench: Bench) -> None:
    class Once(Drilled):
        taken = False

        def load(self, state: StateReader) -> None:
            if self.taken:
                raise StateRejected("one is enough")
            super().load(state)
            self.taken = True

        def reset(self) -> None:
            super().reset()
            self.taken = False

    bench.device = Once


@mutant("SESSION-12", "sessions.where-a-read-ends-means-nothing")
def a_small_read_loses_the_rest_of_a_message(bench: Bench) -> None:
    original = SavingMigf._copy_locked

    def copy(mine: SavingMigf, transfer: Any, done: int) -> int:
        moved = original(mine, transfer, done)
        if moved == 64:
            mine._view = memoryview(b"")
        return moved

    bench.patch(SavingMigf, "_copy_locked", copy)


@mutant("SESSION-13", "sessions.where-a-read-ends-means-nothing")
def a_small_read_fails(bench: Bench) -> None:
    """But for the first one."""

    def read(call: Call, data_fd: int, buffer: memoryview) -> int:
        return end(errno.EIO) if len(buffer) == 7 else call(data_fd, buffer)

    bench.reads.append(read)


@mutant("SESSION-5", "sessions.a-closed-data-fd-does-not-come-back")
def a_closed_descriptor_is_given_again(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        found = original(mine, target)
        again = target == mine._state == State.STOP_COPY
        return found._replace(migf=mine._migf) if again else found

    bench.set_state(set_state)


# Saving.


@mutant("SAVE-3", "saving.no-end-in-stop-copy-is-temporary", others=6)
def the_permanent_end_is_enomsg(bench: Bench) -> None:
    def read(call: Call, data_fd: int, buffer: memoryview) -> int:
        count = call(data_fd, buffer)
        return count or end(errno.ENOMSG)

    bench.reads.append(read)


@mutant("SAVE-1", "saving.the-end-is-zero", others=1)
def the_end_is_told_once(bench: Bench) -> None:
    told: set[object] = set()

    def read(call: Call, data_fd: int, buffer: memoryview) -> int:
        count = call(data_fd, buffer)
        if not count and bench.migration._migf in told:
            return end(errno.ENODATA)
        if not count:
            told.add(bench.migration._migf)
        return count

    bench.reads.append(read)


@mutant("SAVE-1", "saving.one-byte-reads-reach-the-end-too")
def the_last_byte_alone_is_the_end(bench: Bench) -> None:
    def read(call: Call, data_fd: int, buffer: memoryview) -> int:
        count = call(data_fd, buffer)
        migf = bench.migration._migf
        last = migf is not None and migf.moved == LENGTH
        return 0 if last and len(buffer) == 1 else count

    bench.reads.append(read)


@mutant("STATE-3", "saving.a-stopped-device-does-not-change", others=1)
def a_stopped_device_goes_on_counting(bench: Bench) -> None:
    class Counting(Drilled):
        def save(self) -> Iterator[bytes]:
            self.bar0[100] = (self.bar0[100] + 1) % 256
            return super().save()

    bench.device = Counting


@mutant("LOAD-1", "saving.what-was-saved-can-be-loaded", others=1)
def its_own_state_is_foreign_after_a_reset(bench: Bench) -> None:
    class Proud(Drilled):
        def load(self, state: StateReader) -> None:
            raise StateRejected("not mine")

    bench.device = Proud


@mutant("STATE-4", "saving.what-was-loaded-is-saved-again")
def half_of_a_state_is_taken(bench: Bench) -> None:
    class Half(Drilled):
        def finish(self, state: StateReader, content: bytes | bytearray) -> None:
            super().finish(state, content[:2048] + bytes(2048))

    bench.device = Half


@mutant("SAVE-1", "saving.a-state-can-be-read-to-its-half-and-left", others=1)
def the_next_session_goes_on_where_the_last_was_left(bench: Bench) -> None:
    class Resumed(Drilled):
        left = b""

        def save(self) -> Iterator[bytes]:
            whole = self.left or b"".join(super().save())
            self.left = b""
            for at in range(0, len(whole), 64):
                self.left = whole[at + 64 :]
                yield whole[at : at + 64]

        def reset(self) -> None:
            super().reset()
            self.left = b""

    bench.device = Resumed


# The last close.


@mutant("CLOSE-2", "reopen.from-stop", others=8)
def a_state_survives_the_last_close(bench: Bench) -> None:
    """As the kernel's mtty does it: the sessions are gone, the state is not."""
    original, first = Migration.last_close, Migration.first_open
    states: list[State] = []

    def last_close(mine: Migration) -> None:
        states.append(mine._state)
        original(mine)

    def first_open(mine: Migration) -> int:
        result = first(mine)
        mine._state = states[-1] if states else State.RUNNING
        return result

    bench.patch(Migration, "last_close", last_close)
    bench.patch(Migration, "first_open", first_open)


@mutant("SESSION-7", "reopen.a-data-fd-outlives-its-device", others=1, deadline=3.0)
def a_session_survives_the_last_close(bench: Bench) -> None:
    original = Migration.last_close

    def last_close(mine: Migration) -> None:
        mine._migf = None
        original(mine)

    bench.patch(Migration, "last_close", last_close)


@mutant("CLOSE-2", "reopen.from-resuming")
def a_device_is_never_free_again(bench: Bench) -> None:
    """The open that follows a close in the middle of a session is refused, once."""
    busy: list[int] = []
    original, first = Migration.last_close, Migration.first_open

    def last_close(mine: Migration) -> None:
        if mine._migf is not None and mine._migf.moved:
            busy.append(1)
        original(mine)

    def first_open(mine: Migration) -> int:
        if busy:
            return errno.EBUSY
        return first(mine)

    bench.patch(Migration, "last_close", last_close)
    bench.patch(Migration, "first_open", first_open)


def survives(state: State) -> Callable[[Bench], None]:
    """One state that survives the last close; of RUNNING, what is left is STOP."""

    def body(bench: Bench) -> None:
        original, first = Migration.last_close, Migration.first_open
        left: list[State] = []

        def last_close(mine: Migration) -> None:
            left[:] = [mine._state]
            original(mine)

        def first_open(mine: Migration) -> int:
            result = first(mine)
            if left == [state]:
                mine._state = state if state is not State.RUNNING else State.STOP
            return result

        bench.patch(Migration, "last_close", last_close)
        bench.patch(Migration, "first_open", first_open)

    body.__name__ = f"{state.name}_survives_the_last_close".lower()
    return body


for _state, _others in (
    (State.RUNNING, 0),
    (State.STOP_COPY, 1),
    (State.RUNNING_P2P, 0),
    (State.PRE_COPY, 0),
    (State.PRE_COPY_P2P, 0),
):
    _check = f"reopen.from-{_state.name}".lower().replace("_", "-")
    mutant("CLOSE-2", _check, _others)(survives(_state))


@mutant("CLOSE-1", "reopen.after-a-reopen-a-whole-session-works")
def a_close_in_a_session_spoils_the_next_load(bench: Bench) -> None:
    sessions: list[int] = []
    original = Migration.last_close

    def last_close(mine: Migration) -> None:
        sessions[:] = [1] * (mine._migf is not None and mine._migf.kind is SAVING)
        original(mine)

    bench.patch(Migration, "last_close", last_close)
    bench.device = spoiled(sessions)


# Two threads.


class Slow(Drilled):
    """Each arc leaves time for another request to meet it."""

    def step(self, origin: State, target: State) -> None:
        super().step(origin, target)
        time.sleep(0.002)


@mutant("FAIL-1", "threads.a-query-sees-no-state-between")
def a_query_does_not_wait_for_the_walk(bench: Bench) -> None:
    bench.device = Slow
    bench.patch(Migration, "state", lambda mine, *blocks: mine._state)


@mutant("FAIL-1", "threads.two-changes-of-state-happen-one-after-the-other", others=1)
def a_request_beside_another_is_refused(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        if look(number, argument) == (16, SET_STATE) and bench.migration._state_lock.locked():
            return end(errno.EBUSY)
        return call(on, number, argument)

    bench.device = Slow
    bench.ioctl(tamper)


@mutant("RESET-6", "reset.a-reset-may-meet-a-change-of-state", others=2, deadline=3.0)
def a_reset_beside_a_request_forgets_the_session(bench: Bench) -> None:
    """RUNNING, and the session of the request that it met is alive."""
    original = Migration._reset_locked

    def reset_locked(mine: Migration) -> int:
        if mine._state is State.STOP_COPY:
            mine._migf = None
        return original(mine)

    bench.device = Slow
    bench.patch(Migration, "_reset_locked", reset_locked)


@mutant("SESSION-8", "threads.two-readers-share-one-stream", others=1)
def every_reader_has_a_position_of_its_own(bench: Bench) -> None:
    positions: dict[tuple[int, object], int] = {}
    streams: dict[object, bytes] = {}
    lock = threading.Lock()

    def read(call: Call, data_fd: int, buffer: memoryview) -> int:
        migf = bench.migration._migf
        if migf is None or migf.kind is not SAVING or bench.migration._state in PRE_COPY_GROUP:
            return call(data_fd, buffer)
        with lock:
            if migf not in streams:
                whole = bytearray(1 << 16)
                size = 0
                while count := call(data_fd, memoryview(whole)[size:]):
                    size += count
                streams[migf] = bytes(whole[:size])
        key = (threading.get_ident(), migf)
        at = positions.get(key, 0)
        piece = streams[migf][at : at + len(buffer)]
        buffer[: len(piece)] = piece
        positions[key] = at + len(piece)
        return len(piece)

    bench.reads.append(read)


CLOSED = threading.Event()


@mutant(
    "SESSION-4",
    "reopen.a-reader-wakes-at-the-last-close",
    others=1,
    deadline=3.0,
    release=CLOSED.set,
)
def the_last_close_leaves_a_reader_waiting(bench: Bench) -> None:
    bench.reads.append(waits_at_the_end(CLOSED))


HELD = threading.Event()


@mutant("SESSION-4", "threads.a-reader-does-not-hold-up-requests", deadline=3.0, release=HELD.set)
def a_reader_holds_the_lock_of_the_state(bench: Bench) -> None:
    lock = threading.Lock()
    waits = waits_at_the_end(HELD)

    def read(call: Call, data_fd: int, buffer: memoryview) -> int:
        if len(buffer) != 4096:
            return call(data_fd, buffer)
        with lock:
            return waits(call, data_fd, buffer)

    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        with lock:
            return call(on, number, argument)

    bench.reads.append(read)
    bench.ioctl(tamper)


@mutant("SESSION-5", "threads.a-session-can-be-closed-beside-a-change")
def a_close_beside_a_change_fails_it(bench: Bench) -> None:
    walking = threading.Event()
    closed: list[int] = []

    class Slow(Drilled):
        def step(self, origin: State, target: State) -> None:
            super().step(origin, target)
            walking.set()
            time.sleep(0.002)

    def close(call: Callable[..., None], number: int) -> None:
        if walking.wait(0.05):
            closed.append(number)
        call(number)

    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        closed.clear()
        found = original(mine, target)
        walking.clear()
        return found._replace(errno=errno.EBADF) if closed else found

    bench.device = Slow
    bench.closes.append(close)
    bench.set_state(set_state)
