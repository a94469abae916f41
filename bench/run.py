"""Run the measurements and compare them with their bars.

``python bench/run.py [NAME ...] [--quick] [--json]``; exit code 1 if a bar is not kept.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness import Measurement

#: Module and its arguments for a look that takes seconds.
SUITE: dict[str, dict[str, object]] = {
    "state_stream": {"size": "128M", "rounds": 1},
    "get_state": {"count": 2000, "rounds": 1},
    "bar_read": {"count": 2000, "rounds": 1},
    "many_devices": {"many": 40, "few": 4, "rounds": 1},
    "check_suite": {"large": "16M", "rounds": 1},
    "vfio_user": {"size": "32M", "count": 1000, "rounds": 1},
    "virtio_disk": {"count": 500, "rounds": 1},
    "downtime": {"rounds": 1},
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", choices=[*SUITE, []], help="all by default")
    options.add_argument("--quick", action="store_true", help="small sizes, one round")
    options.add_argument("--json", action="store_true", help="results as JSON on stdout")
    chosen = options.parse_args()
    results: list[Measurement] = []
    for name in chosen.names or SUITE:
        print(f"{name} ...", file=sys.stderr)
        measure = importlib.import_module(name).measure
        results += measure(**(SUITE[name] if chosen.quick else {}))
    if chosen.json:
        print(json.dumps([asdict(result) | {"kept": result.kept} for result in results], indent=2))
    else:
        for result in results:
            print(render(result))
    return 0 if all(result.kept for result in results) else 1


def render(result: Measurement) -> str:
    bar = f">= {result.at_least}" if result.at_least is not None else f"<= {result.at_most}"
    mark = "ok  " if result.kept else "MISS"
    return f"{mark} {result.name}: {result.ratio:.2f} ({bar})  {result.details or ''}"


if __name__ == "__main__":
    sys.exit(main())
