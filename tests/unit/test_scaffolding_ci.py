""".ci/run: installs what is missing, and nothing that would change the machine's C library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci/run"

APT_GET = """
echo "apt-get $*" >>"$CALLS"
case "$*" in *"-s install"*) cat "$PLAN";; *install*) mv "$BIN/gcc.new" "$BIN/gcc";; esac
"""
GCC = "Inst gcc (4:12.2.0-3 Debian:12.11/oldstable [amd64])\n"
SAME_RELEASE = (
    "Inst libc6 [2.36-9+deb12u9] (2.36-9+deb12u14 Debian:12.11/oldstable [amd64]) []\n"
    "Inst libc6-dev (2.36-9+deb12u14 Debian:12.11/oldstable [amd64])\n"
)
OTHER_RELEASE = "Inst libc6 [2.36-9+deb12u9] (2.41-12 Debian:13.1/stable [amd64])\n"


class Machine:
    """A machine whose gcc, apt-get and make are small programs that note how they are called."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls = folder / "calls"
        self.calls.touch()
        self.plan = folder / "plan"
        self.program("make", 'echo "make $* CI=$CI" >>"$CALLS"')
        self.program("apt-get", APT_GET)
        self.program("dpkg-query", "echo 2.36-9+deb12u9")
        self.program("gcc", "cat >/dev/null")
        self.program("chromium", "")

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def without_gcc(self, plan: str) -> None:
        """Let gcc be missing until apt-get installs it, which would do what ``plan`` says."""
        (self.bin / "gcc").rename(self.bin / "gcc.new")
        self.program("gcc", "exit 1")
        self.plan.write_text(plan)

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT],
            env={
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "CALLS": str(self.calls),
                "PLAN": str(self.plan),
                "BIN": str(self.bin),
                "PYTHON": sys.executable,
            }
            | environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_that_has_everything_checks_and_tests(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert machine.called() == ["make check test-all CI=true"]


def test_what_is_missing_is_installed_after_a_look_at_what_apt_would_do(machine: Machine) -> None:
    machine.without_gcc(GCC + SAME_RELEASE)
    done = machine.run()
    assert done.returncode == 0, done.stderr
    update, simulate, install, make = machine.called()
    assert update.endswith("update")
    assert simulate == "apt-get -s install --no-install-recommends gcc libc6-dev"
    assert install.endswith("install -y --no-install-recommends gcc libc6-dev")
    assert make == "make check test-all CI=true"


@pytest.mark.parametrize(
    "plan", [GCC + OTHER_RELEASE, GCC + "Remv libfoo [1.0]\n"], ids=["libc6", "removal"]
)
def test_a_plan_that_touches_the_c_library_or_removes_packages_is_refused(
    machine: Machine, plan: str
) -> None:
    machine.without_gcc(plan)
    done = machine.run()
    assert done.returncode == 2
    assert "stopping" in done.stderr
    assert [call.split()[1] for call in machine.called()] == ["-qq", "-s"]


def test_a_python_that_does_not_run_is_passed_over_for_one_that_does(machine: Machine) -> None:
    # What a version manager puts on PATH where a folder asks for a version that is not there.
    machine.program("python3", "echo 'version 3.9 is not installed' >&2; exit 127")
    machine.program("python3.13", f'exec "{sys.executable}" "$@"')
    machine.program("make", 'echo "$PYTHON" >>"$CALLS"')
    done = machine.run(PYTHON="python3")
    assert done.returncode == 0, done.stderr
    assert machine.called() == ["python3.13"]


def test_a_failure_of_the_verbs_is_the_failure_of_the_run(machine: Machine) -> None:
    machine.program("make", "exit 2")
    assert machine.run().returncode == 2
