"""The two rules of tests/conftest.py, seen from outside: a pytest of its own runs small tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leftovers import left_behind, take_snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., str]

TESTS = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs pytest over one test file beside the project's conftest."""
    for name in ("conftest.py", "leftovers.py"):
        shutil.copy(TESTS / name, tmp_path)

    def run_pytest(source: str, *options: str, **environment: str) -> str:
        (tmp_path / "test_inner.py").write_text(source)
        (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", *options]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"]} | environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return done.stdout + done.stderr

    return run_pytest


LEAKS = """
import os, subprocess, sys, threading, time
import leftovers
leftovers._GRACE_S = 1.0
kept = []
def test_descriptor():
    kept.append(os.open("/dev/zero", os.O_RDONLY))
def test_descriptor_of_an_earlier_test_is_closed_at_last():
    os.close(kept.pop())
def test_descriptor_of_somebody_else_is_closed(stranger):
    os.close(stranger)
def test_thread():
    threading.Thread(target=time.sleep, args=(60,), name="sleeper", daemon=True).start()
def test_child():
    kept.append(subprocess.Popen(["sleep", "60"]))
def test_zombie():
    os.posix_spawn("/bin/true", ["true"], {})
def test_child_of_an_earlier_test_ends_at_last():
    kept[0].kill()
    kept.pop().wait()
def test_what_ends_in_a_moment():
    threading.Thread(target=time.sleep, args=(0.1,)).start()
import pytest
@pytest.fixture(scope="module", autouse=True)
def stranger():
    yield os.open("/dev/full", os.O_WRONLY)
"""


def test_what_a_test_leaves_behind_fails_it_by_name(run: Run) -> None:
    output = run(LEAKS)
    assert "(/dev/zero) is still open: close it" in output
    assert "(/dev/full) was closed, and the test had not opened it" in output
    assert "thread 'sleeper' is still running: stop and join it" in output
    assert "is still running: end it and wait for it" in output
    assert "has ended and nobody waited for it" in output
    errors = [line.split()[1] for line in output.splitlines() if line.startswith("ERROR ")]
    assert [error.rpartition("::")[2] for error in errors] == [
        "test_descriptor",
        "test_descriptor_of_somebody_else_is_closed",
        "test_thread",
        "test_child",
        "test_zombie",
    ]
    assert "8 passed, 5 errors" in output


LEAK = """
import os
import leftovers
leftovers._GRACE_S = 0.1
def test_leak():
    os.open("/dev/zero", os.O_RDONLY)
"""


def test_leaks_are_found_in_parallel_runs_too(run: Run) -> None:
    output = run(LEAK, "-n", "1")
    assert "(/dev/zero) is still open: close it" in output
    assert "1 passed, 1 error" in output


SKIPS = """
import pytest
def test_that_skips():
    pytest.skip("no such kernel")
@pytest.mark.skip(reason="some other day")
def test_that_is_marked():
    pass
@pytest.mark.xfail
def test_that_is_known_to_fail():
    assert False
"""


def test_a_skip_in_ci_is_a_failure_that_names_the_test_and_the_reason(run: Run) -> None:
    output = run(SKIPS, CI="true")
    assert "test_that_skips was skipped, which CI=true forbids. Skipped: no such kernel" in output
    assert "test_that_is_marked was skipped" in output
    assert "some other day" in output
    assert "2 failed, 1 xfailed" in output or "1 failed, 1 xfailed, 1 error" in output


def test_a_skipped_module_in_ci_is_a_failure(run: Run) -> None:
    module = "import pytest\npytest.skip('whole', allow_module_level=True)\n"
    assert "which CI=true forbids. Skipped: whole" in run(module, CI="true")
    assert "1 skipped" in run(module)


def test_skips_outside_ci_stay_skips(run: Run) -> None:
    assert "2 skipped, 1 xfailed" in run(SKIPS)


def test_the_check_for_leftovers_is_not_felt() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert left_behind(take_snapshot()) == []
        return time.perf_counter() - start

    assert min(seconds() for _ in range(50)) < 0.005  # 0.2 ms; the best, for others run beside
