"""A card with every kind of declaration, and the places of its capabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiomig import Capability, Device, PciIdentity, Region
from vfiomig.device import (
    ConfigurationSpace,
    Msi,
    Msix,
    PciExpress,
    PowerManagement,
    VendorCapability,
)

if TYPE_CHECKING:
    from vfiomig.errors import DeviceError

__all__ = ("EXPRESS", "MSI", "MSIX", "POWER", "VENDOR", "Card", "space_of")

POWER, MSI, MSIX, EXPRESS, VENDOR = 0x40, 0x48, 0x60, 0x6C, 0xA8


class Card(Device):
    """BAR0 is I/O, BAR1 small memory; BAR2 has 64 bits, MSI-X and mapped pages."""

    pci = PciIdentity(
        0x1234, 0x5678, 0x9ABC, 0xDEF0, class_code=0x070002, revision=3, command=1, status=0x200
    )
    interrupt_pin = 2
    bar0 = Region(size=8, io=True)
    bar1 = Region(size=4096)
    bar2 = Region(
        size=32768,
        bits64=True,
        prefetchable=True,
        mapped=((0x1000, 0x2000), (0x5000, 0x1000)),
    )
    pci_capabilities = (
        PowerManagement(),
        Msi(vectors=4, maskable=True),
        Msix(vectors=70, table=(2, 0x100), pending=(2, 0x800)),
        PciExpress(flr=True),
        VendorCapability(b"\x01\x02\x03\x04\x05", writable=b"\x00\xf0"),
    )
    capabilities = Capability.STOP_COPY | Capability.P2P

    def __init__(self) -> None:
        self.accesses: list[tuple[int, int | bytes]] = []
        self.resets = 0
        self.refuses: DeviceError | None = None

    @bar2.reader
    def read_bar2(self, offset: int, length: int) -> bytes:
        self.accesses.append((offset, length))
        return b"\xee" * length

    @bar2.writer
    def write_bar2(self, offset: int, data: bytes) -> None:
        self.accesses.append((offset, data))

    def reset(self) -> None:
        self.resets += 1
        if self.refuses is not None:
            raise self.refuses


def space_of(device: Device | type[Device]) -> ConfigurationSpace:
    return ConfigurationSpace(
        device.pci, device.regions, device.interrupt_pin, device.pci_capabilities
    )
