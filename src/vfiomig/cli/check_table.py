"""How ``vfiomig check`` looks at a terminal: a bar, the matrix, the chapters, and what was found."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from vfiomig.checks import CHAPTERS, Check, Result, Verdict
from vfiomig.checks.rules import rules
from vfiomig.report.matrix import COLUMNS, LEGEND, matrix

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from vfiomig.checks import Report
    from vfiomig.report.matrix import Cell

__all__ = ("Progress", "explain_check", "explain_rule", "list_checks", "show")

STYLES: Final = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.DEVIATES: "yellow",
    Verdict.NOT_APPLICABLE: "dim",
    Verdict.NOT_RUN: "magenta",
}
#: Columns of the matrix whose name takes too much room in one line.
HEADS: Final = {
    "STOP_COPY": "STOP_\nCOPY",
    "RUNNING_P2P": "RUNNING\n_P2P",
    "PRE_COPY": "PRE_\nCOPY",
    "PRE_COPY_P2P": "PRE_\nCOPY_\nP2P",
    "no state": "no\nstate",
}
WORDS: Final = {verdict: verdict.replace("_", " ") for verdict in Verdict}
#: Verdicts that are told of, in this order, and what of the evidence: deviations may be many.
TOLD: Final[dict[Verdict, tuple[str, ...]]] = {
    Verdict.FAIL: ("rule", "clause", "did", "expected", "saw"),
    Verdict.DEVIATES: ("rule", "expected", "saw"),
}
WHERE_RULES_ARE: Final = (
    "vfiomig check --explain LOAD-3 tells a rule; FAULT rules tell what drivers are known to do."
)
#: Columns of a terminal from which the matrix has its spaces, and from which it is one.
WIDE, NARROW = 90, 80
#: Checks that are named one by one where they were not run for the same reason.
MOST_NAMES: Final = 6


class Progress:
    """A bar on stderr; nothing where that is no terminal."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._bar = RichProgress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=Console(file=sys.stderr),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=len(checks))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._bar.stop()

    def hear(self, event: Check | Result) -> None:
        """Take note of a check that begins, or of what came of it."""
        if isinstance(event, Check):
            self._bar.update(self._task, description=event.id)
        else:
            self._bar.advance(self._task)


def _counted(counts: Counter[Verdict]) -> str:
    return ", ".join(
        f"{counts[verdict]} {WORDS[verdict]}" for verdict in Verdict if counts[verdict]
    )


def show(report: Report) -> None:
    """Print a report."""
    console = Console(highlight=False)
    _show_facts(console, report)
    _show_matrix(console, report)
    _show_chapters(console, report)
    for verdict, parts in TOLD.items():
        for result in report.results:
            if result.verdict is verdict:
                _show_finding(console, result, parts)
    if any(result.verdict in TOLD for result in report.results):
        console.print(f"\n{WHERE_RULES_ARE}", soft_wrap=True)
    _show_reasons(console, report)
    console.print()
    seconds = sum(result.seconds for result in report.results)
    counts = Counter(report.summary)
    ended = ", interrupted" if report.interrupted else ""
    console.print(f"{_counted(counts)}, in {seconds:.1f} s{ended}", soft_wrap=True)


def _show_facts(console: Console, report: Report) -> None:
    facts = report.facts
    console.print(
        f"{report.target}: {facts.by}, dialect {facts.dialect}, migration {facts.migration}",
        soft_wrap=True,
    )


def _show_matrix(console: Console, report: Report) -> None:
    rows = matrix(report)
    if not rows:
        return
    console.print()
    if console.width < NARROW:
        for row in rows:
            cells = Text(", ").join(
                Text(f"{column} ").append(_cell(cell))
                for column, cell in zip(COLUMNS, row.cells, strict=True)
            )
            console.print(Text(f"from {row.origin} to "), cells, sep="")
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("from \\ to", no_wrap=True)
        for column in COLUMNS:
            table.add_column(HEADS.get(column, column), vertical="bottom", no_wrap=True)
        for row in rows:
            tight = console.width < WIDE
            table.add_row(row.origin, *(_cell(cell, tight=tight) for cell in row.cells))
        console.print(table)
    console.print(LEGEND)


def _cell(cell: Cell, *, tight: bool = False) -> Text:
    text = cell.text.replace(" ", "") if tight else cell.text
    return Text(text, style=STYLES[cell.verdict] if cell.verdict else "")


def _show_chapters(console: Console, report: Report) -> None:
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("chapter")
    for verdict in Verdict:
        table.add_column(WORDS[verdict], justify="right")
    for chapter in CHAPTERS:
        counts = Counter(r.verdict for r in report.results if r.check.chapter == chapter.name)
        if counts:
            numbers = (
                Text(str(counts[verdict]), style=STYLES[verdict])
                if counts[verdict]
                else "\N{MIDDLE DOT}"
                for verdict in Verdict
            )
            table.add_row(chapter.name, *numbers)
    console.print(table)


def _show_finding(console: Console, result: Result, parts: Sequence[str]) -> None:
    console.print()
    line = Text(f"{WORDS[result.verdict]} ", style=STYLES[result.verdict])
    line.append(result.check.id, style="bold")
    console.print(line, soft_wrap=True)
    texts = {
        "rule": result.check.sentence,
        "clause": result.check.clause,
        "did": result.did,
        "expected": result.expected,
        "saw": result.saw,
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(width=8)
    table.add_column(overflow="fold")
    for part in parts:
        table.add_row(part, _plain(texts[part]))
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def _show_reasons(console: Console, report: Report) -> None:
    """Say why checks were not run, once for each reason."""
    reasons: dict[str, list[str]] = {}
    for result in report.results:
        if result.verdict is Verdict.NOT_RUN:
            reasons.setdefault(result.saw, []).append(result.check.id)
    for reason, names in reasons.items():
        console.print()
        console.print(Text(f"not run: {_named(names)}", style=STYLES[Verdict.NOT_RUN]))
        console.print(Padding(_plain(reason), (0, 0, 0, 2), expand=False))


def _named(ids: Sequence[str]) -> str:
    """Name checks, by their chapters if they are many."""
    if len(ids) <= MOST_NAMES:
        return ", ".join(ids)
    chapters = Counter(name.partition(".")[0] for name in ids)
    return f"{len(ids)} checks: " + ", ".join(
        f"{count} of {chapter}" for chapter, count in chapters.items()
    )


def _plain(text: str) -> Text:
    """Text for a terminal: what a server sends is not to move the cursor."""
    return Text(
        "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    )


def list_checks(checks: Sequence[Check]) -> None:
    """Print the id and the sentence of each check, chapter by chapter."""
    console = Console(highlight=False)
    for chapter in CHAPTERS:
        own = [check for check in checks if check.chapter == chapter.name]
        if not own:
            continue
        console.print(Text(f"{chapter.name}: {chapter.summary}", style="bold"))
        for check in own:
            console.print(Text(f"  {check.id}"), soft_wrap=True)
            console.print(Padding(Text(check.sentence, style="dim"), (0, 0, 0, 6), expand=False))


def explain_check(check: Check) -> None:
    """Print everything that there is to say about a check."""
    console = Console(highlight=False)
    console.print(Text(check.id, style="bold"), soft_wrap=True)
    console.print(check.sentence)
    if check.explanation:
        console.print(check.explanation)
    console.print(f"Rests on {check.clause}.", soft_wrap=True)
    for name in check.rules:
        console.print(Padding(_rule(name), (0, 0, 0, 2), expand=False))
    for condition in check.conditions:
        console.print(f"Only for {condition}.", soft_wrap=True)
    if check.danger is not None:
        danger = f"{check.danger.what} ({check.danger.rule})"
        console.print(f"Dangerous where it is not known to be safe: {danger}.", soft_wrap=True)


def explain_rule(name: str) -> None:
    """Print the text of a rule."""
    Console(highlight=False).print(_rule(name))


def _rule(name: str) -> Text:
    return Text(f"{name}: ", style="bold").append(rules()[name], style="not bold")
