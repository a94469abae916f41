"""docs/protocol.md is cited by rule: its tables are the code's, and every citation leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vfiomig.fsm import Capability, State, matrix, states_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text()
RULES = set(re.findall(r"^(?:- |\| )\[([A-Z0-9-]+-\d+)\]", PAGE, re.MULTILINE))
PREFIXES = {rule.rpartition("-")[0] for rule in RULES}
CITATION = re.compile(r"\b(" + "|".join(sorted(PREFIXES, key=len, reverse=True)) + r")-(\d+)\b")


def table_after(marker: str) -> list[list[str]]:
    lines = PAGE.partition(marker)[2].splitlines()[1:]
    rows = [[cell.strip("* ") for cell in line.strip("|").split("|")] for line in lines]
    end = next(number for number, line in enumerate(lines) if not line.startswith("|"))
    return [rows[0], *rows[2:end]]


@pytest.mark.parametrize("caps", [1, 7])
def test_a_printed_table_is_the_computed_one(caps: int) -> None:
    heads, *rows = table_after(f"<!-- next-state {caps} -->")
    computed = matrix(Capability(caps))
    assert [State[name] for name in heads[1:]] == [s for s in State if s in states_of(caps)]
    for origin, *cells in rows:
        shown = [None if cell == "refused" else State[cell] for cell in cells]
        assert shown == [computed[State[origin]][State[target]] for target in heads[1:]]
    assert len(rows) == len(heads) - 1


def test_no_rule_is_told_twice() -> None:
    told = re.findall(r"^(?:- |\| )\[([A-Z0-9-]+-\d+)\]", PAGE, re.MULTILINE)
    assert len(told) == len(set(told)) > 200


def cited() -> list[tuple[str, str]]:
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("*.md")]
    return [
        (str(file.relative_to(ROOT)), match[0])
        for file in files
        for match in CITATION.finditer(file.read_text())
    ]


def test_every_rule_that_is_cited_is_told() -> None:
    citations = cited()
    assert len(citations) > 20
    assert [where for where in citations if where[1] not in RULES] == []
