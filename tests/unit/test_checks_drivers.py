"""What the kernel's drivers are known to do otherwise is a deviation, and fails none of them.

Each driver is the device of devices/drilled.py with the habits that docs/protocol.md, chapter
"known faults", tells of it. That there is a deviation at all is part of it: a habit that no check
notices is no habit.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import pytest

from devices.drilled import LEVERS, Drilled
from mutants.bench import LENGTH
from mutants.table import MUTANTS, Bench
from vfiomig import State, StateRejected
from vfiomig.abi.ioctls import Dialect
from vfiomig.checks import Report, Suite, Verdict, choose
from vfiomig.core.migration import Migration, Outcome
from vfiomig.fsm import path

if TYPE_CHECKING:
    from mutants.bench import Call, SetState
    from vfiomig import StateReader

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
            return Outcome(mine._state, errno.EIO, None)
        if refused:
            stopped.append(target)
        return original(mine, target)

    original_reset = Migration.reset

    def reset(mine: Migration) -> int:
        stopped.clear()
        return original_reset(mine)

    bench.set_state(set_state)
    bench.patch(Migration, "reset", reset)


def loses_the_session_at_a_refusal(bench: Bench) -> None:
    """xe: when RESUMING cannot be left its descriptor is dead all the same (FAULT-26)."""

    def set_state(original: SetState, mine: Migration, target: int) -> Outcome:
        found = original(mine, target)
        if found.errno and mine._state is State.RESUMING and target == State.STOP:
            mine._end_session_locked()
        return found

    bench.set_state(set_state)


def of(name: str) -> Habit:
    return MUTANTS[name].body


ENDS_WITH_ZERO = of("the_temporary_end_is_zero")

DRIVERS = {
    "mlx5": Driver(
        "all", (0x15B3, 0x101E), (takes_everything,), ("resuming.an-empty-state-is-refused",)
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
        (takes_everything, answers_eio_in_error, of("leaving_stop_copy_stops_the_log")),
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
