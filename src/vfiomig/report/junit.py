"""A report of checks in the form that build servers read: one test case for each check.

A check that fails is a failure, and one that was not run because the device is lost an error.
What else was not run, or is not applicable, is skipped, with the reason; a deviation passes, and
says in its output what it is.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Final

from vfiomig.checks import Verdict

if TYPE_CHECKING:
    from vfiomig.checks import Report, Result

__all__ = ("as_junit",)

#: What XML 1.0 cannot hold, not even escaped.
ILLEGAL: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
SKIPPED: Final = (Verdict.NOT_APPLICABLE, Verdict.NOT_RUN)


def as_junit(report: Report) -> str:
    """Return the document."""
    summary = report.summary
    lost = sum(_is_lost(result, report) for result in report.results)
    suite = ET.Element(
        "testsuite",
        name=_legal(f"vfiomig check {report.target}"),
        tests=str(len(report.results)),
        failures=str(summary[Verdict.FAIL]),
        errors=str(lost),
        skipped=str(sum(summary[verdict] for verdict in SKIPPED) - lost),
        time=f"{sum(result.seconds for result in report.results):.3f}",
    )
    for result in report.results:
        suite.append(_case(result, is_lost=_is_lost(result, report)))
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _is_lost(result: Result, report: Report) -> bool:
    return result.verdict is Verdict.NOT_RUN and result.saw == report.lost


def _case(result: Result, *, is_lost: bool) -> ET.Element:
    case = ET.Element(
        "testcase",
        classname=f"vfiomig.{result.check.chapter}",
        name=result.check.id,
        time=f"{result.seconds:.3f}",
    )
    saw = _legal(result.saw)
    if result.verdict is Verdict.FAIL:
        ET.SubElement(case, "failure", message=saw).text = _evidence(result)
    elif result.verdict in SKIPPED:
        ET.SubElement(case, "error" if is_lost else "skipped", message=saw)
    elif result.verdict is Verdict.DEVIATES:
        ET.SubElement(case, "system-out").text = f"deviates\n{_evidence(result)}"
    return case


def _evidence(result: Result) -> str:
    lines = (
        result.check.sentence,
        f"clause: {result.check.clause}",
        f"did: {result.did}",
        f"expected: {result.expected}",
        f"saw: {result.saw}",
    )
    return _legal("\n".join(lines))


def _legal(text: str) -> str:
    return ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)
