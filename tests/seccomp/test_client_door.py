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


@pytest.mark.parametrize("name", CASES)
def test_the_client_under_the_door(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    devices = [
        VfioDevice(make(spec), f"vfio{number}", case.dialect)
        for number, spec in enumerate(case.specs)
    ]
    targets = [f"/dev/vfio/devices/{device.name}" for device in devices]
    code = run(
        devices,
        [sys.executable, PROGRAM, name, *targets],
        env={"PYTHONPATH": SOURCE, "PYTHONWARNINGS": "error"},
    )
    output = capfd.readouterr()
    assert (code, output.out) == (0, "ok\n"), output.err
