"""The measurements run and say what they should; how fast the machine is today decides no test."""

from __future__ import annotations

import pytest

from bench_rows import check_measurement


@pytest.mark.parametrize("name", ["state_stream", "get_state", "bar_read", "vfio_user"])
def test_a_measurement_gives_ratios_with_bars(name: str) -> None:
    check_measurement(name, timeout=50)
