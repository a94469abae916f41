"""The rules that checks cite, in full: docs/protocol.md, which lies beside this module as well.

A rule begins with its id in brackets, in an item of a list or in the first cell of a row.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Final

__all__ = ("rules",)

#: An item or a row, the id of its rule, and its text.
RULE: Final = re.compile(r"(- |\| )\[([A-Z][A-Z0-9-]*-\d+)\] (.+)")
LINK: Final = re.compile(r"\[([^]]+)\]\([^)]+\)")


@cache
def rules() -> dict[str, str]:
    """Return the text of every rule by its id."""
    page = files("vfiomig.checks").joinpath("protocol.md").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    heads: list[str] = []
    name = above = ""
    for line in LINK.sub(r"\1", page).splitlines():
        if line.startswith("|") and not above.startswith("|"):
            heads = _cells(line)
        if rule := RULE.fullmatch(line):
            name, text = rule[2], rule[3]
            found[name] = _told(heads, _cells(line)) if rule[1] == "| " else text
        elif name and line.startswith("  "):
            found[name] += f" {line.strip()}"
        else:
            name = ""
        above = line
    return found


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def _told(heads: list[str], cells: list[str]) -> str:
    """Put a row into words: what it is about, and its other cells by their heads."""
    _, first, *others = cells
    named = zip(heads[2:], others, strict=True)
    return "; ".join((first, *(f"{head}: {cell}" for head, cell in named if cell)))
