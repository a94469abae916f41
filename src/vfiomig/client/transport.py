"""What a client needs of the world: descriptors, requests on them, and bytes through them.

A ``Transport`` is one opened device. Its calls are those of the system, in shape and in meaning:
numbers stand for descriptors, an argument is memory of this process, a failure is an ``OSError``
with the errno. All that is decided about the protocol is decided above it, so a device in this
process and one behind the kernel cannot be driven differently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfiomig.abi.uapi import UapiStruct

__all__ = ("NO_FD", "Transport")

#: No descriptor, as a data_fd field says it.
NO_FD = -1


class Transport(Protocol):
    """One opened device and the descriptors that belong to it. Safe for concurrent use."""

    @property
    def device(self) -> int:
        """The descriptor of the device."""

    @property
    def iommufd(self) -> int:
        """The descriptor of the iommufd; ``NO_FD`` where there is none."""

    @property
    def about(self) -> Mapping[str, str | int | bool]:
        """How the device is reached, for people: ``by``, and what was negotiated if anything."""

    @property
    def lost(self) -> str:
        """Why no request reaches the device any more; nothing while they do."""

    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int:
        """Make a request. The argument is read and written in place, after a failure too."""

    def readinto(self, data_fd: int, buffer: memoryview) -> int:
        """Read from a data_fd into ``buffer``; block as the device does."""

    def write(self, data_fd: int, data: memoryview) -> int:
        """Write to a data_fd; return how many bytes were taken."""

    def pread(self, offset: int, length: int) -> bytes:
        """Read from the device's descriptor, where its regions lie."""

    def pwrite(self, offset: int, data: bytes) -> int:
        """Write to the device's descriptor."""

    def map(self, offset: int, length: int, *, writable: bool) -> memoryview:
        """Map part of the device's descriptor; it stays mapped as long as anybody has the view."""

    def close(self, number: int) -> None:
        """Close a descriptor."""
