"""Configuration space of a device: what its class declares, and a write mask for every bit.

Theory of operation
-------------------
The space is bytes and a mask; a write changes the bits where the mask has ones, so sizing a BAR
by writing all ones needs no code: the low bits of its address are not writable. What is more than
that is said here:

* an unsupported power state (D1, D2) and more MSI messages than the device can send are not taken
  over, as the registers' definitions want it;
* the bits that enable MSI and MSI-X are read-only and show what SET_IRQS has done, and the
  interrupt status shows the pin: ``show`` sets such bits from inside.

As with vfio-pci the space outlives resets: whoever resets a device through VFIO finds its command
register and its BARs as they were. The next first open starts from power-on values, with the
regions decoded and without bus mastering, as the kernel hands a device over.

Layouts: include/uapi/linux/pci_regs.h; PCI Local Bus 3.0 chapter 6, PCI Express Base chapter 7.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from vfiomig.abi import pci
from vfiomig.device.capabilities import (
    Msi,
    Msix,
    PciExpress,
    PowerManagement,
    Registers,
    find_capability,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vfiomig.device.capabilities import PciCapability
    from vfiomig.device.region import PciIdentity, Region

__all__ = ("ConfigurationSpace",)


class ConfigurationSpace:
    """Configuration space of one device. Safe for concurrent use.

    Raises ``ValueError`` if what is declared does not fit together.
    """

    def __init__(
        self,
        identity: PciIdentity,
        regions: Mapping[int, Region],
        pin: int = 0,
        capabilities: Iterable[PciCapability] = (),
    ) -> None:
        self.capabilities = tuple(capabilities)
        self.pin = pin
        #: Where each capability begins, by its class.
        self.places: dict[type, int] = {}
        self.express = find_capability(self.capabilities, PciExpress)
        self.size = pci.PCI_CFG_SPACE_EXP_SIZE if self.express else pci.PCI_CFG_SPACE_SIZE
        registers = Registers(self.size)
        _put_header(registers, identity, regions, pin)
        _put_bars(registers, regions)
        self._put_capabilities(registers)
        _check_msix(find_capability(self.capabilities, Msix), regions)
        for region in regions.values():
            decode = pci.PCI_COMMAND_IO if region.io else pci.PCI_COMMAND_MEMORY
            registers.values[pci.PCI_COMMAND] |= decode
        registers.values[pci.PCI_COMMAND] &= ~pci.PCI_COMMAND_MASTER
        self._power_on = bytes(registers.values)
        self._bytes = registers.values
        self._mask = registers.mask
        self._lock = threading.Lock()
        #: Whether the function answers accesses to its memory and I/O regions, and may do DMA.
        self.decodes_memory = self.decodes_io = self.masters = False
        self._settle_locked()

    def _put_capabilities(self, registers: Registers) -> None:
        at = pci.PCI_STD_HEADER_SIZEOF
        link = pci.PCI_CAPABILITY_LIST
        for capability in self.capabilities:
            made = capability.registers()
            end = at + len(made.values)
            if end > pci.PCI_CFG_SPACE_SIZE:
                raise ValueError(f"{type(capability).__name__} does not fit into 256 bytes")
            registers.values[at:end] = made.values
            registers.mask[at:end] = made.mask
            registers.values[at] = capability.id
            registers.values[link] = at
            self.places.setdefault(type(capability), at)
            link, at = at + pci.PCI_CAP_LIST_NEXT, end + 3 & ~3
        if self.capabilities:
            registers.values[pci.PCI_STATUS] |= pci.PCI_STATUS_CAP_LIST

    # What a program does.

    def read(self, at: int, length: int) -> bytes:
        """Read bytes that lie inside the space."""
        with self._lock:
            return bytes(self._bytes[at : at + length])

    def write(self, at: int, data: bytes) -> None:
        """Write to a place inside the space."""
        with self._lock:
            before = bytes(self._bytes)
            for offset, byte in enumerate(data, at):
                mask = self._mask[offset]
                self._bytes[offset] = self._bytes[offset] & ~mask | byte & mask
            self._keep_power_state_locked(before)
            self._limit_messages_locked()
            self._settle_locked()

    def asks_for_flr(self, at: int, data: bytes) -> bool:
        """Tell whether a write asks for a function level reset."""
        if self.express is None or not self.express.flr:
            return False
        # The bit is in the upper byte of its register.
        offset = self.places[PciExpress] + pci.PCI_EXP_DEVCTL + 1 - at
        return 0 <= offset < len(data) and bool(data[offset] & pci.PCI_EXP_DEVCTL_BCR_FLR >> 8)

    def _keep_power_state_locked(self, before: bytes) -> None:
        if PowerManagement in self.places:
            at = self.places[PowerManagement] + pci.PCI_PM_CTRL
            if self._bytes[at] & pci.PCI_PM_CTRL_STATE_MASK in {1, 2}:
                self._bytes[at] = before[at]

    def _limit_messages_locked(self) -> None:
        if Msi in self.places:
            at = self.places[Msi] + pci.PCI_MSI_FLAGS
            capable = (self._bytes[at] & pci.PCI_MSI_FLAGS_QMASK) >> 1
            if (self._bytes[at] & pci.PCI_MSI_FLAGS_QSIZE) >> 4 > capable:
                self._bytes[at] = self._bytes[at] & ~pci.PCI_MSI_FLAGS_QSIZE | capable << 4

    def _settle_locked(self) -> None:
        command = self._bytes[pci.PCI_COMMAND]
        awake = True
        if PowerManagement in self.places:
            state = self._bytes[self.places[PowerManagement] + pci.PCI_PM_CTRL]
            awake = not state & pci.PCI_PM_CTRL_STATE_MASK
        self.decodes_memory = awake and bool(command & pci.PCI_COMMAND_MEMORY)
        self.decodes_io = awake and bool(command & pci.PCI_COMMAND_IO)
        self.masters = awake and bool(command & pci.PCI_COMMAND_MASTER)

    # What happens from inside.

    def register(self, at: int, width: int) -> int:
        return int.from_bytes(self.read(at, width), "little")

    def show(self, at: int, mask: int, *, on: bool) -> None:
        """Set or clear the bits of ``mask`` in the 32-bit register at ``at``, writable or not."""
        with self._lock:
            value = int.from_bytes(self._bytes[at : at + 4], "little")
            value = value | mask if on else value & ~mask
            self._bytes[at : at + 4] = value.to_bytes(4, "little")

    def power_on(self) -> None:
        """Return to the values that the device has when it is opened after power-on."""
        with self._lock:
            self._bytes[:] = self._power_on
            self._settle_locked()


def _put_header(
    registers: Registers, identity: PciIdentity, regions: Mapping[int, Region], pin: int
) -> None:
    if pin not in range(5):
        raise ValueError(f"interrupt_pin is 1 to 4 for INTA to INTD, or 0 for none, not {pin}")
    command = pci.PCI_COMMAND_MASTER | pci.PCI_COMMAND_PARITY | pci.PCI_COMMAND_SERR
    for region in regions.values():
        command |= pci.PCI_COMMAND_IO if region.io else pci.PCI_COMMAND_MEMORY
    if pin:
        command |= pci.PCI_COMMAND_INTX_DISABLE
    put = registers.put
    put(pci.PCI_VENDOR_ID, 2, identity.vendor)
    put(pci.PCI_DEVICE_ID, 2, identity.device)
    put(pci.PCI_COMMAND, 2, identity.command, writable=command)
    put(pci.PCI_STATUS, 2, identity.status)
    put(pci.PCI_CLASS_REVISION, 4, identity.class_code << 8 | identity.revision)
    put(pci.PCI_CACHE_LINE_SIZE, 1, 0, writable=0xFF)
    put(pci.PCI_LATENCY_TIMER, 1, 0, writable=0xFF)
    put(pci.PCI_SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor)
    put(pci.PCI_SUBSYSTEM_ID, 2, identity.subsystem)
    put(pci.PCI_INTERRUPT_LINE, 1, 0, writable=0xFF)
    put(pci.PCI_INTERRUPT_PIN, 1, pin)


def _put_bars(registers: Registers, regions: Mapping[int, Region]) -> None:
    for index, region in sorted(regions.items()):
        at = pci.PCI_BASE_ADDRESS_0 + 4 * index
        if region.bits64 and (index == 5 or index + 1 in regions):
            raise ValueError(f"bar{index} has 64 bits and needs the place of bar{index + 1}")
        kind = pci.PCI_BASE_ADDRESS_SPACE_IO * region.io
        kind |= pci.PCI_BASE_ADDRESS_MEM_TYPE_64 * region.bits64
        kind |= pci.PCI_BASE_ADDRESS_MEM_PREFETCH * region.prefetchable
        width = 8 if region.bits64 else 4
        registers.put(at, width, kind, writable=(1 << 8 * width) - region.size)


def _check_msix(msix: Msix | None, regions: Mapping[int, Region]) -> None:
    """See that the structures lie in trapped pages of a region of the device, side by side."""
    if msix is None:
        return
    for name, (index, offset), size in (
        ("table", msix.table, msix.table_size),
        ("pending bits", msix.pending, msix.pending_size),
    ):
        region = regions.get(index)
        if region is None or region.io or offset + size > region.size:
            raise ValueError(f"the MSI-X {name} lie in no memory of bar{index}")
        if any(offset < at + length and at < offset + size for at, length in region.mapped):
            raise ValueError(f"the MSI-X {name} lie in mapped pages of bar{index}")
    (table_bar, table), (pending_bar, pending) = msix.table, msix.pending
    if (
        table_bar == pending_bar
        and table < pending + msix.pending_size
        and pending < table + msix.table_size
    ):
        raise ValueError("the MSI-X table and the pending bits overlap")
