"""The measurements with guests run; how fast the machine is today decides no test."""

from __future__ import annotations

import pytest

from bench_rows import WITH_GUESTS, check_measurement


@pytest.mark.parametrize("name", WITH_GUESTS)
@pytest.mark.usefixtures("parts")
def test_a_measurement_with_guests_gives_ratios_with_bars(name: str) -> None:
    check_measurement(name, timeout=150)
