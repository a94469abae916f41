"""The interrupt pin: level-triggered, and masked by each interrupt until it is unmasked.

Theory of operation
-------------------
A level that is high interrupts once and masks the pin. Unmasking (``VFIO_IRQ_SET_ACTION_UNMASK``,
or the eventfd that was given for it) looks at the level again: a device that is not served yet
interrupts again at once. The bit INTx Disable of the command register masks as well, and clearing
it unmasks, whatever SET_IRQS said before: one mask serves both, as in vfio-pci.

The level belongs to the device and is remembered while INTx is not enabled. Nothing here locks:
``core.irqs`` holds its lock around every call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiomig.abi import pci

if TYPE_CHECKING:
    from vfiomig.core.unmask import UnmaskWatcher
    from vfiomig.device import ConfigurationSpace
    from vfiomig.eventfd import EventFd

__all__ = ("Intx",)


class Intx:
    """INTx of one function."""

    def __init__(self, space: ConfigurationSpace) -> None:
        self._space = space
        self.enabled = False
        self.masked = False
        self.trigger: EventFd | None = None
        self.unmask_watcher: UnmaskWatcher | None = None
        self._level = False
        self._disabled = False

    def enable(self, trigger: EventFd | None) -> None:
        self.enabled = True
        self.trigger = trigger
        self.masked = self._disabled
        self._interrupt()

    def disable(self) -> UnmaskWatcher | None:
        """Drop the trigger; return the watcher, if there is one, to be closed without a lock."""
        self.enabled = self.masked = False
        self.set_trigger(None)
        watcher, self.unmask_watcher = self.unmask_watcher, None
        return watcher

    def set_trigger(self, trigger: EventFd | None) -> None:
        """Signal another eventfd from here on, or none; neither mask nor level change."""
        former, self.trigger = self.trigger, trigger
        if former is not None:
            former.close()

    def set_level(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self._space.show(pci.PCI_COMMAND, pci.PCI_STATUS_INTERRUPT << 16, on=level)
        self._interrupt()

    def mask(self) -> None:
        self.masked = True

    def unmask(self) -> None:
        if self.enabled and not self._disabled:
            self.masked = False
            self._interrupt()

    def follow_command(self) -> None:
        """Follow the bit INTx Disable after a write to the command register."""
        disabled = bool(self._space.register(pci.PCI_COMMAND, 2) & pci.PCI_COMMAND_INTX_DISABLE)
        if disabled != self._disabled:
            self._disabled = disabled
            if disabled:
                self.mask()
            else:
                self.unmask()

    def signal(self) -> None:
        """Signal the eventfd, whatever level and mask are: a test of the way to the program."""
        if self.trigger is not None and not self._disabled:
            self.trigger.signal()

    def _interrupt(self) -> None:
        if self.enabled and self._level and not self.masked:
            self.masked = True
            self.signal()
