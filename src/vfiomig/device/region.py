"""Regions of a device, declared in its class body.

A region is one PCI resource: ``bar0`` to ``bar5``; the attribute's name says which. Without
handlers it is plain memory, one ``bytearray`` per device. With ``reader`` and ``writer`` every
access is a call, split the way a bus would split it: naturally aligned pieces of 8, 4, 2 or 1
bytes, low address first.

Pages that are declared as ``mapped`` are memory in any case: a program may map them, and then
neither it nor the device is told of accesses. All other pages are trapped: there are the handlers.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

if TYPE_CHECKING:
    from vfiomig.device.base import Device

__all__ = ("BAR_NAMES", "PciIdentity", "Region", "bus_accesses")

#: Attribute name of a region and its VFIO region index (``VFIO_PCI_BAR0_REGION_INDEX`` ...).
BAR_NAMES = {f"bar{index}": index for index in range(6)}

PAGE = mmap.PAGESIZE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
#: Content of regions is looked at and moved in pieces of this size.
CHUNK = 1 << 16
#: Bytes that are not worth a view.
FEW = 1 << 10
ZEROS = memoryview(bytes(CHUNK))

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
    command: int = 0  # the command register after power-on
    status: int = 0  # the status register; the bit for capabilities is set where there are some


class Region:
    """One region: ``bar0 = Region(size=4096)`` in a device's class body.

    On an instance the attribute is the region's memory, a ``bytearray``. ``size`` is in bytes, a
    power of two as PCI wants it, at least 16, or 4 with ``io``.

    ``io``: in I/O space. ``bits64``: the address may lie above 4 GiB, and the next BAR's place is
    taken as well. ``prefetchable``: what PCI means by that. ``mapped``: (offset, size) of the pages
    that a program may map; where there are some the attribute is not a ``bytearray`` but an
    ``mmap``, which has slices of its kind, and is another one in each life of the device with a
    user: do not keep it.
    """

    def __init__(
        self,
        size: int,
        *,
        readable: bool = True,
        writable: bool = True,
        io: bool = False,
        bits64: bool = False,
        prefetchable: bool = False,
        mapped: tuple[tuple[int, int], ...] = (),
    ) -> None:
        least = 4 if io else 16
        if size < least or size & (size - 1):
            raise ValueError(f"a region's size is a power of two from {least} on, not {size}")
        if io and (bits64 or prefetchable or mapped):
            raise ValueError("a region in I/O space has 32 bits and is not prefetched or mapped")
        if size > 1 << 31 and not bits64:
            raise ValueError(f"a region of {size} bytes needs bits64")
        self.size = size
        self.readable = readable
        self.writable = writable
        self.io = io
        self.bits64 = bits64
        self.prefetchable = prefetchable
        self.mapped = _check_mapped(mapped, size)
        self.index = -1
        self.name = ""
        #: Whether reading it is no call of a handler.
        self.is_memory = True
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
        memory = bytearray(self.size) if not self.mapped else mmap.mmap(-1, self.size, PRIVATE)
        # To a type checker both are the one that nearly every region has.
        return cast("bytearray", device.__dict__.setdefault(self.name, memory))

    def memory(self, device: Device) -> bytearray:
        """Return the region's memory, whether somebody asked for it before or not."""
        present: bytearray | None = device.__dict__.get(self.name)
        return self.__get__(device, type(device)) if present is None else present

    def place(self, device: Device, memory: mmap.mmap) -> None:
        """Let the region's memory be ``memory``, all zeros, from here on; its content moves."""
        with memoryview(self.memory(device)) as old, memoryview(memory) as new:
            for at in range(0, self.size, CHUNK):
                # Untouched pages stay so: a large region costs what is used of it.
                if old[at : at + CHUNK] != ZEROS[: min(CHUNK, self.size - at)]:
                    new[at : at + CHUNK] = old[at : at + CHUNK]
        device.__dict__[self.name] = memory

    def withdraw(self, device: Device) -> None:
        """Let the region's memory be the device's own again; its content moves."""
        self.place(device, mmap.mmap(-1, self.size, PRIVATE))

    def reader(self, function: Reader) -> Reader:
        """Declare ``function(self, offset, length) -> bytes`` to answer reads, in full.

        Like any hook it may raise ``DeviceError`` and nothing else.
        """
        self._reader = function.__name__
        self.is_memory = False
        return function

    def writer(self, function: Writer) -> Writer:
        """Declare ``function(self, offset, data)`` to take writes."""
        self._writer = function.__name__
        return function

    def read(self, device: Device, offset: int, length: int) -> bytes:
        """Read ``length`` bytes that lie inside the region."""
        if self.is_memory:
            memory = self.memory(device)
            if length <= FEW:  # two short copies cost less than a view
                return bytes(memory[offset : offset + length])
            return bytes(memoryview(memory)[offset : offset + length])
        if not self.mapped:
            return b"".join(self._ask(device, offset, length))
        pieces = []
        for start, size, mapped in cut(offset, length, self.mapped):
            if mapped is not None:
                pieces.append(bytes(self.memory(device)[start : start + size]))
            else:
                pieces += self._ask(device, start, size)
        return b"".join(pieces)

    def _ask(self, device: Device, offset: int, length: int) -> Iterator[bytes]:
        read = getattr(device, self._reader)
        for at, size in bus_accesses(offset, length):
            piece = read(at, size)
            if not isinstance(piece, bytes | bytearray | memoryview):
                raise TypeError(
                    f"the reader of {self.name} gives {type(piece).__name__}, and no bytes"
                )
            if len(piece) != size:
                raise ValueError(f"the reader of {self.name} gives {len(piece)} bytes for {size}")
            yield bytes(piece)

    def write(self, device: Device, offset: int, data: bytes) -> None:
        """Write ``data`` to a place inside the region."""
        if not self._writer:
            self.memory(device)[offset : offset + len(data)] = data
            return
        write = getattr(device, self._writer)
        for start, length, mapped in cut(offset, len(data), self.mapped):
            if mapped is not None:
                self.memory(device)[start : start + length] = data[start - offset :][:length]
                continue
            for at, size in bus_accesses(start, length):
                write(at, data[at - offset : at - offset + size])


def _check_mapped(mapped: tuple[tuple[int, int], ...], size: int) -> tuple[tuple[int, int], ...]:
    """Return the page ranges in order; ``ValueError`` unless they are pages inside the region."""
    end = 0
    for offset, length in sorted(mapped):
        if offset % PAGE or length % PAGE or length < PAGE or offset < end:
            raise ValueError(f"mapped ({offset:#x}, {length:#x}): whole pages that do not overlap")
        end = offset + length
    if end > size:
        raise ValueError(f"the mapped pages end at {end:#x}, behind the region's {size:#x} bytes")
    return tuple(sorted(mapped))


def cut(
    offset: int, length: int, ranges: tuple[tuple[int, int], ...]
) -> Iterator[tuple[int, int, int | None]]:
    """Cut an access at the edges of ``ranges``, in order: (offset, size, number of the range).

    What lies in none of them has ``None``. ``ranges`` are (offset, size), sorted and apart.
    """
    end = offset + length
    for number, (start, size) in enumerate(ranges):
        if offset < min(start, end):
            yield offset, min(start, end) - offset, None
            offset = min(start, end)
        if start <= offset < min(start + size, end):
            yield offset, min(start + size, end) - offset, number
            offset = min(start + size, end)
    if offset < end:
        yield offset, end - offset, None


def bus_accesses(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Split an access into naturally aligned pieces: (offset, size) with size 8, 4, 2 or 1."""
    end = offset + length
    while offset < end:
        size = next(s for s in (8, 4, 2, 1) if offset % s == 0 and s <= end - offset)
        yield offset, size
        offset += size
