"""tools/prerequisites.sh: each thing that a machine lacks is one line and exit code 2."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/prerequisites.sh"


class Machine:
    """A machine as the script sees it: the programs on its PATH and its seccomp actions."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.seccomp = folder / "actions_avail"
        self.seccomp.write_text("kill_process trap errno user_notif trace log allow\n")
        grep = shutil.which("grep")
        assert grep is not None
        (self.bin / "grep").symlink_to(grep)
        self.program("python3", f'exec "{sys.executable}" "$@"')
        self.program("gcc", "cat >/dev/null")
        self.program("chromium", "")
        (self.bin / "cat").symlink_to("/bin/cat")
        self.is_a("Linux", "x86_64", "6.1.0-18-amd64")

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def is_a(self, system: str, machine: str, release: str) -> None:
        self.program(
            "uname",
            f"case $1 in -s) echo {system};; -m) echo {machine};; -r) echo {release};; esac",
        )

    def lacks(self, *what: str) -> list[str]:
        """Return the lines that the script prints, after checking that its exit code fits."""
        done = subprocess.run(
            ["/bin/sh", SCRIPT, *what],
            env={"PATH": str(self.bin), "SECCOMP_ACTIONS": str(self.seccomp)},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        lines = done.stderr.splitlines()
        assert done.returncode == (2 if lines else 0)
        assert all(line.startswith("vfiomig: ") for line in lines)
        assert not done.stdout
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_that_has_everything_hears_nothing(machine: Machine) -> None:
    assert machine.lacks("python", "platform", "compiler", "browser") == []


def test_this_machine_runs_the_tests_so_it_has_everything() -> None:
    done = subprocess.run(
        ["/bin/sh", SCRIPT, "platform", "compiler"], capture_output=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_no_python(machine: Machine) -> None:
    (machine.bin / "python3").unlink()
    (line,) = machine.lacks("python")
    assert "python3 is not installed: apt install python3 python3-venv" in line


def test_a_python_that_does_not_run(machine: Machine) -> None:
    machine.program("python3", "echo 'version 3.9 is not installed' >&2; exit 127")
    (line,) = machine.lacks("python")
    assert "python3 does not run" in line


def test_a_python_that_is_too_old(machine: Machine) -> None:
    machine.program("python3", 'case $2 in *print*) echo 3.9;; *"(3, 11)"*) exit 1;; esac')
    (line,) = machine.lacks("python")
    assert "python3 is Python 3.9, 3.11 or later is needed" in line


def test_a_debian_python_without_its_venv_package(machine: Machine) -> None:
    # ensurepip comes with python3-venv; venv itself is in the main package.
    without = "import sys; sys.modules['ensurepip'] = None; exec(sys.argv[1])"
    machine.program("python3", f'exec "{sys.executable}" -c "{without}" "$2"')
    (line,) = machine.lacks("python")
    assert "apt install python3-venv" in line


@pytest.mark.parametrize(
    ("release", "good"),
    [
        ("4.19.0", False),
        ("5.4.0-150-generic", False),
        ("5.18.19", False),
        ("5.19-rc1", True),
        ("5.19.0", True),
        ("6.1.0-18-amd64", True),
        ("10.0", True),
    ],
)
def test_the_kernel_is_5_19_or_later(machine: Machine, release: str, *, good: bool) -> None:
    machine.is_a("Linux", "x86_64", release)
    lines = machine.lacks("platform")
    assert lines == (
        []
        if good
        else [f"vfiomig: this kernel is {release}, the syscall door needs Linux 5.19 or later"]
    )


@pytest.mark.parametrize("actions", ["kill_process trap errno trace log allow\n", ""])
def test_seccomp_without_user_notification(machine: Machine, actions: str) -> None:
    machine.seccomp.write_text(actions)
    (line,) = machine.lacks("platform")
    assert "no seccomp user notification" in line


def test_no_seccomp_at_all(machine: Machine) -> None:
    machine.seccomp.unlink()
    (line,) = machine.lacks("platform")
    assert "no seccomp user notification" in line


def test_another_processor(machine: Machine) -> None:
    machine.is_a("Linux", "aarch64", "6.1.0")
    (line,) = machine.lacks("platform")
    assert "this machine is aarch64" in line


def test_another_system(machine: Machine) -> None:
    machine.is_a("Darwin", "arm64", "23.1.0")
    (line,) = machine.lacks("platform")
    assert "this is Darwin, the syscall door needs Linux" in line


def test_no_browser(machine: Machine) -> None:
    (machine.bin / "chromium").rename(machine.bin / "google-chrome")
    assert machine.lacks("browser") == []
    (machine.bin / "google-chrome").unlink()
    (line,) = machine.lacks("browser")
    assert "apt install chromium" in line


def test_no_compiler(machine: Machine) -> None:
    (machine.bin / "gcc").unlink()
    (line,) = machine.lacks("compiler")
    assert "apt install gcc libc6-dev" in line


def test_a_compiler_without_headers(machine: Machine) -> None:
    machine.program("gcc", "echo 'fatal error: stdio.h: No such file' >&2; exit 1")
    (line,) = machine.lacks("compiler")
    assert "apt install libc6-dev" in line


def test_everything_that_is_missing_is_said_at_once(machine: Machine) -> None:
    machine.is_a("Linux", "i686", "4.19.0")
    (machine.bin / "gcc").unlink()
    assert len(machine.lacks("python", "platform", "compiler")) == 3


def test_a_word_that_the_script_does_not_know_is_refused(machine: Machine) -> None:
    (line,) = machine.lacks("pyhton")
    assert "'pyhton'" in line
