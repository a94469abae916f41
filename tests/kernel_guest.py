"""Tests that run in a guest with the kernel's mtty, and are reported where they were collected.

Theory of operation
-------------------
The tests of tests/guest are collected twice: by the pytest on the host, which runs none of them,
and by one in the guest, which runs those that the host has collected. The reports of the latter
come out through a shared folder and become the former's own, each with its outcome, its time and
its traceback. There is a guest for each flavour of modules (vmtest.mtty).

Processes of pytest-xdist share one run: the first that needs it boots the guest while the others
wait at a lock.
"""

from __future__ import annotations

import compileall
import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from c_programs import compile_program
from vfiomig.errors import GuestError, PrerequisiteError
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.initrd import build_initrd
from vfiomig.qemu.installed import cache_folder
from vfiomig.qemu.machine import Machine
from vmtest.fetch import choose_qemu
from vmtest.inside import WORK, enter, inside, shared
from vmtest.mtty import MODULES, fetch_mtty

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

__all__ = (
    "CHECK",
    "FLAVOUR",
    "MATRIX",
    "PAIR",
    "PROGRAMS",
    "REPORTS",
    "SINGLE",
    "Run",
    "flavour_inside",
    "run_folder",
)

ROOT = Path(__file__).parents[1]

#: The environment of a pytest in the guest names the flavour of its modules in this variable.
FLAVOUR: Final = "VFIOMIG_GUEST_FLAVOUR"

#: Devices that are made in the guest: two cards with two ports, then one with one.
PAIR: Final = (
    "0b0d7d1e-5d9c-4d0f-9b43-0000000000a0",
    "0b0d7d1e-5d9c-4d0f-9b43-0000000000a1",
)
SINGLE: Final = "0b0d7d1e-5d9c-4d0f-9b43-0000000000b0"
_KINDS: Final = {PAIR[0]: "mtty-2", PAIR[1]: "mtty-2", SINGLE: "mtty-1"}

#: Names in the shared folder.
REPORTS: Final = "reports"
MATRIX: Final = "matrix.json"
CHECK: Final = "check.json"
#: What the guests have seen, and where it is kept, flavour by flavour.
_KEPT: Final = {MATRIX: "build/mtty-matrix.json", CHECK: "build/mtty-check.json"}
#: The folder with the C programs, which are compiled on the host.
PROGRAMS: Final = "programs"
_TESTS: Final = "tests"
_OUTPUT: Final = "output"
_PROBLEM: Final = "problem"

_BOOT_S: Final = 180
_TESTS_S: Final = 420
#: Of what pytest said in the guest, where a report is missing.
_TAIL: Final = 4000


def flavour_inside() -> str | None:
    """Return the flavour of this guest's modules, ``None`` on the host."""
    return os.environ.get(FLAVOUR)


class Run:
    """One guest, the tests that were run in it, and their reports."""

    def __init__(self, flavour: str, folder: Path) -> None:
        """``folder`` is shared by all the processes of one run of pytest on the host."""
        self._flavour = flavour
        self._folder = folder

    def reports(self, tests: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Return the reports by test, running ``tests`` if that was not done yet."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            # The other process has its deadlines.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self._folder / _PROBLEM).exists():
                self._carry_out(tests)
        found: dict[str, list[dict[str, Any]]] = {}
        path = self._folder / REPORTS
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            report = json.loads(line)
            found.setdefault(report["nodeid"], []).append(report)
        return found

    def why_missing(self) -> str:
        """Tell why a test has no report."""
        output = self._folder / _OUTPUT
        said = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
        problem = (self._folder / _PROBLEM).read_text(encoding="utf-8")
        return f"no report from the guest. {problem}\npytest said there:\n{said[-_TAIL:]}"

    def _carry_out(self, tests: Sequence[str]) -> None:
        (self._folder / _TESTS).write_text("".join(f"{test}\n" for test in tests))
        try:
            problem = self._boot_and_run()
        except (GuestError, PrerequisiteError) as failure:
            problem = str(failure)
        for name, target in _KEPT.items():
            _merge(self._folder / name, self._flavour, ROOT / target)
        (self._folder / _PROBLEM).write_text(problem, encoding="utf-8")

    def _boot_and_run(self) -> str:
        cache = cache_folder()
        files = fetch_mtty(cache)[self._flavour]
        # Compiling in an emulated processor takes longer than all the tests.
        compileall.compile_dir(ROOT / "src", quiet=2)
        _compile_programs(self._folder / PROGRAMS)
        initrd = self._folder / "initrd"
        initrd.write_bytes(build_initrd(files, MODULES))
        machine = Machine(
            kernel=files.kernel, initrd=initrd, memory_mib=1024, extra=shared(self._folder)
        )
        with Guest(choose_qemu(None, cache), machine) as guest:
            guest.wait_ready(timeout=_BOOT_S)
            enter(guest)
            _make_devices(guest)
            outcome = guest.run(self._command(), timeout=_TESTS_S)
            console = guest.console
            guest.power_off()
        return f"pytest ended with {outcome.status}; the console: {console[-_TAIL:]}"

    def _command(self) -> str:
        words = [
            *(sys.executable, "-m", "pytest", "-p", "no:xdist", "--color=no"),
            f"@{WORK / _TESTS}",
        ]
        environment = {FLAVOUR: self._flavour, "CI": os.environ.get("CI", "")}
        return f"{inside(words, ROOT, environment)} >/host{WORK / _OUTPUT} 2>&1"


def _compile_programs(folder: Path) -> None:
    folder.mkdir()
    options = [f'-DNAME_{number}="{uuid}"' for number, uuid in enumerate(PAIR)]
    for program in ("binding", "compat", "group", "landed", "type1"):
        compile_program(program, folder, *options)


def _make_devices(guest: Guest) -> None:
    """Make the devices in this order, so that the numbers of their groups and nodes are known."""
    types = "/sys/class/mtty/mtty/mdev_supported_types"
    guest.check(" && ".join(f"echo {uuid} >{types}/{kind}/create" for uuid, kind in _KINDS.items()))


def _merge(seen: Path, flavour: str, target: Path) -> None:
    """Put what a guest saw beside what the other one saw."""
    if not seen.exists():
        return
    target.parent.mkdir(exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        whole = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        whole[flavour] = json.loads(seen.read_text(encoding="utf-8"))
        new = target.with_suffix(f".{time.monotonic_ns()}")
        new.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        new.rename(target)


def run_folder(config: pytest.Config, flavour: str) -> Path:
    """Return the folder that the processes of this run of pytest share for a flavour."""
    base: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    return base / f"guest-{flavour}"
