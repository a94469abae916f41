"""PCI capabilities that a device may declare, and the registers that each is made of.

A capability is its bytes in configuration space, and a write mask of the same length: a bit of a
register changes by a write where the mask has a one. The first two bytes, its id and the link to
the next, are filled in by ``configuration``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from vfiomig.abi import pci

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = (
    "Msi",
    "Msix",
    "PciCapability",
    "PciExpress",
    "PowerManagement",
    "RegionWindow",
    "Registers",
    "VendorCapability",
    "find_capability",
)

C = TypeVar("C")


class Registers:
    """Bytes with a write mask, built register by register. All are zero and read-only at first."""

    def __init__(self, size: int) -> None:
        self.values = bytearray(size)
        self.mask = bytearray(size)

    def put(self, at: int, width: int, value: int, writable: int = 0) -> None:
        """Set the register of ``width`` bytes at offset ``at``, and which of its bits change."""
        self.values[at : at + width] = value.to_bytes(width, "little")
        self.mask[at : at + width] = writable.to_bytes(width, "little")


class PciCapability(Protocol):
    """What ``pci_capabilities`` is made of."""

    @property
    def id(self) -> int:
        """``PCI_CAP_ID_...``."""

    def registers(self) -> Registers:
        """Make the capability as it is after power-on."""


@dataclass(frozen=True, slots=True)
class PowerManagement:
    """Power states D0 and D3hot; waking up from D3hot loses nothing."""

    id: ClassVar[int] = pci.PCI_CAP_ID_PM

    def registers(self) -> Registers:
        made = Registers(pci.PCI_PM_SIZEOF)
        made.put(pci.PCI_PM_PMC, 2, 0x0003)  # version 1.2, no power management events
        made.put(
            pci.PCI_PM_CTRL, 2, pci.PCI_PM_CTRL_NO_SOFT_RESET, writable=pci.PCI_PM_CTRL_STATE_MASK
        )
        return made


@dataclass(frozen=True, slots=True)
class Msi:
    """Message signalled interrupts, with 64-bit addresses.

    ``maskable``: each vector has a mask and a pending bit.
    """

    id: ClassVar[int] = pci.PCI_CAP_ID_MSI
    vectors: int = 1
    maskable: bool = False

    def __post_init__(self) -> None:
        if self.vectors not in {1, 2, 4, 8, 16, 32}:
            raise ValueError(f"MSI has 1, 2, 4, 8, 16 or 32 vectors, not {self.vectors}")

    def registers(self) -> Registers:
        flags = pci.PCI_MSI_FLAGS_64BIT | (self.vectors.bit_length() - 1) << 1
        flags |= pci.PCI_MSI_FLAGS_MASKBIT * self.maskable
        made = Registers(pci.PCI_MSI_PENDING_64 + 4 if self.maskable else pci.PCI_MSI_DATA_64 + 2)
        # The enable bit is not writable: it shows what SET_IRQS has done.
        made.put(pci.PCI_MSI_FLAGS, 2, flags, writable=pci.PCI_MSI_FLAGS_QSIZE)
        made.put(pci.PCI_MSI_ADDRESS_LO, 4, 0, writable=0xFFFF_FFFC)
        made.put(pci.PCI_MSI_ADDRESS_HI, 4, 0, writable=0xFFFF_FFFF)
        made.put(pci.PCI_MSI_DATA_64, 2, 0, writable=0xFFFF)
        if self.maskable:
            made.put(pci.PCI_MSI_MASK_64, 4, 0, writable=(1 << self.vectors) - 1)
        return made


@dataclass(frozen=True, slots=True)
class Msix:
    """MSI-X: ``table`` and ``pending`` say where the two structures lie, as (BAR, offset)."""

    id: ClassVar[int] = pci.PCI_CAP_ID_MSIX
    vectors: int
    table: tuple[int, int]
    pending: tuple[int, int]

    def __post_init__(self) -> None:
        if not 1 <= self.vectors <= 2048:
            raise ValueError(f"MSI-X has 1 to 2048 vectors, not {self.vectors}")
        for name, (_, offset) in (("table", self.table), ("pending", self.pending)):
            if offset % 8:
                raise ValueError(f"the MSI-X {name} begins at a multiple of 8, not at {offset:#x}")

    @property
    def table_size(self) -> int:
        return self.vectors * pci.PCI_MSIX_ENTRY_SIZE

    @property
    def pending_size(self) -> int:
        return -(-self.vectors // 64) * 8

    def registers(self) -> Registers:
        made = Registers(pci.PCI_CAP_MSIX_SIZEOF)
        # As in vfio-pci nothing here is writable: SET_IRQS enables, and is shown to have.
        made.put(pci.PCI_MSIX_FLAGS, 2, self.vectors - 1)
        made.put(pci.PCI_MSIX_TABLE, 4, self.table[1] | self.table[0])
        made.put(pci.PCI_MSIX_PBA, 4, self.pending[1] | self.pending[0])
        return made


@dataclass(frozen=True, slots=True)
class PciExpress:
    """A PCI Express endpoint; configuration space is then 4096 bytes.

    ``flr``: writing ``PCI_EXP_DEVCTL_BCR_FLR`` resets the function.
    """

    id: ClassVar[int] = pci.PCI_CAP_ID_EXP
    flr: bool = True

    def registers(self) -> Registers:
        made = Registers(0x3C)  # all registers of version 2
        made.put(pci.PCI_EXP_FLAGS, 2, 0x0002)  # version 2, endpoint
        made.put(pci.PCI_EXP_DEVCAP, 4, pci.PCI_EXP_DEVCAP_RBER | pci.PCI_EXP_DEVCAP_FLR * self.flr)
        # Relaxed ordering, no snoop, reads of 512 bytes. The bit that asks for FLR reads as zero.
        made.put(pci.PCI_EXP_DEVCTL, 2, 0x2810, writable=0x78FF)
        made.put(pci.PCI_EXP_LNKCAP, 4, 0x0011)  # one lane of 2.5 GT/s
        made.put(pci.PCI_EXP_LNKCTL, 2, 0, writable=0x00C3)
        made.put(pci.PCI_EXP_LNKSTA, 2, 0x0011)
        made.put(pci.PCI_EXP_LNKCAP2, 4, 0x0002)
        made.put(pci.PCI_EXP_LNKCTL2, 2, 0x0001)
        return made


@dataclass(frozen=True, slots=True)
class VendorCapability:
    """A capability of the vendor's own: ``data`` follows its id, link and length.

    ``writable`` is the write mask of the first bytes of ``data``; behind it all is read-only.
    """

    id: ClassVar[int] = pci.PCI_CAP_ID_VNDR
    data: bytes
    writable: bytes = b""

    def __post_init__(self) -> None:
        if len(self.data) > 252:
            raise ValueError("a vendor capability has at most 252 bytes of data")
        if len(self.writable) > len(self.data):
            raise ValueError("the write mask of a vendor capability is longer than its data")

    def registers(self) -> Registers:
        made = Registers(3 + len(self.data))
        made.put(2, 1, len(made.values))
        made.values[3:] = self.data
        made.mask[3 : 3 + len(self.writable)] = self.writable
        return made


@dataclass(frozen=True, slots=True)
class RegionWindow:
    """A way to the regions through configuration space: ``struct virtio_pci_cfg_cap``.

    A program says where: BAR, offset, and a length of 1, 2 or 4 bytes. What it then reads or
    writes in the last four bytes is read or written there; no code of the device is needed but
    for what ``save`` and ``load`` do with the place. See "PCI configuration access capability" in
    the VIRTIO specification, version 1.2.
    """

    id: ClassVar[int] = pci.PCI_CAP_ID_VNDR
    #: Bytes of the capability, and where in it the place and the data begin.
    SIZE: ClassVar[int] = 20
    PLACE: ClassVar[int] = 4
    DATA: ClassVar[int] = 16
    DATA_SIZE: ClassVar[int] = 4

    def registers(self) -> Registers:
        made = Registers(self.SIZE)
        made.put(2, 1, self.SIZE)
        made.put(3, 1, 5)  # VIRTIO_PCI_CAP_PCI_CFG
        made.put(4, 1, 0, writable=0xFF)
        made.put(8, 4, 0, writable=0xFFFF_FFFF)
        made.put(12, 4, 0, writable=0xFFFF_FFFF)
        made.put(self.DATA, 4, 0, writable=0xFFFF_FFFF)
        return made

    @classmethod
    def where(cls, registers: bytes) -> tuple[int, int, int]:
        """Return BAR, offset and length that the capability's bytes name."""
        offset, length = (int.from_bytes(registers[at : at + 4], "little") for at in (8, 12))
        return registers[4], offset, length


def find_capability(capabilities: Iterable[PciCapability], kind: type[C]) -> C | None:
    """Return the first capability of that kind, if one is declared."""
    return next((one for one in capabilities if isinstance(one, kind)), None)
