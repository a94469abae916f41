"""``vfiomig check`` as a whole: a small state against its bar, a large one against moving it.

Most checks of a large state save it, load it, or both; what they add to that is the checker's own
work. ``python bench/check_suite.py`` prints the results as JSON.
"""

from __future__ import annotations

import json
import mmap
import statistics
import sys
import time
from dataclasses import asdict

from harness import Measurement

from vfiomig import State
from vfiomig.checks import CHECKS, Suite
from vfiomig.client import open_target, target_maker

__all__ = ("checked", "cycle", "measure")

CHUNK = 1 << 20
#: Seconds that all checks of a local model may take.
BAR = 10.0


def checked(spec: str) -> float:
    """Return the seconds that all checks of a model take."""
    begin = time.perf_counter()
    with Suite(target_maker(f"model:{spec}")) as suite:
        report = suite.run(CHECKS)
    if report.failed or report.lost:
        raise SystemExit(f"{spec} does not keep the protocol: {report.failed[0].saw}")
    return time.perf_counter() - begin


def cycle(spec: str, times: int = 4) -> float:
    """Return the seconds that saving the state of a model, a reset and loading it again take."""
    with open_target(f"model:{spec}") as device, mmap.mmap(-1, 2 * device.data_size()) as memory:
        begin = time.perf_counter()
        for _ in range(times):
            size = 0
            with device.set_state(State.STOP_COPY) as saving, memoryview(memory) as room:
                while count := saving.readinto(room[size : size + CHUNK]):
                    size += count
            device.reset()
            with device.set_state(State.RESUMING) as loading, memoryview(memory) as state:
                loading.write_all(state[:size])
                device.set_state(State.STOP)
        return (time.perf_counter() - begin) / times


def measure(small: str = "1M", large: str = "64M", rounds: int = 3) -> list[Measurement]:
    checked("counter")  # imports are nobody's time
    seconds = [checked(f"pattern,size={small}") for _ in range(rounds)]
    pairs = []
    for _ in range(rounds):
        moved = cycle(f"pattern,size={large}")
        pairs.append((checked(f"pattern,size={large}"), moved))
    return [
        Measurement(
            f"all {len(CHECKS)} checks of a model of {small}, against {BAR:g} s",
            statistics.median(seconds) / BAR,
            at_most=1.0,
            details={"seconds": [round(one, 2) for one in seconds]},
        ),
        Measurement(
            f"all checks of a model of {large}, against saving and loading it once",
            statistics.median(whole / moved for whole, moved in pairs),
            at_most=80.0,
            details={"seconds": [(round(a, 2), round(b, 3)) for a, b in pairs]},
        ),
    ]


if __name__ == "__main__":
    results = measure()
    json.dump([asdict(one) | {"kept": one.kept} for one in results], sys.stdout, indent=2)
    print()
