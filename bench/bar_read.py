"""A 4-byte read of a trapped BAR by a C program, against GET of the state, which decides more.

``pattern`` has plain memory there; ``virtio_blk`` answers with a handler.
"""

from __future__ import annotations

import statistics
from functools import partial

from harness import Measurement, compiled, result_of, serve

__all__ = ("measure",)

#: What is served, and the BAR that is read.
DEVICES = {"memory": ("pattern,size=1M", 0), "a handler": ("virtio_blk,size=1M", 4)}


def measure(count: int = 20_000, rounds: int = 5) -> list[Measurement]:
    found = []
    with compiled("get_loop") as binary:
        for name, (spec, bar) in DEVICES.items():
            ratios, medians = [], []
            for _ in range(rounds):
                start = partial(serve, [spec])
                get, _ = result_of(binary, start, count)
                read, _ = result_of(binary, start, count, "bar", bar)
                ratios.append(read / get)
                medians.append((round(read / 1000, 1), round(get / 1000, 1)))
            found.append(
                Measurement(
                    f"read of a BAR against GET: {name}",
                    statistics.median(ratios),
                    at_most=1.5,
                    details={"us": medians},
                )
            )
    return found
