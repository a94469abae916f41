"""An IO address space, the device's port to it, and the log, without any request."""

from __future__ import annotations

import errno

import pytest

from vfiomig.errors import DeviceError
from vfiomig.iommu import DirtyLog, DmaPort, IoSpace, Mapping
from vfiomig.iommu.space import ALIGNMENT, ALLOWED

PAGE = ALIGNMENT


class Memory:
    """Bytes from address 0 on; those from ``fault_at`` on fault."""

    def __init__(self, size: int, fault_at: int | None = None) -> None:
        self.data = bytearray(size)
        self.fault_at = size if fault_at is None else fault_at

    def read(self, address: int, length: int) -> bytes:
        if address + length > self.fault_at:
            raise OSError(errno.EFAULT, "there")
        return bytes(self.data[address : address + length])

    def read_into(self, address: int, view: memoryview) -> int:
        room = max(0, min(len(view), self.fault_at - address))
        view[:room] = self.data[address : address + room]
        return room

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        room = max(0, self.fault_at - address)
        self.data[address : address + min(room, len(data))] = data[:room]
        if room < len(data):
            raise OSError(errno.EFAULT, "there")


def mapping(
    iova: int,
    length: int = PAGE,
    memory: Memory | None = None,
    address: int = 0,
    *,
    readable: bool = True,
    writable: bool = True,
) -> Mapping:
    target = Memory(length) if memory is None else memory
    return Mapping(iova, length, target, address, readable=readable, writable=writable)


def refused(number: int) -> pytest.RaisesExc[OSError]:
    return pytest.RaisesExc(OSError, check=lambda failure: failure.errno == number)


@pytest.fixture
def space() -> IoSpace:
    return IoSpace()


# Mappings.


@pytest.mark.parametrize(
    ("iova", "length", "number"),
    [
        (0, 0, errno.EINVAL),
        (1, PAGE, errno.EINVAL),
        (0, PAGE + 1, errno.EINVAL),
        ((1 << 64) - PAGE, 2 * PAGE, errno.EOVERFLOW),
        ((1 << 64) - PAGE, PAGE, errno.EINVAL),
        (1 << 48, PAGE, errno.EINVAL),
        (0xFEE0_0000, PAGE, errno.EINVAL),
        (0xFEEF_F000, 2 * PAGE, errno.EINVAL),
    ],
)
def test_a_mapping_lies_on_pages_that_may_be_mapped(
    space: IoSpace, iova: int, length: int, number: int
) -> None:
    with refused(number):
        space.map(mapping(iova, length, Memory(0)))
    assert len(space) == 0


def test_the_edges_of_what_may_be_mapped_may_be_mapped(space: IoSpace) -> None:
    for first, last in ALLOWED:
        space.map(mapping(first))
        space.map(mapping(last + 1 - PAGE))
    assert len(space) == 4


@pytest.mark.parametrize(("iova", "length"), [(2, 1), (1, 2), (3, 3), (4, 1), (1, 9), (5, 1)])
def test_mappings_never_overlap(space: IoSpace, iova: int, length: int) -> None:
    space.map(mapping(2 * PAGE, 4 * PAGE))
    with refused(errno.EEXIST):
        space.map(mapping(iova * PAGE, length * PAGE))
    space.map(mapping(0, 2 * PAGE))
    space.map(mapping(6 * PAGE))
    assert len(space) == 3


def test_an_unmap_removes_whole_mappings_or_nothing(space: IoSpace) -> None:
    for number in (1, 3, 5):
        space.map(mapping(number * PAGE, 2 * PAGE))
    for first, count in ((1, 3), (2, 3), (0, 1), (2, 1), (4, 9)):
        with refused(errno.ENOENT):
            space.unmap(first * PAGE, count * PAGE)
    assert len(space) == 3
    assert space.unmap(0, 5 * PAGE) == 4 * PAGE
    assert space.clear() == 2 * PAGE
    assert space.clear() == 0


def test_the_lowest_room_is_found_but_never_0_and_full_is_full(space: IoSpace) -> None:
    space.map(mapping(2 * PAGE, 2 * PAGE))
    assert [space.find_free(size * PAGE) for size in (1, 2)] == [PAGE, 4 * PAGE]
    # The last page below the window is too small for two.
    space.map(mapping(4 * PAGE, ALLOWED[0][1] + 1 - 5 * PAGE, Memory(0)))
    assert space.find_free(2 * PAGE) == ALLOWED[1][0]
    space.map(mapping(ALLOWED[1][0], ALLOWED[1][1] + 1 - ALLOWED[1][0], Memory(0)))
    assert space.map_anywhere(mapping(0)) == PAGE
    with refused(errno.ENOSPC):
        space.map_anywhere(mapping(0, 2 * PAGE))


@pytest.mark.parametrize(
    ("pages", "hint", "iova"),
    [
        (1, 0, PAGE),
        (3, 0, 4 * PAGE),
        (512, 0, 512 * PAGE),
        (512, 5 * PAGE, PAGE),
        (512, 6 * PAGE, 2 * PAGE),
        (3, 1 << 21, 4 * PAGE),
    ],
)
def test_room_is_aligned_like_what_goes_there(
    space: IoSpace, pages: int, hint: int, iova: int
) -> None:
    assert space.find_free(pages * PAGE, hint) == iova


@pytest.mark.parametrize(
    ("length", "hint", "number"),
    [
        (0, 0, errno.EOVERFLOW),
        (PAGE + 1, 0, errno.EINVAL),
        (1 << 63, 0, errno.EOVERFLOW),
        (PAGE, 0x1008, errno.EINVAL),
        (1 << 62, 0, errno.ENOSPC),
    ],
)
def test_room_is_not_found_for_what_fits_nowhere(
    space: IoSpace, length: int, hint: int, number: int
) -> None:
    with refused(number):
        space.find_free(length, hint)


# DMA.


def test_without_an_address_space_every_access_is_the_devices_fault() -> None:
    with pytest.raises(DeviceError) as failure:
        DmaPort().read(0, 1)
    assert failure.value.errno == errno.EFAULT
    with pytest.raises(DeviceError):
        DmaPort().write(0, b"x")


def test_an_access_crosses_mappings_that_touch(space: IoSpace) -> None:
    first, second = Memory(2 * PAGE), Memory(PAGE)
    space.map(mapping(0, PAGE, first, address=PAGE))
    space.map(mapping(PAGE, PAGE, second))
    port = DmaPort()
    port.space = space
    port.write(PAGE - 2, b"abcd")
    assert bytes(first.data[-2:] + second.data[:2]) == b"abcd"
    assert port.read(PAGE - 3, 6) == b"\0abcd\0"
    assert port.read(0, 0) == b""


@pytest.mark.parametrize(("iova", "length"), [(2 * PAGE, 1), (PAGE, PAGE + 1), (4 * PAGE, 1)])
def test_an_access_that_leaves_the_mappings_is_efault(
    space: IoSpace, iova: int, length: int
) -> None:
    space.map(mapping(PAGE))
    space.map(mapping(3 * PAGE))
    port = DmaPort()
    port.space = space
    for access in (lambda: port.read(iova, length), lambda: port.write(iova, bytes(length))):
        with pytest.raises(DeviceError) as failure:
            access()
        assert failure.value.errno == errno.EFAULT


def test_a_mapping_keeps_its_direction(space: IoSpace) -> None:
    space.map(mapping(0, writable=False))
    space.map(mapping(PAGE, readable=False))
    port = DmaPort()
    port.space = space
    port.read(0, 8)
    port.write(PAGE, b"x")
    with pytest.raises(DeviceError):
        port.write(0, b"x")
    with pytest.raises(DeviceError):
        port.read(PAGE, 1)


def test_what_came_before_a_fault_is_written_and_logged(space: IoSpace) -> None:
    memory, log = Memory(4 * PAGE, fault_at=PAGE + 10), DirtyLog([(0, 8 * PAGE)])
    space.map(mapping(0, 4 * PAGE, memory))
    port = DmaPort()
    port.space, port.logs = space, (log,)
    with pytest.raises(DeviceError):
        port.write(0, b"x" * (2 * PAGE))
    assert memory.data.count(b"x") == PAGE + 10
    assert log.report(0, 8 * PAGE, PAGE)[0] & 3 == 3


def test_a_write_that_is_not_mapped_is_not_logged(space: IoSpace) -> None:
    log = DirtyLog([(0, 8 * PAGE)])
    port = DmaPort()
    port.space, port.logs = space, (log,)
    with pytest.raises(DeviceError):
        port.write(0, b"x")
    assert not any(log.report(0, 8 * PAGE, PAGE))


def test_a_failed_access_says_what_is_wrong() -> None:
    port = DmaPort()
    with pytest.raises(DeviceError, match=r"DMA read at IOVA 0x10: .*no IO address space"):
        port.read(0x10, 1)
    port.space = IoSpace()
    with pytest.raises(DeviceError, match=r"DMA write at IOVA 0x1000: .*nothing is mapped"):
        port.write(0x1000, b"x")
    port.space.map(mapping(PAGE, readable=False))
    with pytest.raises(DeviceError, match=r"DMA read at IOVA 0x1008: .*0x1008 may not be read"):
        port.read_into(0x1008, bytearray(1))


# The log.


def test_ranges_of_no_length_log_nothing() -> None:
    log = DirtyLog([(0, 0), (PAGE, PAGE), (2 * PAGE, 0)])
    assert log.ranges == [(PAGE, 2 * PAGE)]
    log.mark(0, 4 * PAGE)
    assert log.report(0, 4 * PAGE, PAGE) == b"\2" + bytes(7)


def test_two_ranges_in_one_unit_are_told_apart() -> None:
    log = DirtyLog([(0, 0x400), (0x800, 0x400)])
    log.mark(0x800, 1)
    assert not any(log.report(0, 0x800, PAGE))
    assert log.report(0x800, 0x400, PAGE)[0] == 1


def test_a_bitmap_is_whole_words() -> None:
    log = DirtyLog([(0, 1 << 40)])
    assert [len(log.report(0, pages * PAGE, PAGE)) for pages in (0, 1, 64, 65)] == [0, 8, 8, 16]
    assert len(log.report(0, 64 * PAGE + 1, PAGE)) == 16


def test_a_mark_of_nothing_marks_nothing() -> None:
    log = DirtyLog([(0, PAGE)])
    log.mark(5, 0)
    assert not any(log.report(0, PAGE, PAGE))


def test_a_mark_that_begins_where_one_is_already_is_marked_to_its_end() -> None:
    log = DirtyLog([(0, 8 * PAGE)])
    log.mark(PAGE, 1)
    log.mark(PAGE + 5, 1)
    log.mark(2 * PAGE - 1, 2 * PAGE)
    assert log.report(0, 8 * PAGE, PAGE)[0] == 0b1110


def test_what_is_forgotten_is_not_told_and_the_rest_is() -> None:
    log = DirtyLog([(0, 8 * PAGE)])
    log.mark(0, 5 * PAGE)
    log.forget(PAGE, 2 * PAGE)
    log.forget(4 * PAGE, 1 << 40)
    assert log.report(0, 8 * PAGE, PAGE)[0] == 0b1001


def test_a_report_that_clears_nothing_is_told_again() -> None:
    log, memory = DirtyLog([(0, 8 * PAGE)]), Memory(64)
    log.mark(PAGE, 1)
    log.report_into(0, 8 * PAGE, PAGE, memory, 8, clear=False)
    assert memory.data[8] == 2
    assert log.report(0, 8 * PAGE, PAGE)[0] == 2


def test_only_words_with_a_bit_are_written() -> None:
    class Counting(Memory):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.writes: list[tuple[int, int]] = []

        def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
            self.writes.append((address, len(data)))
            super().write(address, data)

    log, memory = DirtyLog([(0, 1 << 40)]), Counting(1 << 16)
    for page in (0, 63, 64, 640, 300_000):
        log.mark(page * PAGE, 1)
    log.report_into(0, 400_000 * PAGE, PAGE, memory, 8)
    assert memory.writes == [(8, 16), (8 + 80, 8), (8 + 300_000 // 64 * 8, 8)]
