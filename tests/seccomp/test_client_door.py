"""The client's suite through real system calls: the client is a program under the door."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import client_suite
from client_suite import CASES
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.doors.syscall.run import run
from vfiomig.models import make

PROGRAM = str(Path(client_suite.__file__))
SOURCE = str(Path(__file__).parents[2] / "src")


#: Behind a container nobody is told that the IOMMU cannot track: all that is mapped is dirty then.
WAYS = {
    "character device": ("/dev/vfio/devices/vfio{n}", ()),
    "group": (
        "/dev/vfio/{n}:0000:{bus:02x}:00.0",
        ("an_iommu_that_cannot_track_says_so_and_the_device_works_on-landed",),
    ),
}


@pytest.mark.parametrize(
    ("way", "name"),
    [(way, name) for way, (_, without) in WAYS.items() for name in CASES if name not in without],
)
def test_the_client_under_the_door(way: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    devices = [
        VfioDevice(make(spec), f"vfio{number}", case.dialect)
        for number, spec in enumerate(case.specs)
    ]
    targets = [WAYS[way][0].format(n=n, bus=n + 1) for n in range(len(devices))]
    code = run(
        devices,
        [sys.executable, PROGRAM, name, *targets],
        env={"PYTHONPATH": SOURCE, "PYTHONWARNINGS": "error"},
    )
    output = capfd.readouterr()
    assert (code, output.out) == (0, "ok\n"), output.err
