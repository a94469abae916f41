"""GET of the state through the door, against a loop over the same mechanism that decides nothing."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import bare_loop
from harness import Measurement, compiled, result_of, serve

__all__ = ("measure",)


def measure(count: int = 20_000, rounds: int = 5) -> list[Measurement]:
    ratios, medians = [], []
    with tempfile.TemporaryDirectory() as folder, compiled("get_loop") as binary:
        client = bare_loop.compile_client(Path(folder))
        for _ in range(rounds):
            bare = bare_loop.measure(client, count)["median_us"]
            median, _ = result_of(binary, lambda argv: serve(["pattern,size=1M"], argv), count)
            ratios.append(median / 1000 / bare)
            medians.append((round(median / 1000, 1), round(bare, 1)))
        busy = [
            result_of(binary, lambda argv: serve(["pattern,size=64M,dirty=1000G"], argv), count)[1]
            for _ in range(rounds)
        ]
    return [
        Measurement(
            "GET against the bare loop",
            statistics.median(ratios),
            at_most=2.5,
            details={"us": medians},
        ),
        Measurement(
            "GET beside full-rate rewriting, 99th percentile (ms)",
            statistics.median(busy) / 1e6,
            at_most=1,
            details={"ms": [round(late / 1e6, 3) for late in busy]},
        ),
    ]
