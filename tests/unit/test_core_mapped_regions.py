"""Regions that a program may map: what GET_REGION_INFO says, and whose memory they are."""

from __future__ import annotations

import errno
import gc
import itertools
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from in_process import V6, Pages, Program, refusal
from pci_card import Card
from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.core.regions import memory_size, region_offset
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.descriptors import create_sealed_memfd
from vfiomig.device import Device, Region
from vfiomig.device.region import cut

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig.descriptors import Fd

GET_REGION_INFO = vfio.VFIO_DEVICE_GET_REGION_INFO
BAR2 = region_offset(2)


class Whole(Device):
    """A region without a trapped page, and one that nobody may map."""

    bar0 = Region(size=8192, mapped=((0, 4096), (4096, 4096)))
    bar3 = Region(size=4096)


class OpenProgram(Program):
    """A program whose open of the device has a file behind it."""

    def __init__(self, device: Device, dialect: Dialect = Dialect.LANDED) -> None:
        self.memory: Fd = create_sealed_memfd("test", memory_size(device))
        super().__init__(device, dialect, bound=False)
        self.file.release()  # it has no file behind it
        self.file = self.served.open(self.memory)
        if dialect is Dialect.LANDED:
            assert self.bind().errno == 0

    def close(self) -> None:
        super().close()
        self.memory.close()

    def shared(self, index: int = 2, size: int = 32768) -> mmap.mmap:
        """Map a region as the program would."""
        return mmap.mmap(self.memory.fileno(), size, offset=region_offset(index))


# Declarations.


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"size": 2, "io": True}, "from 4 on"),
        ({"size": 16, "io": True, "bits64": True}, "I/O space"),
        ({"size": 16, "io": True, "prefetchable": True}, "I/O space"),
        ({"size": 4096, "io": True, "mapped": ((0, 4096),)}, "I/O space"),
        ({"size": 1 << 32}, "needs bits64"),
        ({"size": 4096, "mapped": ((0, 4097),)}, "whole pages"),
        ({"size": 8192, "mapped": ((1, 4096),)}, "whole pages"),
        ({"size": 8192, "mapped": ((0, 0),)}, "whole pages"),
        ({"size": 8192, "mapped": ((0, 8192), (4096, 4096))}, "whole pages"),
        ({"size": 8192, "mapped": ((4096, 8192),)}, "behind the region"),
        ({"size": 16, "mapped": ((0, 4096),)}, "behind the region"),
    ],
)
def test_a_region_that_cannot_be_is_refused(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Region(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", range(12))
@pytest.mark.parametrize("length", range(13))
def test_an_access_is_cut_at_the_edges(offset: int, length: int) -> None:
    ranges = ((2, 3), (5, 1), (8, 2))
    owner = {
        byte: n for n, (start, size) in enumerate(ranges) for byte in range(start, start + size)
    }
    pieces = list(cut(offset, length, ranges))
    covered = [(at + n, number) for at, size, number in pieces for n in range(size)]
    assert covered == [(byte, owner.get(byte)) for byte in range(offset, offset + length)]
    assert all(size for _, size, _ in pieces)
    numbers = [number for _, _, number in pieces]
    assert all(one != other for one, other in itertools.pairwise(numbers))


# GET_REGION_INFO.


def region_info(program: Program, index: int, argsz: int) -> tuple[vfio.RegionInfo, bytes]:
    asked = vfio.RegionInfo(argsz=argsz, index=index, cap_offset=9)
    answer = program.ioctl(GET_REGION_INFO, bytes(asked) + b"\xaa" * 200)
    assert answer.errno == 0
    return vfio.RegionInfo.parse(answer.data), answer.data[32:]


@pytest.mark.parametrize("argsz", [32, 33, 79])
def test_an_argsz_that_is_too_small_for_the_areas_grows(argsz: int) -> None:
    with Program(Card()) as program:
        told, behind = region_info(program, 2, argsz)
        assert (told.argsz, told.flags, told.cap_offset) == (80, 0xF, 0)
        assert (told.size, told.offset) == (32768, BAR2)
        assert behind == b"\xaa" * 200


@pytest.mark.parametrize("argsz", [80, 100, 0xFFFF_FFFF])
def test_the_areas_follow_the_struct(argsz: int) -> None:
    with Program(Card()) as program:
        told, behind = region_info(program, 2, argsz)
        assert (told.argsz, told.flags, told.cap_offset) == (argsz, 0xF, 32)
        head = vfio.RegionInfoCapSparseMmap.parse(behind)
        assert (head.header.id, head.header.version, head.header.next) == (1, 1, 0)
        assert (head.nr_areas, head.reserved) == (2, 0)
        areas = [vfio.SparseMmapArea.parse(behind[16 + 16 * n :]) for n in range(2)]
        assert [(area.offset, area.size) for area in areas] == [(0x1000, 0x2000), (0x5000, 0x1000)]
        assert behind[48:] == b"\xaa" * 152


def test_a_region_that_is_mapped_as_a_whole_has_no_areas() -> None:
    with Program(Whole()) as program:
        told, _ = region_info(program, 0, 232)
        assert (told.argsz, told.flags, told.cap_offset) == (232, 7, 0)
        assert region_info(program, 3, 232)[0].flags == 3


def test_areas_that_cannot_be_written_are_efault() -> None:
    with Program(Card()) as program, Pages("rw", "") as pages:
        at = pages.page(1) - 32
        program.caller.write(at, bytes(vfio.RegionInfo(argsz=80, index=2)))
        assert program.at(GET_REGION_INFO, at) == errno.EFAULT
        program.caller.write(at, bytes(vfio.RegionInfo(argsz=79, index=2)))
        assert program.at(GET_REGION_INFO, at) == 0


def test_configuration_space_of_an_express_device_has_4096_bytes() -> None:
    with Program(Card()) as program:
        assert region_info(program, 7, 32)[0].size == 4096
        assert len(program.file.pread(region_offset(7), 4096)) == 4096
        assert program.file.pread(region_offset(7) + 4095, 1) == b"\0"


# Whose memory it is.


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def program(card: Card) -> Iterator[OpenProgram]:
    with OpenProgram(card) as program:
        yield program


def test_the_program_and_the_device_share_the_pages(card: Card, program: OpenProgram) -> None:
    with program.shared() as memory:
        memory[0x1000:0x1003] = b"one"
        assert card.bar2[0x1000:0x1003] == b"one"
        card.bar2[0x5FFF] = 7
        assert memory[0x5FFF] == 7
        assert card.accesses == []


def test_positional_accesses_reach_mapped_and_trapped_pages_alike(
    card: Card, program: OpenProgram
) -> None:
    assert program.file.pwrite(BAR2 + 0xFFC, b"abcdefgh") == 8
    assert card.accesses == [(0xFFC, b"abcd")]
    assert card.bar2[0x1000:0x1004] == b"efgh"
    card.bar2[0x2FFF] = 9
    assert program.file.pread(BAR2 + 0x2FFE, 4) == b"\0\x09\xee\xee"
    assert card.accesses[1:] == [(0x3000, 2)]
    assert program.file.pread(BAR2 + 0xFFF, 0x5002).count(b"\xee") == 1 + 0x2000 + 1


def test_the_content_moves_to_the_file_and_back(card: Card) -> None:
    card.bar2[0x1000:0x1005] = b"early"
    card.bar2[0x7FF8:] = b"the end."
    with OpenProgram(card) as program:
        with program.shared() as memory:
            assert memory[0x1000:0x1005] == b"early"
            assert memory[0x7FF8:] == b"the end."
            memory[0x1000:0x1005] = b"later"
        program.file.release()
        assert card.bar2[0x1000:0x1005] == b"later"
        card.bar2[0x1000:0x1005] = b"alone"
        with program.shared() as memory:
            assert memory[0x1000:0x1005] == bytes(5), "nobody's memory any more"
    with OpenProgram(card) as program, program.shared() as memory:
        assert memory[0x1000:0x1005] == b"alone"


def test_the_memory_is_in_place_when_the_device_starts_and_until_it_has_stopped() -> None:
    class Lively(Card):
        def start(self) -> None:
            self.bar2[0x1000:0x1005] = b"start"

        def stop(self) -> None:
            self.seen = bytes(self.bar2[0x5000:0x5004])
            self.bar2[0x5000:0x5004] = b"stop"

    device = Lively()
    with OpenProgram(device) as program:
        with program.shared() as memory:
            assert memory[0x1000:0x1005] == b"start"
            memory[0x5000:0x5004] = b"last"
        program.file.release()
    assert device.seen == b"last"
    assert device.bar2[0x5000:0x5004] == b"stop"


def test_an_open_that_is_not_in_use_leaves_the_device_its_memory(card: Card) -> None:
    card.bar2[0x1000] = 5
    with OpenProgram(card) as program:
        other = create_sealed_memfd("other", memory_size(card))
        file = program.served.open(other)
        with other, mmap.mmap(other.fileno(), 32768, offset=BAR2) as memory:
            assert memory[0x1000] == 0
        file.release()
        assert card.bar2[0x1000] == 5
        with program.shared() as memory:
            assert memory[0x1000] == 5


def test_a_binding_that_fails_late_can_be_made_again(card: Card) -> None:
    card.bar2[0x1000:0x1003] = b"was"
    memfd = create_sealed_memfd("again", memory_size(card))
    served = VfioDevice(card)
    with memfd, Pages("rw", "r") as pages:
        program = Program(card, bound=False)
        file = served.open(memfd)
        at = pages.read_only(bytes(vfio.BindIommufd(argsz=16, iommufd=3))[:16])
        assert program.at(vfio.VFIO_DEVICE_BIND_IOMMUFD, at, file) == errno.EFAULT
        card.bar2[0x1000:0x1003] = b"is\0"
        assert program.bind(file).errno == 0
        with mmap.mmap(memfd.fileno(), 32768, offset=BAR2) as memory:
            assert memory[0x1000:0x1003] == b"is\0"
        file.release()
        program.close()


def test_a_start_that_refuses_gives_the_memory_back(card: Card) -> None:
    class Stubborn(Card):
        def start(self) -> None:
            raise refusal(errno.EIO)

    device = Stubborn()
    device.bar2[0x1000] = 1
    memfd = create_sealed_memfd("refused", memory_size(device))
    with memfd, Program(device, bound=False) as program:
        file = program.served.open(memfd)
        assert program.bind(file).errno == errno.EIO
        with mmap.mmap(memfd.fileno(), 32768, offset=BAR2) as memory:
            assert memory[0x1000] == 0
        assert device.bar2[0x1000] == 1
        file.release()


def test_in_process_mapped_pages_are_memory_as_well(card: Card) -> None:
    card.bar2[0x1000] = 3
    with Program(card) as program:
        assert program.file.pread(BAR2 + 0x1000, 1) == b"\3"
        program.file.pwrite(BAR2 + 0x1000, b"\4")
        assert card.bar2[0x1000] == 4
        assert not mappable(program, BAR2 + 0x1000, 4096)


def test_no_descriptor_and_no_mapping_stays_behind(card: Card) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with OpenProgram(card):
            pass
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# What may be mapped.


def mappable(program: Program, offset: int, length: int, *, shared: bool = True) -> bool:
    try:
        program.file.require_mappable(offset, length, shared=shared)
    except OSError as failure:
        if failure.errno != errno.EINVAL:
            raise
        return False
    return True


@pytest.mark.parametrize(
    ("offset", "length", "allowed"),
    [
        (0x1000, 0x1000, True),
        (0x1000, 0x2000, True),
        (0x2000, 0x1000, True),
        (0x2000, 1, True),
        (0x5000, 0x1000, True),
        (0x1000, 0x2001, False),
        (0, 0x1000, False),
        (0, 0x8000, False),
        (0x3000, 0x1000, False),
        (0x4000, 0x2000, False),
        (0x5000, 0x2000, False),
        (0x7000, 0x1000, False),
        (0x8000, 0x1000, False),
        (0x1000, 0, False),
        (0x1800, 0x800, False),
        (0x1000, (1 << 64) - 0x1000, False),
    ],
)
def test_only_declared_pages_may_be_mapped(
    program: OpenProgram, offset: int, length: int, allowed: bool
) -> None:
    assert mappable(program, BAR2 + offset, length) is allowed
    assert not mappable(program, BAR2 + offset, length, shared=False)


@pytest.mark.parametrize("index", [0, 1, 3, 6, 7, 8, 9, 200])
def test_no_other_region_may_be_mapped(program: OpenProgram, index: int) -> None:
    assert not mappable(program, region_offset(index) + 0x1000, 4096)
    assert not mappable(program, 0x1000, 4096)
    assert not mappable(program, -4096, 4096)


def test_areas_side_by_side_are_one_to_a_program() -> None:
    with OpenProgram(Whole()) as program:
        assert mappable(program, region_offset(0), 8192)
        assert not mappable(program, region_offset(3), 4096)


def test_before_the_binding_nothing_may_be_mapped(card: Card) -> None:
    memfd = create_sealed_memfd("unbound", memory_size(card))
    with memfd, Program(card, bound=False) as program:
        program.file = program.served.open(memfd)
        assert not mappable(program, BAR2 + 0x1000, 4096)


def test_where_several_opens_use_a_device_the_first_one_has_its_pages(card: Card) -> None:
    second = create_sealed_memfd("second", memory_size(card))
    with second, OpenProgram(card, V6) as program:
        first, program.file = program.file, program.served.open(second)
        assert not mappable(program, BAR2 + 0x1000, 4096)
        program.file.release()
        program.file = first
        assert mappable(program, BAR2 + 0x1000, 4096)


def test_a_device_without_mapped_pages_needs_no_memory() -> None:
    assert memory_size(Device()) == 0
    assert memory_size(Card()) == BAR2 + 32768
