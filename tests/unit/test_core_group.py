"""Groups and containers: every errno in the kernel's order, who keeps what, and what is exclusive."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import pytest

from group_requests import ADDRESS, CONTAINER, V1, V2, OldProgram
from in_process import IOMMUFD, OTHER, PAGE, V6, Pages, Scripted
from iommu_requests import words
from vfiomig import State
from vfiomig.abi import vfio
from vfiomig.abi import vfio_iommu as abi
from vfiomig.core.container import Container
from vfiomig.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BIND = vfio.VFIO_DEVICE_BIND_IOMMUFD
NAME = ADDRESS.encode()


@pytest.fixture
def program() -> Iterator[OldProgram]:
    """A program whose group is in a container with an IOMMU."""
    with OldProgram() as program:
        yield program


@pytest.fixture
def alone() -> Iterator[OldProgram]:
    """A program whose group is in no container."""
    with OldProgram(version=0) as program:
        yield program


def busy(action: Callable[[], object]) -> bool:
    with pytest.raises(OSError) as refused:
        action()
    return refused.value.errno == errno.EBUSY


# The group.


@pytest.mark.parametrize(("argsz", "result"), [(0, errno.EINVAL), (7, errno.EINVAL), (8, 0)])
def test_a_status_needs_its_argsz(alone: OldProgram, argsz: int, result: int) -> None:
    answer = alone.ioctl(alone.group, abi.VFIO_GROUP_GET_STATUS, words(argsz, 0xFF))
    assert answer == (result, words(argsz, 0xFF if result else abi.VFIO_GROUP_FLAGS_VIABLE))


def test_a_status_tells_of_the_container(alone: OldProgram) -> None:
    flags = []
    for change in (alone.set_container, alone.unset_container, lambda: 0):
        answer = alone.ioctl(alone.group, abi.VFIO_GROUP_GET_STATUS, words(8, 0))
        flags.append(int.from_bytes(answer.data[4:], "little"))
        assert change() == 0
    assert flags == [1, 3, 1]


def test_a_request_that_is_none_of_a_group_is_enotty_and_not_read(alone: OldProgram) -> None:
    for number in (abi.VFIO_GET_API_VERSION, vfio.VFIO_DEVICE_RESET, 0x3BFF):
        assert alone.at(alone.group, number, 0) == -errno.ENOTTY


@pytest.mark.parametrize(
    ("number", "result"),
    [(99, errno.EBADF), (-1, errno.EBADF), (OTHER, errno.EBADFD), (CONTAINER, 0)],
)
def test_a_container_is_looked_for(alone: OldProgram, number: int, result: int) -> None:
    assert alone.set_container(number) == result
    assert alone.unset_container() == (errno.EINVAL if result else 0)


def test_being_in_a_container_comes_between_a_closed_number_and_a_foreign_file(
    alone: OldProgram,
) -> None:
    assert alone.set_container() == 0
    assert alone.at(alone.group, abi.VFIO_GROUP_SET_CONTAINER, 0) == -errno.EFAULT
    assert alone.set_container(99) == errno.EBADF
    assert alone.set_container(OTHER) == errno.EINVAL
    assert alone.set_container() == errno.EINVAL


@pytest.mark.parametrize(
    ("name", "result"),
    [
        (NAME, 0),
        (NAME + b" ", 0),
        (NAME + b"   ", 0),
        (NAME + b" x", -errno.EINVAL),
        (NAME + b"  vf_token=bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3", -errno.EINVAL),
        (NAME + b"\t", -errno.ENODEV),
        (NAME + b"1 x", -errno.ENODEV),
        (NAME[:-1], -errno.ENODEV),
        (b"", -errno.ENODEV),
        (b"vfio0", -errno.ENODEV),
        (b"\xff" * 4095, -errno.ENODEV),
        (b"\xff" * 4096, -errno.EINVAL),
    ],
)
def test_a_device_is_called_by_its_address(program: OldProgram, name: bytes, result: int) -> None:
    number = program.device_fd(name)
    assert number == result or (number > 0 and not result)


def test_a_name_is_read_to_its_end_and_no_further(program: OldProgram) -> None:
    with Pages("rw", "", "rw", "rw", "") as pages:
        for end, name, result in (
            (pages.page(1), NAME + b"\0", 0),
            (pages.page(1), NAME, -errno.EFAULT),
            (pages.page(4), b"x" * PAGE + b"x" * 100, -errno.EINVAL),
        ):
            at = end - len(name)
            program.caller.write(at, name)
            number = program.at(program.group, abi.VFIO_GROUP_GET_DEVICE_FD, at)
            assert number == result or (number > 0 and not result)
        at = pages.page(2) + 100  # over a page's end
        program.caller.write(at, b" " * (PAGE - 104) + b"12345678\0")
        number = program.at(program.group, abi.VFIO_GROUP_GET_DEVICE_FD, at)
        assert number == -errno.ENODEV
    assert program.at(program.group, abi.VFIO_GROUP_GET_DEVICE_FD, 0) == -errno.EFAULT


def test_no_device_without_a_container_and_its_iommu(alone: OldProgram) -> None:
    assert alone.device_fd() == -errno.EINVAL
    assert alone.device_fd(b"x") == -errno.ENODEV
    assert alone.set_container() == 0
    assert alone.device_fd() == -errno.EINVAL
    alone.caller.full = True
    assert alone.device_fd() == -errno.EMFILE
    assert alone.device_fd(b"x") == -errno.ENODEV
    alone.caller.full = False
    assert alone.at(alone.container, abi.VFIO_SET_IOMMU, V2) == 0
    assert alone.served.users == 0
    assert alone.device_fd() > 0


def test_a_device_that_does_not_start_is_not_given_out(program: OldProgram) -> None:
    assert isinstance(program.device, Scripted)
    program.device.fails["start"] = DeviceError(errno.EAGAIN)
    assert program.device_fd() == -errno.EAGAIN
    assert program.unset_container() == 0


# The container.


@pytest.mark.parametrize("kind", [0, 2, 4, 5, 6, 7, 8, 10, 11, 1 << 32 | 3])
def test_an_iommu_that_there_is_not_is_enodev(alone: OldProgram, kind: int) -> None:
    assert alone.at(alone.container, abi.VFIO_SET_IOMMU, kind) == -errno.EINVAL
    assert alone.set_container() == 0
    assert alone.at(alone.container, abi.VFIO_SET_IOMMU, kind) == -errno.ENODEV
    assert alone.at(alone.container, abi.VFIO_SET_IOMMU, abi.VFIO_UNMAP_ALL) == -errno.EINVAL
    assert alone.at(alone.container, abi.VFIO_SET_IOMMU, V1) == 0
    assert alone.at(alone.container, abi.VFIO_SET_IOMMU, kind) == -errno.EINVAL


@pytest.mark.parametrize(
    ("extension", "before", "after"),
    [(0, 0, 0), (1, 1, 1), (3, 1, 1), (4, 0, 1), (6, 0, 0), (8, 0, 0), (9, 1, 1), (10, 0, 1)],
)
def test_extensions(alone: OldProgram, extension: int, before: int, after: int) -> None:
    assert alone.at(alone.container, abi.VFIO_CHECK_EXTENSION, extension) == before
    assert alone.set_container() == 0
    assert alone.at(alone.container, abi.VFIO_CHECK_EXTENSION, extension) == before
    assert alone.at(alone.container, abi.VFIO_SET_IOMMU, V2) == 0
    assert alone.at(alone.container, abi.VFIO_CHECK_EXTENSION, extension) == after


def test_a_container_without_an_iommu_refuses_what_it_does_not_know(alone: OldProgram) -> None:
    numbers = (abi.VFIO_IOMMU_GET_INFO, abi.VFIO_IOMMU_MAP_DMA, 0x3BFF, 0x541B)
    assert {alone.at(alone.container, number, 0) for number in numbers} == {-errno.EINVAL}
    assert alone.at(alone.container, abi.VFIO_GET_API_VERSION, 0) == 0
    assert alone.set_container() == 0
    assert {alone.at(alone.container, number, 0) for number in numbers} == {-errno.EINVAL}
    assert alone.at(alone.container, abi.VFIO_SET_IOMMU, V2) == 0
    assert [-alone.at(alone.container, number, 0) for number in numbers] == [
        errno.EFAULT,
        errno.EFAULT,
        errno.ENOTTY,
        errno.ENOTTY,
    ]


def test_the_last_group_takes_the_iommu_and_its_mappings_along() -> None:
    with OldProgram() as one, OldProgram(caller=one.caller) as other, Pages("rw") as pages:
        assert one.map(pages.page(0), 0x10000) == 0
        one.device.dma.write(0x10000, b"one")
        other.device.dma.write(0x10004, b"other")
        assert one.unset_container() == 0
        with pytest.raises(DeviceError):
            one.device.dma.read(0x10000, 1)
        assert other.device.dma.read(0x10000, 9) == b"one\0other"
        assert one.set_container() == 0
        assert one.device.dma.read(0x10004, 5) == b"other"
        iommu = one.iommu
        assert one.unset_container() == other.unset_container() == 0
        assert one.container.iommu is None
        assert len(iommu.space) == 0
        assert one.set_container() == 0
        assert one.map(pages.page(0), 0x10000) == errno.EINVAL


# The device.


def test_a_device_of_a_group_needs_no_bind_and_knows_none(program: OldProgram) -> None:
    file = program.open_device()
    assert program.served.users == 1
    assert program.at(file, vfio.VFIO_DEVICE_RESET, 0) == 0
    bind = words(16, 0, IOMMUFD, 0)
    assert program.ioctl(file, BIND, bind).errno == errno.EINVAL
    assert program.ioctl(file, BIND, words(16, 0, 99, 0)).errno == errno.EINVAL
    assert program.at(file, BIND, 0) == -errno.EFAULT
    for number in (
        vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT,
        vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT,
        abi.VFIO_GROUP_GET_STATUS,
    ):
        assert program.at(file, number, 0) == -errno.ENOTTY


def test_all_descriptors_of_a_device_share_its_state_until_the_last_is_closed(
    program: OldProgram,
) -> None:
    one, other = program.open_device(), program.open_device()
    program.served.migration.set_state(State.STOP)
    program.close_device(one)
    assert program.served.migration.state() is State.STOP
    assert program.unset_container() == errno.EBUSY
    program.close_device(other)
    assert program.unset_container() == 0
    assert program.set_container() == 0
    assert program.at(program.container, abi.VFIO_SET_IOMMU, V2) == 0
    program.open_device()
    assert program.served.migration.state() is State.RUNNING


def test_a_device_keeps_its_group_open_and_in_its_container() -> None:
    program = OldProgram()
    file = program.open_device()
    with Pages("rw") as pages:
        assert program.map(pages.page(0), 0x10000) == 0
        program.group.leave()
        program.device.dma.write(0x10000, b"still there")
        assert busy(program.group.open)
        program.close_device(file)
        with pytest.raises(DeviceError):
            program.device.dma.write(0x10000, b"gone")
    assert program.container.iommu is None
    program.group.open()
    program.group.leave()


# Other ways to the device.


def test_a_group_is_opened_once_at_a_time(alone: OldProgram) -> None:
    assert busy(alone.group.open)
    alone.group.leave()
    alone.group.open()


def test_a_device_in_use_otherwise_has_no_group_to_open() -> None:
    program = OldProgram(version=0)
    program.group.leave()
    other_way = program.served.open(in_use=True)
    assert busy(program.group.open)
    other_way.release()
    program.group.open()
    assert busy(lambda: program.served.open(in_use=True))
    program.group.leave()


def test_while_the_group_is_open_the_character_device_cannot_be_bound(alone: OldProgram) -> None:
    file = alone.served.open()
    for number in (IOMMUFD, 99, OTHER):
        assert alone.ioctl(file, BIND, words(16, 0, number, 0)).errno == errno.EBUSY
    assert alone.ioctl(file, BIND, words(16, 0, -1, 0)).errno == errno.EINVAL
    alone.group.leave()
    assert alone.ioctl(file, BIND, words(16, 0, IOMMUFD, 0)).errno == 0
    assert busy(alone.group.open)
    file.release()
    alone.group.open()


def test_in_v6_an_open_of_either_way_keeps_the_other_out() -> None:
    with OldProgram(dialect=V6) as program:
        assert busy(program.served.open)
        file = program.open_device()
        argument = vfio.MigSetState(argsz=16, device_state=State.STOP_COPY, data_fd=-1)
        answer = program.ioctl(file, vfio.VFIO_DEVICE_MIG_SET_STATE, argument)
        assert answer.errno == 0
        assert vfio.MigSetState.parse(answer.data).data_fd in program.caller.table
    file = program.served.open()
    assert busy(program.group.open)
    file.release()
    program.group.open()


def test_a_container_keeps_its_groups_apart_from_those_of_another() -> None:
    with OldProgram() as one, OldProgram() as other, Pages("rw", "rw") as pages:
        assert one.map(pages.page(0), 0x10000) == 0
        assert other.map(pages.page(1), 0x10000) == 0
        one.device.dma.write(0x10000, b"1")
        other.device.dma.write(0x10000, b"2")
        assert ctypes.string_at(pages.page(0), 1) + ctypes.string_at(pages.page(1), 1) == b"12"
        assert isinstance(one.container, Container)
        assert one.container is not other.container
