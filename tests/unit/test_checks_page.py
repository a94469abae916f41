"""docs/checks.md is written from the checks, and written anew when they change."""

from __future__ import annotations

from pathlib import Path

from vfiomig.checks import CHECKS, Levers
from vfiomig.checks.dangers import DANGERS
from vfiomig.checks.document import page

PAGE = Path(__file__).parents[2] / "docs/checks.md"


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == page(), "run make docs"


def test_the_page_has_every_check_danger_and_lever() -> None:
    text = PAGE.read_text()
    for check in CHECKS:
        assert f"\n| `{check.id}` | {check.sentence}" in text
    for danger in DANGERS:
        assert f"\n| {danger.rule} | {danger.what} | `" in text
    for lever in Levers._fields:
        assert f"\n| `{lever}` | " in text


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    width = 0
    for line in PAGE.read_text().splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        cells = line.count(" | ") if width else line.count("|")
        width = width or line.count("|")
        assert line.count("|") == width, (line, cells)
