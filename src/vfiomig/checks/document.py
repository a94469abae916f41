"""docs/checks.md, written from the checks: ``python -m vfiomig.checks.document docs/checks.md``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vfiomig.checks.check import HEADER, Levers
from vfiomig.checks.dangers import DANGERS
from vfiomig.checks.table import CHAPTERS, CHECKS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfiomig.checks.check import Chapter, Check

__all__ = ("page",)

INTRODUCTION: Final = f"""# What `vfiomig check` checks

This page is written from the checks by `make docs`; a test compares the two.
It lists {len(CHECKS)} checks in {len(CHAPTERS)} chapters, in the order in which they run.
`vfiomig check TARGET` runs them, `--only` and `--skip` choose by id, chapter or pattern, and `--explain ID` tells more about one, or the text of a rule.

A clause is a rule of [protocol.md](protocol.md), where the sources are named; the section of `{HEADER}` that says the same is what `--explain` and every report add.
A check that prepares something in vain (a device that does not get to STOP_COPY, say) is not run: why it does not get there is the subject of another one.

| verdict | meaning |
|---|---|
| pass | the device did what the rule says |
| fail | it breaks a rule that everybody has to keep |
| deviates | it does what some drivers are known to do, or leaves what a device may leave to its user |
| not_applicable | this device, or this way to it, has nothing that the rule is about |
| not_run | something is missing: `--dangerous`, a lever, a state that could be reached, or the device, which an earlier check has lost |

The exit code of `vfiomig check` is 0 if no check failed and 1 if one did; 2 if the device cannot be reached, or is lost on the way and nothing failed; 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, when the report tells what was found until then.
A device that was handed over (`--fd N`) is not closed as long as its giver has it open, so what the last close does is not applicable there.

## Dangers
Some requests are known to hang or crash a driver, and with it the machine.
They are sent where that is known not to happen, or with `--dangerous`.

| rule | what can happen | checks |
|---|---|---|
"""

LEVERS: Final = """
## Levers
A checker cannot make a device write memory, or fail.
Its author can: `vfiomig.testing.check_device` takes functions that do it.

| lever | what it does | checks that do not run without it |
|---|---|---|
"""

#: What a lever does, by its name in ``Levers``.
DOES: Final = {
    "enter_error": "brings the device to ERROR; without it a state that the device refuses is tried",
    "write_by_dma": "has the device write bytes to an IOVA, and returns when they are there",
}


def page() -> str:
    """Return the whole page."""
    dangers = "".join(
        f"| {danger.rule} | {danger.what} | {_names(c for c in CHECKS if c.danger is danger)} |\n"
        for danger in DANGERS
    )
    levers = "".join(
        f"| `{lever}` | {DOES[lever]} | {_names(c for c in CHECKS if c.lever == lever)} |\n"
        for lever in Levers._fields
    )
    return INTRODUCTION + dangers + LEVERS + levers + "".join(map(_chapter, CHAPTERS))


def _names(checks: Iterable[Check]) -> str:
    return ", ".join(f"`{check.id}`" for check in checks) or "none"


def _chapter(chapter: Chapter) -> str:
    rows = "".join(map(_row, chapter.checks))
    return f"\n## {chapter.name}\n{chapter.summary}\n\n| id | rule | clause | only for |\n|---|---|---|---|\n{rows}"


def _row(check: Check) -> str:
    sentence = " ".join(f"{check.sentence} {check.explanation}".split())
    only = "; ".join(check.conditions)
    return f"| `{check.id}` | {sentence} | {', '.join(check.rules)} | {only} |\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
