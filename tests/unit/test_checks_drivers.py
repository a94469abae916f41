"""What the kernel's drivers are known to do otherwise is a deviation, and fails none of them.

Each driver is the device of devices/drilled.py with the habits that docs/protocol.md, chapter
"known faults", tells of it. That there is a deviation at all is part of it: a habit that no check
notices is no habit.
"""

from __future__ import annotations

import errno
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import pytest

from devices.drilled import LEVERS, Drilled
from mutants.bench import LENGTH, RESET, end
from mutants.table import MUTANTS, Bench
from vfiomig import DeviceError, State, StateReader, StateRejected
from vfiomig.abi.ioctls import Dialect
from vfiomig.checks import Report, Suite, Verdict, choose, find
from vfiomig.client import device_maker
from vfiomig.core.migration import Migration, Outcome
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.fsm import path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mutants.bench import Call, SetState
    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.iommu import DirtyLog

Habit: TypeAlias = Callable[[Bench], None]


class Driver(NamedTuple):
    """One driver: what it can do, what it does otherwise, and checks that have to notice."""

    caps: str
    identity: tuple[int, int]
    habits: tuple[Habit, ...]
    noticed: tuple[str, ...]


def takes_everything(bench: Bench) -> None:
    """mlx5 and virtio: leaving RESUMING succeeds, whatever was written (FAULT-12)."""

    class Swallowing(Drilled):
        def load(self, state: StateReader) -> None:
            try:
                super().load(state)
            except StateRejected:
                while state.read(1 << 16):
                    pass

    bench.device = Swallowing


def takes_a_lone_first_part(bench: Bench) -> None:
    """hisi_acc: its match part alone is a state, of which nothing is loaded (FAULT-14)."""

    class Idle(Drilled):
        def load(self, state: StateReader) -> None:
            content = state.read(8)
            if content == b"DRILLED1" and not (rest := state.read(LENGTH)):
                return
            if content != b"DRILLED1" or len(rest) != LENGTH - 8:
                raise StateRejected("the state is cut off, or none of this device")

    bench.device = Idle


def refuses_with(number: int) -> Habit:
    """A foreign state, of which more is there than a byte, is refused with a misleading errno."""

    def habit(bench: Bench) -> None:
        def write(call: Call, data_fd: int, data: memoryview) -> int:
            try:
                return call(data_fd, data)
            except OSError as failure:
                if failure.errno != errno.EINVAL or len(data) == 1:
                    raise
                raise OSError(number, "") from None

        bench.writes.append(write)

    return habit


def answers_eio_in_error(bench: Bench) -> None:
    """pds: every target in ERROR (ERROR-3)."""

    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        if mine._state is State.ERROR:
            return Outcome(State.ERROR, errno.EIO, None)
        return original(mine, target)

    bench.set_state(set_state)


def stops_at_a_refusal(bench: Bench) -> None:
    """xe: whatever it refuses stops the function, and only a reset helps (FAULT-25)."""
    stopped: list[int] = []

    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        refused = mine._state is not State.ERROR and path(3, mine._state, target) is None
        if stopped and not refused and target != mine._state:
            return Outcome(mine._state, errno.EPERM, None)
        if refused:
            stopped.append(target)
        return original(mine, target)

    original_reset = Migration.reset

    def reset(mine: Migration) -> int:
        stopped.clear()
        return original_reset(mine)

    def read(call: Call, data_fd: int, buffer: memoryview) -> int:
        return end(errno.EIO) if stopped and len(buffer) == 32 else call(data_fd, buffer)

    bench.set_state(set_state)
    bench.patch(Migration, "reset", reset)
    bench.reads.append(read)


def logs_whole_words_of_a_bitmap(bench: Bench) -> None:
    """pds: a range whose bitmap is not made of whole words is EINVAL (LOG-11)."""
    original = VfioDevice.start_dirty_log

    def start_dirty_log(mine: VfioDevice, log: DirtyLog) -> None:
        if any((high - low) % (64 * 4096) for low, high in log.ranges):
            raise OSError(errno.EINVAL, "no whole words")
        original(mine, log)

    bench.patch(VfioDevice, "start_dirty_log", start_dirty_log)


def loses_the_session_at_a_refusal(bench: Bench) -> None:
    """xe: when RESUMING cannot be left its descriptor is dead all the same (FAULT-26)."""

    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        found = original(mine, target)
        if found.errno and mine._state is State.RESUMING and target == State.STOP:
            mine._end_session_locked()
        return found

    bench.set_state(set_state)


def fails_to_start_with_half_a_state(bench: Bench) -> None:
    """What leaving RESUMING did not notice, a later arc may (FAULT-12, FAIL-2)."""

    class Swallowing(Drilled):
        halved = False

        def load(self, state: StateReader) -> None:
            try:
                super().load(state)
            except StateRejected:
                self.halved = True
                while state.read(1 << 16):
                    pass

        def reset(self) -> None:
            super().reset()
            self.halved = False

        def step(self, origin: State, target: State) -> None:
            super().step(origin, target)
            if self.halved and origin is State.STOP and target is not State.RESUMING:
                raise DeviceError(errno.EREMOTEIO)

    bench.device = Swallowing


def delivers_other_lengths(bench: Bench) -> None:
    """Two saves of a stopped device differ, also in length: bytes of a stream are its own."""
    saves = itertools.count()

    class Padded(Drilled):
        def save(self) -> Iterator[bytes]:
            yield from super().save()
            yield (2 + next(saves) % 3 * 100) * b"\0"

        def finish(self, state: StateReader, content: bytes | bytearray) -> None:
            if state.read(1 << 16).strip(b"\0"):
                raise StateRejected("bytes behind the end")
            self.bar0[:] = content

    bench.device = Padded


def cannot_be_reset(bench: Bench) -> None:
    """A device without a reset (RESET-3)."""

    def tamper(call: Call, on: int, number: int, argument: UapiStruct | None) -> int:
        return end(errno.EINVAL) if number == RESET and on <= 4 else call(on, number, argument)

    bench.ioctl(tamper)


def of(name: str) -> Habit:
    return MUTANTS[name].body


ENDS_WITH_ZERO = of("the_temporary_end_is_zero")

DRIVERS = {
    "mlx5": Driver(
        "all",
        (0x15B3, 0x101E),
        (fails_to_start_with_half_a_state,),
        (
            "resuming.an-empty-state-is-refused",
            "combinations.a-failing-combination-stops-where-it-failed",
        ),
    ),
    "virtio": Driver(
        "all",
        (0x1AF4, 0x1041),
        (takes_everything, of("the_size_is_too_small")),
        ("resuming.cut-by-one-byte", "size.it-covers-what-is-delivered"),
    ),
    "hisi_acc": Driver(
        "stop-copy+pre-copy",
        (0x19E5, 0xA251),
        (takes_a_lone_first_part, ENDS_WITH_ZERO, refuses_with(errno.EFAULT)),
        ("resuming.the-pre-copy-part-alone-is-refused", "precopy.the-temporary-end-is-enomsg"),
    ),
    "qat": Driver(
        "all",
        (0x8086, 0x4941),
        (of("old_bytes_fill_up_a_short_state"), ENDS_WITH_ZERO),
        ("resuming.an-earlier-load-completes-no-other",),
    ),
    "pds": Driver(
        "stop-copy+p2p",
        (0x1DD8, 0x1003),
        (
            takes_everything,
            answers_eio_in_error,
            logs_whole_words_of_a_bitmap,
            of("leaving_stop_copy_stops_the_log"),
        ),
        ("states.error-to-stop", "dma.states-do-not-matter-to-the-log"),
    ),
    "xe": Driver(
        "stop-copy+p2p",
        (0x8086, 0xE211),
        (
            stops_at_a_refusal,
            loses_the_session_at_a_refusal,
            refuses_with(errno.ENODEV),
            of("the_size_is_an_errno"),
        ),
        ("combinations.after-a-refusal-the-device-goes-on", "size.it-is-no-errno"),
    ),
    "a mediated device": Driver("all", (0x10DE, 0x2236), (cannot_be_reset,), ()),
    "a vGPU": Driver(
        "all",
        (0x10DE, 0x2237),
        (delivers_other_lengths,),
        ("saving.a-stopped-device-does-not-change",),
    ),
}


def check(driver: Driver, name: str, monkeypatch: pytest.MonkeyPatch) -> Report:
    bench = Bench(monkeypatch, driver.caps, Dialect.LANDED)
    for habit in driver.habits:
        habit(bench)
    try:
        with Suite(bench.serve(), name, levers=LEVERS) as suite:
            suite.facts = replace(suite.facts, kernel=(7, 3, 4), identity=driver.identity)
            return suite.run(choose())
    finally:
        bench.end()


@pytest.mark.parametrize("name", DRIVERS)
def test_no_habit_of_a_known_driver_is_a_failure(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "vfiomig")
    driver = DRIVERS[name]
    report = check(driver, name, monkeypatch)
    assert {r.check.id: (r.expected, r.saw) for r in report.failed} == {}
    deviating = {r.check.id: r.saw for r in report.results if r.verdict is Verdict.DEVIATES}
    print(name, *(f"{check}: {saw}" for check, saw in deviating.items()), sep="\n  ")
    assert set(driver.noticed) <= deviating.keys()


class Interrupted(Drilled):
    """A reset waits for the arc that it meets, and that arc for the reset, which fails it."""

    def __init__(self) -> None:
        self.walking, self.came = threading.Event(), threading.Event()
        super().__init__()

    def step(self, origin: State, target: State) -> None:
        super().step(origin, target)
        if threading.current_thread().name == "vfiomig-check-beside":
            self.walking.set()
            assert self.came.wait(30)
            raise DeviceError(errno.EREMOTEIO)

    def reset(self) -> None:
        super().reset()
        self.walking.clear()
        self.came.clear()


def test_hardware_may_fail_the_arc_that_a_reset_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Interrupted()
    original = Migration.reset

    def reset(mine: Migration) -> int:
        if any(thread.name == "vfiomig-check-beside" for thread in threading.enumerate()):
            assert device.walking.wait(30)
            device.came.set()
        return original(mine)

    monkeypatch.setattr(Migration, "reset", reset)
    with Suite(device_maker(device), levers=LEVERS) as suite:
        result = suite.run_check(find("reset.a-reset-may-meet-a-change-of-state"))
    assert (result.verdict, result.saw) == (
        Verdict.DEVIATES,
        "the request for STOP_COPY: EREMOTEIO (FAIL-2: a device's errno)",
    )
