"""State of a device read and written by a C program, against a memfd with as many bytes.

Also: how much the serving process grows meanwhile, and what STOP -> STOP_COPY costs for a large
and for a small state.
"""

from __future__ import annotations

import statistics
import subprocess
from functools import partial
from typing import TYPE_CHECKING

from harness import Measurement, compiled, peak, reset_peak, result_of, serve

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ("measure",)

CHUNK = 1 << 20
MIB = 1 << 20


def measure(size: str = "1G", rounds: int = 5) -> list[Measurement]:
    reading, writing, growth = [], [], 0
    with compiled("stream") as binary:
        for _ in range(rounds):
            before = reset_peak()
            pair = partial(serve, [f"pattern,size={size}"] * 2)
            read_s, write_s, total = result_of(binary, pair, CHUNK, "device")
            growth = max(growth, peak() - before - 2 * int(total) // 1024)
            plain_read, plain_write, _ = result_of(binary, run_plainly, CHUNK, "memfd", int(total))
            reading.append((plain_read / read_s, total / read_s / 2**30))
            writing.append((plain_write / write_s, total / write_s / 2**30))
        large, small = (
            result_of(binary, partial(serve, [f"pattern,size={one}"]), CHUNK, "arc")[0]
            for one in (size, "1M")
        )
    return [
        _speed("state read against a memfd", reading),
        _speed("state written against a memfd", writing),
        Measurement("serving process grows (MiB)", growth / 1024, at_most=64),
        Measurement(
            f"STOP -> STOP_COPY: {size} against 1M",
            large / small,
            at_most=3,
            details={"large_us": large / 1000, "small_us": small / 1000},
        ),
    ]


def run_plainly(argv: list[str | Path]) -> None:
    subprocess.run(argv, check=True)


def _speed(name: str, rounds: list[tuple[float, float]]) -> Measurement:
    ratio = statistics.median(ratio for ratio, _ in rounds)
    details: dict[str, object] = {"GiB_per_s": [round(speed, 2) for _, speed in rounds]}
    return Measurement(name, ratio, at_least=0.5, details=details)
