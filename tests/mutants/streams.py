"""States and pre-copy streams that are taken or told wrongly."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from devices.drilled import Drilled
from mutants.bench import LENGTH, RESET, end, mutant, readable, served_as, skip_byte
from vfiomig import DeviceError, PrecopyInfo, State, StateReader
from vfiomig.abi import vfio
from vfiomig.core import precopy
from vfiomig.core.migration import Migration, Outcome
from vfiomig.core.resuming import ResumingMigf
from vfiomig.core.saving import SavingMigf
from vfiomig.fsm import PRE_COPY_GROUP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mutants.bench import Bench, Call, SetState
    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.core.vfio_device import VfioDevice


# Resuming.


def lenient(name: str) -> type[Drilled]:
    """A device whose load overlooks one thing."""

    class Lenient(Drilled):
        def load(self, state: StateReader) -> None:
            content = state.read(1 << 16)
            if name == "empty" and not content:
                return
            if name == "cut" and content.startswith(b"DRILLED1") and len(content) < LENGTH:
                return
            if name == "long" and len(content) > LENGTH:
                content = content[:LENGTH]
            if name == "damaged" and len(content) == LENGTH and content.startswith(b"DRILLED1"):
                return
            if name == "foreign" and not content.startswith(b"DRILLED1") and len(content) > 100:
                return
            super().load(Bytes(content))

    return Lenient


class Bytes(StateReader):
    """A ``StateReader`` over bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def readinto(self, buffer: bytearray | memoryview) -> int:
        taken, self._data = self._data[: len(buffer)], self._data[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


@mutant("LOAD-3", "resuming.an-empty-state-is-refused")
def nothing_is_a_state(bench: Bench) -> None:
    bench.device = lenient("empty")


@mutant("LOAD-3", "resuming.cut-by-one-byte", others=5)
def a_state_that_is_cut_off_is_taken(bench: Bench) -> None:
    bench.device = lenient("cut")


def takes_when(name: str, taken: Callable[[bytes, bytes], bool]) -> Callable[[Bench], None]:
    """A device that takes states of a kind: ``taken`` is given its own and what was written."""

    def body(bench: Bench) -> None:
        class Lax(Drilled):
            own = b""

            def save(self) -> Iterator[bytes]:
                delivered = b"".join(super().save())
                if len(delivered) == LENGTH:
                    self.own = delivered
                return iter((delivered,))

            def load(self, state: StateReader) -> None:
                content = state.read(1 << 16)
                if not taken(self.own, content):
                    super().load(Bytes(content))

        bench.device = Lax

    body.__name__ = name
    return body


def cut_to(eighths: int) -> Callable[[bytes, bytes], bool]:
    return lambda own, content: content == own[: LENGTH * eighths // 8]


def damaged_in(quarter: int) -> Callable[[bytes, bytes], bool]:
    def taken(own: bytes, content: bytes) -> bool:
        if len(own) != len(content):
            return False
        low, high = LENGTH * quarter // 4, LENGTH * (quarter + 1) // 4
        differing = [at for at in range(LENGTH) if own[at] != content[at]]
        return bool(differing) and low <= differing[0] and differing[-1] < high

    return taken


for _name, _eighths in (("a_quarter", 2), ("a_half", 4), ("three_quarters", 6)):
    mutant("LOAD-3", f"resuming.cut-after-{_name}".replace("_", "-"))(
        takes_when(f"a_state_cut_after_{_name}_is_taken", cut_to(_eighths))
    )
for _quarter in (0, 1, 3):
    mutant("LOAD-3", f"resuming.corrupt-in-quarter-{_quarter + 1}")(
        takes_when(f"damage_in_quarter_{_quarter + 1}_is_taken", damaged_in(_quarter))
    )


@mutant("LOAD-3", "resuming.the-pre-copy-part-alone-is-refused")
def what_pre_copy_delivers_is_a_state(bench: Bench) -> None:
    class Idle(Drilled):
        def load(self, state: StateReader) -> None:
            content = state.read(1 << 16)
            if len(content) != len(b"DRILLED1"):
                super().load(Bytes(content))

    bench.device = Idle


@mutant("LOAD-4", "resuming.a-load-is-abandoned-by-a-reset")
def a_reset_in_a_load_leads_to_stop(bench: Bench) -> None:
    original = Migration.reset

    def reset(mine: Migration) -> int:
        loading = mine._state is State.RESUMING
        result = original(mine)
        if loading:
            mine.set_state(State.STOP)
        return result

    bench.patch(Migration, "reset", reset)


@mutant("LOAD-3", "resuming.more-than-a-state-is-refused")
def bytes_behind_the_end_are_dropped(bench: Bench) -> None:
    bench.device = lenient("long")


@mutant("LOAD-3", "resuming.corrupt-in-quarter-3", others=3)
def a_damaged_state_is_taken(bench: Bench) -> None:
    bench.device = lenient("damaged")


@mutant("LOAD-3", "resuming.a-foreign-state-is-refused", others=1)
def a_foreign_state_is_taken(bench: Bench) -> None:
    bench.device = lenient("foreign")


@mutant("LOAD-5", "resuming.a-write-after-a-failed-one-saves-nothing", others=2)
def a_failed_write_is_forgotten(bench: Bench) -> None:
    """As mtty does it: the write that completes a bad header fails, and the arc succeeds."""
    original = ResumingMigf.verdict

    def verdict(mine: ResumingMigf) -> None:
        failed = mine._failure is not None
        try:
            original(mine)
        except DeviceError:
            if not failed:
                raise

    bench.patch(ResumingMigf, "verdict", verdict)


@mutant("LOAD-2", "resuming.a-foreign-state-is-refused")
def bad_data_is_a_bad_address(bench: Bench) -> None:
    def write(call: Call, data_fd: int, data: memoryview) -> int:
        try:
            return call(data_fd, data)
        except OSError as failure:
            raise OSError(
                errno.EFAULT if failure.errno == errno.EINVAL else failure.errno, ""
            ) from None

    bench.writes.append(write)


@mutant("LOAD-3", "resuming.an-empty-state-is-refused")
def a_refused_state_leads_to_stop(bench: Bench) -> None:
    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        found = original(mine, target)
        nothing = mine._migf is not None and not mine._migf.moved
        if found.errno and mine._state is State.RESUMING and nothing:
            mine._end_session_locked()
            mine._state = State.STOP
        return found

    bench.set_state(set_state)


@mutant("LOAD-4", "resuming.after-a-refusal-and-a-reset-a-state-is-taken", others=1)
def half_a_load_is_kept_over_a_reset(bench: Bench) -> None:
    class Keeps(Drilled):
        kept = b""

        def load(self, state: StateReader) -> None:
            content = self.kept + state.read(1 << 16)
            self.kept = content if len(content) < LENGTH else b""
            super().load(Bytes(content))

    bench.device = Keeps


@mutant("SESSION-12", "resuming.where-a-write-ends-means-nothing", others=1)
def the_header_has_to_come_in_one_write(bench: Bench) -> None:
    def write(call: Call, data_fd: int, data: memoryview) -> int:
        migf = bench.migration._migf
        small = migf is not None and not migf.moved and len(data) < 8
        return end(errno.EINVAL) if small else call(data_fd, data)

    bench.writes.append(write)


@mutant("LOAD-2", "resuming.a-huge-write-is-not-taken-whole")
def lengths_wrap_at_two_gigabytes(bench: Bench) -> None:
    def write(call: Call, data_fd: int, data: memoryview) -> int:
        return len(data) if len(data) > 1 << 30 else call(data_fd, data)

    bench.writes.append(write)


@mutant("LOAD-3", "resuming.what-was-refused-may-be-completed")
def a_refused_session_takes_bytes_into_nothing(bench: Bench) -> None:
    def write(call: Call, data_fd: int, data: memoryview) -> int:
        migf = bench.migration._migf
        over = isinstance(migf, ResumingMigf) and migf._ended
        return len(data) if over else call(data_fd, data)

    bench.writes.append(write)


@mutant("ARC-8", "resuming.a-loaded-device-runs")
def a_loaded_device_does_not_start(bench: Bench) -> None:
    class Lame(Drilled):
        loaded = False

        def finish(self, state: StateReader, content: bytes | bytearray) -> None:
            super().finish(state, content)
            self.loaded = True

        def reset(self) -> None:
            super().reset()
            self.loaded = False

        def quiesce(self) -> None:
            if self.loaded:
                raise DeviceError(errno.EIO)

    bench.device = Lame


# Pre-copy.


@mutant("SAVE-2", "precopy.the-temporary-end-is-enomsg")
def the_temporary_end_is_zero(bench: Bench) -> None:
    def read(call: Call, data_fd: int, buffer: memoryview) -> int:
        try:
            return call(data_fd, buffer)
        except OSError as failure:
            if failure.errno != errno.ENOMSG:
                raise
            return 0

    bench.reads.append(read)


@mutant("SAVE-4", "precopy.what-was-not-read-early-comes-later", others=5)
def what_was_not_read_is_dropped(bench: Bench) -> None:
    original = SavingMigf.stop_copy

    def stop_copy(mine: SavingMigf, rest: Any) -> None:
        original(mine, rest)
        mine._precopy, mine._view = None, memoryview(b"")

    class Sent(Drilled):
        """Takes what it has handed over for read."""

        def precopy(self) -> Iterator[bytes]:
            self._send(b"DRILLED1")
            return iter((b"DRILLED1",))

    bench.patch(SavingMigf, "stop_copy", stop_copy)
    bench.device = Sent


@mutant("SAVE-4", "precopy.a-stream-left-in-the-middle-goes-on", others=1)
def the_rest_of_a_message_is_dropped_at_stop_copy(bench: Bench) -> None:
    original = SavingMigf.stop_copy

    def stop_copy(mine: SavingMigf, rest: Any) -> None:
        original(mine, rest)
        if mine.moved:
            mine._view = memoryview(b"")

    bench.patch(SavingMigf, "stop_copy", stop_copy)


@mutant("LOAD-1", "precopy.what-both-parts-delivered-can-be-loaded", others=1)
def what_was_read_early_is_forgotten_by_the_checksum(bench: Bench) -> None:
    class Forgetful(Drilled):
        def save(self) -> Iterator[bytes]:
            if self.sent and not self.unread():
                self.sent = self.sent[1:]
            return super().save()

        def unread(self) -> bool:
            """Whether some of the first part was not read in PRE_COPY."""
            migf = bench.migration._migf
            return migf is None or migf.moved < len(b"DRILLED1")

    bench.device = Forgetful


@mutant("SAVE-4", "precopy.a-temporary-end-is-no-end", others=4)
def nothing_follows_the_temporary_end(bench: Bench) -> None:
    class Early(Drilled):
        def save(self) -> Iterator[bytes]:
            return iter(()) if self.sent else super().save()

    bench.device = Early


@mutant("ARC-14", "precopy.p2p-and-back-keep-the-session")
def p2p_and_back_begins_the_stream_anew(bench: Bench) -> None:
    class Anew(Drilled):
        def step(self, origin: State, target: State) -> None:
            super().step(origin, target)
            if (origin, target) == (State.PRE_COPY_P2P, State.PRE_COPY):
                self._begin()

    bench.device = Anew


@mutant("ARC-10", "precopy.cancelling-ends-the-session", others=2)
def cancelling_leaves_the_session_open(bench: Bench) -> None:
    original = Migration._end_session_locked

    def end_session(mine: Migration) -> None:
        if mine._state is State.PRE_COPY:
            mine._migf = None
        original(mine)

    bench.patch(Migration, "_end_session_locked", end_session)


@mutant("USER-8", "precopy.after-cancelling-it-begins-anew")
def a_cancelled_pre_copy_counts_as_sent(bench: Bench) -> None:
    class Tracking(Drilled):
        def step(self, origin: State, target: State) -> None:
            if (origin, target) != (State.RUNNING, State.PRE_COPY):
                super().step(origin, target)

        def precopy(self) -> Iterator[bytes]:
            return super().precopy() if not self.sent else iter(())

    bench.device = Tracking


@mutant("USER-8", "precopy.after-cancelling-it-begins-anew")
def a_cancelled_pre_copy_counts_as_sent_in_stop_copy(bench: Bench) -> None:
    class Tracking(Drilled):
        def step(self, origin: State, target: State) -> None:
            opens = target in PRE_COPY_GROUP and origin not in PRE_COPY_GROUP
            if opens or origin is State.STOP_COPY:
                self._begin()

    bench.device = Tracking


@mutant("PRECOPY-1", "precopy.it-begins-with-initial-bytes", others=1)
def there_are_no_initial_bytes(bench: Bench) -> None:
    class Bare(Drilled):
        def precopy_info(self) -> PrecopyInfo:
            return PrecopyInfo(0, 8)

    bench.device = Bare


@mutant("PRECOPY-6", "precopy.initial-bytes-only-fall", others=2)
def initial_bytes_rise(bench: Bench) -> None:
    def change(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        result = call(on, number, argument)
        if isinstance(argument, vfio.PrecopyInfo) and argument.dirty_bytes:
            argument.initial_bytes = 1 << 30
        return result

    bench.ioctl(change)


@mutant("PRECOPY-1", "precopy.initial-bytes-fall-as-they-are-read")
def initial_bytes_stay_as_they_are(bench: Bench) -> None:
    class Still(Drilled):
        def precopy_info(self) -> PrecopyInfo:
            return PrecopyInfo(8 - 8 * (not self._parts), 0)

    bench.device = Still


@mutant("PRECOPY-4", "precopy.both-numbers-zero-is-the-temporary-end")
def dirty_bytes_are_not_counted(bench: Bench) -> None:
    class Silent(Drilled):
        def precopy_info(self) -> PrecopyInfo:
            return super().precopy_info()._replace(dirty_bytes=0)

    bench.device = Silent


@mutant("PRECOPY-8", "precopy.a-new-first-part-is-announced")
def a_new_first_part_comes_unannounced(bench: Bench) -> None:
    def change(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        result = call(on, number, argument)
        if isinstance(argument, vfio.PrecopyInfo) and bench.migration.precopy_v2:
            argument.initial_bytes += 100 * (not argument.initial_bytes)
        return result

    bench.ioctl(change)


@mutant("INFO-1", "precopy.another-request-is-enotty")
def a_data_fd_knows_the_reset_of_its_device(bench: Bench) -> None:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        return end(errno.EINVAL) if on > 4 and number == RESET else call(on, number, argument)

    bench.ioctl(tamper)


@mutant("INFO-3", "precopy.argsz-holds-the-numbers")
def a_small_argsz_of_the_info_is_accepted(bench: Bench) -> None:
    bench.ioctl(info_answers(lambda argument: argument.argsz == 23, 0))


def info_answers(when: Callable[[vfio.PrecopyInfo], bool], result: int) -> Call:
    def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        is_info = isinstance(argument, vfio.PrecopyInfo) and on > 4
        if is_info and number == vfio.VFIO_MIG_GET_PRECOPY_INFO and readable(argument, 24):
            assert isinstance(argument, vfio.PrecopyInfo)
            if when(argument):
                return end(result)
        return call(on, number, argument)

    return tamper


@mutant("INFO-5", "precopy.outside-pre-copy-it-is-einval", others=1)
def the_info_is_told_in_every_state(bench: Bench) -> None:
    bench.ioctl(info_answers(lambda argument: bench.migration._state not in PRE_COPY_GROUP, 0))


@mutant("INFO-5", "precopy.the-numbers-are-told-in-pre-copy-p2p")
def the_info_is_told_in_pre_copy_alone(bench: Bench) -> None:
    bench.ioctl(
        info_answers(lambda argument: bench.migration._state is State.PRE_COPY_P2P, errno.EINVAL)
    )


@mutant("SESSION-2", "precopy.a-stream-left-in-the-middle-goes-on")
def the_info_skips_bytes(bench: Bench) -> None:
    def skip(_: vfio.PrecopyInfo) -> bool:
        skip_byte(bench)
        return False

    bench.ioctl(info_answers(skip, 0))


@mutant("INFO-9", "precopy.the-state-comes-before-the-session")
def a_dead_session_comes_before_the_state(bench: Bench) -> None:
    bench.ioctl(
        info_answers(lambda argument: bench.migration._state is State.RUNNING, errno.ENODEV)
    )


@mutant("INFO-6", "precopy.the-state-comes-before-the-session")
def an_old_descriptor_is_told_of_a_new_session(bench: Bench) -> None:
    original = precopy.precopy_info

    def precopy_info(migration: Migration, migf: SavingMigf) -> PrecopyInfo:
        current = migration._migf
        return original(migration, current if isinstance(current, SavingMigf) else migf)

    bench.patch(precopy, "precopy_info", precopy_info)


@mutant("INFO-8", "precopy.an-argument-in-bad-memory-is-efault")
def an_info_that_cannot_be_told_is_success(bench: Bench) -> None:
    bench.swap_number(vfio.VFIO_MIG_GET_PRECOPY_INFO, {errno.EFAULT: 0})


@mutant("INFO-10", "precopy.flags-are-an-echo", others=1)
def flags_are_an_answer_without_the_opt_in(bench: Bench) -> None:
    def change(call: Call, on: int, number: int, argument: UapiStruct) -> int:
        result = call(on, number, argument)
        if isinstance(argument, vfio.PrecopyInfo) and not bench.migration.precopy_v2:
            argument.flags = 1
        return result

    bench.ioctl(change)


@mutant("INFO-4", "precopy.after-the-opt-in-flags-are-an-answer", others=1)
def flags_are_an_echo_for_ever(bench: Bench) -> None:
    served_as(bench, "MIG_PRECOPY_INFOv2", lambda *request: None)


@mutant("PRECOPY-7", "precopy.a-reset-keeps-the-opt-in")
def a_reset_forgets_the_opt_in(bench: Bench) -> None:
    original = Migration.reset

    def reset(mine: Migration) -> int:
        mine.precopy_v2 = False
        return original(mine)

    bench.patch(Migration, "reset", reset)


@mutant("PRECOPY-7", "precopy.the-opt-in-may-be-repeated")
def the_opt_in_is_given_once(bench: Bench) -> None:
    def opt_in(device: VfioDevice, *request: object) -> None:
        if device.migration.precopy_v2:
            raise OSError(errno.EBUSY, "already")
        device.migration.precopy_v2 = True

    served_as(bench, "MIG_PRECOPY_INFOv2", opt_in)


@mutant("CLOSE-1", "precopy.the-last-close-ends-the-opt-in", others=1)
def the_opt_in_survives_the_last_close(bench: Bench) -> None:
    original = Migration.last_close

    def last_close(mine: Migration) -> None:
        before = mine.precopy_v2
        original(mine)
        mine.precopy_v2 = before

    bench.patch(Migration, "last_close", last_close)


@mutant("LOAD-1", "resuming.one-good-load-vouches-for-no-other")
def the_first_load_vouches_for_all(bench: Bench) -> None:
    class Trusting(Drilled):
        trusted = False

        def load(self, state: StateReader) -> None:
            content = state.read(1 << 16)
            if self.trusted and len(content) == LENGTH:
                return
            super().load(Bytes(content))
            self.trusted = True

        def reset(self) -> None:
            super().reset()
            self.trusted = False

    bench.device = Trusting


@mutant("LOAD-1", "resuming.an-earlier-load-completes-no-other")
def old_bytes_fill_up_a_short_state(bench: Bench) -> None:
    class Stale(Drilled):
        old = b""

        def load(self, state: StateReader) -> None:
            content = state.read(1 << 16)
            content += self.old[len(content) :]
            super().load(Bytes(content))
            self.old = content

        def reset(self) -> None:
            super().reset()
            self.old = b""

    bench.device = Stale
