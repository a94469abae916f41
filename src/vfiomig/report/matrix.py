"""What came of every request for a state, as a matrix: rows are where the device was.

The last column is for numbers that are no state. A cell that no check has filled is empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from vfiomig.checks import Verdict
from vfiomig.fsm import State

if TYPE_CHECKING:
    from vfiomig.checks import Report

__all__ = ("COLUMNS", "LEGEND", "Cell", "Row", "matrix")

NONE: Final = "no state"
COLUMNS: Final = (*(state.name for state in State), NONE)
#: What stands in a cell that was not tried.
UNTRIED: Final = {Verdict.NOT_APPLICABLE: "\N{EN DASH}", Verdict.NOT_RUN: "?"}
LEGEND: Final = (
    "+r, +w: a new data_fd to read or to write; =: the old one lives; x: it answers ENODEV; "
    "\N{EN DASH}: not applicable; ?: not run"
)


class Cell(NamedTuple):
    """One request: what came of it in short, its verdict, and the check with its evidence."""

    text: str
    verdict: Verdict | None = None
    check: str = ""
    saw: str = ""


class Row(NamedTuple):
    """One state that the device was in."""

    origin: str
    cells: tuple[Cell, ...]


def matrix(report: Report) -> list[Row]:
    """Return a row for each state; nothing if no check of a pair is about such a device."""
    cells = {
        result.check.pair: Cell(
            result.cell or UNTRIED.get(result.verdict, str(result.verdict)),
            result.verdict,
            result.check.id,
            result.saw,
        )
        for result in report.results
        if result.check.pair is not None
    }
    if all(cell.verdict is Verdict.NOT_APPLICABLE for cell in cells.values()):
        return []
    columns = range(len(COLUMNS))  # the number behind the last state is what none is known by
    return [
        Row(origin.name, tuple(cells.get((origin, target), Cell("")) for target in columns))
        for origin in State
    ]
