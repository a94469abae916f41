"""The wheel that `make dist` builds: complete, and the core runs from it without third parties."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_every_module_the_licence_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        (entry_points,) = (name for name in inside if name.endswith("entry_points.txt"))
        commands = archive.read(entry_points).decode()
    modules = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert modules <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert "vfiomig = vfiomig_command:main" in commands
    assert "[pytest11]\nvfiomig = vfiomig_pytest" in commands


def test_the_core_runs_from_the_wheel_on_a_bare_python(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import sys; from vfiomig.fsm import draw; print(draw(7, 'json')[0]); "
        "print(sorted(name for name in sys.modules if 'site-packages' in "
        "str(getattr(sys.modules[name], '__file__', ''))))"
    )
    # -S: no site-packages, so a third-party import would fail.
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stdout.splitlines() == ["{", "[]"]


def test_without_its_extra_the_command_line_asks_for_it(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "vfiomig", "draw"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "vfiomig: the command line needs cyclopts, which is not installed: "
        "pip install 'vfiomig[cli]', or make setup in a checkout\n"
    )


#: A project of somebody else's: a device, and a test of it.
PROJECT = {
    "knob.py": """
import vfiomig

class Knob(vfiomig.Device):
    bar0 = vfiomig.Region(size=64)

    def save(self):
        return [bytes(self.bar0)]

    def load(self, state):
        if state.readinto(self.bar0) < 64 or state.read(1):
            raise vfiomig.StateRejected("a knob has 64 bytes")
""",
    "test_knob.py": """
from knob import Knob
from vfiomig.testing import check_device, device_maker

def test_a_knob_keeps_the_protocol():
    report = check_device(device_maker(Knob()))
    assert report.summary["pass"] > 100
""",
}


def test_a_project_of_its_own_checks_its_device_with_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """pytest finds the plugin by itself, and needs nothing that the wheel does not have."""
    site, project = tmp_path / "site", tmp_path / "project"
    project.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name, text in PROJECT.items():
        (project / name).write_text(text)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("-v", "--vfiomig-target", "model:knob.py:Knob", "--vfiomig-only", "resuming"),
            *("--vfiomig-deadline", "30", "--vfiomig-state-limit", "1M"),
        ],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(site), "CI": "", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_knob.py::test_a_knob_keeps_the_protocol PASSED" in done.stdout
    assert "vfiomig[model:knob.py:Knob]::resuming.cut-by-one-byte PASSED" in done.stdout
