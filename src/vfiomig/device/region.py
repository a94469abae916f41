"""Regions of a device, declared in its class body.

A region is one PCI resource: ``bar0`` to ``bar5``; the attribute's name says which. Without
handlers it is plain memory, one ``bytearray`` per device. With ``reader`` and ``writer`` every
access is a call, split the way a bus would split it: naturally aligned pieces of 8, 4, 2 or 1
bytes, low address first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from vfiomig.device.base import Device

__all__ = ("BAR_NAMES", "PciIdentity", "Region", "bus_accesses")

#: Attribute name of a region and its VFIO region index (``VFIO_PCI_BAR0_REGION_INDEX`` ...).
BAR_NAMES = {f"bar{index}": index for index in range(6)}

Reader = TypeVar("Reader", bound=Callable[[Any, int, int], bytes])
Writer = TypeVar("Writer", bound=Callable[[Any, int, bytes], None])


@dataclass(frozen=True, slots=True)
class PciIdentity:
    """What a PCI function says it is: the identification part of its configuration header."""

    vendor: int
    device: int
    subsystem_vendor: int = 0
    subsystem: int = 0
    class_code: int = 0xFF0000  # base class, subclass, programming interface: 24 bits
    revision: int = 0


class Region:
    """One region: ``bar0 = Region(size=4096)`` in a device's class body.

    On an instance the attribute is the region's ``bytearray``. ``size`` is in bytes, a power of
    two as PCI wants it, at least 16.
    """

    def __init__(self, size: int, *, readable: bool = True, writable: bool = True) -> None:
        if size < 16 or size & (size - 1):
            raise ValueError(f"a region's size is a power of two from 16 on, not {size}")
        self.size = size
        self.readable = readable
        self.writable = writable
        self.index = -1
        self.name = ""
        self._reader = ""
        self._writer = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.index = BAR_NAMES.get(name, -1)  # Device refuses any other name

    @overload
    def __get__(self, device: None, owner: type) -> Region: ...
    @overload
    def __get__(self, device: Device, owner: type) -> bytearray: ...
    def __get__(self, device: Device | None, owner: type) -> Region | bytearray:
        if device is None:
            return self
        # Kept under the same name in the instance: from now on this method is not asked.
        memory: bytearray = device.__dict__.setdefault(self.name, bytearray(self.size))
        return memory

    def reader(self, function: Reader) -> Reader:
        """Declare ``function(self, offset, length) -> bytes`` to answer reads, in full.

        Like any hook it may raise ``DeviceError`` and nothing else.
        """
        self._reader = function.__name__
        return function

    def writer(self, function: Writer) -> Writer:
        """Declare ``function(self, offset, data)`` to take writes."""
        self._writer = function.__name__
        return function

    def read(self, device: Device, offset: int, length: int) -> bytes:
        """Read ``length`` bytes that lie inside the region."""
        if not self._reader:
            return bytes(memoryview(self.__get__(device, type(device)))[offset : offset + length])
        read = getattr(device, self._reader)
        pieces = []
        for at, size in bus_accesses(offset, length):
            piece = read(at, size)
            if len(piece) != size:
                raise ValueError(f"the reader of {self.name} gives {len(piece)} bytes for {size}")
            pieces.append(piece)
        return b"".join(pieces)

    def write(self, device: Device, offset: int, data: bytes) -> None:
        """Write ``data`` to a place inside the region."""
        if not self._writer:
            self.__get__(device, type(device))[offset : offset + len(data)] = data
            return
        write = getattr(device, self._writer)
        for at, size in bus_accesses(offset, len(data)):
            write(at, data[at - offset : at - offset + size])


def bus_accesses(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Split an access into naturally aligned pieces: (offset, size) with size 8, 4, 2 or 1."""
    end = offset + length
    while offset < end:
        size = next(s for s in (8, 4, 2, 1) if offset % s == 0 and s <= end - offset)
        yield offset, size
        offset += size
