"""``linux/iommufd.h``: address spaces, their mappings, page tables and dirty tracking.

Every struct begins with its own size. The kernel takes a shorter one down to the request's
minimum and a longer one whose excess is zero.
"""

from __future__ import annotations

import enum

from vfiomig.abi.uapi import IO, UapiStruct, s32, u8, u8x3, u16, u32, u64

IOMMUFD_TYPE = 0x3B
IOMMUFD_CMD_BASE = 0x80

IOMMU_DESTROY = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x00)
IOMMU_IOAS_ALLOC = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x01)
IOMMU_IOAS_ALLOW_IOVAS = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x02)
IOMMU_IOAS_COPY = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x03)
IOMMU_IOAS_IOVA_RANGES = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x04)
IOMMU_IOAS_MAP = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x05)
IOMMU_IOAS_UNMAP = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x06)
IOMMU_OPTION = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x07)
IOMMU_VFIO_IOAS = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x08)
IOMMU_HWPT_ALLOC = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x09)
IOMMU_GET_HW_INFO = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x0A)
IOMMU_HWPT_SET_DIRTY_TRACKING = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x0B)
IOMMU_HWPT_GET_DIRTY_BITMAP = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x0C)
IOMMU_IOAS_MAP_FILE = IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 0x0F)

IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0
IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
IOMMU_IOAS_MAP_READABLE = 1 << 2

IOMMU_OPTION_RLIMIT_MODE = 0
IOMMU_OPTION_HUGE_PAGES = 1
IOMMU_OPTION_OP_SET = 0
IOMMU_OPTION_OP_GET = 1

IOMMU_VFIO_IOAS_GET = 0
IOMMU_VFIO_IOAS_SET = 1
IOMMU_VFIO_IOAS_CLEAR = 2

IOMMU_HWPT_ALLOC_NEST_PARENT = 1 << 0
IOMMU_HWPT_ALLOC_DIRTY_TRACKING = 1 << 1
IOMMU_HWPT_FAULT_ID_VALID = 1 << 2
IOMMU_HWPT_ALLOC_PASID = 1 << 3
IOMMU_HWPT_DATA_NONE = 0

IOMMU_HW_INFO_TYPE_NONE = 0
IOMMU_HW_CAP_DIRTY_TRACKING = 1 << 0

IOMMU_HWPT_DIRTY_TRACKING_ENABLE = 1 << 0
IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1 << 0


class ObjectKind(enum.StrEnum):
    """What an iommufd object id stands for, by the names of the kernel's documentation."""

    DEVICE = "IOMMUFD_OBJ_DEVICE"
    IOAS = "IOMMUFD_OBJ_IOAS"
    HWPT_PAGING = "IOMMUFD_OBJ_HWPT_PAGING"


class IommuDestroy(UapiStruct):
    """struct iommu_destroy."""

    size: u32
    id: u32


class IoasAlloc(UapiStruct):
    """struct iommu_ioas_alloc."""

    size: u32
    flags: u32
    out_ioas_id: u32


class IovaRange(UapiStruct):
    """struct iommu_iova_range, both ends included."""

    start: u64
    last: u64


class IoasIovaRanges(UapiStruct):
    """struct iommu_ioas_iova_ranges."""

    size: u32
    ioas_id: u32
    num_iovas: u32
    reserved: u32
    allowed_iovas: u64
    out_iova_alignment: u64


class IoasAllowIovas(UapiStruct):
    """struct iommu_ioas_allow_iovas."""

    size: u32
    ioas_id: u32
    num_iovas: u32
    reserved: u32
    allowed_iovas: u64


class IoasMap(UapiStruct):
    """struct iommu_ioas_map."""

    size: u32
    flags: u32
    ioas_id: u32
    reserved: u32
    user_va: u64
    length: u64
    iova: u64


class IoasMapFile(UapiStruct):
    """struct iommu_ioas_map_file."""

    size: u32
    flags: u32
    ioas_id: u32
    fd: s32
    start: u64
    length: u64
    iova: u64


class IoasCopy(UapiStruct):
    """struct iommu_ioas_copy."""

    size: u32
    flags: u32
    dst_ioas_id: u32
    src_ioas_id: u32
    length: u64
    dst_iova: u64
    src_iova: u64


class IoasUnmap(UapiStruct):
    """struct iommu_ioas_unmap."""

    size: u32
    ioas_id: u32
    iova: u64
    length: u64


class IommuOption(UapiStruct):
    """struct iommu_option."""

    size: u32
    option_id: u32
    op: u16
    reserved: u16
    object_id: u32
    val64: u64


class IommuVfioIoas(UapiStruct):
    """struct iommu_vfio_ioas."""

    size: u32
    ioas_id: u32
    op: u16
    reserved: u16


class HwptAlloc(UapiStruct):
    """struct iommu_hwpt_alloc."""

    size: u32
    flags: u32
    dev_id: u32
    pt_id: u32
    out_hwpt_id: u32
    reserved: u32
    data_type: u32
    data_len: u32
    data_uptr: u64
    fault_id: u32
    reserved2: u32


class HwInfo(UapiStruct):
    """struct iommu_hw_info."""

    size: u32
    flags: u32
    dev_id: u32
    data_len: u32
    data_uptr: u64
    out_data_type: u32
    out_max_pasid_log2: u8
    reserved: u8x3
    out_capabilities: u64


class HwptSetDirtyTracking(UapiStruct):
    """struct iommu_hwpt_set_dirty_tracking."""

    size: u32
    flags: u32
    hwpt_id: u32
    reserved: u32


class HwptGetDirtyBitmap(UapiStruct):
    """struct iommu_hwpt_get_dirty_bitmap."""

    size: u32
    hwpt_id: u32
    flags: u32
    reserved: u32
    iova: u64
    length: u64
    page_size: u64
    data: u64
