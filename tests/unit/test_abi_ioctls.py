"""The table of requests and the table of features."""

from __future__ import annotations

import pytest

from vfiomig.abi import iommufd, vfio, vfio_iommu
from vfiomig.abi.ioctls import (
    FEATURES,
    IOCTLS,
    Dialect,
    FdKind,
    Feature,
    Ioctl,
    feature_name,
    find,
    find_feature,
    request_name,
)

# Name, kind of descriptor, n of _IO(';', 100 + n), minsz: written from the headers, not computed.
EXPECTED = """
VFIO_GET_API_VERSION                 container  0   0
VFIO_CHECK_EXTENSION                 container  1   0
VFIO_SET_IOMMU                       container  2   0
VFIO_GROUP_GET_STATUS                group      3   8
VFIO_GROUP_SET_CONTAINER             group      4   0
VFIO_GROUP_UNSET_CONTAINER           group      5   0
VFIO_GROUP_GET_DEVICE_FD             group      6   0
VFIO_DEVICE_GET_INFO                 device     7  16
VFIO_DEVICE_GET_REGION_INFO          device     8  32
VFIO_DEVICE_GET_IRQ_INFO             device     9  16
VFIO_DEVICE_SET_IRQS                 device    10  20
VFIO_DEVICE_RESET                    device    11   0
VFIO_DEVICE_GET_PCI_HOT_RESET_INFO   device    12  12
VFIO_DEVICE_PCI_HOT_RESET            device    13  12
VFIO_DEVICE_FEATURE                  device    17   8
VFIO_DEVICE_BIND_IOMMUFD             device    18  16
VFIO_DEVICE_ATTACH_IOMMUFD_PT        device    19  12
VFIO_DEVICE_DETACH_IOMMUFD_PT        device    20   8
VFIO_DEVICE_MIG_SET_STATE            device    21  16
VFIO_MIG_GET_PRECOPY_INFO            data      21  24
VFIO_IOMMU_GET_INFO                  container 12  16
VFIO_IOMMU_MAP_DMA                   container 13  32
VFIO_IOMMU_UNMAP_DMA                 container 14  24
VFIO_IOMMU_DIRTY_PAGES               container 17   8
IOMMU_DESTROY                        iommufd   28   8
IOMMU_IOAS_ALLOC                     iommufd   29  12
IOMMU_IOAS_ALLOW_IOVAS               iommufd   30  24
IOMMU_IOAS_COPY                      iommufd   31  40
IOMMU_IOAS_IOVA_RANGES               iommufd   32  32
IOMMU_IOAS_MAP                       iommufd   33  40
IOMMU_IOAS_UNMAP                     iommufd   34  24
IOMMU_OPTION                         iommufd   35  24
IOMMU_VFIO_IOAS                      iommufd   36  12
IOMMU_HWPT_ALLOC                     iommufd   37  24
IOMMU_GET_HW_INFO                    iommufd   38  32
IOMMU_HWPT_SET_DIRTY_TRACKING        iommufd   39  16
IOMMU_HWPT_GET_DIRTY_BITMAP          iommufd   40  48
IOMMU_IOAS_MAP_FILE                  iommufd   43  40
"""
ROWS = [line.split() for line in EXPECTED.strip().splitlines()]

# Kind, number, dialect, name: the numbers that mean different things on different descriptors.
SHARED = [
    (FdKind.DEVICE, 0x3B70, Dialect.LANDED, "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO"),
    (FdKind.CONTAINER, 0x3B70, Dialect.LANDED, "VFIO_IOMMU_GET_INFO"),
    (FdKind.DEVICE, 0x3B71, Dialect.LANDED, "VFIO_DEVICE_PCI_HOT_RESET"),
    (FdKind.CONTAINER, 0x3B71, Dialect.LANDED, "VFIO_IOMMU_MAP_DMA"),
    (FdKind.DEVICE, 0x3B75, Dialect.LANDED, "VFIO_DEVICE_FEATURE"),
    (FdKind.DEVICE, 0x3B75, Dialect.V6, "VFIO_DEVICE_FEATURE"),
    (FdKind.CONTAINER, 0x3B75, Dialect.LANDED, "VFIO_IOMMU_DIRTY_PAGES"),
    (FdKind.DEVICE, 0x3B79, Dialect.V6, "VFIO_DEVICE_MIG_SET_STATE"),
    (FdKind.DEVICE, 0x3B79, Dialect.LANDED, None),
    (FdKind.DATA, 0x3B79, Dialect.LANDED, "VFIO_MIG_GET_PRECOPY_INFO"),
    (FdKind.DATA, 0x3B79, Dialect.V6, None),
    (FdKind.CONTAINER, 0x3B79, Dialect.LANDED, None),
    (FdKind.IOMMUFD, 0x3B79, Dialect.LANDED, None),
    (FdKind.DATA, 0x3B75, Dialect.LANDED, None),
]


def _row(name: str) -> Ioctl:
    (row,) = (row for row in IOCTLS if row.name == name)
    return row


@pytest.mark.parametrize(("name", "kind", "n", "minsz"), ROWS, ids=[row[0] for row in ROWS])
def test_request_has_its_number_kind_and_minimum(name: str, kind: str, n: str, minsz: str) -> None:
    row = _row(name)
    assert row.number == ord(";") << 8 | 100 + int(n)
    assert row.on == kind
    assert row.minsz == int(minsz)


def test_the_table_has_exactly_these_requests() -> None:
    assert sorted(row.name for row in IOCTLS) == sorted(row[0] for row in ROWS)


def test_every_request_number_that_is_declared_is_a_row() -> None:
    numbers = {
        name
        for module in (vfio, vfio_iommu, iommufd)
        for name, value in vars(module).items()
        if isinstance(value, int) and value >> 8 == vfio.VFIO_TYPE
    }
    assert numbers == {row.name for row in IOCTLS}


@pytest.mark.parametrize("row", IOCTLS, ids=lambda row: row.name)
def test_minimum_lies_within_the_struct(row: Ioctl) -> None:
    if row.struct is None:
        assert row.minsz == 0
    else:
        assert 8 <= row.minsz <= row.struct.SIZE


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("row", IOCTLS, ids=lambda row: row.name)
def test_a_request_is_found_on_its_own_kind_of_descriptor_only(
    row: Ioctl, dialect: Dialect
) -> None:
    for kind in FdKind:
        found = find(kind, row.number, dialect)
        if kind is row.on and row.dialect in {None, dialect}:
            assert found is row
        else:
            assert found is None or found.name != row.name


@pytest.mark.parametrize(("kind", "number", "dialect", "name"), SHARED)
def test_a_shared_number_is_told_apart_by_descriptor_and_dialect(
    kind: FdKind, number: int, dialect: Dialect, name: str | None
) -> None:
    row = find(kind, number, dialect)
    assert (row.name if row else None) == name


@pytest.mark.parametrize("number", [0, 0x3B63, 0x3B7A, 0x3BFF, 0xC0043B79, 0x7FFF_FFFF_0000_3B75])
def test_an_unknown_number_is_nothing_on_any_descriptor(number: int) -> None:
    assert {find(kind, number, dialect) for kind in FdKind for dialect in Dialect} == {None}


def test_dialects_and_kinds_are_their_words() -> None:
    assert [str(dialect) for dialect in Dialect] == ["landed", "v6"]
    assert Dialect("v6") is Dialect.V6
    assert str(FdKind.DATA) == "data"


def test_requests_are_named_for_traces() -> None:
    assert request_name(FdKind.DEVICE, 0x3B79) == "VFIO_DEVICE_MIG_SET_STATE"
    assert request_name(FdKind.DATA, 0x3B79) == "VFIO_MIG_GET_PRECOPY_INFO"
    both = "VFIO_DEVICE_MIG_SET_STATE|VFIO_MIG_GET_PRECOPY_INFO"
    assert request_name(None, 0x3B79) == both
    assert request_name(FdKind.GROUP, 0x3B79) == "0x3b79"
    assert request_name(None, 5) == "0x0005"


# Index, ops, minimum argsz.
FEATURE_ROWS = """
PCI_VF_TOKEN                  0 SET     24
MIGRATION                     1 GET     16
MIG_DEVICE_STATE              2 GET|SET 16
LOW_POWER_ENTRY               3 SET      8
LOW_POWER_ENTRY_WITH_WAKEUP   4 SET     16
LOW_POWER_EXIT                5 SET      8
DMA_LOGGING_START             6 SET     32
DMA_LOGGING_STOP              7 SET      8
DMA_LOGGING_REPORT            8 GET     40
MIG_DATA_SIZE                 9 GET     16
BUS_MASTER                   10 SET     12
DMA_BUF                      11 GET     24
MIG_PRECOPY_INFOv2           12 SET      8
ZPCI_ERROR                   13 GET     16
"""


def test_features_have_their_index_operations_and_minimum() -> None:
    ops = {"GET": 0x10000, "SET": 0x20000, "GET|SET": 0x30000}
    expected = [
        (name, int(index), ops[op], int(minsz))
        for name, index, op, minsz in map(str.split, FEATURE_ROWS.strip().splitlines())
    ]
    assert [(row.name, row.index, row.ops, row.minsz) for row in FEATURES] == expected


@pytest.mark.parametrize("row", FEATURES, ids=lambda row: row.name)
def test_a_feature_agrees_with_its_constant_and_its_payload(row: Feature) -> None:
    assert getattr(vfio, f"VFIO_DEVICE_FEATURE_{row.name}") == row.index
    assert feature_name(row.index) == row.name
    if row.payload is not None:
        assert row.minsz == vfio.DeviceFeature.SIZE + row.payload.SIZE


def test_v6_knows_the_features_that_existed_then() -> None:
    known = [row.name for row in FEATURES if find_feature(row.index, Dialect.V6)]
    assert known == ["PCI_VF_TOKEN", "MIGRATION"]
    assert [find_feature(row.index, Dialect.LANDED) for row in FEATURES] == list(FEATURES)
    assert find_feature(14, Dialect.LANDED) is None
    assert feature_name(14) == "feature 14"
