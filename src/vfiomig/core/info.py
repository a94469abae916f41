"""What a device is made of, and access to its regions.

VFIO_DEVICE_GET_INFO, ..._GET_REGION_INFO, ..._GET_IRQ_INFO, and the positional reads and writes
of the device's descriptor. The regions are those of vfio-pci: six BARs, ROM, configuration space
and VGA, of which a device has what its class declares, and always configuration space.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from vfiomig.abi import vfio

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
    from vfiomig.device import Device

__all__ = (
    "OFFSET_TAG",
    "device_get_info",
    "device_get_irq_info",
    "device_get_region_info",
    "read_region",
    "region_offset",
    "write_region",
)

#: Region offsets carry it in their top byte: a filter of system calls tells an access to a
#: region by the offset alone.
OFFSET_TAG = 0x56
INDEX_SHIFT = 40
CONFIG = vfio.VFIO_PCI_CONFIG_REGION_INDEX
CONFIG_SIZE = 256


def region_offset(index: int) -> int:
    """Where a region begins in the device's descriptor."""
    return OFFSET_TAG << 56 | index << INDEX_SHIFT


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
    size, flags = _describe(file.device.device, asked.index)
    answer = vfio.RegionInfo(
        argsz=asked.argsz,
        flags=flags,
        index=asked.index,
        size=size,
        offset=region_offset(asked.index),
    )
    caller.write(arg, bytes(answer))
    return 0


def device_get_irq_info(file: VfioDeviceFile, arg: int, caller: Caller) -> int:  # noqa: ARG001
    """Tell that the device raises no interrupts: every index has none."""
    asked = vfio.IrqInfo.parse(caller.read(arg, vfio.IrqInfo.SIZE))
    if asked.argsz < asked.SIZE or asked.index >= vfio.VFIO_PCI_NUM_IRQS:
        raise OSError(errno.EINVAL, "argsz or index")
    asked.flags = asked.count = 0
    caller.write(arg, bytes(asked))
    return 0


def read_region(served: VfioDevice, offset: int, length: int) -> bytes:
    """Read at an offset of the descriptor; EINVAL outside the regions, EFAULT outside config."""
    if not length:
        return b""
    device = served.device
    index, at, length = _locate(device, offset, length)
    if index == CONFIG:
        return configuration(device)[at : at + length]
    region = device.regions[index]
    if not region.readable:
        raise OSError(errno.EINVAL, f"{region.name} cannot be read")
    return served.migration.beside(region.name, lambda: region.read(device, at, length))


def write_region(served: VfioDevice, offset: int, data: bytes) -> int:
    """Write at an offset of the descriptor; return the bytes that lie inside the region."""
    if not data:
        return 0
    device = served.device
    index, at, length = _locate(device, offset, len(data))
    if index == CONFIG:
        return length  # every bit of this header is read-only
    region = device.regions[index]
    if not region.writable:
        raise OSError(errno.EINVAL, f"{region.name} cannot be written")
    served.migration.beside(region.name, lambda: region.write(device, at, data[:length]))
    return length


def _locate(device: Device, offset: int, length: int) -> tuple[int, int, int]:
    """Region index, offset inside it, and how much of ``length`` lies there."""
    index = offset - (OFFSET_TAG << 56) >> INDEX_SHIFT
    at = offset & ((1 << INDEX_SHIFT) - 1)
    if index == CONFIG:
        if at + length > CONFIG_SIZE:
            raise OSError(errno.EFAULT, "the access leaves configuration space")
        return index, at, length
    if index not in device.regions or at >= device.regions[index].size:
        raise OSError(errno.EINVAL, f"the offset {offset:#x} is in no region")
    return index, at, min(length, device.regions[index].size - at)


def _describe(device: Device, index: int) -> tuple[int, int]:
    """Size and flags of a region; a region that the device lacks has none of either."""
    if index == CONFIG:
        return CONFIG_SIZE, vfio.VFIO_REGION_INFO_FLAG_READ | vfio.VFIO_REGION_INFO_FLAG_WRITE
    region = device.regions.get(index)
    if region is None:
        return 0, 0
    flags = vfio.VFIO_REGION_INFO_FLAG_READ * region.readable
    return region.size, flags | vfio.VFIO_REGION_INFO_FLAG_WRITE * region.writable


def configuration(device: Device) -> bytes:
    """Return the type 0 header that says who the device is; the rest of the space reads as 0."""
    pci = device.pci
    header = struct.pack("<HHHHI", pci.vendor, pci.device, 0, 0, pci.class_code << 8 | pci.revision)
    header = header.ljust(0x2C, b"\0") + struct.pack("<HH", pci.subsystem_vendor, pci.subsystem)
    return header.ljust(CONFIG_SIZE, b"\0")
