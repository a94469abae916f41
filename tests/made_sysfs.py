"""A sysfs tree of a few devices, as far as anybody here looks into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ("Made", "make_sysfs")


@dataclass(frozen=True)
class Made:
    """A device: ``node`` and ``group`` as they are called under /dev/vfio."""

    name: str
    driver: str | None = "vfio-pci"
    node: str | None = None
    group: str | None = None
    bus: str = "pci"


def make_sysfs(root: Path, *devices: Made) -> Path:
    """Make the links and folders that the kernel makes for these devices."""
    for device in devices:
        folder = root / "devices" / ("pci0000:00" if device.bus == "pci" else "parent")
        folder /= device.name
        folder.mkdir(parents=True)
        _link(root / "bus" / device.bus / "devices" / device.name, folder)
        if device.driver is not None:
            driver = root / "bus" / device.bus / "drivers" / device.driver
            driver.mkdir(parents=True, exist_ok=True)
            _link(folder / "driver", driver)
        if device.node is not None:
            node = folder / "vfio-dev" / device.node
            node.mkdir(parents=True)
            _link(node / "device", folder)
            _link(root / "class/vfio-dev" / device.node, node)
        if device.group is not None:
            group = root / "kernel/iommu_groups" / device.group.removeprefix("noiommu-")
            (group / "devices").mkdir(parents=True, exist_ok=True)
            if device.group.startswith("noiommu-") or device.bus == "mdev":
                (group / "name").write_text("vfio-noiommu\n", encoding="ascii")
            if device.driver is not None:
                (root / "class/vfio" / device.group).mkdir(parents=True, exist_ok=True)
            _link(group / "devices" / device.name, folder)
            _link(folder / "iommu_group", group)
    return root


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
