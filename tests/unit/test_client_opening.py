"""From a TARGET to a client: what is refused, and what is said then."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import TYPE_CHECKING

import pytest

import vfiomig
from only_requests import OnlyRequests
from suite_devices import Card, Closed
from vfiomig import Device, SpecError, State, TargetError
from vfiomig.abi import iommufd, vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.client import open_device
from vfiomig.client.connecting import connect, settle
from vfiomig.client.kernel import KernelTransport
from vfiomig.client.transport import NO_FD
from vfiomig.descriptors import Fd
from vfiomig.models.counter import Counter

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig.abi.uapi import UapiStruct

DEVICE_PATH = "/dev/vfio/devices/vfio0"


@pytest.mark.parametrize(
    "target",
    [
        *("", "vfio0", "/dev/vfio/vfio", "/dev/vfio/12:", "/dev/vfio/devices/vfio", "/etc/passwd"),
        *("0000:01:00", "01:00.8", "1:0.0", "83b8f4f2-509f-382f-3c1e-e6bfe0fa100", "fd:", "fd:-1"),
        *("fd:3,iommufd=", "fd:3,group=4", "fd:3,iommufd=4,container=5", "vfio-user:"),
        "vfio-user:a\0b",
    ],
)
def test_an_unknown_target_names_the_known_ones(target: str) -> None:
    with pytest.raises(SpecError, match=r"model:SPEC.*/dev/vfio/devices/vfioN.*fd:N"):
        vfiomig.open(target)


@pytest.mark.parametrize("kind", ["iommufd", "container"])
def test_a_descriptor_cannot_be_a_device_and_what_it_belongs_to(kind: str) -> None:
    with Fd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) as file:
        number = file.fileno()
        with pytest.raises(SpecError, match=f"descriptor {number} is named twice"):
            vfiomig.open(f"fd:{number},{kind}={number}")


@pytest.mark.parametrize("number", [2**31, 2**70])
def test_a_number_that_no_descriptor_has_is_not_open(number: int) -> None:
    with pytest.raises(TargetError, match=f"descriptor {number} cannot be opened: EBADF"):
        vfiomig.open(f"fd:{number}")


def test_the_dialect_of_a_kernel_cannot_be_chosen() -> None:
    with pytest.raises(SpecError, match="found out"):
        vfiomig.open(DEVICE_PATH, "v6")


def test_an_unknown_dialect_names_the_known_ones() -> None:
    with pytest.raises(SpecError, match="landed or v6"):
        vfiomig.open("model:pattern,size=4K", "v5")


def test_an_instance_of_a_device_is_opened_as_it_is() -> None:
    device = Counter(rate=7)
    with vfiomig.open(device, "v6") as client:
        assert client.dialect is Dialect.V6
        assert client.name == "Counter"


@pytest.mark.parametrize("target", [Counter, 7, b"model:counter", None])
def test_what_is_neither_a_text_nor_a_device_is_refused(target: object) -> None:
    with pytest.raises(vfiomig.SpecError, match="give a text, or an instance"):
        vfiomig.open(target)  # type: ignore[arg-type]


@pytest.mark.parametrize("dialect", Dialect)
def test_a_model_speaks_the_dialect_that_was_asked_for(dialect: Dialect) -> None:
    with vfiomig.open("model:pattern,size=4K", str(dialect)) as dev:
        assert (dev.dialect, dev.name) == (dialect, "pattern")


def test_a_device_is_named_after_its_class() -> None:
    with open_device(Device()) as dev:
        assert (dev.name, repr(dev)) == ("Device", "<DeviceClient of Device, landed>")
    assert repr(dev) == "<DeviceClient of Device, landed, closed>"


@pytest.mark.parametrize("dialect", Dialect)
def test_a_device_that_does_not_start_is_a_target_that_cannot_be_opened(dialect: Dialect) -> None:
    with pytest.raises(TargetError, match="Closed cannot be opened: EBUSY") as caught:
        open_device(Closed(), dialect)
    assert caught.value.errno == errno.EBUSY


#: Folders that are there, and what is said of a node that is not.
WITHOUT = [
    ((), "VFIO is not there: load the driver"),
    (("/dev/vfio",), r"no character devices of VFIO.*/dev/vfio/GROUP"),
    (("/dev/vfio", "/dev/vfio/devices"), "look into /dev/vfio/devices"),
]


@pytest.mark.parametrize(("folders", "advice"), WITHOUT)
def test_a_node_that_is_not_there_tells_how_much_of_vfio_is_missing(
    folders: tuple[str, ...], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path in folders)
    with pytest.raises(TargetError, match=advice) as caught:
        vfiomig.open(DEVICE_PATH)
    assert caught.value.errno == errno.ENOENT
    assert "vfio0" in str(caught.value)


@pytest.mark.parametrize(
    ("folders", "advice"), [((), "VFIO is not there"), (("/dev/vfio",), "no such group")]
)
def test_a_group_that_is_not_there_is_not_asked_for_its_members(
    folders: tuple[str, ...], advice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path in folders)
    with pytest.raises(TargetError, match=f"/dev/vfio/12 cannot be opened: ENOENT.*{advice}"):
        vfiomig.open("/dev/vfio/12", sysfs=tmp_path)


@pytest.mark.parametrize(
    ("target", "lists"),
    [("0000:99:00.0", "lspci -D"), ("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "mdevctl list")],
)
def test_a_name_that_sysfs_does_not_know_says_what_lists_them(
    target: str, lists: str, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=f"{target}.*ENODEV; {tmp_path} is no sysfs"):
        vfiomig.open(target, sysfs=tmp_path)
    (tmp_path / "bus").mkdir()
    with pytest.raises(TargetError, match=f"{target}.*ENODEV.*{lists}"):
        vfiomig.open(target, sysfs=tmp_path)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOTDIR, "dmesg"),
        (errno.EACCES, "chown"),
        (errno.EBUSY, "another program"),
        (errno.ENXIO, "dmesg"),
    ],
)
def test_a_node_that_does_not_open_says_what_to_do(
    number: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(TargetError, match=advice) as caught:
        vfiomig.open(DEVICE_PATH)
    assert caught.value.errno == number
    assert "vfio0" in str(caught.value)


class Kernel(OnlyRequests):
    """A transport whose device knows BIND and the probes only."""

    def __init__(
        self,
        bind: int,
        probes: tuple[int, int],
        iommufd_number: int = 4,
        info: int = errno.EINVAL,
    ) -> None:
        super().__init__(iommufd_number)
        self.bind = bind
        self.info = info
        self.probes = dict(zip((1, 2), probes, strict=True))

    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int:
        assert argument is not None
        self.requests.append(number)
        if number == vfio.VFIO_DEVICE_BIND_IOMMUFD:
            failure = self.bind
        elif number == vfio.VFIO_DEVICE_GET_INFO:
            failure = self.info
        else:
            assert number == vfio.VFIO_DEVICE_FEATURE
            header = vfio.DeviceFeature.from_address(ctypes.addressof(argument))
            assert header.flags & vfio.VFIO_DEVICE_FEATURE_PROBE
            failure = self.probes[header.flags & vfio.VFIO_DEVICE_FEATURE_MASK]
        if failure:
            raise OSError(failure, os.strerror(failure))
        return 0


@pytest.mark.parametrize(
    ("bind", "probes", "dialect"),
    [
        (0, (0, 0), Dialect.LANDED),
        (0, (0, errno.ENOTTY), Dialect.V6),
        (0, (0, errno.EINVAL), Dialect.V6),
        (errno.ENOTTY, (0, errno.EINVAL), Dialect.V6),
        (errno.EINVAL, (0, errno.EINVAL), Dialect.V6),
        (0, (errno.ENOTTY, errno.ENOTTY), Dialect.LANDED),  # cannot migrate
    ],
)
def test_the_dialect_is_found_out_by_probes_alone(
    bind: int, probes: tuple[int, int], dialect: Dialect
) -> None:
    kernel = Kernel(bind, probes)
    with connect(kernel, "vfio0") as dev:
        assert dev.dialect is dialect
    assert vfio.VFIO_DEVICE_MIG_SET_STATE not in kernel.requests
    assert kernel.closed == [3, 4]


def test_a_device_that_another_program_has_says_so() -> None:
    kernel = Kernel(errno.EINVAL, (errno.EINVAL, errno.EINVAL))
    with pytest.raises(TargetError, match="another program has it"):
        connect(kernel, "vfio0")
    assert kernel.closed == [3, 4]


def test_a_bind_that_fails_otherwise_is_told() -> None:
    kernel = Kernel(errno.ENODEV, (0, 0))
    with pytest.raises(TargetError, match="ENODEV"):
        connect(kernel, "vfio0")
    assert kernel.closed == [3, 4]


def test_a_landed_kernel_without_iommufd_names_the_module() -> None:
    kernel = Kernel(0, (errno.EINVAL, errno.EINVAL), NO_FD)
    with pytest.raises(TargetError, match="modprobe"):
        connect(kernel, "vfio0", "/dev/iommu: modprobe iommufd")
    assert kernel.closed == [3]


def test_a_file_that_is_no_device_is_not_taken_for_a_missing_module() -> None:
    kernel = Kernel(0, (errno.ENOTTY, errno.ENOTTY), NO_FD, info=errno.ENOTTY)
    with pytest.raises(TargetError, match="no VFIO device") as refused:
        connect(kernel, "fd:0", "/dev/iommu: modprobe iommufd")
    assert refused.value.errno == errno.ENOTTY


def test_a_device_of_a_group_that_cannot_migrate_is_opened_without_an_iommufd() -> None:
    kernel = Kernel(0, (errno.ENOTTY, errno.ENOTTY), NO_FD, info=0)
    with connect(kernel, "fd:3", "no /dev/iommu") as dev:
        assert dev.dialect is Dialect.LANDED


def test_a_v6_kernel_needs_no_iommufd_until_memory_is_mapped() -> None:
    kernel = Kernel(0, (0, errno.EINVAL), NO_FD)
    with connect(kernel, "vfio0", "no /dev/iommu") as dev:
        assert dev.dialect is Dialect.V6
        with pytest.raises(vfiomig.VfioMigError, match="no /dev/iommu"):
            dev.map(0, bytearray(4096))
    assert kernel.closed == [3]


def test_a_device_that_does_not_answer_at_all_is_given_back() -> None:
    kernel = Kernel(0, (errno.EIO, 0))
    with pytest.raises(TargetError, match="EIO"):
        connect(kernel, "vfio0")
    assert kernel.closed == [3, 4]


# The transport of system calls, over files that are no devices.


def test_the_kernels_transport_makes_the_system_calls(tmp_path: Path) -> None:
    file = tmp_path / "regions"
    file.write_bytes(b"0123456789")
    device = Fd(os.open(file, os.O_RDWR))
    transport = KernelTransport(device, None)
    assert device.closed
    assert transport.iommufd == NO_FD
    assert transport.pread(3, 4) == b"3456"
    assert transport.pwrite(2, b"ab") == 2
    assert file.read_bytes() == b"01ab456789"
    with pytest.raises(OSError) as caught:
        transport.ioctl(transport.device, vfio.VFIO_DEVICE_RESET, None)
    assert caught.value.errno == errno.ENOTTY
    reading, writing = os.pipe()
    assert transport.write(writing, memoryview(b"xyz")) == 3
    buffer = bytearray(5)
    assert transport.readinto(reading, memoryview(buffer)) == 3
    assert buffer == b"xyz\0\0"
    for number in (reading, writing, transport.device):
        transport.close(number)
    with pytest.raises(OSError):
        transport.close(reading)


def test_a_file_that_is_no_device_is_refused_after_the_bind(tmp_path: Path) -> None:
    file = tmp_path / "node"
    file.touch()
    transport = KernelTransport(
        Fd(os.open(file, os.O_RDWR)), Fd(os.open(file, os.O_RDWR | os.O_CLOEXEC))
    )
    with pytest.raises(TargetError):
        connect(transport, "node")


def test_the_memory_of_a_request_is_the_structs_own() -> None:
    """FIONREAD writes an int where the request says: into the struct, not into a copy."""
    reading, writing = os.pipe()
    transport = KernelTransport(Fd(reading), Fd(writing))
    os.write(writing, b"12345")
    answer = iommufd.IommuDestroy()
    transport.ioctl(reading, 0x541B, answer)
    assert answer.size == 5
    transport.close(reading)
    transport.close(writing)


# A device that its former user left somewhere.


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("state", [State.STOP, State.STOP_COPY, State.RESUMING])
def test_a_device_that_was_left_in_another_state_is_reset(
    dialect: Dialect, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    with vfiomig.open("model:pattern,size=4K", dialect) as dev:
        assert settle(dev) is dev
        assert not caplog.records
        session = dev.set_state(state)
        assert settle(dev) is dev
        assert dev.state is State.RUNNING
        assert f"was left in {state.name}" in caplog.text
        if session is not None:
            session.close()


def test_a_device_that_cannot_migrate_is_left_alone() -> None:
    with vfiomig.open("model:pattern,size=4K,caps=none") as dev:
        assert settle(dev) is dev


def test_a_device_that_does_not_reset_is_closed_again() -> None:
    dev = open_device(Card(resets=1))
    dev.set_state(State.STOP)
    with pytest.raises(TargetError, match="left it in STOP, and it does not reset"):
        settle(dev)
    assert "closed" in repr(dev)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOMEM, "ulimit -l"), (errno.ENOSPC, "dma_entry_limit"), (errno.EIO, r"error\)$")],
)
def test_memory_that_cannot_be_mapped_says_what_to_do(
    number: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(iova: int, memory: object) -> None:
        raise OSError(number, os.strerror(number))

    with vfiomig.open("model:pattern,size=4K") as dev:
        monkeypatch.setattr(dev._memory, "map", refuse)
        with pytest.raises(vfiomig.VfioMigError, match=rf"IOVA 0x1000 failed with.*{advice}"):
            dev.map(0x1000, bytearray(4096))


def test_what_is_mapped_already_and_what_is_no_page_say_so() -> None:
    with vfiomig.open("model:pattern,size=4K") as dev, mmap.mmap(-1, 4096) as memory:
        dev.map(0x1000, memory)
        with pytest.raises(vfiomig.VfioMigError, match=r"EEXIST.*unmap it first"):
            dev.map(0x1000, memory)
        with pytest.raises(vfiomig.VfioMigError, match=r"EINVAL.*begin and end at a page"):
            dev.map(0x2800, memory)
        dev.unmap(0x1000, 4096)


def test_what_keeps_a_device_from_migrating_is_told_at_the_attempt() -> None:
    with vfiomig.open("model:pattern,size=4K,caps=none") as dev:
        with pytest.raises(
            vfiomig.VfioMigError, match="a Device class has capabilities"
        ) as refused:
            dev.set_state(State.STOP)
        assert isinstance(refused.value, OSError)
        assert refused.value.errno == errno.ENOTTY
