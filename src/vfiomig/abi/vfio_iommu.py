"""``linux/vfio.h``, the side of the group and of the container with its type1 IOMMU."""

from __future__ import annotations

from vfiomig.abi.uapi import IO, UapiStruct, u32, u64
from vfiomig.abi.vfio import VFIO_BASE, VFIO_TYPE, InfoCapHeader

VFIO_GET_API_VERSION = IO(VFIO_TYPE, VFIO_BASE + 0)
VFIO_CHECK_EXTENSION = IO(VFIO_TYPE, VFIO_BASE + 1)
VFIO_SET_IOMMU = IO(VFIO_TYPE, VFIO_BASE + 2)
VFIO_GROUP_GET_STATUS = IO(VFIO_TYPE, VFIO_BASE + 3)
VFIO_GROUP_SET_CONTAINER = IO(VFIO_TYPE, VFIO_BASE + 4)
VFIO_GROUP_UNSET_CONTAINER = IO(VFIO_TYPE, VFIO_BASE + 5)
VFIO_GROUP_GET_DEVICE_FD = IO(VFIO_TYPE, VFIO_BASE + 6)
VFIO_IOMMU_GET_INFO = IO(VFIO_TYPE, VFIO_BASE + 12)
VFIO_IOMMU_MAP_DMA = IO(VFIO_TYPE, VFIO_BASE + 13)
VFIO_IOMMU_UNMAP_DMA = IO(VFIO_TYPE, VFIO_BASE + 14)
VFIO_IOMMU_DIRTY_PAGES = IO(VFIO_TYPE, VFIO_BASE + 17)

VFIO_API_VERSION = 0

VFIO_TYPE1_IOMMU = 1
VFIO_TYPE1v2_IOMMU = 3
VFIO_DMA_CC_IOMMU = 4
VFIO_NOIOMMU_IOMMU = 8
VFIO_UNMAP_ALL = 9
VFIO_UPDATE_VADDR = 10

VFIO_GROUP_FLAGS_VIABLE = 1 << 0
VFIO_GROUP_FLAGS_CONTAINER_SET = 1 << 1

VFIO_IOMMU_INFO_PGSIZES = 1 << 0
VFIO_IOMMU_INFO_CAPS = 1 << 1
VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1
VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION = 2
VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3

VFIO_DMA_MAP_FLAG_READ = 1 << 0
VFIO_DMA_MAP_FLAG_WRITE = 1 << 1
VFIO_DMA_MAP_FLAG_VADDR = 1 << 2

VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1 << 0
VFIO_DMA_UNMAP_FLAG_ALL = 1 << 1
VFIO_DMA_UNMAP_FLAG_VADDR = 1 << 2

VFIO_IOMMU_DIRTY_PAGES_FLAG_START = 1 << 0
VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP = 1 << 1
VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP = 1 << 2


class GroupStatus(UapiStruct):
    """struct vfio_group_status."""

    argsz: u32
    flags: u32


class Type1Info(UapiStruct):
    """struct vfio_iommu_type1_info."""

    argsz: u32
    flags: u32
    iova_pgsizes: u64
    cap_offset: u32
    pad: u32


class Type1IovaRange(UapiStruct):
    """struct vfio_iova_range, both ends included."""

    start: u64
    end: u64


class Type1InfoCapIovaRange(UapiStruct):
    """struct vfio_iommu_type1_info_cap_iova_range, followed by its `Type1IovaRange` array."""

    header: InfoCapHeader
    nr_iovas: u32
    reserved: u32


class Type1InfoCapMigration(UapiStruct):
    """struct vfio_iommu_type1_info_cap_migration."""

    header: InfoCapHeader
    flags: u32
    pgsize_bitmap: u64
    max_dirty_bitmap_size: u64


class Type1InfoDmaAvail(UapiStruct):
    """struct vfio_iommu_type1_info_dma_avail."""

    header: InfoCapHeader
    avail: u32


class Type1DmaMap(UapiStruct):
    """struct vfio_iommu_type1_dma_map."""

    argsz: u32
    flags: u32
    vaddr: u64
    iova: u64
    size: u64


class Type1DmaUnmap(UapiStruct):
    """struct vfio_iommu_type1_dma_unmap, followed by a `Bitmap` if the flags ask for one."""

    argsz: u32
    flags: u32
    iova: u64
    size: u64


class Bitmap(UapiStruct):
    """struct vfio_bitmap."""

    pgsize: u64
    size: u64
    data: u64


class Type1DirtyBitmap(UapiStruct):
    """struct vfio_iommu_type1_dirty_bitmap, and for GET_BITMAP a `Type1DirtyBitmapGet`."""

    argsz: u32
    flags: u32


class Type1DirtyBitmapGet(UapiStruct):
    """struct vfio_iommu_type1_dirty_bitmap_get."""

    iova: u64
    size: u64
    bitmap: Bitmap
