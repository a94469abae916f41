"""A device that makes DMA when it is told to, in the hook of the write or in a thread of its own."""

from __future__ import annotations

import threading

from vfiomig import Device, DeviceError, Region
from vfiomig.fsm import Capability

__all__ = ("DONE", "FAILED", "PATTERN", "READ", "READ_APART", "WRITE", "WRITE_APART", "Engine")

READ, WRITE, READ_APART, WRITE_APART = range(1, 5)
DONE, FAILED = 1, 2
JOIN_SECONDS = 20.0
PATTERN = bytes(range(256)) * (64 << 10)


class Engine(Device):
    """BAR0: u64 IOVA at 0, u64 length at 8, a command at 16 that starts; 24 is what came of it.

    ``memory`` is what it writes, and where it reads to; a reset brings PATTERN back.
    """

    capabilities = Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY
    bar0 = Region(size=32)

    def __init__(self) -> None:
        self.memory = bytearray(PATTERN)
        self._iova = self._length = 0
        self.result = 0
        self.problem = ""
        self._thread: threading.Thread | None = None

    def reset(self) -> None:
        self.stop()
        self.memory[:] = PATTERN

    def precopy(self) -> list[bytes]:
        return [b"early"]

    def stop(self) -> None:
        """Finish what is under way, as the contract of STOP says."""
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)
            assert not self._thread.is_alive()
            self._thread = None

    @bar0.reader
    def read_bar0(self, offset: int, length: int) -> bytes:
        return (self.result if offset == 24 else 0).to_bytes(length, "little")

    @bar0.writer
    def write_bar0(self, offset: int, data: bytes) -> None:
        number = int.from_bytes(data, "little")
        if offset == 0:
            self._iova = number
        elif offset == 8:
            self._length = number
        elif offset == 16:
            self.result = 0
            if number in {READ, WRITE}:
                self._work(number)
            else:
                self.stop()
                self._thread = threading.Thread(target=self._work, args=(number - 2,), daemon=True)
                self._thread.start()

    def _work(self, command: int) -> None:
        view = memoryview(self.memory)[: self._length]
        try:
            if command == READ:
                self.dma.read_into(self._iova, view)
            else:
                self.dma.write(self._iova, view)
        except DeviceError as problem:
            self.problem = str(problem)
            self.result = FAILED
        else:
            self.result = DONE
