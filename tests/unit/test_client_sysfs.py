"""What the client finds in a sysfs, and what it makes of a device's driver and group."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from made_sysfs import Made, make_sysfs
from vfiomig.client import diagnosis
from vfiomig.client.sysfs import SysDevice, Sysfs

if TYPE_CHECKING:
    from pathlib import Path

NIC = "0000:3b:00.2"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
ROWS = (
    Made(NIC, "mlx5_vfio_pci", "vfio0", "12"),
    Made("0000:3b:00.3", "nvme", None, "12"),
    Made("0000:00:1c.0", "pcieport", None, "12"),
    Made("0000:02:00.0", None),
    Made("0000:05:00.0", "vfio-pci", "noiommu-vfio1", "noiommu-3"),
    Made(UUID, "mtty", "vfio2", "7", "mdev"),
)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(make_sysfs(tmp_path, *ROWS))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_device_is_found_by_its_name_and_by_its_node(row: Made, sysfs: Sysfs) -> None:
    found = SysDevice(row.name, row.driver, row.node, row.group)
    assert sysfs.find(row.name) == found
    if row.node is not None:
        assert sysfs.of_node(row.node) == found


def test_a_function_tells_its_vendor(sysfs: Sysfs) -> None:
    folder = sysfs.root / "bus/pci/devices" / NIC
    (folder / "vendor").write_text("0x15b3\n", encoding="ascii")
    found = sysfs.find(NIC)
    assert found is not None
    assert found.vendor == 0x15B3
    (folder / "vendor").write_text("?\n", encoding="ascii")
    assert sysfs.find(NIC) == SysDevice(NIC, "mlx5_vfio_pci", "vfio0", "12")


def test_what_is_not_there_is_none(sysfs: Sysfs, tmp_path: Path) -> None:
    assert sysfs.find("0000:ff:00.0") is None
    assert sysfs.of_node("vfio9") is None
    assert sysfs.members("99") == []
    nothing = Sysfs(tmp_path / "nothing")
    assert nothing.find(NIC) is nothing.of_node("vfio0") is None
    assert nothing.members("12") == []


def test_the_members_of_a_group_are_told_in_order(sysfs: Sysfs) -> None:
    assert [member.name for member in sysfs.members("12")] == ["0000:00:1c.0", NIC, "0000:3b:00.3"]
    assert [member.node for member in sysfs.members("noiommu-3")] == ["noiommu-vfio1"]


def test_who_keeps_a_group_from_being_viable_is_named(sysfs: Sysfs) -> None:
    text = diagnosis.not_viable("/dev/vfio/12", sysfs.members("12"))
    assert "0000:3b:00.3 (nvme)" in text
    assert NIC not in text  # it is bound to a VFIO driver
    assert "pcieport" not in text
    assert "does not show" in diagnosis.not_viable("/dev/vfio/99", sysfs.members("99"))


def test_before_a_vfio_driver_had_a_node_its_name_tells(tmp_path: Path) -> None:
    rows = [
        Made(f"0000:0{n}:00.0", driver, None, "1")
        for n, driver in enumerate(("vfio-pci", "mlx5_vfio_pci", "mtty", None, "e1000e"))
    ]
    sysfs = Sysfs(make_sysfs(tmp_path, *rows))
    text = diagnosis.not_viable("/dev/vfio/1", sysfs.members("1"))
    assert "there is 0000:04:00.0 (e1000e);" in text


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (SysDevice(NIC, None, None, "12"), ("no driver is bound", "driverctl set-override", NIC)),
        (SysDevice(NIC, "nvme", None, "12"), ("bound to nvme", "no VFIO driver", NIC)),
        (SysDevice(NIC, "nvme", None, None), ("no IOMMU group", "intel_iommu=on")),
        (SysDevice(NIC, "mlx5_core", None, "12", 0x15B3), (f"set-override {NIC} mlx5_vfio_pci",)),
        (SysDevice(NIC, None, None, "12", 0x8086), ("qat_vfio_pci or xe_vfio_pci", NIC)),
        (SysDevice(NIC, "nvme", None, "12", 0x144D), (f"{NIC} vfio-pci", "vendor, 0x144d")),
        (SysDevice(NIC, "vfio-pci", "vfio0", "12"), ("/dev/vfio/devices/vfio0", "visible")),
        (SysDevice(NIC, "vfio-pci", None, "12"), ("vfio-pci has it", "no /dev/vfio/12", "visible")),
    ],
)
def test_why_a_device_has_no_vfio_node(device: SysDevice, words: tuple[str, ...]) -> None:
    for word in words:
        assert word in diagnosis.not_bound(device)


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        (None, ("5.18", "mlx5_vfio_pci")),
        ("vfio-pci", ("vfio-pci migrates no device", "qat_vfio_pci")),
        ("mlx5_vfio_pci", ("devlink", "migratable")),
        ("mtty", ("mtty could", "6.8")),
        ("nvgrace_gpu_vfio_pci", ("nvgrace_gpu_vfio_pci offers no migration",)),
    ],
)
def test_which_layer_keeps_a_device_from_migrating(
    driver: str | None, words: tuple[str, ...]
) -> None:
    for word in words:
        about = {"by": "system calls"} | ({} if driver is None else {"driver": driver})
        assert word in diagnosis.why_no_migration(about)


def test_a_refusal_names_what_failed_the_errno_and_the_next_step() -> None:
    failure = diagnosis.refused("vfio0", OSError(errno.EBUSY, ""), "end that one")
    assert failure.errno == errno.EBUSY
    assert str(failure) == "[Errno 16] vfio0 cannot be opened: EBUSY; end that one"
    unknown = diagnosis.refused("vfio0", OSError(4321, ""), diagnosis.advice({}, OSError(4321, "")))
    assert str(unknown) == "[Errno 4321] vfio0 cannot be opened: 4321; see the kernel's log (dmesg)"
