"""Page tables of an iommufd, and what it tells of a device's IOMMU.

IOMMU_HWPT_ALLOC, IOMMU_GET_HW_INFO, IOMMU_HWPT_SET_DIRTY_TRACKING and ..._GET_DIRTY_BITMAP, with
the checks in the order of drivers/iommu/iommufd (hw_pagetable.c, device.c). The IOMMU here is a
plain one: its page tables can track writes, are not nested, and know no PASIDs and page faults.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vfiomig.abi import iommufd as abi
from vfiomig.core.ioas import Ioas
from vfiomig.iommu import PageTable
from vfiomig.iommu.dirty import bitmap_size
from vfiomig.iommu.space import ALIGNMENT

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.core.iommufd import Iommufd

__all__ = (
    "BoundDevice",
    "Hwpt",
    "alloc",
    "get_dirty_bitmap",
    "get_hw_info",
    "set_dirty_tracking",
)

END = 1 << 64
ZEROS = bytes(1 << 16)
TRACKING = abi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
FAULTS = abi.IOMMU_HWPT_FAULT_ID_VALID


@dataclass(slots=True, eq=False)
class Hwpt:
    """A page table over an IOAS."""

    ioas: Ioas
    #: Made by attaching a device to the IOAS itself; it goes with the last such device.
    automatic: bool = False
    #: Whether it can track writes.
    tracks: bool = False
    #: Devices attached to it.
    users: int = 0
    table: PageTable = field(init=False)

    def __post_init__(self) -> None:
        self.table = PageTable(self.ioas.space)


@dataclass(slots=True, eq=False)
class BoundDevice:
    """A device that was bound to this iommufd; it goes when the device is closed."""

    name: str
    #: Whether the IOMMU in front of it can track its writes.
    tracks: bool = True
    users: int = 1


def alloc(context: Iommufd, argument: abi.HwptAlloc, caller: Caller) -> int:  # noqa: ARG001
    if argument.reserved:
        raise OSError(errno.EOPNOTSUPP, "a reserved field is set")
    if (argument.data_type == abi.IOMMU_HWPT_DATA_NONE) is bool(argument.data_len):
        raise OSError(errno.EINVAL, "data without a type, or a type without data")
    device = context.find(argument.dev_id, BoundDevice)
    flags = argument.flags

    def make(parent: object) -> Hwpt:
        if isinstance(parent, Hwpt):
            raise OSError(errno.EOPNOTSUPP, "page tables do not nest")
        if not isinstance(parent, Ioas):
            raise OSError(errno.EINVAL, f"the object {argument.pt_id} is no IOAS")
        if flags & ~(TRACKING | FAULTS) or argument.data_len:
            raise OSError(errno.EOPNOTSUPP, "flags or data that this IOMMU does not know")
        if flags & TRACKING and not device.tracks:
            raise OSError(errno.EOPNOTSUPP, f"the IOMMU of {device.name} cannot track writes")
        return Hwpt(parent, tracks=bool(flags & TRACKING))

    number = context.add_over(argument.pt_id, make)
    if flags & FAULTS:
        context.remove(number)
        raise OSError(errno.ENOENT, "no fault queue has that id")
    argument.out_hwpt_id = number
    return 0


def get_hw_info(context: Iommufd, argument: abi.HwInfo, caller: Caller) -> int:
    """Tell what the IOMMU of a device can; it has nothing to say in a format of its own."""
    if argument.flags or any(argument.reserved):
        raise OSError(errno.EOPNOTSUPP, "flags, or a reserved field is set")
    device = context.find(argument.dev_id, BoundDevice)
    for at in range(0, argument.data_len, len(ZEROS)):
        caller.write(argument.data_uptr + at, ZEROS[: argument.data_len - at])
    argument.data_len = 0
    argument.out_data_type = abi.IOMMU_HW_INFO_TYPE_NONE
    argument.out_max_pasid_log2 = 0
    argument.out_capabilities = abi.IOMMU_HW_CAP_DIRTY_TRACKING * device.tracks
    return 0


def set_dirty_tracking(
    context: Iommufd,
    argument: abi.HwptSetDirtyTracking,
    caller: Caller,  # noqa: ARG001
) -> int:
    if argument.flags & ~abi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE:
        raise OSError(errno.EOPNOTSUPP, "unknown flags")
    _tracking(context, argument.hwpt_id).track(bool(argument.flags))
    return 0


def get_dirty_bitmap(context: Iommufd, argument: abi.HwptGetDirtyBitmap, caller: Caller) -> int:
    """Set the bits of what was written, and forget it unless asked not to.

    While tracking is off there is nothing to tell, which is no error; neither is a gap in the
    mappings, at which the report ends.
    """
    if argument.flags & ~abi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR or argument.reserved:
        raise OSError(errno.EOPNOTSUPP, "unknown flags, or a reserved field is set")
    hwpt = context.find(argument.hwpt_id, Hwpt)
    _check_range(argument.iova, argument.length, argument.page_size)
    table = _tracking(context, argument.hwpt_id)
    log = table.log
    if log is None:
        return 0
    length = hwpt.table.space.mapped_length(argument.iova, argument.length)
    page_size = argument.page_size & -argument.page_size  # its lowest bit is all that counts
    if not caller.check(argument.data, bitmap_size(length, page_size), writable=True):
        raise OSError(errno.EFAULT, "the bitmap cannot be written")
    clear = not argument.flags & abi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
    log.report_into(argument.iova, length, page_size, caller, argument.data, clear=clear)
    return 0


def _check_range(iova: int, length: int, page_size: int) -> None:
    if not length:
        raise OSError(errno.EINVAL, "an empty range")
    if iova + length > END:
        raise OSError(errno.EOVERFLOW, "iova + length")
    # The kernel masks with page_size - 1 and never asks whether that is a power of two.
    if (iova | length) % ALIGNMENT or not page_size or (iova | iova + length) & (page_size - 1):
        raise OSError(errno.EINVAL, "the range is not made of pages")


def _tracking(context: Iommufd, number: int) -> PageTable:
    """Find a page table that can track writes; EOPNOTSUPP for any other one."""
    hwpt = context.find(number, Hwpt)
    if not hwpt.tracks:
        raise OSError(errno.EOPNOTSUPP, f"the page table {number} cannot track writes")
    return hwpt.table
