"""What the program's descriptors stand for, and how to tell whose a descriptor is.

Theory of operation
===================
A descriptor of ours is a placeholder in the program's table: a memfd for a device, an iommufd or
a data_fd without poll, a pipe end for a data_fd with it. Every open has a placeholder of its own,
so the inode behind /proc/TID/fd/N tells which open a number means, after dup, fork, exec and
hand-over as well. Nothing is cached: a number may mean something else in the next call.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from vfiomig.core.iommufd import Iommufd
    from vfiomig.core.transfer import Migf
    from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
    from vfiomig.doors.syscall.readiness import DataPipe

__all__ = ("DataOpen", "DeviceOpen", "IommufdOpen", "Opened", "Table", "inode_of")

Inode: TypeAlias = tuple[int, int]


@dataclass(slots=True, eq=False)
class DeviceOpen:
    """One open of /dev/vfio/devices/vfioN."""

    number: int
    file: VfioDeviceFile

    @property
    def label(self) -> str:
        return f"vfio{self.number}"


@dataclass(slots=True, eq=False)
class IommufdOpen:
    """One open of /dev/iommu."""

    context: Iommufd
    label: str = "iommu"


@dataclass(slots=True, eq=False)
class DataOpen:
    """A data_fd. ``pipe`` is ``None`` where the device has no poll."""

    device: VfioDevice
    migf: Migf
    pipe: DataPipe | None = None
    label: str = field(init=False)

    def __post_init__(self) -> None:
        self.label = f"{self.device.name}:{self.migf.kind.name.lower()}"


Opened: TypeAlias = DeviceOpen | IommufdOpen | DataOpen


def inode_of(fd: int) -> Inode:
    """Inode behind a descriptor of this process."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


class Table:
    """All opens, by the inode of their placeholder. Safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_inode: dict[Inode, Opened] = {}

    def add(self, inode: Inode, opened: Opened) -> None:
        with self._lock:
            self._by_inode[inode] = opened

    def remove(self, opened: Opened) -> None:
        with self._lock:
            for inode in [i for i, known in self._by_inode.items() if known is opened]:
                del self._by_inode[inode]

    def replace(self, opened: Opened, other: Opened) -> None:
        """Let whatever means ``opened`` mean ``other``."""
        with self._lock:
            for inode in [i for i, known in self._by_inode.items() if known is opened]:
                self._by_inode[inode] = other

    def all(self) -> list[Opened]:
        with self._lock:
            return list(self._by_inode.values())

    def find(self, tid: int, fd: int) -> Opened | None:
        """Tell what number ``fd`` of the thread means; ``None`` if it is not ours, or not open."""
        try:
            status = os.stat(f"/proc/{tid}/fd/{fd & 0xFFFF_FFFF}")
        except OSError:
            return None
        return self._by_inode.get((status.st_dev, status.st_ino))
