"""What sysfs tells of the served devices, where programs look for a device's group and its nodes.

Theory of operation
-------------------
A program that is given a PCI address or a folder of sysfs finds the group by ``iommu_group``, the
character device by ``vfio-dev``, the driver and the identity by files and links beside them. What
is here is what such programs read, as one table of paths; each function is bound to vfio-pci and
alone in its group. As with /dev/vfio, the machine's own functions and groups are not this
program's: the folders in ``OURS`` have served devices only, and whatever else there is in sysfs
stays as it is.

Rows are real files and links of the stand-in (standin.py), so links are followed by the kernel.
Nothing can be written, and ``config`` stays what it was when the program first looked here.
Layout: Documentation/ABI/testing/sysfs-bus-pci, sysfs-kernel-iommu_groups and sysfs-devices-vfio-dev
of the kernel, and include/linux/ioport.h for the flags in ``resource``.
"""

from __future__ import annotations

import os
import posixpath
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from vfiomig.doors.syscall.paths import DEVICES, VFIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from vfiomig.core.group import Group
    from vfiomig.device import Device
    from vfiomig.doors.syscall.paths import DevTree

__all__ = ("SysTree",)

DRIVER: Final = "/sys/bus/pci/drivers/vfio-pci"
GROUPS: Final = "/sys/kernel/iommu_groups"
#: Folders that are ours altogether; there are those of the functions as well.
OURS: Final = (
    "/sys/bus/pci",
    "/sys/class/vfio",
    "/sys/class/vfio-dev",
    "/sys/devices/virtual/vfio",
    GROUPS,
    # Where programs look whether VFIO is there at all.
    "/sys/module/vfio",
    "/sys/module/vfio_pci",
    "/sys/module/vfio_iommu_type1",
    "/sys/module/iommufd",
)
#: Lines of ``resource``: six BARs, the ROM, and six windows of bridges.
RESOURCES: Final = 13
IORESOURCE_IO: Final = 0x100
IORESOURCE_MEM: Final = 0x200
IORESOURCE_PREFETCH: Final = 0x2000
IORESOURCE_SIZEALIGN: Final = 0x40000
IORESOURCE_MEM_64: Final = 0x100000
#: A BAR has no address before it is given one, as after power-on.
IORESOURCE_UNSET: Final = 0x20000000


class Link(NamedTuple):
    """A symbolic link, by the path that it leads to."""

    target: str


Row: TypeAlias = tuple[str, bytes | Link]


class SysTree:
    """The part of /sys that is ours."""

    def __init__(self, groups: Sequence[Group], nodes: DevTree) -> None:
        self._groups = groups
        self._nodes = nodes
        self._folders = (*OURS, *(posixpath.dirname(_folder(group)) for group in groups))

    def has(self, path: str) -> bool:
        """Whether ``path`` is one of ours to tell about, be it there or not."""
        return path.startswith("/sys/") and any(
            path == folder or path.startswith(f"{folder}/") for folder in self._folders
        )

    def fill(self, root: Path) -> None:
        """Make what is there below ``root``."""
        for folder in self._folders:
            (root / folder[1:]).mkdir(parents=True, exist_ok=True)
        for path, content in self._rows():
            place = root / path[1:]
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Link):
                place.symlink_to(posixpath.relpath(content.target, posixpath.dirname(path)))
            else:
                place.write_bytes(content)
                place.chmod(0o444)

    def _rows(self) -> Iterator[Row]:
        for number, group in enumerate(self._groups):
            folder, address, name = _folder(group), group.address, group.device.name
            for file, text in _files(group.device.device).items():
                yield f"{folder}/{file}", f"{text}\n".encode("ascii")
            space = group.device.configuration
            yield f"{folder}/config", space.read(0, space.size)
            yield f"{folder}/driver", Link(DRIVER)
            yield f"{folder}/subsystem", Link("/sys/bus/pci")
            yield f"{folder}/iommu_group", Link(f"{GROUPS}/{number}")
            yield f"{folder}/vfio-dev/{name}/dev", self._numbers(f"{DEVICES}/{name}")
            yield f"{folder}/vfio-dev/{name}/device", Link(folder)
            yield f"/sys/bus/pci/devices/{address}", Link(folder)
            yield f"{DRIVER}/{address}", Link(folder)
            yield f"{GROUPS}/{number}/devices/{address}", Link(folder)
            yield f"/sys/class/vfio-dev/{name}", Link(f"{folder}/vfio-dev/{name}")
            yield f"/sys/devices/virtual/vfio/{number}/dev", self._numbers(f"{VFIO}/{number}")
            yield f"/sys/class/vfio/{number}", Link(f"/sys/devices/virtual/vfio/{number}")

    def _numbers(self, path: str) -> bytes:
        device = self._nodes.node(path).device
        return b"%d:%d\n" % (os.major(device), os.minor(device))


def _folder(group: Group) -> str:
    """The folder of a function, which is the only one on its root bus."""
    return f"/sys/devices/pci{group.address[:7]}/{group.address}"


def _files(device: Device) -> dict[str, str]:
    identity = device.pci
    return {
        "vendor": f"{identity.vendor:#06x}",
        "device": f"{identity.device:#06x}",
        "subsystem_vendor": f"{identity.subsystem_vendor:#06x}",
        "subsystem_device": f"{identity.subsystem:#06x}",
        "class": f"{identity.class_code:#08x}",
        "revision": f"{identity.revision:#04x}",
        "irq": "0",
        "numa_node": "-1",
        "resource": "\n".join(_resource(device, index) for index in range(RESOURCES)),
    }


def _resource(device: Device, index: int) -> str:
    region, last, flags = device.regions.get(index), 0, 0
    if region is not None:
        last = region.size - 1
        flags = IORESOURCE_IO if region.io else IORESOURCE_MEM
        flags |= IORESOURCE_PREFETCH * region.prefetchable | IORESOURCE_MEM_64 * region.bits64
        flags |= IORESOURCE_SIZEALIGN | IORESOURCE_UNSET
    return f"{0:#018x} {last:#018x} {flags:#018x}"
