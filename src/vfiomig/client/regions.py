"""Which parts of a region may be mapped: the sparse areas behind VFIO_DEVICE_GET_REGION_INFO.

The answer is a struct and, where argsz has room for it, a chain of capabilities; each names the
offset of the next, 0 at the end. What a device's side wrote there is believed only as far as it
lies inside the buffer. What is mapped is memory that is shared with the device's side.
"""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.client.chain import MOST_INFO, capability_chain

if TYPE_CHECKING:
    from vfiomig.client.requests import Requests

__all__ = ("map_file", "mappable_areas")

INFO = vfio.RegionInfo
SPARSE, AREA = vfio.RegionInfoCapSparseMmap, vfio.SparseMmapArea


def mappable_areas(requests: Requests, region: vfio.RegionInfo) -> list[tuple[int, int]]:
    """Return the (offset, size) of each area; all of the region where nothing more is said.

    Raises:
        OSError: the request's errno, or EPROTO for capabilities that make no sense.
    """
    if not region.flags & vfio.VFIO_REGION_INFO_FLAG_MMAP:
        return []
    whole = [(0, region.size)]
    if not region.flags & vfio.VFIO_REGION_INFO_FLAG_CAPS:
        return whole
    if not INFO.SIZE < region.argsz <= MOST_INFO:
        raise OSError(errno.EPROTO, f"region {region.index} claims {region.argsz} bytes of info")
    buffer = bytearray(region.argsz)
    argument = INFO.from_buffer(buffer)
    argument.argsz, argument.index = region.argsz, region.index
    requests.on_device(vfio.VFIO_DEVICE_GET_REGION_INFO, argument)
    chain = capability_chain(buffer, argument.cap_offset, INFO.SIZE, f"region {region.index}")
    for number, at in chain:
        if number == vfio.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
            return _areas(buffer, at, region)
    return whole


def map_file(number: int, offset: int, length: int, *, writable: bool) -> memoryview:
    """Map part of the file behind a descriptor, which may be closed afterwards.

    Raises:
        OSError: EINVAL as well where Python sees that the file has no such part.
    """
    if length <= 0:  # Python would map all that there is
        raise OSError(errno.EINVAL, "there is nothing to be mapped")
    protection = mmap.PROT_READ | mmap.PROT_WRITE * writable
    try:
        return memoryview(
            mmap.mmap(number, length, flags=mmap.MAP_SHARED, prot=protection, offset=offset)
        )
    except (ValueError, OverflowError) as problem:
        raise OSError(errno.EINVAL, f"its file has no such part: {problem}") from None


def _areas(buffer: bytearray, at: int, region: vfio.RegionInfo) -> list[tuple[int, int]]:
    first = at + SPARSE.SIZE
    count = SPARSE.parse(memoryview(buffer)[at:]).nr_areas if first <= len(buffer) else 0
    if not count or first + count * AREA.SIZE > len(buffer):
        raise OSError(errno.EPROTO, f"the sparse areas of region {region.index} are cut off")
    areas = (AREA.parse(memoryview(buffer)[first + n * AREA.SIZE :]) for n in range(count))
    found = [(area.offset, area.size) for area in areas]
    if any(offset + size > region.size for offset, size in found):
        raise OSError(errno.EPROTO, f"a sparse area leaves region {region.index}")
    return found
