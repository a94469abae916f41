"""Does a device keep the protocol? Checks for it, each with the rule it rests on and evidence.

``table`` holds the checks, one chapter a module; ``suite`` runs them on a target, one client
after the other from a maker. A check compares what a device does with what docs/protocol.md says
of every device; what is written there of known drivers it reports as a deviation.
"""

from __future__ import annotations

from vfiomig.checks.check import Check, Levers
from vfiomig.checks.evidence import Verdict
from vfiomig.checks.facts import Facts, Shows
from vfiomig.checks.subject import Subject
from vfiomig.checks.suite import DEADLINE, Report, Result, Suite
from vfiomig.checks.table import CHAPTERS, CHECKS, choose, find

__all__ = (
    "CHAPTERS",
    "CHECKS",
    "DEADLINE",
    "Check",
    "Facts",
    "Levers",
    "Report",
    "Result",
    "Shows",
    "Subject",
    "Suite",
    "Verdict",
    "choose",
    "find",
)
