"""A report of checks as one JSON document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vfiomig.checks import Report

__all__ = ("as_data",)


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
