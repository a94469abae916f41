"""A measurement of ``bench/`` runs small and says what it should; its ratios decide no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"
#: Every measurement is run by a test: those that need no guest, and those that do.
WITHOUT_GUESTS = (
    "state_stream", "get_state", "bar_read", "many_devices", "check_suite", "vfio_user",
)  # fmt: skip
WITH_GUESTS = ("virtio_disk", "downtime")


def check_measurement(name: str, *, timeout: float) -> None:
    command = [sys.executable, str(BENCH / "run.py"), name, "--quick", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert ran.returncode in {0, 1}, ran.stderr
    rows = json.loads(ran.stdout)
    assert rows
    for row in rows:
        assert row["kept"] is (
            (row["at_least"] is None or row["ratio"] >= row["at_least"])
            and (row["at_most"] is None or row["ratio"] <= row["at_most"])
        )
        assert (row["at_least"] is None) is not (row["at_most"] is None)
    assert ran.returncode == (0 if all(row["kept"] for row in rows) else 1)
