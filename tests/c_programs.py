"""The C programs of tests/seccomp: compiled once, run with devices, their output taken apart."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("COMMANDED", "HERE", "WHOLE", "compile_program", "differences", "run_with", "sections")

TESTS = Path(__file__).parent
HERE = TESTS / "seccomp"
COMMANDED = f"{TESTS}/devices/commanded.py:Commanded"
WHOLE = f"{TESTS}/devices/commanded.py:Whole"
DEADLINE = 100


def compile_program(name: str, folder: Path, *options: str) -> Path:
    """Compile c/NAME.c as the plain C that it is; warnings are errors."""
    binary = folder / name
    subprocess.run(
        [
            *("gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"),
            *options,
            *("-o", binary, HERE / "c" / f"{name}.c"),
        ],
        check=True,
        timeout=DEADLINE,
    )
    return binary


def run_with(devices: Sequence[str], *options: str, program: list[str]) -> str:
    """Run a program under ``vfiomig run``; return what it printed. It must end well."""
    command = [sys.executable, "-m", "vfiomig", "run", *options]
    for device in devices:
        command += ["--device", device]
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}/src"}
    done = subprocess.run(
        [*command, "--", *program],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sections(text: str) -> dict[str, list[str]]:
    """Split an output at its ``## name`` lines."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("## "):
            lines = found.setdefault(line[3:], [])
        else:
            lines.append(line)
    return found


def differences(expected: list[str], seen: list[str]) -> str:
    """Return a readable difference, empty if there is none."""
    return "\n".join(difflib.unified_diff(expected, seen, "expected", "seen", lineterm="", n=2))
