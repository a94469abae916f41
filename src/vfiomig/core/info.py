"""What a device is made of: VFIO_DEVICE_GET_INFO and VFIO_DEVICE_GET_REGION_INFO.

The regions are those of vfio-pci: six BARs, ROM, configuration space and VGA, of which a device
has what its class declares, and always configuration space.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.core.regions import OFFSET_TAG, region_offset

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
    from vfiomig.device import Region

__all__ = ("OFFSET_TAG", "device_get_info", "device_get_region_info", "region_offset")

CONFIG = vfio.VFIO_PCI_CONFIG_REGION_INDEX


def device_get_info(file: VfioDeviceFile, arg: int, caller: Caller) -> int:  # noqa: ARG001
    minsz = vfio.DeviceInfo.end_of("num_irqs")
    argsz = int.from_bytes(caller.read(arg, minsz)[:4], "little")
    if argsz < minsz:
        raise OSError(errno.EINVAL, f"argsz is {argsz}, at least {minsz} is needed")
    info = vfio.DeviceInfo(
        argsz=argsz,
        flags=vfio.VFIO_DEVICE_FLAGS_RESET | vfio.VFIO_DEVICE_FLAGS_PCI,
        num_regions=vfio.VFIO_PCI_NUM_REGIONS,
        num_irqs=vfio.VFIO_PCI_NUM_IRQS,
    )
    caller.write(arg, bytes(info)[:argsz])
    return 0


def device_get_region_info(file: VfioDeviceFile, arg: int, caller: Caller) -> int:
    asked = vfio.RegionInfo.parse(caller.read(arg, vfio.RegionInfo.SIZE))
    if asked.argsz < asked.SIZE:
        raise OSError(errno.EINVAL, f"argsz is {asked.argsz}, at least {asked.SIZE} is needed")
    if asked.index > CONFIG:  # VGA only where there is one
        raise OSError(errno.EINVAL, f"no region has the index {asked.index}")
    size, flags = _describe(file.device, asked.index)
    answer = vfio.RegionInfo(
        argsz=asked.argsz,
        flags=flags,
        index=asked.index,
        size=size,
        offset=region_offset(asked.index),
    )
    region = file.device.device.regions.get(asked.index)
    capabilities = _sparse_areas(region) if region is not None else b""
    if capabilities:
        answer.flags |= vfio.VFIO_REGION_INFO_FLAG_CAPS
        needed = asked.SIZE + len(capabilities)
        if asked.argsz < needed:
            answer.argsz = needed  # the caller comes back with as much room
        else:
            caller.write(arg + asked.SIZE, capabilities)
            answer.cap_offset = asked.SIZE
    caller.write(arg, bytes(answer))
    return 0


def _describe(served: VfioDevice, index: int) -> tuple[int, int]:
    """Size and flags of a region; a region that the device lacks has none of either."""
    if index == CONFIG:
        flags = vfio.VFIO_REGION_INFO_FLAG_READ | vfio.VFIO_REGION_INFO_FLAG_WRITE
        return served.configuration.size, flags
    region = served.device.regions.get(index)
    if region is None:
        return 0, 0
    flags = vfio.VFIO_REGION_INFO_FLAG_READ * region.readable
    flags |= vfio.VFIO_REGION_INFO_FLAG_WRITE * region.writable
    flags |= vfio.VFIO_REGION_INFO_FLAG_MMAP * bool(region.mapped)
    return region.size, flags


def _sparse_areas(region: Region) -> bytes:
    """Make the capability that says what may be mapped, unless that is nothing or all of it."""
    if not region.mapped or sum(size for _, size in region.mapped) == region.size:
        return b""
    header = vfio.InfoCapHeader(id=vfio.VFIO_REGION_INFO_CAP_SPARSE_MMAP, version=1)
    head = vfio.RegionInfoCapSparseMmap(header=header, nr_areas=len(region.mapped))
    areas = (vfio.SparseMmapArea(offset=offset, size=size) for offset, size in region.mapped)
    return bytes(head) + b"".join(map(bytes, areas))
