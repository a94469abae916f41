"""From what the tests with real guests start them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfiomig.qemu.machine import Machine

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig.qemu.installed import GuestFiles

__all__ = ("GuestParts",)


@dataclass(frozen=True, slots=True)
class GuestParts:
    """A QEMU, a kernel and initrd that boot under it, and what that was built from."""

    qemu: Path
    kernel: Path
    initrd: Path
    files: GuestFiles

    def machine(self, *extra: str, incoming: bool = False, append: str = "") -> Machine:
        """Return a Linux machine, with ``extra`` words for QEMU."""
        return Machine(
            kernel=self.kernel, initrd=self.initrd, append=append, extra=extra, incoming=incoming
        )
