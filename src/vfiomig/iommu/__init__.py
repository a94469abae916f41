"""IOVA space: what a device reaches by DMA, and the log of what it wrote there.

``IoSpace`` is filled by whoever maps memory for the device (iommufd, later type1 and
vfio-user); ``DmaPort`` is how a device uses it; ``DirtyLog`` remembers the device's writes.
"""

from __future__ import annotations

from vfiomig.iommu.dirty import DirtyLog
from vfiomig.iommu.port import DmaPort
from vfiomig.iommu.space import IoSpace, Mapping, Memory

__all__ = ("DirtyLog", "DmaPort", "IoSpace", "Mapping", "Memory")
