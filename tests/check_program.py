"""``vfiomig check`` for the tests: a program that opens its target itself, under any front door.

``python check_program.py TARGET [PATTERN...]`` runs the checks, with the levers of
devices/drilled.py, and prints what came of them as JSON: every result that is no pass, by its id.
"""

from __future__ import annotations

import json
import sys

from devices.drilled import LEVERS
from vfiomig.checks import Suite, Verdict, choose
from vfiomig.client import target_maker


def main(target: str, *only: str) -> None:
    with Suite(target_maker(target), target, levers=LEVERS, dangerous=True) as suite:
        report = suite.run(choose(only))
    others = {
        result.check.id: [str(result.verdict), result.saw]
        for result in report.results
        if result.verdict is not Verdict.PASS
    }
    print(json.dumps({"checks": len(report.results), "others": others}))


if __name__ == "__main__":
    main(*sys.argv[1:])
