"""Many devices of 1 MiB migrated in one process: nothing may grow with their number.

All sources are open before the first migration begins, and every destination stays open and
running to the end. The device is plain memory: one that makes its content would hide in its own
work what is measured. ``python bench/many_devices.py`` prints the result as JSON.
"""

from __future__ import annotations

import json
import mmap
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING

from harness import Measurement

from vfiomig import Capability, Device, DeviceClient, State, StateReader, StateRejected
from vfiomig.client import open_device

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("measure", "migrate", "per_device")

MIB = 1 << 20
END = b"end"


class Block(Device):
    """1 MiB of state, offered early."""

    capabilities = Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, MIB))  # new pages for each, few or many
        self.memory[::4096] = bytes(MIB // 4096)

    def precopy(self) -> Iterator[memoryview]:
        yield self.memory

    def save(self) -> Iterator[bytes]:
        yield END

    def load(self, state: StateReader) -> None:
        if state.readinto(self.memory) < MIB or state.read(len(END) + 1) != END:
            raise StateRejected("not 1 MiB and an end")


def migrate(source: DeviceClient, destination: DeviceClient, buffer: bytearray) -> int:
    """Migrate with everything that the devices have; return the bytes of the stream."""
    view = memoryview(buffer)
    with (
        source.set_state(State.PRE_COPY) as saving,
        destination.set_state(State.RESUMING) as loading,
    ):
        for state in (State.PRE_COPY, State.STOP_COPY):
            source.set_state(state)
            while count := saving.readinto(view):
                loading.write_all(view[:count])
        source.set_state(State.STOP)
        destination.set_state(State.RUNNING)
        return loading.transferred


def per_device(count: int) -> float:
    """Return the seconds that each of ``count`` migrations takes, opens and closes included."""
    buffer = bytearray(MIB)
    begin = time.perf_counter()
    with ExitStack() as stack:
        sources = [stack.enter_context(open_device(Block())) for _ in range(count)]
        for source in sources:
            destination = stack.enter_context(open_device(Block()))
            if migrate(source, destination, buffer) != MIB + len(END):
                raise SystemExit("a stream of another length than 1 MiB and an end")
            source.close()
    return (time.perf_counter() - begin) / count


def measure(many: int = 1000, few: int = 10, rounds: int = 3) -> list[Measurement]:
    per_device(few)  # imports and caches are nobody's time
    pairs = []
    for _ in range(rounds):
        # As many migrations on either side, so that both meet the same noise.
        of_few = statistics.fmean(per_device(few) for _ in range(many // few))
        pairs.append((per_device(many), of_few))
    return [
        Measurement(
            f"{many} devices of 1 MiB against {few}, time for each",
            statistics.median(of_many / of_few for of_many, of_few in pairs),
            at_most=1.5,
            details={"ms": [(round(a * 1e3, 2), round(b * 1e3, 2)) for a, b in pairs]},
        )
    ]


if __name__ == "__main__":
    (result,) = measure()
    json.dump(asdict(result) | {"kept": result.kept}, sys.stdout, indent=2)
    print()
