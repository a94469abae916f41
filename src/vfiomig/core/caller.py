"""Whoever makes a request: its memory, and its table of descriptors.

A front door implements ``Caller`` once per request. Everything that ``core`` knows of the world
outside goes through it, so the same code serves another process's system call and a function
call in this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.core.transfer import Migf
    from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
    from vfiomig.descriptors import Fd, HasFileno
    from vfiomig.eventfd import EventFd
    from vfiomig.iommu import Backings, Place

__all__ = ("Caller",)


class Caller(Protocol):
    """The maker of one request. Every method may raise ``OSError`` with the caller's errno."""

    def read(self, address: int, length: int) -> bytes:
        """Read all of it; EFAULT if any byte cannot be read."""

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of it; EFAULT if any byte cannot be written."""

    def check(self, address: int, length: int, *, writable: bool) -> bool:
        """Tell whether the whole range is mapped with that permission."""

    def memory(self, address: int, length: int, *, writable: bool, known: Backings) -> Place:
        """Find what is there, for later: DMA outlives the request that mapped it.

        EFAULT if not all of it is there with that permission; ``known`` remembers what was found.
        """

    def file(self, number: int) -> Fd:
        """Share an open file of the caller's: EBADF if it is not open, EINVAL if it is ours."""

    def capable(self, capability: int) -> bool:
        """Tell whether the calling thread has a capability (capabilities(7)) over the machine."""

    def blocks(self) -> None:
        """Note that the request may take long from here on: it waits, or runs a device's hook."""

    def return_fd(self, migf: Migf, address: int, render: Callable[[int], bytes]) -> None:
        """Give the caller a new close-on-exec descriptor for ``migf``, and tell it the number.

        ``render(number)`` is written to ``address``. As in the kernel either both happen or
        neither: EMFILE leaves the caller's memory as it was, EFAULT gives the number back.
        """

    def return_device(
        self, device: VfioDevice, open_file: Callable[[HasFileno | None], VfioDeviceFile]
    ) -> int:
        """Give the caller a new close-on-exec descriptor for an open of ``device``.

        ``open_file`` is given the memory behind the descriptor, if there is one, and called only
        when a number is free: EMFILE comes before what it raises.
        """

    def opened(self, number: int) -> object:
        """Find what of ours is behind a descriptor number, ``None`` for another file: EBADF."""

    def eventfd(self, number: int) -> EventFd:
        """Share an eventfd of the caller's: EBADF if it is not open, EINVAL if it is none."""
