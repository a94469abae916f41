"""The checks through real system calls: the checker is a program under the door."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import check_program
import descriptor_mutants
from descriptor_mutants import FAULTS
from vfiomig.abi.ioctls import Dialect
from vfiomig.checks import CHECKS, Shows
from vfiomig.checks.check import SHOWN
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.doors.syscall.run import run
from vfiomig.models import make

ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(check_program.__file__))
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
    "PYTHONWARNINGS": "error",
}
DRILLED = f"{ROOT / 'tests/devices/drilled.py'}:Drilled"

LANDED, V6 = Dialect.LANDED, Dialect.V6
#: How the program reaches the device.
WAYS = {"cdev": "/dev/vfio/devices/vfio0", "group": "/dev/vfio/0:0000:01:00.0"}
SETS = ("stop-copy", "stop-copy+p2p", "stop-copy+pre-copy", "all")


def check(
    spec: str, dialect: Dialect, target: str, capfd: pytest.CaptureFixture[str]
) -> dict[str, list[str]]:
    """Run the checks; return what did not pass."""
    device = VfioDevice(make(spec), "vfio0", dialect)
    code = run([device], [sys.executable, PROGRAM, target], env=ENVIRONMENT)
    output = capfd.readouterr()
    assert code == 0, output.err
    answer = json.loads(output.out)
    assert answer["checks"] == len(CHECKS)
    others: dict[str, list[str]] = answer["others"]
    return others


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("caps", "dialect"), [*((caps, LANDED) for caps in SETS), ("all", V6)], ids=str
)
def test_a_good_device_passes_every_check_that_there_is_for_it(
    way: str, caps: str, dialect: Dialect, capfd: pytest.CaptureFixture[str]
) -> None:
    others = check(f"{DRILLED},caps={caps}", dialect, WAYS[way], capfd)
    assert {verdict for verdict, _ in others.values()} == {"not_applicable"}, others
    assert [name for name, (_, saw) in others.items() if saw in SHOWN.values()] == []


def test_a_device_without_poll_deviates_in_that_alone(capfd: pytest.CaptureFixture[str]) -> None:
    others = check("pattern,size=64K,poll=none", LANDED, WAYS["cdev"], capfd)
    differing = {name for name, (verdict, _) in others.items() if verdict == "deviates"}
    assert differing == {
        "sessions.a-dead-data-fd-polls-hung-up",
        "sessions.a-data-fd-can-be-watched-by-epoll",
        "precopy.poll-knows-the-temporary-end",
    }


def test_a_descriptor_that_is_not_as_it_has_to_be_is_found(
    capfd: pytest.CaptureFixture[str],
) -> None:
    device = VfioDevice(make(DRILLED), "vfio0", LANDED)
    program = [sys.executable, descriptor_mutants.__file__, WAYS["cdev"]]
    code = run([device], program, env=ENVIRONMENT)
    output = capfd.readouterr()
    assert code == 0, output.err
    found = json.loads(output.out)
    assert found.keys() == FAULTS.keys()
    for name, (good, bad, saw) in found.items():
        print(f"{name:<30} {FAULTS[name].check:<52} {saw}")
        assert (good, bad in {"fail", "deviates"}) == ("pass", True), (name, bad, saw)


#: Comes back from STOP_COPY when whoever waits for that has long given up.
HANGING = """
import time
from vfiomig import Device, State

class Hanging(Device):
    def save(self):
        return [b"state"]
    def load(self, state):
        state.read(6)
    def step(self, origin, target):
        if target is State.STOP_COPY:
            time.sleep(6)
"""


def test_a_check_that_hangs_without_a_descriptor_leaves_some_for_the_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "hanging.py", tmp_path / "page.html"
    file.write_text(HANGING)
    device = VfioDevice(make(f"{file}:Hanging"), "vfio0", LANDED)
    words = ["-m", "vfiomig", "check", WAYS["cdev"], "--deadline=2", f"--html={page}", "--json"]
    check = "exhaustion.no-descriptor-for-stop-copy"
    code = run([device], [sys.executable, *words, f"--only={check}"], env=ENVIRONMENT)
    output = capfd.readouterr()
    assert code == 1, output.err
    (found,) = json.loads(output.out)["checks"]
    assert found["saw"] == "still under way after 2 s: SET STOP_COPY"
    assert check in page.read_text()


def test_every_check_that_needs_a_descriptor_has_its_fault() -> None:
    need = {row.id for row in CHECKS if Shows.DESCRIPTORS in row.shows}
    assert need == {fault.check for fault in FAULTS.values()} | {
        "precopy.poll-knows-the-temporary-end"
    }


def test_a_device_that_was_handed_over_is_checked_and_stays_open(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The program is given a descriptor, as a shell does it with 3<>PATH."""
    device = VfioDevice(make(DRILLED), "vfio0", LANDED)
    program = [sys.executable, "-c", HANDED_OVER, sys.executable, PROGRAM]
    code = run([device], program, env=ENVIRONMENT)
    output = capfd.readouterr()
    assert code == 0, output.err
    answer, state = output.out.splitlines()
    others = json.loads(answer)["others"]
    assert {verdict for verdict, _ in others.values()} == {"not_applicable"}, others
    assert {name for name in others if name.startswith("reopen.")} == {
        row.id for row in CHECKS if row.chapter == "reopen"
    }
    assert state == "RUNNING"


#: Opens the device, has it checked, and asks afterwards where it is.
HANDED_OVER = """
import os, subprocess, sys
import vfiomig
number = os.open("/dev/vfio/devices/vfio0", os.O_RDWR)
subprocess.run([*sys.argv[1:], f"fd:{number}"], pass_fds=[number], check=True)
with vfiomig.open(f"fd:{number}") as device:
    print(device.state.name)
"""
