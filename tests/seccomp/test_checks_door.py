"""The checks through real system calls: the checker is a program under the door."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import check_program
from vfiomig.abi.ioctls import Dialect
from vfiomig.checks import CHECKS, Shows
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
    seen = [row.id for row in CHECKS if row.shows & Shows.DESCRIPTORS and row.id in others]
    assert seen == []


def test_a_device_without_poll_deviates_in_that_alone(capfd: pytest.CaptureFixture[str]) -> None:
    others = check("pattern,size=64K,poll=none", LANDED, WAYS["cdev"], capfd)
    differing = {name for name, (verdict, _) in others.items() if verdict == "deviates"}
    assert differing == {"sessions.a-dead-data-fd-polls-hung-up"}
