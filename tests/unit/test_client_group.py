"""Opening a device by its group: every step that can fail, and what is said then."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

import pytest

from made_sysfs import Made, make_sysfs
from vfiomig.abi import vfio_iommu as abi
from vfiomig.client import group as module
from vfiomig.client.group import choose_member, open_group_device
from vfiomig.client.sysfs import Sysfs
from vfiomig.errors import SpecError, TargetError

if TYPE_CHECKING:
    from pathlib import Path

NIC, DISK = "0000:3b:00.2", "0000:3b:00.3"
NAMES = {
    number: name for name, number in vars(abi).items() if name.startswith("VFIO_") and number > 255
}


class Kernel:
    """Answers what the steps ask; ``fails`` maps a path or the name of a request to an errno."""

    def __init__(self) -> None:
        self.fails: dict[str, int] = {}
        self.answers = {"VFIO_GET_API_VERSION": 0, "VFIO_CHECK_EXTENSION": 1}
        self.flags = abi.VFIO_GROUP_FLAGS_VIABLE
        self.seen: list[str | tuple[str, object]] = []
        self.given: list[int] = []

    def open(self, path: str, flags: int) -> int:
        assert flags == os.O_RDWR | os.O_CLOEXEC
        self.seen.append(path)
        self._fail(path)
        return self._new()

    def ioctl(self, on: int, number: int, argument: int) -> int:
        assert on in self.given
        name = NAMES[number]
        told: object = argument
        if name == "VFIO_GROUP_SET_CONTAINER":
            assert ctypes.c_int.from_address(argument).value == self.given[0]
            told = ""
        elif name == "VFIO_GROUP_GET_DEVICE_FD":
            told = ctypes.string_at(argument).decode()
        elif name == "VFIO_GROUP_GET_STATUS":
            status = abi.GroupStatus.from_address(argument)
            assert status.argsz == 8
            status.flags = self.flags
            told = ""
        self.seen.append((name, told))
        self._fail(name)
        return self._new() if name.endswith("DEVICE_FD") else self.answers.get(name, 0)

    def _fail(self, what: str) -> None:
        number = self.fails.get(what, 0)
        if number == errno.EINTR:
            del self.fails[what]
        if number:
            raise OSError(number, os.strerror(number))

    def _new(self) -> int:
        self.given.append(os.eventfd(0))
        return self.given[-1]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(module, "ioctl", kernel.ioctl)
    monkeypatch.setattr(os, "open", kernel.open)
    return kernel


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    rows = Made(NIC, "mlx5_vfio_pci", "vfio0", "12"), Made(DISK, "nvme", None, "12")
    return Sysfs(make_sysfs(tmp_path, *rows))


STEPS = [
    "/dev/vfio/vfio",
    ("VFIO_GET_API_VERSION", 0),
    "/dev/vfio/12",
    ("VFIO_GROUP_GET_STATUS", ""),
    ("VFIO_GROUP_SET_CONTAINER", ""),
    ("VFIO_CHECK_EXTENSION", 3),
    ("VFIO_SET_IOMMU", 3),
    ("VFIO_GROUP_GET_DEVICE_FD", NIC),
]


def test_the_steps_are_taken_in_their_order(kernel: Kernel, sysfs: Sysfs) -> None:
    kernel.fails["VFIO_GROUP_GET_DEVICE_FD"] = errno.EINTR  # a signal, and again
    opened = open_group_device("12", NIC, None, sysfs)
    assert kernel.seen == [*STEPS, STEPS[-1]]
    container, group, device = kernel.given
    assert [fd.fileno() for fd in opened] == [device, group, container]
    for fd in opened:
        fd.close()


def test_a_group_without_an_iommu_says_so_in_its_name(kernel: Kernel, sysfs: Sysfs) -> None:
    for fd in open_group_device("noiommu-3", NIC, None, sysfs):
        fd.close()
    assert kernel.seen[2] == "/dev/vfio/noiommu-3"
    assert kernel.seen[5:7] == [("VFIO_CHECK_EXTENSION", 8), ("VFIO_SET_IOMMU", 8)]


@pytest.mark.parametrize(
    ("step", "number", "words"),
    [
        ("/dev/vfio/vfio", errno.ENOENT, ("/dev/vfio/vfio", "modprobe vfio-pci")),
        ("/dev/vfio/vfio", errno.ENODEV, ("modprobe vfio",)),
        ("/dev/vfio/vfio", errno.EACCES, ("chmod",)),
        ("/dev/vfio/vfio", errno.EIO, ("dmesg",)),
        ("/dev/vfio/12", errno.ENOENT, ("/dev/vfio/12", "VFIO driver")),
        ("/dev/vfio/12", errno.EACCES, ("chown",)),
        ("/dev/vfio/12", errno.EPERM, ("CAP_SYS_RAWIO",)),
        ("/dev/vfio/12", errno.EBUSY, ("another program",)),
        ("VFIO_GROUP_SET_CONTAINER", errno.EBUSY, ("not viable", f"{DISK} (nvme)")),
        ("VFIO_GROUP_SET_CONTAINER", errno.EIO, ("/dev/vfio/12", "dmesg")),
        ("VFIO_SET_IOMMU", errno.EPERM, ("remap interrupts",)),
        ("VFIO_SET_IOMMU", errno.ENODEV, ("vfio_iommu_type1",)),
        ("VFIO_GROUP_GET_DEVICE_FD", errno.ENODEV, (NIC, "no device of that name")),
        ("VFIO_GROUP_GET_DEVICE_FD", errno.EACCES, ("VF token",)),
        ("VFIO_GROUP_GET_DEVICE_FD", errno.ETIMEDOUT, (NIC, "dmesg")),
    ],
)
def test_a_step_that_fails_says_what_to_do_and_closes_everything(
    kernel: Kernel, sysfs: Sysfs, step: str, number: int, words: tuple[str, ...]
) -> None:
    kernel.fails[step] = number
    with pytest.raises(TargetError) as refused:
        open_group_device("12", NIC, None, sysfs)
    assert refused.value.errno == number
    for word in (*words, errno.errorcode[number]):
        assert word in str(refused.value)


def test_a_group_that_is_not_viable_names_who_is_in_the_way(kernel: Kernel, sysfs: Sysfs) -> None:
    kernel.flags = 0
    with pytest.raises(TargetError, match=rf"not viable.*{DISK} \(nvme\)"):
        open_group_device("12", NIC, None, sysfs)
    assert kernel.seen == STEPS[:4]


def test_an_iommu_or_a_version_that_there_is_not(kernel: Kernel, sysfs: Sysfs) -> None:
    kernel.answers["VFIO_CHECK_EXTENSION"] = 0
    with pytest.raises(TargetError, match="modprobe vfio_iommu_type1"):
        open_group_device("12", NIC, None, sysfs)
    kernel.answers["VFIO_GET_API_VERSION"] = 1
    with pytest.raises(TargetError, match="version 1"):
        open_group_device("12", NIC, None, sysfs)


def test_a_device_with_another_driver_is_named_with_it(kernel: Kernel, sysfs: Sysfs) -> None:
    kernel.fails["VFIO_GROUP_GET_DEVICE_FD"] = errno.ENODEV
    with pytest.raises(TargetError, match=r"bound to nvme, which is no VFIO driver"):
        open_group_device("12", DISK, sysfs.find(DISK), sysfs)


# Which device of a group.


def test_the_one_device_that_is_bound_to_vfio_is_meant(sysfs: Sysfs) -> None:
    assert choose_member("12", sysfs).name == NIC


def test_before_vfio_had_nodes_the_only_member_is_meant(tmp_path: Path) -> None:
    sysfs = Sysfs(make_sysfs(tmp_path, Made(NIC, "mlx5_vfio_pci", None, "4")))
    assert choose_member("4", sysfs).name == NIC


def test_several_devices_have_to_be_told_apart(tmp_path: Path) -> None:
    rows = Made(NIC, "vfio-pci", "vfio0", "4"), Made(DISK, "vfio-pci", "vfio1", "4")
    with pytest.raises(SpecError, match=rf"/dev/vfio/4:{NIC}; {NIC}, {DISK}"):
        choose_member("4", Sysfs(make_sysfs(tmp_path, *rows)))


def test_without_a_sysfs_the_device_has_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"name it, as in /dev/vfio/4:0000:01:00\.0"):
        choose_member("4", Sysfs(tmp_path))
