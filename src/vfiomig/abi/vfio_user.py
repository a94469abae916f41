"""The vfio-user protocol, version 0.x: what goes over the socket in place of an ioctl.

All numbers are little-endian and no struct has padding. Where a message carries a struct of
``linux/vfio.h`` it is that of `vfiomig.abi.vfio`: region, interrupt and feature structs, migration
state, precopy info. Structs are declared here where the wire differs: it has no pointers, so what
the kernel would fetch follows the struct.

Sources: the vfio-user specification (QEMU's docs/interop/vfio-user.rst) and what libvfio-user and
QEMU send; the last command is the extension of docs/spec/vfio-user-migration-extension.md.
"""

from __future__ import annotations

from vfiomig.abi.uapi import UapiStruct, u8x8, u16, u32, u64

# --- commands ----------------------------------------------------------------------------------

VFIO_USER_VERSION = 1
VFIO_USER_DMA_MAP = 2
VFIO_USER_DMA_UNMAP = 3
VFIO_USER_DEVICE_GET_INFO = 4
VFIO_USER_DEVICE_GET_REGION_INFO = 5
VFIO_USER_DEVICE_GET_REGION_IO_FDS = 6
VFIO_USER_DEVICE_GET_IRQ_INFO = 7
VFIO_USER_DEVICE_SET_IRQS = 8
VFIO_USER_REGION_READ = 9
VFIO_USER_REGION_WRITE = 10
VFIO_USER_DMA_READ = 11
VFIO_USER_DMA_WRITE = 12
VFIO_USER_DEVICE_RESET = 13
VFIO_USER_REGION_WRITE_MULTI = 15  # 14 was DIRTY_PAGES, which nobody has any more
VFIO_USER_DEVICE_FEATURE = 16
VFIO_USER_MIG_DATA_READ = 17
VFIO_USER_MIG_DATA_WRITE = 18

# The commands of the specification grow upwards from 1, so an experiment that counted on from 18
# would collide with the next one. The upper half of the numbers is not theirs; 0x79 is the number
# of the ioctl that this stands for (0x3B79).
VFIO_USER_MIG_GET_PRECOPY_INFO = 0x8079

# --- the header --------------------------------------------------------------------------------

VFIO_USER_TYPE = 0xF
VFIO_USER_REQUEST = 0x0
VFIO_USER_REPLY = 0x1
VFIO_USER_NO_REPLY = 0x10
VFIO_USER_ERROR = 0x20


class Header(UapiStruct):
    """struct vfio_user_header, followed by ``msg_size`` - 16 bytes."""

    msg_id: u16
    cmd: u16
    msg_size: u32
    flags: u32
    error_no: u32


class Version(UapiStruct):
    """struct vfio_user_version, followed by nothing, or by JSON and a NUL."""

    major: u16
    minor: u16


# --- memory ------------------------------------------------------------------------------------

VFIO_USER_F_DMA_REGION_READ = 1 << 0
VFIO_USER_F_DMA_REGION_WRITE = 1 << 1
VFIO_USER_F_DMA_REGION_MMAP = 1 << 2
VFIO_USER_F_DMA_REGION_FILE_IO = 1 << 3


class DmaMap(UapiStruct):
    """struct vfio_user_dma_map; ``offset`` is the place of the memory in the descriptor."""

    argsz: u32
    flags: u32
    offset: u64
    addr: u64
    size: u64


class DmaUnmap(UapiStruct):
    """struct vfio_user_dma_unmap, followed by a `Bitmap` with the flag for it.

    The flags are VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP and VFIO_DMA_UNMAP_FLAG_ALL.
    """

    argsz: u32
    flags: u32
    addr: u64
    size: u64


class Bitmap(UapiStruct):
    """struct vfio_user_bitmap; in a reply ``size`` bytes of bits follow."""

    pgsize: u64
    size: u64


class DmaRegionAccess(UapiStruct):
    """struct vfio_user_dma_region_access, followed by the data of a write or of a read's reply."""

    addr: u64
    count: u64


# --- device and regions ------------------------------------------------------------------------


class DeviceInfo(UapiStruct):
    """struct vfio_user_device_info: that of VFIO without capabilities."""

    argsz: u32
    flags: u32
    num_regions: u32
    num_irqs: u32


class RegionIoFds(UapiStruct):
    """struct vfio_user_region_io_fds, in a reply followed by what ``count`` descriptors are for."""

    argsz: u32
    flags: u32
    index: u32
    count: u32


class RegionAccess(UapiStruct):
    """struct vfio_user_region_access, followed by the data of a write or of a read's reply."""

    offset: u64
    region: u32
    count: u32


class WriteMulti(UapiStruct):
    """struct vfio_user_write_multi, in a request followed by ``wr_cnt`` times `WriteOne`."""

    wr_cnt: u64


class WriteOne(UapiStruct):
    """struct vfio_user_write_one: of ``data`` the first ``count`` bytes count."""

    offset: u64
    region: u32
    count: u32
    data: u8x8


# --- migration ---------------------------------------------------------------------------------


class DmaLoggingControl(UapiStruct):
    """struct vfio_user_dma_logging_control, followed by ``num_ranges`` times `DmaLoggingRange`.

    The ranges are those of `vfiomig.abi.vfio`; the kernel's struct has a pointer to them.
    """

    page_size: u64
    num_ranges: u32
    reserved: u32


class DmaLoggingReport(UapiStruct):
    """struct vfio_user_dma_logging_report, in a reply followed by the bitmap."""

    iova: u64
    length: u64
    page_size: u64


class MigData(UapiStruct):
    """struct vfio_user_mig_data, followed by the data of a write or of a read's reply.

    ``argsz`` counts this struct and the data.
    """

    argsz: u32
    size: u32
