"""Access to a device's regions: positional reads and writes of its descriptor, and mmap.

Theory of operation
-------------------
A region begins at an offset that names its index. What a program may map is memory in the file
behind its descriptor, at the region's very offset, and it is the device's memory too: when the
device gets its first user the region's content moves there, and back when the last one has gone
(``Placement``). Without such a file, in process, the device's memory stays where it is.

The MSI-X table and the pending bits lie in trapped pages and are kept by ``core.irqs``; the
device's own handlers never see accesses to them.

As with vfio-pci an access to a memory region fails while the command register (or D3hot) keeps the
function from decoding it, and nobody answers for a region in I/O space. What a program has mapped
stays, where a kernel would send it SIGBUS: pages cannot be taken out of another process.
"""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING, NamedTuple

from vfiomig.abi import vfio
from vfiomig.device.capabilities import RegionWindow
from vfiomig.device.region import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfiomig.core.irqs import Irqs
    from vfiomig.core.vfio_device import VfioDevice
    from vfiomig.descriptors import HasFileno
    from vfiomig.device import Device
    from vfiomig.device.region import Region

__all__ = (
    "OFFSET_TAG",
    "Placement",
    "Windows",
    "may_map",
    "memory_size",
    "pages_lie_in",
    "plain_regions",
    "read_region",
    "region_offset",
    "view",
    "windows_of",
    "write_region",
)

#: Region offsets carry it in their top byte: a filter of system calls tells an access to a
#: region by the offset alone. Without it they are vfio-pci's, which some programs take for granted
#: where they read and write, and may.
OFFSET_TAG = 0x56
INDEX_SHIFT = 40
#: What is left of an offset without its region.
INSIDE = (1 << INDEX_SHIFT) - 1
CONFIG = vfio.VFIO_PCI_CONFIG_REGION_INDEX
PAGE = mmap.PAGESIZE


class Window(NamedTuple):
    """A part of a region that is not the device's own; without ``write`` it is read-only."""

    offset: int
    size: int
    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], None] | None


class Windows:
    """The windows of one region, in order."""

    def __init__(self, *windows: Window) -> None:
        self._windows = windows
        self._ranges = tuple((window.offset, window.size) for window in windows)
        self._start = windows[0].offset
        self._end = windows[-1].offset + windows[-1].size

    def cut(self, at: int, length: int) -> Iterator[tuple[int, int, Window | None]]:
        """Cut an access of the region: (offset, size, the window or ``None`` for the device)."""
        if at >= self._end or at + length <= self._start:  # nearly every access: be quick
            yield at, length, None
            return
        for start, size, number in cut(at, length, self._ranges):
            yield start, size, None if number is None else self._windows[number]


def region_offset(index: int) -> int:
    """Where a region begins in the device's descriptor."""
    return OFFSET_TAG << 56 | index << INDEX_SHIFT


def windows_of(served: VfioDevice) -> dict[int, Windows]:
    """Say which parts of regions are not the device's own, by region index."""
    found = _msix_windows(served.irqs)
    place = served.configuration.places.get(RegionWindow)
    if place is not None:
        found[CONFIG] = Windows(_region_window(served, place))
    return found


def _region_window(served: VfioDevice, place: int) -> Window:
    """The data of the ``RegionWindow`` at ``place``; decoded or not, its region answers."""

    def target() -> tuple[int, int, int] | None:
        index, at, length = RegionWindow.where(served.configuration.read(place, RegionWindow.SIZE))
        region = served.device.regions.get(index)
        if region is None or length not in {1, 2, 4} or at % length or at >= region.size:
            return None
        return index, at, length

    def read(start: int, size: int) -> bytes:
        found = target()
        if found is None or not served.device.regions[found[0]].readable:
            return bytes(size)
        return _read(served, *found).ljust(RegionWindow.DATA_SIZE, b"\0")[start : start + size]

    def write(_start: int, _data: bytes) -> None:
        found = target()
        if found is not None and served.device.regions[found[0]].writable:
            index, at, length = found
            _write(served, index, at, served.configuration.read(place + RegionWindow.DATA, length))

    return Window(place + RegionWindow.DATA, RegionWindow.DATA_SIZE, read, write)


def _msix_windows(irqs: Irqs) -> dict[int, Windows]:
    """Say where the MSI-X structures lie, by region index."""
    msix = irqs.msix_capability
    if msix is None:
        return {}
    table = Window(msix.table[1], msix.table_size, irqs.read_table, irqs.write_table)
    pending = Window(msix.pending[1], msix.pending_size, irqs.read_pending, None)
    if msix.table[0] != msix.pending[0]:
        return {msix.table[0]: Windows(table), msix.pending[0]: Windows(pending)}
    both = sorted((table, pending), key=lambda window: window.offset)
    return {msix.table[0]: Windows(*both)}


def plain_regions(served: VfioDevice) -> dict[int, Region]:
    """Find the memory regions whose reads ask nobody, by what stands for them in an offset."""
    return {
        region_offset(index) >> INDEX_SHIFT: region
        for index, region in served.device.regions.items()
        if region.readable and region.is_memory and not region.io and index not in served.windows
    }


# Reads and writes.


def read_region(
    served: VfioDevice, offset: int, length: int, blocks: Callable[[], None] = lambda: None
) -> bytes:
    """Read at an offset of the descriptor; ``blocks`` is called before a hook of the device.

    Raises:
        OSError: EINVAL outside the regions, EFAULT outside configuration space, EIO in a region
            that is not decoded.
    """
    plain, inside = served.plain_regions.get(offset >> INDEX_SHIFT), offset & INSIDE
    if (
        plain is not None
        and served.configuration.decodes_memory
        and 0 < length <= plain.size - inside
    ):
        return plain.read(served.device, inside, length)
    if not length:
        return b""
    index, at, length = _locate(served, offset, length)
    if index != CONFIG:
        region = served.device.regions[index]
        if not region.readable:
            raise OSError(errno.EINVAL, f"{region.name} cannot be read")
        if not _is_decoded(served, region):
            return b"\xff" * length
    blocks()
    return _read(served, index, at, length)


def write_region(
    served: VfioDevice, offset: int, data: bytes, blocks: Callable[[], None] = lambda: None
) -> int:
    """Write at an offset of the descriptor; return the bytes that lie inside the region.

    ``blocks`` is called before what may take long.
    """
    if not data:
        return 0
    index, at, length = _locate(served, offset, len(data))
    if index == CONFIG:
        _write_configuration(served, at, data, blocks)
        return length
    region = served.device.regions[index]
    if not region.writable:
        raise OSError(errno.EINVAL, f"{region.name} cannot be written")
    if _is_decoded(served, region):
        _write(served, index, at, data[:length])
    return length


def _is_decoded(served: VfioDevice, region: Region) -> bool:
    """Whether the function answers for a region: ``False`` in I/O space, EIO in memory."""
    if region.io:
        return served.configuration.decodes_io
    if not served.configuration.decodes_memory:
        raise OSError(errno.EIO, f"{region.name} is not decoded: PCI_COMMAND_MEMORY, or D3hot")
    return True


def _read(served: VfioDevice, index: int, at: int, length: int) -> bytes:
    windows = served.windows.get(index)
    if windows is None:
        return _read_own(served, index, at, length)
    pieces = []
    for start, size, window in windows.cut(at, length):
        if window is None:
            pieces.append(_read_own(served, index, start, size))
        else:
            pieces.append(window.read(start - window.offset, size))
    return b"".join(pieces)


def _write(served: VfioDevice, index: int, at: int, data: bytes) -> None:
    windows = served.windows.get(index)
    if windows is None:
        _write_own(served, index, at, data)
        return
    for start, size, window in windows.cut(at, len(data)):
        piece = data[start - at :][:size]
        if window is None:
            _write_own(served, index, start, piece)
        elif window.write is not None:
            window.write(start - window.offset, piece)


def _read_own(served: VfioDevice, index: int, at: int, length: int) -> bytes:
    if index == CONFIG:
        return served.configuration.read(at, length)
    region = served.device.regions[index]
    return served.migration.beside(region.name, lambda: region.read(served.device, at, length))


def _write_own(served: VfioDevice, index: int, at: int, data: bytes) -> None:
    region = served.device.regions[index]
    served.migration.beside(region.name, lambda: region.write(served.device, at, data))


def _write_configuration(
    served: VfioDevice, at: int, data: bytes, blocks: Callable[[], None]
) -> None:
    served.configuration.write(at, data)
    served.irqs.follow_configuration(at, len(data))
    served.device.dma.master(served.configuration.masters)
    windows = served.windows.get(CONFIG)
    for start, size, window in windows.cut(at, len(data)) if windows is not None else ():
        if window is not None and window.write is not None:
            window.write(start - window.offset, data[start - at :][:size])
    if served.configuration.asks_for_flr(at, data):
        blocks()
        served.reset()  # like hardware it does not tell whether that worked


def _locate(served: VfioDevice, offset: int, length: int) -> tuple[int, int, int]:
    """Region index, offset inside it, and how much of ``length`` lies there."""
    index = offset >> INDEX_SHIFT
    if offset >> 56 == OFFSET_TAG:
        index -= OFFSET_TAG << 56 - INDEX_SHIFT
    at = offset & INSIDE
    if index == CONFIG:
        if at + length > served.configuration.size:
            raise OSError(errno.EFAULT, "the access leaves configuration space")
        return index, at, length
    regions = served.device.regions
    if index not in regions or at >= regions[index].size:
        raise OSError(errno.EINVAL, f"the offset {offset:#x} is in no region")
    return index, at, min(length, regions[index].size - at)


# Memory that a program may map.


def memory_size(device: Device) -> int:
    """How large the file behind a descriptor must be for ``Placement``; 0: none is needed."""
    return max(
        (region_offset(i) + region.size for i, region in device.regions.items() if region.mapped),
        default=0,
    )


def may_map(device: Device, offset: int, length: int, *, shared: bool) -> bool:
    """Tell whether a program may map these bytes: shared, and all of them in mapped pages."""
    region = device.regions.get(_mapped_index(offset))
    if region is None or not shared or not length or offset % PAGE:
        return False
    return pages_lie_in(region.mapped, offset & INSIDE, length)


def view(device: Device, offset: int, length: int) -> memoryview:
    """Return such memory, of a device that nobody else has mapped: its own, where it stays."""
    if length <= 0 or not may_map(device, offset, length, shared=True):
        raise OSError(errno.EINVAL, "these are not pages that may be mapped")
    region, at = device.regions[_mapped_index(offset)], offset & INSIDE
    return memoryview(region.memory(device))[at : at + length]


def _mapped_index(offset: int) -> int:
    """The region that is mapped at ``offset``: only those that carry the tag can be."""
    return offset - (OFFSET_TAG << 56) >> INDEX_SHIFT


def pages_lie_in(ranges: tuple[tuple[int, int], ...], at: int, length: int) -> bool:
    """Tell whether every page that is touched lies in ``ranges``, which may be side by side."""
    pieces = cut(at, -(-length // PAGE) * PAGE, ranges)
    return all(number is not None for _, _, number in pieces)


class Placement:
    """A device's mapped regions in the file behind a descriptor, from ``enter`` to ``leave``."""

    def __init__(self, device: Device, memory: HasFileno) -> None:
        self._device = device
        self._memory = {
            index: mmap.mmap(memory.fileno(), region.size, offset=region_offset(index))
            for index, region in device.regions.items()
            if region.mapped
        }

    def enter(self) -> None:
        for index, memory in self._memory.items():
            self._device.regions[index].place(self._device, memory)

    def leave(self) -> None:
        """Move the content back. Whoever kept the memory sees no more of the device in it."""
        for index, memory in self._memory.items():
            self._device.regions[index].withdraw(self._device)
            memory.madvise(mmap.MADV_REMOVE)  # all zeros again, as it came

    def close(self) -> None:
        """Let go of the file."""
        self._memory.clear()
