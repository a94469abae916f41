"""``linux/vfio.h``, the side of the device: regions, interrupts, features and migration.

Numbers are named in `vfiomig.abi.ioctls` as rows as well; there stands which kind of descriptor
takes which. The same number means different things on different descriptors.
"""

from __future__ import annotations

from vfiomig.abi.uapi import IO, UapiStruct, s32, u8, u16, u32, u64

VFIO_API_VERSION = 0
VFIO_TYPE = 0x3B
VFIO_BASE = 100

VFIO_DEVICE_GET_INFO = IO(VFIO_TYPE, VFIO_BASE + 7)
VFIO_DEVICE_GET_REGION_INFO = IO(VFIO_TYPE, VFIO_BASE + 8)
VFIO_DEVICE_GET_IRQ_INFO = IO(VFIO_TYPE, VFIO_BASE + 9)
VFIO_DEVICE_SET_IRQS = IO(VFIO_TYPE, VFIO_BASE + 10)
VFIO_DEVICE_RESET = IO(VFIO_TYPE, VFIO_BASE + 11)
VFIO_DEVICE_GET_PCI_HOT_RESET_INFO = IO(VFIO_TYPE, VFIO_BASE + 12)
VFIO_DEVICE_PCI_HOT_RESET = IO(VFIO_TYPE, VFIO_BASE + 13)
VFIO_DEVICE_FEATURE = IO(VFIO_TYPE, VFIO_BASE + 17)
VFIO_DEVICE_BIND_IOMMUFD = IO(VFIO_TYPE, VFIO_BASE + 18)
VFIO_DEVICE_ATTACH_IOMMUFD_PT = IO(VFIO_TYPE, VFIO_BASE + 19)
VFIO_DEVICE_DETACH_IOMMUFD_PT = IO(VFIO_TYPE, VFIO_BASE + 20)
# One number, two requests: on the device in V6, on the data descriptor in the landed dialect.
VFIO_DEVICE_MIG_SET_STATE = IO(VFIO_TYPE, VFIO_BASE + 21)
VFIO_MIG_GET_PRECOPY_INFO = IO(VFIO_TYPE, VFIO_BASE + 21)

# --- device, regions, interrupts ---------------------------------------------------------------

VFIO_DEVICE_FLAGS_RESET = 1 << 0
VFIO_DEVICE_FLAGS_PCI = 1 << 1
VFIO_DEVICE_FLAGS_CAPS = 1 << 7

VFIO_REGION_INFO_FLAG_READ = 1 << 0
VFIO_REGION_INFO_FLAG_WRITE = 1 << 1
VFIO_REGION_INFO_FLAG_MMAP = 1 << 2
VFIO_REGION_INFO_FLAG_CAPS = 1 << 3

VFIO_REGION_INFO_CAP_SPARSE_MMAP = 1
VFIO_REGION_INFO_CAP_TYPE = 2
VFIO_REGION_INFO_CAP_MSIX_MAPPABLE = 3

VFIO_PCI_BAR0_REGION_INDEX = 0
VFIO_PCI_BAR1_REGION_INDEX = 1
VFIO_PCI_BAR2_REGION_INDEX = 2
VFIO_PCI_BAR3_REGION_INDEX = 3
VFIO_PCI_BAR4_REGION_INDEX = 4
VFIO_PCI_BAR5_REGION_INDEX = 5
VFIO_PCI_ROM_REGION_INDEX = 6
VFIO_PCI_CONFIG_REGION_INDEX = 7
VFIO_PCI_VGA_REGION_INDEX = 8
VFIO_PCI_NUM_REGIONS = 9

VFIO_PCI_INTX_IRQ_INDEX = 0
VFIO_PCI_MSI_IRQ_INDEX = 1
VFIO_PCI_MSIX_IRQ_INDEX = 2
VFIO_PCI_ERR_IRQ_INDEX = 3
VFIO_PCI_REQ_IRQ_INDEX = 4
VFIO_PCI_NUM_IRQS = 5

VFIO_IRQ_INFO_EVENTFD = 1 << 0
VFIO_IRQ_INFO_MASKABLE = 1 << 1
VFIO_IRQ_INFO_AUTOMASKED = 1 << 2
VFIO_IRQ_INFO_NORESIZE = 1 << 3

VFIO_IRQ_SET_DATA_NONE = 1 << 0
VFIO_IRQ_SET_DATA_BOOL = 1 << 1
VFIO_IRQ_SET_DATA_EVENTFD = 1 << 2
VFIO_IRQ_SET_ACTION_MASK = 1 << 3
VFIO_IRQ_SET_ACTION_UNMASK = 1 << 4
VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5
VFIO_IRQ_SET_DATA_TYPE_MASK = (
    VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_DATA_EVENTFD
)
VFIO_IRQ_SET_ACTION_TYPE_MASK = (
    VFIO_IRQ_SET_ACTION_MASK | VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_ACTION_TRIGGER
)

VFIO_PCI_HOT_RESET_FLAG_DEV_ID = 1 << 0
VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED = 1 << 1


class InfoCapHeader(UapiStruct):
    """struct vfio_info_cap_header."""

    id: u16
    version: u16
    next: u32


class DeviceInfo(UapiStruct):
    """struct vfio_device_info."""

    argsz: u32
    flags: u32
    num_regions: u32
    num_irqs: u32
    cap_offset: u32
    pad: u32


class RegionInfo(UapiStruct):
    """struct vfio_region_info."""

    argsz: u32
    flags: u32
    index: u32
    cap_offset: u32
    size: u64
    offset: u64


class SparseMmapArea(UapiStruct):
    """struct vfio_region_sparse_mmap_area."""

    offset: u64
    size: u64


class RegionInfoCapSparseMmap(UapiStruct):
    """struct vfio_region_info_cap_sparse_mmap, followed by its `SparseMmapArea` array."""

    header: InfoCapHeader
    nr_areas: u32
    reserved: u32


class RegionInfoCapType(UapiStruct):
    """struct vfio_region_info_cap_type."""

    header: InfoCapHeader
    type: u32
    subtype: u32


class IrqInfo(UapiStruct):
    """struct vfio_irq_info."""

    argsz: u32
    flags: u32
    index: u32
    count: u32


class IrqSet(UapiStruct):
    """struct vfio_irq_set, followed by nothing, or by one u8 or one s32 eventfd per interrupt."""

    argsz: u32
    flags: u32
    index: u32
    start: u32
    count: u32


class PciDependentDevice(UapiStruct):
    """struct vfio_pci_dependent_device, whose first member is a devid under iommufd."""

    group_id: u32
    segment: u16
    bus: u8
    devfn: u8


class PciHotResetInfo(UapiStruct):
    """struct vfio_pci_hot_reset_info, followed by its `PciDependentDevice` array."""

    argsz: u32
    flags: u32
    count: u32


class PciHotReset(UapiStruct):
    """struct vfio_pci_hot_reset, followed by one s32 group descriptor per count."""

    argsz: u32
    flags: u32
    count: u32


# --- the character device and iommufd ----------------------------------------------------------

VFIO_DEVICE_BIND_FLAG_TOKEN = 1 << 0
VFIO_DEVICE_ATTACH_PASID = 1 << 0
VFIO_DEVICE_DETACH_PASID = 1 << 0


class BindIommufd(UapiStruct):
    """struct vfio_device_bind_iommufd; kernels without tokens know its first 16 bytes."""

    argsz: u32
    flags: u32
    iommufd: s32
    out_devid: u32
    token_uuid_ptr: u64


class AttachIommufdPt(UapiStruct):
    """struct vfio_device_attach_iommufd_pt; kernels without PASIDs know its first 12 bytes."""

    argsz: u32
    flags: u32
    pt_id: u32
    pasid: u32


class DetachIommufdPt(UapiStruct):
    """struct vfio_device_detach_iommufd_pt; kernels without PASIDs know its first 8 bytes."""

    argsz: u32
    flags: u32
    pasid: u32


# --- features ----------------------------------------------------------------------------------

VFIO_DEVICE_FEATURE_MASK = 0xFFFF
VFIO_DEVICE_FEATURE_GET = 1 << 16
VFIO_DEVICE_FEATURE_SET = 1 << 17
VFIO_DEVICE_FEATURE_PROBE = 1 << 18

VFIO_DEVICE_FEATURE_PCI_VF_TOKEN = 0
VFIO_DEVICE_FEATURE_MIGRATION = 1
VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2
VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY = 3
VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP = 4
VFIO_DEVICE_FEATURE_LOW_POWER_EXIT = 5
VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6
VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7
VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8
VFIO_DEVICE_FEATURE_MIG_DATA_SIZE = 9
VFIO_DEVICE_FEATURE_BUS_MASTER = 10
VFIO_DEVICE_FEATURE_DMA_BUF = 11
VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 = 12
VFIO_DEVICE_FEATURE_ZPCI_ERROR = 13


class DeviceFeature(UapiStruct):
    """struct vfio_device_feature, followed by the feature's payload."""

    argsz: u32
    flags: u32


class LowPowerEntryWithWakeup(UapiStruct):
    """struct vfio_device_low_power_entry_with_wakeup."""

    wakeup_eventfd: s32
    reserved: u32


# --- migration ---------------------------------------------------------------------------------

VFIO_MIGRATION_STOP_COPY = 1 << 0
VFIO_MIGRATION_P2P = 1 << 1
VFIO_MIGRATION_PRE_COPY = 1 << 2

VFIO_DEVICE_STATE_ERROR = 0
VFIO_DEVICE_STATE_STOP = 1
VFIO_DEVICE_STATE_RUNNING = 2
VFIO_DEVICE_STATE_STOP_COPY = 3
VFIO_DEVICE_STATE_RESUMING = 4
VFIO_DEVICE_STATE_RUNNING_P2P = 5
VFIO_DEVICE_STATE_PRE_COPY = 6
VFIO_DEVICE_STATE_PRE_COPY_P2P = 7
VFIO_DEVICE_STATE_NR = 8  # how many there are; not a state

VFIO_PRECOPY_INFO_REINIT = 1 << 0


class FeatureMigration(UapiStruct):
    """struct vfio_device_feature_migration."""

    flags: u64


class MigState(UapiStruct):
    """struct vfio_device_feature_mig_state."""

    device_state: u32
    data_fd: s32


class MigDataSize(UapiStruct):
    """struct vfio_device_feature_mig_data_size."""

    stop_copy_length: u64


class PrecopyInfo(UapiStruct):
    """struct vfio_precopy_info."""

    argsz: u32
    flags: u32
    initial_bytes: u64
    dirty_bytes: u64


class DmaLoggingControl(UapiStruct):
    """struct vfio_device_feature_dma_logging_control."""

    page_size: u64
    num_ranges: u32
    reserved: u32
    ranges: u64


class DmaLoggingRange(UapiStruct):
    """struct vfio_device_feature_dma_logging_range."""

    iova: u64
    length: u64


class DmaLoggingReport(UapiStruct):
    """struct vfio_device_feature_dma_logging_report."""

    iova: u64
    length: u64
    page_size: u64
    bitmap: u64


class MigSetState(UapiStruct):
    """struct vfio_device_mig_set_state, of "vfio: Define device migration protocol v2".

    Alone among VFIO's structs it has ``flags`` at its end.
    """

    argsz: u32
    device_state: u32
    data_fd: s32
    flags: u32


# --- migration protocol v1: a region, deprecated; a v1 state is never told from a v2 one -------

VFIO_REGION_TYPE_MIGRATION_DEPRECATED = 3
VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED = 1

VFIO_DEVICE_STATE_V1_STOP = 0
VFIO_DEVICE_STATE_V1_RUNNING = 1 << 0
VFIO_DEVICE_STATE_V1_SAVING = 1 << 1
VFIO_DEVICE_STATE_V1_RESUMING = 1 << 2
VFIO_DEVICE_STATE_MASK = (
    VFIO_DEVICE_STATE_V1_RUNNING | VFIO_DEVICE_STATE_V1_SAVING | VFIO_DEVICE_STATE_V1_RESUMING
)


class MigrationInfoV1(UapiStruct):
    """struct vfio_device_migration_info."""

    device_state: u32
    reserved: u32
    pending_bytes: u64
    data_offset: u64
    data_size: u64
