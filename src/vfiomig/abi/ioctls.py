"""The one table of requests and the one table of device features.

A request is known by the kind of descriptor it is made on *and* its number, never by the number
alone: 0x3B70, 0x3B71 and 0x3B75 are other requests on a container than on a device, and 0x3B79
sets the state on a V6 device and asks for precopy sizes on a landed data descriptor.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfiomig.abi import iommufd, vfio, vfio_iommu

if TYPE_CHECKING:
    from types import ModuleType

    from vfiomig.abi.uapi import UapiStruct


class Dialect(enum.StrEnum):
    """The two ways in which the migration protocol has been spoken."""

    #: Linux 5.18 and later: the state is a device feature.
    LANDED = "landed"
    #: The patch "vfio: Define device migration protocol v2" of January 2022: one request.
    V6 = "v6"


class FdKind(enum.StrEnum):
    """What a descriptor is, which decides what a request number on it means."""

    DEVICE = "device"
    #: The descriptor of a data transfer session.
    DATA = "data"
    GROUP = "group"
    CONTAINER = "container"
    IOMMUFD = "iommufd"


@dataclass(frozen=True, slots=True)
class Ioctl:
    """One request."""

    name: str
    number: int
    on: FdKind
    #: What the argument points to; without one it is nothing, a plain value, or an int or string.
    struct: type[UapiStruct] | None
    #: The smallest argsz (VFIO) or size (iommufd) that is accepted.
    minsz: int
    #: The dialect that has it, ``None`` for both.
    dialect: Dialect | None


@dataclass(frozen=True, slots=True)
class Feature:
    """One device feature, reached through VFIO_DEVICE_FEATURE."""

    index: int
    #: The kernel's name without VFIO_DEVICE_FEATURE.
    name: str
    #: VFIO_DEVICE_FEATURE_GET, _SET or both.
    ops: int
    payload: type[UapiStruct] | None
    #: The smallest argsz: the header, and the payload if there is one.
    minsz: int
    dialect: Dialect | None


def _row(
    module: ModuleType,
    on: FdKind,
    name: str,
    struct: type[UapiStruct] | None = None,
    last: str = "",
    dialect: Dialect | None = None,
) -> Ioctl:
    """Write a row as the kernel does: minsz ends behind the *last* member that must be there."""
    minsz = struct.end_of(last) if struct else 0
    return Ioctl(name, getattr(module, name), on, struct, minsz, dialect)


def _device(
    name: str,
    struct: type[UapiStruct] | None = None,
    last: str = "",
    dialect: Dialect | None = None,
) -> Ioctl:
    return _row(vfio, FdKind.DEVICE, name, struct, last, dialect)


def _group(name: str, struct: type[UapiStruct] | None = None, last: str = "") -> Ioctl:
    return _row(vfio_iommu, FdKind.GROUP, name, struct, last)


def _container(name: str, struct: type[UapiStruct] | None = None, last: str = "") -> Ioctl:
    return _row(vfio_iommu, FdKind.CONTAINER, name, struct, last)


def _iommufd(name: str, struct: type[UapiStruct], last: str) -> Ioctl:
    return _row(iommufd, FdKind.IOMMUFD, name, struct, last)


IOCTLS: tuple[Ioctl, ...] = (
    _container("VFIO_GET_API_VERSION"),
    _container("VFIO_CHECK_EXTENSION"),
    _container("VFIO_SET_IOMMU"),
    _container("VFIO_IOMMU_GET_INFO", vfio_iommu.Type1Info, "iova_pgsizes"),
    _container("VFIO_IOMMU_MAP_DMA", vfio_iommu.Type1DmaMap, "size"),
    _container("VFIO_IOMMU_UNMAP_DMA", vfio_iommu.Type1DmaUnmap, "size"),
    _container("VFIO_IOMMU_DIRTY_PAGES", vfio_iommu.Type1DirtyBitmap, "flags"),
    _group("VFIO_GROUP_GET_STATUS", vfio_iommu.GroupStatus, "flags"),
    _group("VFIO_GROUP_SET_CONTAINER"),
    _group("VFIO_GROUP_UNSET_CONTAINER"),
    _group("VFIO_GROUP_GET_DEVICE_FD"),
    _device("VFIO_DEVICE_GET_INFO", vfio.DeviceInfo, "num_irqs"),
    _device("VFIO_DEVICE_GET_REGION_INFO", vfio.RegionInfo, "offset"),
    _device("VFIO_DEVICE_GET_IRQ_INFO", vfio.IrqInfo, "count"),
    _device("VFIO_DEVICE_SET_IRQS", vfio.IrqSet, "count"),
    _device("VFIO_DEVICE_RESET"),
    _device("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", vfio.PciHotResetInfo, "count"),
    _device("VFIO_DEVICE_PCI_HOT_RESET", vfio.PciHotReset, "count"),
    _device("VFIO_DEVICE_FEATURE", vfio.DeviceFeature, "flags"),
    _device("VFIO_DEVICE_BIND_IOMMUFD", vfio.BindIommufd, "out_devid"),
    _device("VFIO_DEVICE_ATTACH_IOMMUFD_PT", vfio.AttachIommufdPt, "pt_id"),
    _device("VFIO_DEVICE_DETACH_IOMMUFD_PT", vfio.DetachIommufdPt, "flags"),
    _device("VFIO_DEVICE_MIG_SET_STATE", vfio.MigSetState, "flags", Dialect.V6),
    _row(
        vfio,
        FdKind.DATA,
        "VFIO_MIG_GET_PRECOPY_INFO",
        vfio.PrecopyInfo,
        "dirty_bytes",
        Dialect.LANDED,
    ),
    _iommufd("IOMMU_DESTROY", iommufd.IommuDestroy, "id"),
    _iommufd("IOMMU_IOAS_ALLOC", iommufd.IoasAlloc, "out_ioas_id"),
    _iommufd("IOMMU_IOAS_ALLOW_IOVAS", iommufd.IoasAllowIovas, "allowed_iovas"),
    _iommufd("IOMMU_IOAS_COPY", iommufd.IoasCopy, "src_iova"),
    _iommufd("IOMMU_IOAS_IOVA_RANGES", iommufd.IoasIovaRanges, "out_iova_alignment"),
    _iommufd("IOMMU_IOAS_MAP", iommufd.IoasMap, "iova"),
    _iommufd("IOMMU_IOAS_MAP_FILE", iommufd.IoasMapFile, "iova"),
    _iommufd("IOMMU_IOAS_UNMAP", iommufd.IoasUnmap, "length"),
    _iommufd("IOMMU_OPTION", iommufd.IommuOption, "val64"),
    _iommufd("IOMMU_VFIO_IOAS", iommufd.IommuVfioIoas, "reserved"),
    _iommufd("IOMMU_HWPT_ALLOC", iommufd.HwptAlloc, "reserved"),
    _iommufd("IOMMU_GET_HW_INFO", iommufd.HwInfo, "reserved"),
    _iommufd("IOMMU_HWPT_SET_DIRTY_TRACKING", iommufd.HwptSetDirtyTracking, "reserved"),
    _iommufd("IOMMU_HWPT_GET_DIRTY_BITMAP", iommufd.HwptGetDirtyBitmap, "data"),
)

_GET = vfio.VFIO_DEVICE_FEATURE_GET
_SET = vfio.VFIO_DEVICE_FEATURE_SET

# V6 has the two that say so with None; the payloads without a struct here are never served.
FEATURES: tuple[Feature, ...] = (
    Feature(0, "PCI_VF_TOKEN", _SET, None, 24, None),
    Feature(1, "MIGRATION", _GET, vfio.FeatureMigration, 16, None),
    Feature(2, "MIG_DEVICE_STATE", _GET | _SET, vfio.MigState, 16, Dialect.LANDED),
    Feature(3, "LOW_POWER_ENTRY", _SET, None, 8, Dialect.LANDED),
    Feature(
        4,
        "LOW_POWER_ENTRY_WITH_WAKEUP",
        _SET,
        vfio.LowPowerEntryWithWakeup,
        16,
        Dialect.LANDED,
    ),
    Feature(5, "LOW_POWER_EXIT", _SET, None, 8, Dialect.LANDED),
    Feature(6, "DMA_LOGGING_START", _SET, vfio.DmaLoggingControl, 32, Dialect.LANDED),
    Feature(7, "DMA_LOGGING_STOP", _SET, None, 8, Dialect.LANDED),
    Feature(8, "DMA_LOGGING_REPORT", _GET, vfio.DmaLoggingReport, 40, Dialect.LANDED),
    Feature(9, "MIG_DATA_SIZE", _GET, vfio.MigDataSize, 16, Dialect.LANDED),
    Feature(10, "BUS_MASTER", _SET, None, 12, Dialect.LANDED),
    Feature(11, "DMA_BUF", _GET, None, 24, Dialect.LANDED),
    Feature(12, "MIG_PRECOPY_INFOv2", _SET, None, 8, Dialect.LANDED),
    Feature(13, "ZPCI_ERROR", _GET, None, 16, Dialect.LANDED),
)

_BY_KIND = {
    (row.on, row.number, dialect): row
    for row in IOCTLS
    for dialect in Dialect
    if row.dialect in {None, dialect}
}
_FEATURES_BY_INDEX = {row.index: row for row in FEATURES}


def find(kind: FdKind, number: int, dialect: Dialect) -> Ioctl | None:
    """Return the request that *number* is on this kind of descriptor, in this dialect."""
    return _BY_KIND.get((kind, number, dialect))


def find_feature(index: int, dialect: Dialect) -> Feature | None:
    """Return the feature with this index, if the dialect has it."""
    row = _FEATURES_BY_INDEX.get(index)
    return row if row is not None and row.dialect in {None, dialect} else None


def request_name(kind: FdKind | None, number: int) -> str:
    """Name a request for a trace, in whatever dialect; an unknown one is its number.

    With no kind every request of that number is named, joined by a bar. An iommufd answers
    requests of a container too, whose numbers are others than its own.
    """
    kinds = set(FdKind) if kind is None else {kind}
    if kind is FdKind.IOMMUFD:
        kinds.add(FdKind.CONTAINER)
    rows = (row for row in IOCTLS if row.number == number and row.on in kinds)
    return "|".join(row.name for row in rows) or f"{number:#06x}"


def feature_name(index: int) -> str:
    """Name a feature for a trace; an unknown one is its index."""
    row = _FEATURES_BY_INDEX.get(index)
    return row.name if row else f"feature {index}"
