"""GET_INFO, GET_REGION_INFO, and accesses by offset in the device's descriptor."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from in_process import Pages, Program
from vfiomig.abi import vfio
from vfiomig.core.info import OFFSET_TAG, region_offset
from vfiomig.device import Device, PciIdentity, Region
from vfiomig.errors import DeviceError
from vfiomig.fsm import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GET_INFO = vfio.VFIO_DEVICE_GET_INFO
GET_REGION_INFO = vfio.VFIO_DEVICE_GET_REGION_INFO
CONFIG = vfio.VFIO_PCI_CONFIG_REGION_INDEX


class Card(Device):
    """Plain memory, one region of each restriction, and one with handlers."""

    pci = PciIdentity(0x1234, 0x5678, 0x9ABC, 0xDEF0, class_code=0x070002, revision=3)
    bar0 = Region(size=4096)
    bar1 = Region(size=16, writable=False)
    bar2 = Region(size=256, readable=False)
    bar4 = Region(size=64)

    def __init__(self) -> None:
        self.accesses: list[tuple[int, int | bytes]] = []
        self.answer: Callable[[int], bytes] = bytes

    @bar4.reader
    def read_bar4(self, offset: int, length: int) -> bytes:
        self.accesses.append((offset, length))
        return self.answer(length)

    @bar4.writer
    def write_bar4(self, offset: int, data: bytes) -> None:
        self.accesses.append((offset, bytes(data)))
        self.answer(len(data))


@pytest.fixture
def program() -> Iterator[Program]:
    with Program(Card()) as program:
        yield program


def card(program: Program) -> Card:
    assert isinstance(program.served.device, Card)
    return program.served.device


# What a device tells about itself.


@pytest.mark.parametrize("argsz", [16, 20, 24, 4096])
def test_the_device_is_a_pci_device_that_can_be_reset(program: Program, argsz: int) -> None:
    answer = program.ioctl(GET_INFO, vfio.DeviceInfo(argsz=argsz, cap_offset=7, pad=7))
    told = vfio.DeviceInfo.parse(answer.data)
    assert (answer.errno, told.argsz, told.flags) == (0, argsz, 3)
    assert (told.num_regions, told.num_irqs) == (9, 5)
    assert told.cap_offset == (7 if argsz < 20 else 0)
    assert told.pad == (7 if argsz < 24 else 0)


def test_get_info_checks_its_argument(program: Program) -> None:
    assert program.ioctl(GET_INFO, vfio.DeviceInfo(argsz=15)).errno == errno.EINVAL
    with Pages("rw", "") as pages:
        assert program.at(GET_INFO, pages.page(1) - 15) == errno.EFAULT
        assert program.at(GET_INFO, pages.read_only(bytes(vfio.DeviceInfo(argsz=16)))) == 14


@pytest.mark.parametrize(
    ("index", "size", "flags"),
    [
        (0, 4096, 3),
        (1, 16, 1),
        (2, 256, 2),
        (3, 0, 0),
        (4, 64, 3),
        (5, 0, 0),
        (6, 0, 0),
        (7, 256, 3),
    ],
)
def test_each_region_tells_size_flags_and_offset(
    program: Program, index: int, size: int, flags: int
) -> None:
    answer = program.ioctl(GET_REGION_INFO, vfio.RegionInfo(argsz=32, index=index, cap_offset=9))
    told = vfio.RegionInfo.parse(answer.data)
    assert answer.errno == 0
    assert (told.size, told.flags, told.cap_offset) == (size, flags, 0)
    assert told.offset == region_offset(index)
    assert told.offset >> 56 == OFFSET_TAG


@pytest.mark.parametrize(("argsz", "index"), [(31, 0), (32, 8), (32, 9), (32, 0xFFFF_FFFF)])
def test_get_region_info_checks_its_argument(program: Program, argsz: int, index: int) -> None:
    argument = vfio.RegionInfo(argsz=argsz, index=index)
    assert program.ioctl(GET_REGION_INFO, argument) == (errno.EINVAL, bytes(argument))
    assert program.at(GET_REGION_INFO, 0) == errno.EFAULT


# Accesses.


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(OSError) as failure:
        call()
    return failure.value.errno or -1


@pytest.mark.parametrize("width", [1, 2, 4, 8, 3, 100])
@pytest.mark.parametrize("at", [0, 1, 7, 4096 - 100])
def test_memory_is_readable_and_writable_at_every_width(
    program: Program, width: int, at: int
) -> None:
    data = bytes(range(1, width + 1))
    offset = region_offset(0) + at
    assert program.file.pwrite(offset, data) == width
    assert program.file.pread(offset, width) == data
    assert card(program).bar0[at : at + width] == data
    assert card(program).bar0.count(0) == 4096 - width


@pytest.mark.parametrize("at", [4095, 4090, 0])
def test_an_access_ends_with_its_region(program: Program, at: int) -> None:
    offset = region_offset(0) + at
    assert len(program.file.pread(offset, 5000)) == 4096 - at
    assert program.file.pwrite(offset, b"x" * 5000) == 4096 - at
    assert len(card(program).bar0) == 4096


@pytest.mark.parametrize(
    "offset",
    [
        4096,
        3 << 40,
        8 << 40,
        region_offset(0) - 1,
        region_offset(0) + 4096,
        region_offset(1) - 1,
        region_offset(3),
        region_offset(6),
        region_offset(8),
        region_offset(100),
        (OFFSET_TAG - 1) << 56,
        (1 << 64) - 1,
        -1,
    ],
)
def test_an_offset_in_no_region_is_einval(program: Program, offset: int) -> None:
    assert errno_of(lambda: program.file.pread(offset, 1)) == errno.EINVAL
    assert errno_of(lambda: program.file.pwrite(offset, b"x")) == errno.EINVAL
    assert program.file.pread(offset, 0) == b""
    assert program.file.pwrite(offset, b"") == 0


def test_a_program_that_does_not_ask_for_offsets_reaches_the_regions_of_vfio_pci(
    program: Program,
) -> None:
    """DPDK 22.11 reads configuration space at 7 << 40, whatever GET_REGION_INFO says."""
    assert program.file.pread(CONFIG << 40, 4) == bytes.fromhex("34127856")
    assert program.file.pwrite(5, b"five") == 4
    assert program.file.pread(region_offset(0) + 5, 4) == b"five"
    assert errno_of(lambda: program.file.pwrite(1 << 40, b"x")) == errno.EINVAL  # read-only
    assert len(program.file.pread(1 << 40, 100)) == 16


def test_regions_keep_their_direction(program: Program) -> None:
    assert program.file.pread(region_offset(1), 4) == bytes(4)
    assert errno_of(lambda: program.file.pwrite(region_offset(1), b"x")) == errno.EINVAL
    assert program.file.pwrite(region_offset(2), b"x") == 1
    assert errno_of(lambda: program.file.pread(region_offset(2), 1)) == errno.EINVAL


def test_configuration_space_says_who_the_device_is_whatever_is_written(program: Program) -> None:
    space = program.file.pread(region_offset(CONFIG), 256)
    assert space[:4] == bytes.fromhex("34127856")
    assert space[8:12] == bytes.fromhex("03020007")
    assert space[0x2C:0x30] == bytes.fromhex("bc9af0de")
    assert program.file.pwrite(region_offset(CONFIG), b"\xff" * 256) == 256
    written = program.file.pread(region_offset(CONFIG), 256)
    assert (written[:4], written[8:12], written[0x2C:0x30]) == (
        space[:4],
        space[8:12],
        space[0x2C:0x30],
    )
    assert program.file.pread(region_offset(CONFIG) + 255, 1) == b"\0"


@pytest.mark.parametrize(("at", "length"), [(256, 1), (255, 2), (0, 257), (1 << 39, 1)])
def test_an_access_that_leaves_configuration_space_is_a_fault(
    program: Program, at: int, length: int
) -> None:
    offset = region_offset(CONFIG) + at
    assert errno_of(lambda: program.file.pread(offset, length)) == errno.EFAULT
    assert errno_of(lambda: program.file.pwrite(offset, bytes(length))) == errno.EFAULT


def test_accesses_before_the_binding_are_einval() -> None:
    with Program(Card(), bound=False) as program:
        assert errno_of(lambda: program.file.pread(region_offset(0), 1)) == errno.EINVAL
        assert errno_of(lambda: program.file.pwrite(region_offset(0), b"x")) == errno.EINVAL
        assert errno_of(lambda: program.file.pread(region_offset(0), 0)) == errno.EINVAL


def test_accesses_are_not_blocked_in_any_state(program: Program) -> None:
    for state in (State.STOP, State.STOP_COPY, State.RESUMING):
        program.go(state)
        assert program.file.pwrite(region_offset(0), b"x") == 1
        assert program.file.pread(region_offset(0), 1) == b"x"


# Handlers.


def test_a_handler_sees_the_pieces_that_a_bus_would_make(program: Program) -> None:
    program.file.pread(region_offset(4) + 3, 13)
    program.file.pwrite(region_offset(4) + 6, b"abcdef")
    assert card(program).accesses == [
        (3, 1),
        (4, 4),
        (8, 8),
        (6, b"ab"),
        (8, b"cdef"),
    ]


def test_a_handler_may_refuse_with_an_errno(program: Program) -> None:
    def refuse(length: int) -> bytes:
        raise DeviceError(errno.EIO, "not now")

    card(program).answer = refuse
    assert errno_of(lambda: program.file.pread(region_offset(4), 4)) == errno.EIO
    assert errno_of(lambda: program.file.pwrite(region_offset(4), b"abcd")) == errno.EIO
    assert program.state() is State.RUNNING


@pytest.mark.parametrize("answer", [None, 4, b"", b"abcde", "abcd"])
def test_a_reader_that_gives_anything_but_its_bytes_is_a_bug(
    program: Program, answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    card(program).answer = lambda length: answer  # type: ignore[assignment, return-value]
    assert errno_of(lambda: program.file.pread(region_offset(4), 4)) == errno.EIO
    assert program.state() is State.ERROR
    assert "bar4 raised; the device goes to ERROR" in caplog.text


def test_a_fatal_refusal_of_a_handler_leads_to_error(program: Program) -> None:
    def refuse(length: int) -> bytes:
        raise DeviceError(errno.ENXIO, "gone", fatal=True)

    card(program).answer = refuse
    assert errno_of(lambda: program.file.pwrite(region_offset(4), b"a")) == errno.ENXIO
    assert program.state() is State.ERROR
