"""How a device interrupts: ``self.interrupts``.

Whoever serves the device puts an implementation there (``vfiomig.core.irqs``). Every method may be
called from any thread and in any state, and returns at once.
"""

from __future__ import annotations

__all__ = ("Interrupts",)


class Interrupts:
    """The interrupts of one device. This class is that of a device which nobody serves."""

    def intx(self, level: bool) -> None:
        """Set the level of the interrupt pin; it is remembered while masked or disabled."""

    def msi(self, vector: int) -> None:
        """Send an MSI once. It is dropped where MSI, or this vector of it, is not enabled."""

    def msix(self, vector: int) -> None:
        """Send an MSI-X once; while the vector is masked, its pending bit is set instead.

        It is dropped where MSI-X, or this vector of it, is not enabled.
        """
