"""A page table over an IO address space, and the dirty tracking of an IOMMU.

Theory of operation
-------------------
Devices are attached to a page table, any number of them to one; its mappings are those of the
space. While tracking is on, what any of them writes through the table is in its log, apart from
what devices log themselves: either is read and cleared without the other noticing.

The log of an IOMMU sits in the entries of the table. So what was unmapped is forgotten, and
turning tracking on starts anew. See ``IOMMU_HWPT_SET_DIRTY_TRACKING`` and ``..._GET_DIRTY_BITMAP`` in include/uapi/linux/iommufd.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiomig.iommu.dirty import DirtyLog

if TYPE_CHECKING:
    from vfiomig.iommu.space import IoSpace

__all__ = ("PageTable",)

EVERYTHING = (0, 1 << 64)


class PageTable:
    """What devices are attached to."""

    def __init__(self, space: IoSpace) -> None:
        self.space = space
        #: What was written since the last report; ``None`` while tracking is off.
        self.log: DirtyLog | None = None

    def track(self, on: bool) -> None:
        """Turn tracking on, with nothing written so far, or off."""
        with self.space.lock:
            if self.log is not None:
                self.space.logs.remove(self.log)
            self.log = DirtyLog([EVERYTHING]) if on else None
            if self.log is not None:
                self.space.logs.append(self.log)
