"""The measurements run and say what they should; how fast the machine is today decides no test."""

from __future__ import annotations

import ast
import re

import pytest

from bench_rows import BENCH, WITH_GUESTS, WITHOUT_GUESTS, check_measurement


@pytest.mark.parametrize("name", WITHOUT_GUESTS)
def test_a_measurement_gives_ratios_with_bars(name: str) -> None:
    check_measurement(name, timeout=100)


def test_no_measurement_is_left_out() -> None:
    """Neither of the suite by the tests, nor a module of the folder by the suite."""
    tree = ast.parse((BENCH / "run.py").read_text())
    (suite,) = (
        ast.literal_eval(line.value)
        for line in tree.body
        if isinstance(line, ast.AnnAssign) and line.value and ast.unparse(line.target) == "SUITE"
    )
    assert set(suite) == {*WITHOUT_GUESTS, *WITH_GUESTS}
    used = set(suite) | {"run"}
    for module in BENCH.glob("*.py"):
        used.update(re.findall(r"^(?:from|import) (\w+)", module.read_text(), re.MULTILINE))
    assert {module.stem for module in BENCH.glob("*.py")} <= used
