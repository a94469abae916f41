"""A device that counts what is written to it, and interrupts when told to."""

from __future__ import annotations

from vfiomig import Device, Region
from vfiomig.device import Msix

__all__ = (
    "COUNT",
    "DIGEST",
    "MODULUS",
    "PENDING",
    "RING",
    "TABLE",
    "VALUE",
    "VECTORS",
    "Switchboard",
)

#: Offsets in BAR0.
VALUE, RING, COUNT, DIGEST = 0, 4, 8, 12
MODULUS = (1 << 31) - 1
#: More than a message has descriptors for.
VECTORS = 40
#: Offsets in BAR2.
TABLE, PENDING = 0, 0x800


class Switchboard(Device):
    """BAR0: what is written to VALUE is counted, a vector written to RING is sent.

    COUNT says how many values there were, DIGEST which ones in which order. BAR2 has the tables
    of MSI-X. No page can be mapped: then QEMU waits for every write.
    """

    bar0 = Region(size=4096)
    bar2 = Region(size=4096)
    pci_capabilities = (Msix(vectors=VECTORS, table=(2, TABLE), pending=(2, PENDING)),)

    def __init__(self) -> None:
        self._count = self._digest = 0

    def reset(self) -> None:
        self._count = self._digest = 0

    @bar0.reader
    def read_bar0(self, offset: int, length: int) -> bytes:
        return {COUNT: self._count, DIGEST: self._digest}.get(offset, 0).to_bytes(length, "little")

    @bar0.writer
    def write_bar0(self, offset: int, data: bytes) -> None:
        number = int.from_bytes(data, "little")
        if offset == VALUE:
            self._count += 1
            self._digest = (self._digest * 31 + number) % MODULUS
        elif offset == RING:
            self.interrupts.msix(number)
