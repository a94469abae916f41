"""Devices that die, hang or say nothing sensible, and users who have enough: a report all the same.

Each of these runs ends in time, leaves no thread that still uses the device, and tells of every
check; that nothing is a bug of a check is part of it.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.drilled import LEVERS, Drilled
from vfiomig import DeviceClient, DeviceError, State, StateReader
from vfiomig.checks import Check, Report, Result, Suite, Verdict, choose
from vfiomig.checks.evidence import Gone
from vfiomig.checks.suite import BUG, DEADLINE
from vfiomig.client import Maker, device_maker, target_maker
from vfiomig.core.migration import Migration
from vfiomig.errors import TargetError
from vfiomig.testing import check_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfiomig.checks.beside import Beside
    from vfiomig.checks.raw import Raw
    from vfiomig.checks.subject import Subject

ROOT = Path(__file__).parents[2]

#: A server's device that ends its process when it is given a state that is cut off.
CRASHING = """
import os
from vfiomig import Device

class Crashing(Device):
    def save(self):
        return [bytes(1000)]
    def load(self, state):
        if len(state.read(1001)) != 1000:
            os._exit(3)
"""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "vfiomig")


def run(maker: Maker, *only: str, deadline: float = DEADLINE) -> Report:
    with Suite(maker, levers=LEVERS, deadline=deadline) as suite:
        report = suite.run(choose(only))
    is_whole(report, *only)
    return report


def is_whole(report: Report, *only: str) -> None:
    """See that every check is told of, and that what was not run says why."""
    assert [result.check for result in report.results] == choose(only)
    for result in report.results:
        assert result.saw, result.check.id
        assert not result.saw.startswith(BUG), (result.check.id, result.saw)


def of(report: Report, verdict: Verdict) -> dict[str, str]:
    return {r.check.id: r.saw for r in report.results if r.verdict is verdict}


# Devices that answer nothing, or do not come back.


class Switchable(Drilled):
    """Works until it is told to fail: then every hook does."""

    broken = False

    def step(self, origin: State, target: State) -> None:
        if self.broken:
            raise DeviceError(errno.EIO)
        super().step(origin, target)

    def reset(self) -> None:
        if self.broken:
            raise DeviceError(errno.EIO)
        super().reset()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every device keep its state over the last close, as a driver of the kernel does."""
    last_close, first_open = Migration.last_close, Migration.first_open
    left: list[State] = []

    def close(mine: Migration) -> None:
        left[:] = [mine._state]
        last_close(mine)

    def open_(mine: Migration) -> int:
        result = first_open(mine)
        mine._state = left[0] if left else mine._state
        return result

    monkeypatch.setattr(Migration, "last_close", close)
    monkeypatch.setattr(Migration, "first_open", open_)


@pytest.mark.usefixtures("kept")
def test_a_device_that_nothing_brings_to_running_is_lost_and_says_how_it_answers() -> None:
    device = Switchable()
    with Suite(device_maker(device), levers=LEVERS) as suite:
        (first,) = choose(["states.running-to-stop"])
        assert suite.run_check(first).verdict is Verdict.PASS
        suite._target.client.set_state(State.STOP)
        device.broken = True
        report = suite.run(choose(["saving", "size"]))
    is_whole(report, "saving", "size")
    assert report.failed == []
    assert report.lost == (
        "the device is in STOP, and nothing brings it to RUNNING: RESET answers EIO, "
        "SET RUNNING EIO, and closing and opening it changes nothing"
    )
    assert set(of(report, Verdict.NOT_RUN).values()) == {report.lost}


class Refusing:
    """A transport's requests that all fail, as those of a device that was unplugged."""

    def __init__(self, number: int) -> None:
        self.number = number

    def ioctl(self, *_: object) -> int:
        raise OSError(self.number, os.strerror(self.number))

    readinto = write = ioctl


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV, errno.EINTR], ids=errno.errorcode.get)
def test_a_device_that_answers_one_errno_to_everything_is_lost(number: int) -> None:
    """Once it has begun to, it cannot be looked at again either."""
    refusing = Refusing(number)
    with Suite(device_maker(Drilled()), levers=LEVERS) as suite:
        transport = suite._target.client._transport
        suite.run_check(choose(["states.running-to-stop"])[0])
        for name in ("ioctl", "readinto", "write"):
            setattr(transport, name, getattr(refusing, name))

        suite._target._maker = failing(number)
        report = suite.run(choose())
    is_whole(report)
    assert "cannot be opened again" in report.lost
    told = of(report, Verdict.FAIL)
    assert told == {
        "discovery.an-untouched-device-is-in-running": (
            f"the query of the state: {errno.errorcode[number]}"
        )
    }


def failing(number: int) -> Maker:
    def make() -> None:
        raise TargetError(number, "it is not there any more")

    return make  # type: ignore[return-value]  # it never returns


class Stubborn(Drilled):
    """No reset succeeds."""

    def __init__(self) -> None:
        self.made = False
        super().__init__()
        self.made = True

    def reset(self) -> None:
        if self.made:
            raise DeviceError(errno.EIO)
        super().reset()


def test_a_device_that_cannot_be_reset_fails_the_checks_about_that() -> None:
    report = run(device_maker(Stubborn()))
    failed = of(report, Verdict.FAIL)
    assert "reset.from-stop-copy" in failed
    assert failed["reset.from-stop-copy"] == "RESET: EIO"


class Stuck(Drilled):
    """An arc that does not return until the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def step(self, origin: State, target: State) -> None:
        super().step(origin, target)
        if target is State.STOP_COPY:
            assert self.go_on.wait(30)


def test_a_device_that_hangs_fails_the_check_and_holds_nobody_up() -> None:
    device = Stuck()
    names = ("states.stop-to-stop-copy", "states.running-to-stop")
    report = run(device_maker(device), *names, deadline=1.5)
    device.go_on.set()
    hung, later = sorted(report.results, key=lambda result: result.verdict)
    assert hung.check.id == "states.stop-to-stop-copy"
    assert hung.verdict is Verdict.FAIL
    assert hung.expected == "an end in time"
    assert hung.saw == "still under way after 1.5 s: SET STOP_COPY"
    assert later.verdict is Verdict.NOT_RUN
    assert "an earlier check has lost the device" in later.saw
    join_checks()


def join_checks() -> None:
    """Wait for checks that were left to themselves."""
    for thread in threading.enumerate():
        if thread.name.startswith("vfiomig-check"):
            thread.join(10)
            assert not thread.is_alive()


def test_a_check_that_hangs_makes_no_request_when_it_wakes() -> None:
    device = Stuck()
    with Suite(device_maker(device), deadline=1.5) as suite:
        raw = suite._target.raw
        hung = suite.run_check(choose(["states.stop-copy-to-stop"])[0])
        assert hung.saw == "still under way after 1.5 s: SET STOP_COPY"
        device.go_on.set()
        join_checks()
        assert raw.barred
        assert suite.run_check(choose(["states.stop-copy-to-stop"])[0]).verdict is Verdict.PASS


def test_a_thread_that_outlives_its_check_makes_no_request_beside_the_next() -> None:
    """The descriptors of the next one have the numbers that it knows."""
    go_on = threading.Event()
    late: list[Beside[int]] = []

    def read_late(raw: Raw, data_fd: int) -> int:
        assert go_on.wait(30)
        return raw.read(data_fd, bytearray(1))

    def outlived(subject: Subject) -> None:
        data_fd = subject.session(State.STOP_COPY)
        late.append(subject.beside(partial(read_late, subject.raw, data_fd)))
        late[0].result("the other thread")

    def undisturbed(subject: Subject) -> None:
        subject.session(State.STOP_COPY)
        go_on.set()
        assert late[0].wait(at_least=10)
        with pytest.raises(Gone):
            late[0].result("the other thread")

    (check,) = choose(["states.stop-copy-to-stop"])
    with Suite(device_maker(Drilled()), deadline=1.5) as suite:
        first = suite.run_check(replace(check, body=outlived))
        assert (first.verdict, first.saw) == (Verdict.FAIL, "the other thread: still under way")
        suite._deadline = DEADLINE
        second = suite.run_check(replace(check, body=undisturbed))
        assert second.verdict is Verdict.PASS, second.saw


# Servers.


@contextmanager
def serving(file: Path, socket: Path) -> Iterator[subprocess.Popen[str]]:
    spec = f"{file}:Crashing"
    command = [sys.executable, "-m", "vfiomig", "serve", spec, "--socket", str(socket)]
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("serving")
            yield process
        finally:
            process.kill()


@pytest.fixture
def crashing(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    file = tmp_path / "crashing.py"
    file.write_text(CRASHING)
    with serving(file, tmp_path / "dev.sock") as process:
        yield process


@pytest.mark.usefixtures("crashing")
def test_a_server_that_a_request_ends_fails_that_check_and_is_lost(tmp_path: Path) -> None:
    report = run(target_maker(f"vfio-user:{tmp_path / 'dev.sock'}"), "combinations", "saving")
    ((name, saw),) = of(report, Verdict.FAIL).items()
    assert name == "combinations.a-failing-combination-stops-where-it-failed"
    assert "ended the connection" in saw
    assert saw.endswith("; under way: SET RUNNING")
    assert "dev.sock cannot be opened" in report.lost


def test_a_server_that_is_killed_between_two_checks_is_told_once(
    tmp_path: Path, crashing: subprocess.Popen[str]
) -> None:
    def hear(event: Check | Result) -> None:
        if isinstance(event, Result) and event.check.id == "states.stop-to-stop":
            crashing.kill()
            crashing.wait()

    with Suite(target_maker(f"vfio-user:{tmp_path / 'dev.sock'}")) as suite:
        report = suite.run(choose(["states"]), hear)
    is_whole(report, "states")
    (saw,) = of(report, Verdict.FAIL).values()
    assert "ended the connection" in saw
    assert report.lost


# Its user.


class Slow(Drilled):
    """Says when it is on its way to STOP_COPY, and takes its time."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self.tell = tell

    def step(self, origin: State, target: State) -> None:
        super().step(origin, target)
        if target is State.STOP_COPY:
            self.tell()


def interrupt_once() -> Callable[[], None]:
    """Send Ctrl-C to this process, the first time."""
    told: list[int] = []

    def tell() -> None:
        if not told:
            told.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    return tell


def test_after_ctrl_c_what_was_found_is_told_and_the_device_runs() -> None:
    device = Slow(interrupt_once())
    maker = device_maker(device)
    with Suite(maker) as suite:
        report = suite.run(choose(["states"]))
    is_whole(report, "states")
    assert report.interrupted
    assert len(of(report, Verdict.PASS)) >= 2
    reasons = of(report, Verdict.NOT_RUN)
    assert reasons["states.stop-to-stop-copy"].startswith("the run was interrupted; under way: ")
    assert reasons["states.running-to-stop"] == "the run was interrupted"
    with maker() as client:
        assert client.state is State.RUNNING


def test_ctrl_c_ends_a_test_that_checks_a_device() -> None:
    with pytest.raises(KeyboardInterrupt):
        check_device(device_maker(Slow(interrupt_once())), only=["states"])


@pytest.mark.usefixtures("kept")
def test_a_device_that_is_lost_fails_a_test_that_checks_it() -> None:
    device = Switchable()
    opened: list[DeviceClient] = []
    maker = device_maker(device)

    def make() -> DeviceClient:
        opened.append(maker())
        return opened[-1]

    def hear(event: Check | Result) -> None:
        if isinstance(event, Check) and event.id == "size.it-is-no-errno":
            opened[-1].set_state(State.STOP)
            device.broken = True

    with pytest.raises(AssertionError, match="was lost: the device is in STOP"):
        check_device(make, only=["size"], hear=hear)


class Lazy(Drilled):
    """Takes its time for a reset, as hardware does."""

    def reset(self) -> None:
        super().reset()
        time.sleep(0.1)


def test_a_race_is_tried_less_often_on_a_device_that_takes_its_time() -> None:
    report = run(device_maker(Lazy()), "reset.a-reset-may-meet-*", deadline=2.0)
    assert len(of(report, Verdict.PASS)) == 2, of(report, Verdict.FAIL)


class Trickling(Drilled):
    """Delivers 20 MiB a second: as its state more than there is time for, in pre-copy without end.

    A read of the checks takes one piece, so that none lasts beyond the time on a busy machine.
    """

    def save(self) -> Iterator[bytes]:
        return itertools.islice(self.precopy(), 100)

    def precopy(self) -> Iterator[bytes]:
        while True:
            time.sleep(0.05)
            yield bytes(1 << 20)


def test_a_device_that_is_slow_is_none_that_hangs() -> None:
    names = ("saving.the-end-is-zero", "precopy.the-temporary-end-is-enomsg")
    report = run(device_maker(Trickling()), *names, deadline=2.0)
    assert of(report, Verdict.NOT_RUN) == {
        names[0]: "bytes still come and go when its time is up: give it more (--deadline)"
    }
    assert of(report, Verdict.NOT_APPLICABLE) == {
        names[1]: "more pre-copy data comes as fast as it is read"
    }


class Careless(Drilled):
    """Takes every state there is, and does not end."""

    def load(self, state: StateReader) -> None:
        while state.read(1 << 16):
            pass


def test_a_device_that_takes_whatever_it_is_given_ends_in_time() -> None:
    report = run(device_maker(Careless()), "resuming", deadline=2.0)
    assert report.failed == []
    assert len(of(report, Verdict.DEVIATES)) > 8
