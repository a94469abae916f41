"""``counter``: the smallest device with a life of its own, an example of style."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

from vfiomig.device import Buffer, Device, PciIdentity, Region, StateReader
from vfiomig.errors import SpecError, StateRejected
from vfiomig.fsm import Capability

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Counter",)

#: The whole state: which device, and what it had counted.
STATE = struct.Struct("<8sQ")
NAME = b"counter1"
COUNT_BYTES = 8


class Counter(Device):
    """Counts while it runs; the first 8 bytes of BAR0 show the count, little endian.

    Keys:
      rate     counts per second, K, M, G allowed (1000)
    """

    pci = PciIdentity(vendor=0x1AF4, device=0x10F1)
    bar0 = Region(size=4096, writable=False)
    capabilities = Capability.STOP_COPY | Capability.P2P

    def __init__(self, rate: int = 1000) -> None:
        if rate < 1:
            raise SpecError(f"rate={rate}: give counts per second, 1 or greater")
        self._rate = rate
        #: The count of the last stop, and since when it has been running again.
        self._clock: tuple[int, float | None] = (0, None)

    @property
    def count(self) -> int:
        """The count: nothing ticks, it follows from how long the device has been running."""
        counted, since = self._clock
        running = 0.0 if since is None else time.monotonic() - since
        return (counted + int(running * self._rate)) % (1 << 64)

    def start(self) -> None:
        self._clock = (self.count, time.monotonic())

    quiesce = start  # no peer-to-peer traffic: P2P quiescent, it goes on counting

    def stop(self) -> None:
        self._clock = (self.count, None)

    def reset(self) -> None:
        runs = self._clock[1] is not None
        self._clock = (0, time.monotonic() if runs else None)

    @bar0.reader
    def read_bar0(self, offset: int, length: int) -> bytes:
        registers = self.count.to_bytes(COUNT_BYTES, "little")
        return registers[offset : offset + length].ljust(length, b"\0")

    def save(self) -> Iterator[Buffer]:
        yield STATE.pack(NAME, self.count)

    def load(self, state: StateReader) -> None:
        content = state.read(STATE.size + 1)
        if len(content) != STATE.size or not content.startswith(NAME):
            raise StateRejected(f"a counter's state is {STATE.size} bytes that begin with {NAME!r}")
        self._clock = (STATE.unpack(content)[1], None)
