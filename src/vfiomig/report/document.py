"""A report of checks, and the checks themselves, as one JSON document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfiomig.checks import Check, Report

__all__ = ("as_data", "checks_as_data")


def as_data(report: Report) -> dict[str, Any]:
    """Everything that machines want to know; ``saw`` holds the reason of what was not run."""
    return {
        "target": report.target,
        "summary": {str(verdict): count for verdict, count in report.summary.items()},
        "checks": [
            {
                "id": result.check.id,
                "verdict": str(result.verdict),
                "clause": result.check.clause,
                "did": result.did,
                "expected": result.expected,
                "saw": result.saw,
            }
            for result in report.results
        ],
    }


def checks_as_data(checks: Iterable[Check]) -> dict[str, Any]:
    """What checks are about, whatever device they are run on."""
    return {
        "checks": [
            {
                "id": check.id,
                "chapter": check.chapter,
                "rule": check.sentence,
                "explanation": check.explanation,
                "clause": check.clause,
                "only_for": check.conditions,
                "danger": check.danger and f"{check.danger.what} ({check.danger.rule})",
            }
            for check in checks
        ]
    }
