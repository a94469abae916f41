"""MSI and MSI-X: vectors with an eventfd each, and where their mask and pending bits are kept.

Theory of operation
-------------------
A message is sent once. While its vector is masked the pending bit is set instead, and the message
is sent when the vector is unmasked. How many vectors there are is settled when the first are given
(``VFIO_IRQ_INFO_NORESIZE``), unless what is one request elsewhere comes in parts (``grows``).

Under VFIO the MSI-X table belongs to the host, which writes a vector's entry and unmasks it when
it starts to serve the vector. So does ``MsixTable`` when a vector gets its eventfd; a program may
mask vectors in the table afterwards, but one that never touches it, as a VMM that emulates the
table for its guest, is not kept from its interrupts by the masks of power-on.

Nothing here locks: ``core.irqs`` holds its lock around every call.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from vfiomig.abi import pci
from vfiomig.device import Msi
from vfiomig.device.capabilities import find_capability

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vfiomig.device import ConfigurationSpace, Msix
    from vfiomig.eventfd import EventFd

__all__ = ("Messages", "MsiMasks", "MsixTable")

ENTRY = pci.PCI_MSIX_ENTRY_SIZE


class Masks(Protocol):
    """Mask and pending bits of the vectors."""

    def masked(self, vector: int) -> bool: ...
    def pend(self, vector: int) -> None: ...
    def take(self, vector: int) -> bool:
        """Clear the pending bit; tell whether it was set."""

    def serve(self, vector: int, *, on: bool) -> None:
        """Note that the vector has an eventfd from here on, or that it has none."""


class MsiMasks:
    """Bits in configuration space, if the capability has them."""

    def __init__(self, space: ConfigurationSpace) -> None:
        self._space = space
        msi = find_capability(space.capabilities, Msi)
        self._maskable = msi is not None and msi.maskable
        place = space.places.get(Msi, 0)
        self.register = place + pci.PCI_MSI_MASK_64
        self._pending = place + pci.PCI_MSI_PENDING_64

    def masked(self, vector: int) -> bool:
        return self._maskable and bool(self._space.register(self.register, 4) >> vector & 1)

    def pend(self, vector: int) -> None:
        self._space.show(self._pending, 1 << vector, on=True)

    def take(self, vector: int) -> bool:
        if not self._maskable or not self._space.register(self._pending, 4) >> vector & 1:
            return False
        self._space.show(self._pending, 1 << vector, on=False)
        return True

    def serve(self, vector: int, *, on: bool) -> None:
        """Do nothing: the mask bits of MSI are the program's alone."""


class MsixTable:
    """The table and the pending bits, as a program finds them in the device's BARs."""

    def __init__(self, msix: Msix | None) -> None:
        self.table = bytearray(msix.table_size if msix else 0)
        self.pending = bytearray(msix.pending_size if msix else 0)
        self.power_on()

    def power_on(self) -> None:
        """Mask every vector, and forget addresses, data and what is pending."""
        entry = bytearray(ENTRY)
        entry[pci.PCI_MSIX_ENTRY_VECTOR_CTRL] = pci.PCI_MSIX_ENTRY_CTRL_MASKBIT
        self.table[:] = entry * (len(self.table) // ENTRY)
        self.pending[:] = bytes(len(self.pending))

    def write(self, at: int, data: bytes) -> range:
        """Write to the table; return the vectors whose entries were touched."""
        self.table[at : at + len(data)] = data
        vectors = range(at // ENTRY, (at + len(data) - 1) // ENTRY + 1)
        for vector in vectors:
            # Of the last word only the mask bit is writable.
            control = vector * ENTRY + pci.PCI_MSIX_ENTRY_VECTOR_CTRL
            mask = self.table[control] & pci.PCI_MSIX_ENTRY_CTRL_MASKBIT
            self.table[control : control + 4] = mask.to_bytes(4, "little")
            self.table[vector * ENTRY] &= 0xFC  # addresses are multiples of 4
        return vectors

    def masked(self, vector: int) -> bool:
        return bool(self.table[vector * ENTRY + pci.PCI_MSIX_ENTRY_VECTOR_CTRL])

    def pend(self, vector: int) -> None:
        self.pending[vector // 8] |= 1 << vector % 8

    def take(self, vector: int) -> bool:
        bit = 1 << vector % 8
        was = bool(self.pending[vector // 8] & bit)
        self.pending[vector // 8] &= ~bit
        return was

    def serve(self, vector: int, *, on: bool) -> None:
        self.table[vector * ENTRY + pci.PCI_MSIX_ENTRY_VECTOR_CTRL] = not on


class Messages:
    """The vectors of MSI or of MSI-X; ``triggers`` is empty while they are not enabled."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        #: Whether vectors may be added to those that were enabled.
        self.grows = False
        self.triggers: list[EventFd | None] = []

    def enable(self, count: int) -> None:
        if not count:  # so the kernel's allocation of no vector at all says
            raise OSError(errno.ERANGE, "no vector to enable")
        self.triggers = [None] * count

    def disable(self) -> None:
        for vector in range(len(self.triggers)):
            self.drop(vector)
            self.masks.take(vector)
        self.triggers = []

    def drop(self, vector: int) -> None:
        """Take the eventfd of a vector away, if it has one."""
        trigger = self.trigger(vector)
        if trigger is not None:
            self.triggers[vector] = None
            self.masks.serve(vector, on=False)
            trigger.close()

    def give(self, vector: int, find: Callable[[], EventFd]) -> None:
        """Give a vector the eventfd that ``find`` finds; the one that it had is gone by then."""
        self.drop(vector)
        if vector >= len(self.triggers):
            if not self.grows:
                raise OSError(errno.EINVAL, "the vector is beyond those that were enabled")
            self.triggers += [None] * (vector + 1 - len(self.triggers))
        self.triggers[vector] = find()
        self.masks.serve(vector, on=True)
        self.send_pending((vector,))

    def trigger(self, vector: int) -> EventFd | None:
        return self.triggers[vector] if vector < len(self.triggers) else None

    def send(self, vector: int) -> None:
        trigger = self.trigger(vector)
        if trigger is None:
            return
        if self.masks.masked(vector):
            self.masks.pend(vector)
        else:
            trigger.signal()

    def send_pending(self, vectors: Iterable[int]) -> None:
        """Send what waited for the mask of one of ``vectors`` to be cleared."""
        for vector in vectors:
            trigger = self.trigger(vector)
            if trigger is not None and not self.masks.masked(vector) and self.masks.take(vector):
                trigger.signal()
