"""Devices that lose something on their way, for a verdict that has to notice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiomig.models.mtty import Mtty
from vfiomig.models.pattern import Pattern
from vfiomig.models.virtio_blk import VirtioBlk
from vfiomig.models.virtio_disk import MemoryDisk

if TYPE_CHECKING:
    from vfiomig import StateReader

__all__ = ("ForgetfulDisk", "LeakyCard", "Scratched")


class LeakyCard(Mtty):
    """Loses the first byte that was on its way to the driver, or doubles one where none was."""

    def load(self, state: StateReader) -> None:
        super().load(state)
        (port,) = self._ports
        for place in (port.held, port.uart.rx, port.uart.tx):
            if place:
                del place[0]
                return
        port.held += b"?"


class ForgetfulDisk(VirtioBlk):
    """Forgets the third 4 KiB."""

    def load(self, state: StateReader) -> None:
        super().load(state)
        assert isinstance(self._disk, MemoryDisk)
        self._disk.content(0, 1)[2 * 4096 : 3 * 4096] = bytes(4096)


class Scratched(Pattern):
    """Changes one bit of BAR0."""

    def load(self, state: StateReader) -> None:
        super().load(state)
        self.bar0[17] ^= 1
