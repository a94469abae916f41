"""An iommufd in a container's place: groups that are put into it, and VFIO's requests on it."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import pytest

from group_requests import ALL, READ, V1, V2, VADDR, WRITE, OldProgram
from in_process import IOMMUFD, PAGE, Pages, Scripted
from iommu_requests import Iommu, words
from vfiomig.abi import iommufd
from vfiomig.abi import vfio_iommu as abi
from vfiomig.abi.vfio import InfoCapHeader
from vfiomig.errors import DeviceError
from vfiomig.iommu.space import ALLOWED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from in_process import Answer
    from vfiomig.abi.uapi import UapiStruct

END = 1 << 64
HERE = 0x40000


class Both(OldProgram):
    """A program whose group is not in a container yet, and which has an iommufd as well."""

    def __init__(self) -> None:
        super().__init__(version=0)
        self.fd = Iommu(self.caller)

    def enter(self) -> None:
        assert self.set_container(IOMMUFD) == 0

    def ask(self, number: int, argument: UapiStruct | bytes) -> Answer:
        return self.fd.ioctl(number, argument)

    def value(self, number: int, value: int) -> int:
        """Make a request with a plain value; return its result, or the negative errno."""
        try:
            return self.fd.context.ioctl(number, value, self.caller)
        except OSError as failure:
            return -(failure.errno or 1)

    def map_dma(
        self, address: int, iova: int, size: int = PAGE, flags: int = READ | WRITE, argsz: int = 32
    ) -> int:
        argument = abi.Type1DmaMap(argsz=argsz, flags=flags, vaddr=address, iova=iova, size=size)
        return self.ask(abi.VFIO_IOMMU_MAP_DMA, argument).errno

    def unmap_dma(self, iova: int, size: int, flags: int = 0, argsz: int = 24) -> tuple[int, int]:
        argument = abi.Type1DmaUnmap(argsz=argsz, flags=flags, iova=iova, size=size)
        answer = self.ask(abi.VFIO_IOMMU_UNMAP_DMA, argument)
        return answer.errno, abi.Type1DmaUnmap.parse(answer.data).size

    def ioas(self) -> int:
        """The id of the address space; 0 if there is none."""
        argument = iommufd.IommuVfioIoas(size=12, op=iommufd.IOMMU_VFIO_IOAS_GET)
        answer = self.ask(iommufd.IOMMU_VFIO_IOAS, argument)
        return 0 if answer.errno else iommufd.IommuVfioIoas.parse(answer.data).ioas_id

    def reaches(self, iova: int) -> bool:
        try:
            self.device.dma.read(iova, 1)
        except DeviceError:
            return False
        return True


@pytest.fixture
def program() -> Iterator[Both]:
    with Both() as program:
        yield program


@pytest.fixture
def pages() -> Iterator[Pages]:
    with Pages(*["rw"] * 8, "r", "") as pages:
        yield pages


# The group.


def test_a_group_gives_an_iommufd_an_address_space_once(program: Both) -> None:
    assert program.ioas() == 0
    program.enter()
    first = program.ioas()
    assert first
    assert program.set_container() == errno.EINVAL
    assert program.unset_container() == 0
    assert program.unset_container() == errno.EINVAL
    assert program.ioas() == first
    program.enter()
    assert program.ioas() == first


def test_an_address_space_that_was_chosen_is_kept(program: Both) -> None:
    chosen = program.fd.alloc()
    argument = iommufd.IommuVfioIoas(size=12, ioas_id=chosen, op=iommufd.IOMMU_VFIO_IOAS_SET)
    assert program.ask(iommufd.IOMMU_VFIO_IOAS, argument).errno == 0
    program.enter()
    assert program.ioas() == chosen


def test_the_status_tells_of_an_iommufd_as_of_a_container(program: Both) -> None:
    program.enter()
    answer = program.ioctl(program.group, abi.VFIO_GROUP_GET_STATUS, words(8, 0))
    assert int.from_bytes(answer.data[4:], "little") == 3


def test_a_device_is_attached_while_it_is_open(program: Both, pages: Pages) -> None:
    program.enter()  # and no SET_IOMMU
    assert program.map_dma(pages.page(0), HERE) == 0
    assert not program.reaches(HERE)
    one, other = program.open_device(), program.open_device()
    program.device.dma.write(HERE, b"seen")
    assert ctypes.string_at(pages.page(0), 4) == b"seen"
    assert program.fd.destroy(program.ioas()) == errno.EBUSY
    program.close_device(one)
    assert program.reaches(HERE)
    program.close_device(other)
    assert not program.reaches(HERE)
    assert program.fd.destroy(program.ioas()) == 0


def test_a_group_may_leave_an_iommufd_while_its_device_is_open(program: Both, pages: Pages) -> None:
    program.enter()
    assert program.map_dma(pages.page(0), HERE) == 0
    file = program.open_device()
    assert program.unset_container() == 0
    assert program.device_fd() == -errno.EINVAL
    assert program.reaches(HERE)
    # The iommufd has its DMA still: no container can have it, and the group is not viable.
    assert program.set_container() == errno.EBUSY
    assert program.ioctl(program.group, abi.VFIO_GROUP_GET_STATUS, words(8, 1))[1] == words(8, 0)
    program.enter()
    assert program.device_fd() > 0
    program.close_device(file)
    assert program.reaches(HERE)


def test_a_device_without_an_address_space_is_not_given_out(program: Both) -> None:
    program.enter()
    assert program.fd.destroy(program.ioas()) == 0
    assert program.device_fd() == -errno.ENODEV
    assert program.served.users == 0
    clear = iommufd.IommuVfioIoas(size=12, op=iommufd.IOMMU_VFIO_IOAS_CLEAR)
    assert program.ask(iommufd.IOMMU_VFIO_IOAS, clear).errno == 0
    assert program.unset_container() == 0
    program.enter()
    assert program.device_fd() > 0


def test_a_device_that_does_not_start_is_bound_to_nothing(program: Both) -> None:
    program.enter()
    assert isinstance(program.device, Scripted)
    program.device.fails["start"] = DeviceError(errno.EAGAIN)
    assert program.device_fd() == -errno.EAGAIN
    assert program.fd.destroy(program.ioas()) == 0


# Requests without an argument in memory.


@pytest.mark.parametrize(
    ("extension", "before", "after"),
    [
        *((0, 0, 0), (1, 1, 1), (3, 1, 1), (4, -errno.ENODEV, 1), (6, 0, 0)),
        *((8, 0, 0), (9, 1, 1), (10, 0, 0), (1 << 32 | 3, 0, 0)),
    ],
)
def test_extensions(program: Both, extension: int, before: int, after: int) -> None:
    assert program.value(abi.VFIO_GET_API_VERSION, 0) == 0
    assert program.value(abi.VFIO_CHECK_EXTENSION, extension) == before
    program.enter()
    assert program.value(abi.VFIO_CHECK_EXTENSION, extension) == after


def test_the_iommu_is_one_of_two_versions_and_there_once_a_group_is(program: Both) -> None:
    assert program.value(abi.VFIO_SET_IOMMU, V2) == -errno.ENODEV
    program.enter()
    for version in (0, 2, 6, 8, 9, 10, 1 << 32 | 3):
        assert program.value(abi.VFIO_SET_IOMMU, version) == -errno.EINVAL
    for version in (V2, V2, V1, V2):
        assert program.value(abi.VFIO_SET_IOMMU, version) == 0


def test_dirty_pages_are_not_asked_for_here(program: Both) -> None:
    program.enter()
    for number in (abi.VFIO_IOMMU_DIRTY_PAGES, abi.VFIO_GROUP_GET_STATUS, 0x3BFF):
        assert program.value(number, 0) == -errno.ENOTTY
    assert program.unmap_dma(HERE, PAGE, 1)[0] == errno.EINVAL


# GET_INFO.


def info_of(program: Both, argsz: int) -> Answer:
    return program.ask(abi.VFIO_IOMMU_GET_INFO, argsz.to_bytes(4, "little") + b"\xee" * 140)


@pytest.mark.parametrize("argsz", [16, 20, 24, 35, 36, 39, 40, 56, 72, 87, 88, 144])
def test_the_info_is_filled_as_far_as_there_is_room(program: Both, argsz: int) -> None:
    program.enter()
    program.open_device()
    answer = info_of(program, argsz)
    info = abi.Type1Info.parse(answer.data)
    assert (answer.errno, info.argsz, info.flags, info.iova_pgsizes) == (0, 88, 3, 0x40201000)
    assert answer.data[max(argsz, 16) :] == b"\xee" * (144 - max(argsz, 16))
    if argsz >= 24:
        assert info.cap_offset == (24 if argsz >= 88 else 0)
    head = InfoCapHeader.parse(answer.data[24:32])
    if argsz >= 36:
        assert (head.id, head.version, head.next) == (3, 1, 40 if argsz >= 40 else 0)
        assert abi.Type1InfoDmaAvail.parse(answer.data[24:36]).avail == 0xFFFFFFFF
    if argsz >= 88:
        iovas = abi.Type1InfoCapIovaRange.parse(answer.data[40:56])
        assert (iovas.header.id, iovas.header.next, iovas.nr_iovas) == (1, 0, 2)
        rows = [abi.Type1IovaRange.parse(answer.data[at : at + 16]) for at in (56, 72)]
        assert tuple((row.start, row.end) for row in rows) == ALLOWED


def test_before_a_device_is_attached_nothing_limits_pages_and_iovas(program: Both) -> None:
    assert info_of(program, 144).errno == errno.ENODEV
    assert info_of(program, 15).errno == errno.EINVAL
    program.enter()
    answer = info_of(program, 144)
    info = abi.Type1Info.parse(answer.data)
    assert (info.argsz, info.iova_pgsizes) == (72, END - PAGE)
    row = abi.Type1IovaRange.parse(answer.data[56:72])
    assert (row.start, row.end) == (0, END - 1)
    with Pages("rw", "") as memory:
        for argsz, room in ((16, 8), (24, 20), (72, 60)):
            at = memory.page(1) - room
            program.caller.write(at, argsz.to_bytes(4, "little") + bytes(room - 4))
            assert program.value(abi.VFIO_IOMMU_GET_INFO, at) == -errno.EFAULT


# MAP_DMA and UNMAP_DMA.


@pytest.mark.parametrize(
    ("members", "result"),
    [
        ({}, 0),
        ({"argsz": 31}, errno.EINVAL),
        ({"argsz": 4096}, 0),
        ({"flags": VADDR}, errno.EINVAL),
        ({"flags": VADDR | READ}, errno.EINVAL),
        ({"flags": 0}, 0),  # mapped, and nobody may use it
        ({"flags": READ, "page": 8}, 0),
        ({"page": 8}, errno.EFAULT),
        ({"page": 9}, errno.EFAULT),
        ({"size": 0}, errno.EINVAL),
        ({"size": PAGE + 1}, errno.EINVAL),
        ({"iova": HERE + 1}, errno.EINVAL),
        ({"iova": END - PAGE, "size": 2 * PAGE}, errno.EOVERFLOW),
        ({"iova": ALLOWED[0][1] + 1}, errno.EINVAL),
        ({"iova": 0x7000}, errno.EEXIST),
    ],
)
def test_a_mapping_is_checked_as_iommufd_does(
    program: Both, pages: Pages, members: dict[str, int], result: int
) -> None:
    program.enter()
    program.open_device()
    assert program.map_dma(pages.page(0), 0x7000) == 0
    members = {"iova": HERE, **members}
    address = pages.page(members.pop("page", 1))
    assert program.map_dma(address, **members) == result
    if not result:
        assert program.reaches(HERE) == (members.get("flags") != 0)


def test_addresses_beyond_the_end_are_eoverflow_and_no_space_is_enodev(
    program: Both, pages: Pages
) -> None:
    assert program.map_dma(pages.page(0), HERE) == errno.ENODEV
    assert program.map_dma(pages.page(0), HERE, argsz=31) == errno.EINVAL
    assert program.unmap_dma(HERE, PAGE) == (errno.ENODEV, PAGE)
    assert program.unmap_dma(HERE, PAGE, argsz=23) == (errno.EINVAL, PAGE)
    program.enter()
    assert program.map_dma(END - PAGE, HERE, 2 * PAGE) == errno.EOVERFLOW
    assert program.value(abi.VFIO_IOMMU_MAP_DMA, 0) == -errno.EFAULT
    assert program.value(abi.VFIO_IOMMU_UNMAP_DMA, 0) == -errno.EFAULT


@pytest.mark.parametrize(
    ("iova", "size", "flags", "answer"),
    [
        (HERE, 4 * PAGE, 0, (0, 4 * PAGE)),
        (0, 1 << 30, 0, (0, 5 * PAGE)),
        (HERE + 5 * PAGE, PAGE, 0, (0, 0)),
        (END - PAGE, PAGE, 0, (0, 0)),
        (0, 0, ALL, (0, 5 * PAGE)),
        (HERE, 0, ALL, (errno.EINVAL, 0)),
        (0, PAGE, ALL, (errno.EINVAL, PAGE)),
        (HERE, 0, 0, (errno.EINVAL, 0)),
        (END - PAGE, 2 * PAGE, 0, (errno.EOVERFLOW, 0)),
        (HERE, PAGE, 0, (errno.ENOENT, 0)),
        (HERE + PAGE, 3 * PAGE, 0, (errno.ENOENT, 0)),
        (HERE, PAGE, VADDR, (errno.EINVAL, PAGE)),
    ],
)
def test_whole_mappings_are_unmapped_and_the_size_is_told_after_a_failure_too(
    program: Both, pages: Pages, iova: int, size: int, flags: int, answer: tuple[int, int]
) -> None:
    program.enter()
    program.open_device()
    assert program.map_dma(pages.page(0), HERE, 4 * PAGE) == 0
    assert program.map_dma(pages.page(4), HERE + 8 * PAGE) == 0
    assert program.unmap_dma(iova, size, flags) == answer
    left = sum(program.reaches(HERE + at * PAGE) for at in range(16))
    assert left == 5 - (0 if answer[0] else answer[1] // PAGE)


def test_version_1_cuts_a_mapping_in_three(program: Both, pages: Pages) -> None:
    program.enter()
    assert program.value(abi.VFIO_SET_IOMMU, V1) == 0
    program.open_device()
    assert program.map_dma(pages.page(0), HERE, 5 * PAGE) == 0
    for at in range(5):
        ctypes.memset(pages.page(at), 0x30 + at, PAGE)
    assert program.unmap_dma(HERE + 2 * PAGE, PAGE) == (0, PAGE)
    reads = [program.device.dma.read(HERE + at * PAGE, 1) for at in (0, 1, 3, 4)]
    assert reads == [b"0", b"1", b"3", b"4"]
    assert not program.reaches(HERE + 2 * PAGE)
    assert program.unmap_dma(HERE + PAGE, 3 * PAGE) == (0, 2 * PAGE)
    assert program.unmap_dma(0, 0, ALL) == (0, 2 * PAGE)
