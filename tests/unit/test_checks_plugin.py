"""The checks in other people's tests: the function, and pytest --vfiomig-target."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from c_style_server import CStyleServer, Options
from devices.drilled import LEVERS, Drilled
from vfiomig import State
from vfiomig.checks import Result
from vfiomig.testing import Verdict, check_device, device_maker, target_maker

ROOT = Path(__file__).parents[2]


class Lame(Drilled):
    """Does not come back from a reset."""

    def reset(self) -> None:
        if vars(self).get("bar_reset"):
            raise ValueError
        super().reset()

    def step(self, origin: State, target: State) -> None:
        super().step(origin, target)
        vars(self)["bar_reset"] = target is State.STOP


def test_a_good_device_gives_its_report() -> None:
    heard: list[object] = []
    report = check_device(device_maker(Drilled()), levers=LEVERS, hear=heard.append)
    assert report.summary[Verdict.FAIL] == 0
    assert [event for event in heard if isinstance(event, Result)] == report.results


def test_a_bad_device_is_an_assertion_with_the_evidence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("CRITICAL", "vfiomig")
    with pytest.raises(AssertionError) as caught:
        check_device(device_maker(Lame()), only=["reset.from-stop"])
    text = str(caught.value)
    assert text.startswith("Lame does not keep the protocol:\n\nfail: reset.from-stop\n")
    for part in ("clause: docs/protocol.md, RESET-1", "did: SET STOP", "saw: RESET: EIO"):
        assert part in text


def test_a_target_is_checked_like_a_device() -> None:
    report = check_device(target_maker("model:counter"), only=["size"], skip=["size.it-is-*"])
    assert report.summary[Verdict.PASS] == 4


PYTEST = (sys.executable, "-m", "pytest", "-p", "vfiomig_pytest", "-p", "no:cacheprovider")
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120", "CI": ""}


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PYTEST, *arguments],
        cwd=folder,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_with_a_target_every_check_is_a_test_beside_the_others(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_of_my_own(): pass\n")
    done = run_pytest(
        tmp_path, "-v", "-rs", "--vfiomig-target", "model:counter",
        "--vfiomig-only", "size", "--vfiomig-only", "precopy.flags*", "--vfiomig-only", "resuming",
        "--vfiomig-skip", "resuming.a-huge*",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_own.py::test_of_my_own PASSED" in done.stdout
    assert "vfiomig[model:counter]::size.it-is-no-errno PASSED" in done.stdout
    assert "vfiomig[model:counter]::precopy.flags-are-an-echo SKIPPED" in done.stdout
    assert "not_applicable: the device has stop-copy+p2p only" in done.stdout
    assert "a-huge-write" not in done.stdout


def test_a_check_that_fails_is_a_test_that_fails_with_the_evidence(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "from vfiomig import Device\nclass Bad(Device):\n    def reset(self): raise ValueError\n"
    )
    done = run_pytest(tmp_path, "--vfiomig-target", "model:bad.py:Bad", "--vfiomig-only", "reset")
    assert done.returncode == 1
    assert "fail: reset.from-stop\n" in done.stdout
    assert "  clause: docs/protocol.md, RESET-1, RESET-2" in done.stdout
    assert "plugin.py" not in done.stdout


def test_a_target_that_is_not_there_fails_every_check_with_the_reason(tmp_path: Path) -> None:
    target = f"vfio-user:{tmp_path}/none.sock"
    done = run_pytest(tmp_path, "--vfiomig-target", target, "--vfiomig-only", "size")
    assert done.returncode == 1
    assert done.stdout.count("there is no such socket") >= 4


def test_after_ctrl_c_the_device_runs(tmp_path: Path) -> None:
    """Its server keeps the state that a client leaves it in."""
    started: list[subprocess.Popen[bytes]] = []

    def interrupt(server: CStyleServer, _: int) -> None:
        if State.STOP_COPY in server.transitions and started:
            started.pop().send_signal(signal.SIGINT)

    options = Options(before=interrupt)
    target = f"vfio-user:{tmp_path / 'c.sock'}"
    with CStyleServer(tmp_path / "c.sock", b"state", options) as server:
        command = [*PYTEST, f"--vfiomig-target={target}", "--vfiomig-only=states"]
        with subprocess.Popen(command, cwd=tmp_path, env=os.environ | ENVIRONMENT) as process:
            started.append(process)
            assert process.wait(60) == pytest.ExitCode.INTERRUPTED
        assert not started
        assert server.migration == State.RUNNING


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--vfiomig-only", "nothing"), "no check is called 'nothing'"),
        (("--vfiomig-state-limit", "much"), "'much' is no whole number"),
        (("-n", "2"), "one process has the target; leave -n out"),
    ],
)
def test_options_that_mean_nothing_are_usage_errors(
    tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = run_pytest(tmp_path, "--vfiomig-target", "model:counter", *arguments)
    assert done.returncode == 4
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("target", "sentence"),
    [("model:none", "no device is called 'none'"), ("nowhere", "unknown target 'nowhere'")],
)
def test_a_target_that_means_nothing_is_a_usage_error_told_once(
    tmp_path: Path, target: str, sentence: str
) -> None:
    done = run_pytest(tmp_path, "--vfiomig-target", target)
    assert done.returncode == 4
    assert (done.stdout + done.stderr).count(sentence) == 1


def test_without_a_target_the_plugin_imports_nothing_of_vfiomig(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import sys\n"
        "def test_bare():\n"
        "    assert 'vfiomig_pytest' in sys.modules\n"
        "    assert 'vfiomig' not in sys.modules\n"
    )
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout
