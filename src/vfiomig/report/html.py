"""A report of checks as one page: nothing to fetch, no script, light and dark, and on paper.

The state matrix comes first, then what was found, then every check with its evidence to unfold.
The state matrix is an inline picture; colours are never the only difference, since each cell has
its words, and each verdict its sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from vfiomig.checks import CHAPTERS, Verdict
from vfiomig.report.matrix import COLUMNS, LEGEND, matrix
from vfiomig.version import VERSION

if TYPE_CHECKING:
    from vfiomig.checks import Facts, Report

__all__ = ("as_html",)

WORDS: Final = {
    Verdict.PASS: "pass",
    Verdict.FAIL: "fail",
    Verdict.DEVIATES: "deviates",
    Verdict.NOT_APPLICABLE: "not applicable",
    Verdict.NOT_RUN: "not run",
}
SIGNS: Final = {
    Verdict.PASS: "\N{CHECK MARK}",
    Verdict.FAIL: "\N{BALLOT X}",
    Verdict.DEVIATES: "\N{ALMOST EQUAL TO}",
    Verdict.NOT_APPLICABLE: "\N{EN DASH}",
    Verdict.NOT_RUN: "?",
}


def as_html(report: Report) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("vfiomig.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    chapters = [
        (chapter, [result for result in report.results if result.check.chapter == chapter.name])
        for chapter in CHAPTERS
    ]
    return environment.get_template("report.html.jinja").render(
        report=report,
        facts=[*_facts(report.facts), *_end(report)],
        findings=[
            result
            for verdict in (Verdict.FAIL, Verdict.DEVIATES)
            for result in report.results
            if result.verdict is verdict
        ],
        summary=report.summary,
        chapters=[(chapter, results) for chapter, results in chapters if results],
        rows=matrix(report),
        columns=COLUMNS,
        legend=LEGEND,
        words=WORDS,
        signs=SIGNS,
        version=VERSION,
    )


def _end(report: Report) -> list[tuple[str, str]]:
    """Say what kept later checks from being run."""
    ends = [("lost", report.lost)] if report.lost else []
    if report.interrupted:
        ends.append(("interrupted", "by its user, before every check had run"))
    return ends


def _facts(facts: Facts) -> list[tuple[str, str]]:
    found = [
        ("reached by", facts.by),
        ("dialect", str(facts.dialect)),
        ("migration", facts.migration),
    ]
    if facts.identity is not None:
        found.append(("identity", ":".join(f"{part:04x}" for part in facts.identity)))
    if facts.kernel:
        found.append(("kernel", ".".join(map(str, facts.kernel))))
    return found
