"""What sysfs knows of devices: their drivers, their VFIO nodes and their groups.

A device is found by its PCI address or mdev uuid under /sys/bus, by the name of its character
device under /sys/class/vfio-dev, or as a member of an IOMMU group. Whatever is not there, or
cannot be read, is ``None``: a container often shows no sysfs, or that of another machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ("SysDevice", "Sysfs")

BUSES = ("pci", "mdev")
#: What the node of a group is called in front of its number if its devices do DMA without an IOMMU.
#: The group's own name does not tell: a mediated device, which has none either, is in one
#: that is called the same, and its node has the bare number.
NO_IOMMU = "noiommu-"


@dataclass(frozen=True, slots=True)
class SysDevice:
    """A device, by the name that its bus has for it."""

    name: str
    #: The driver that it is bound to.
    driver: str | None
    #: Its node under /dev/vfio/devices, once a VFIO driver has it.
    node: str | None
    #: Its node under /dev/vfio, which is there once a VFIO driver has one of the group's devices.
    group: str | None
    #: Who made it, if it is a PCI function.
    vendor: int | None = None


class Sysfs:
    """A sysfs, mounted at ``root``."""

    def __init__(self, root: str | os.PathLike[str] = "/sys") -> None:
        self.root = Path(root)

    def find(self, name: str) -> SysDevice | None:
        """Find a device by its PCI address or mdev uuid."""
        for bus in BUSES:
            folder = self.root / "bus" / bus / "devices" / name
            if folder.is_dir():
                return self._describe(folder, name)
        return None

    def of_node(self, node: str) -> SysDevice | None:
        """Find the device behind /dev/vfio/devices/NODE."""
        folder = self.root / "class/vfio-dev" / node / "device"
        return self._describe(folder, folder.resolve().name) if folder.is_dir() else None

    def members(self, group: str) -> list[SysDevice]:
        """List the devices of /dev/vfio/GROUP, by name."""
        number = group.removeprefix(NO_IOMMU)
        folder = self.root / "kernel/iommu_groups" / number / "devices"
        return [self._describe(folder / name, name) for name in _names(folder)]

    def _describe(self, folder: Path, name: str) -> SysDevice:
        nodes = _names(folder / "vfio-dev")
        driver = _link(folder / "driver")
        node = nodes[0] if nodes else None
        return SysDevice(name, driver, node, self._group(folder), _number(folder / "vendor"))

    def _group(self, folder: Path) -> str | None:
        number = _link(folder / "iommu_group")
        if number is None:
            return None
        special = f"{NO_IOMMU}{number}"
        return special if (self.root / "class/vfio" / special).exists() else number


def _link(path: Path) -> str | None:
    """The last part of where a link leads."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"), 16)
    except (OSError, ValueError):
        return None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
