"""IOVA space: what a device reaches by DMA, and the log of what it wrote there.

``IoSpace`` is filled by whoever maps memory for the device (iommufd, type1 or vfio-user), with
memory that ``Backings`` finds; ``PageTable`` is what devices are attached to;
``DmaPort`` is how a device uses it; ``DirtyLog`` remembers the device's writes.
"""

from __future__ import annotations

from vfiomig.iommu.backing import Backings, Place
from vfiomig.iommu.dirty import DirtyLog
from vfiomig.iommu.port import DmaPort
from vfiomig.iommu.space import IoSpace, Mapping, Memory
from vfiomig.iommu.table import PageTable

__all__ = (
    "Backings",
    "DirtyLog",
    "DmaPort",
    "IoSpace",
    "Mapping",
    "Memory",
    "PageTable",
    "Place",
)
