"""The process in front of each QEMU of `vfiomig demo --qemu`, with a small program for the QEMU."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from vfiomig.cli.qemu_demo_machine import main

if TYPE_CHECKING:
    import pytest


def test_it_reports_every_arc_and_its_program_does_not_hold_the_pipe(
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = """
import os, vfiomig
with vfiomig.open('/dev/vfio/devices/vfio0') as device:
    device.set_state(vfiomig.State.STOP)
print(os.path.exists('/proc/self/fd/REPORTS'))
"""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    words = [sys.executable, "-c", program.replace("REPORTS", str(writer))]
    try:
        assert main([str(writer), "pattern,size=300K", "--", *words]) == 0
        os.close(writer)
        lines = os.read(reader, 1 << 16).splitlines()
    finally:
        os.close(reader)
    assert capfd.readouterr().out == "False\n"
    arcs = [(one["origin"], one["target"]) for one in map(json.loads, lines)]
    assert arcs == [("RUNNING", "RUNNING_P2P"), ("RUNNING_P2P", "STOP")]
