"""The type1 IOMMU: GET_INFO, MAP_DMA, UNMAP_DMA and DIRTY_PAGES, every errno and effect."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import pytest

from group_requests import (
    ALL,
    BITMAP,
    GET_BITMAP,
    READ,
    START,
    STOP,
    V1,
    VADDR,
    WRITE,
    OldProgram,
)
from in_process import PAGE, Pages, Scripted
from iommu_requests import bits_of
from vfiomig.abi import vfio_iommu as abi
from vfiomig.abi.vfio import InfoCapHeader
from vfiomig.core import type1
from vfiomig.errors import DeviceError
from vfiomig.iommu.space import ALLOWED

if TYPE_CHECKING:
    from collections.abc import Iterator

END = 1 << 64
HERE = 0x40000
MAP, UNMAP = abi.VFIO_IOMMU_MAP_DMA, abi.VFIO_IOMMU_UNMAP_DMA
DIRTY = abi.VFIO_IOMMU_DIRTY_PAGES


class Untracked(Scripted):
    iommu_dirty_tracking = False


@pytest.fixture
def pages() -> Iterator[Pages]:
    with Pages(*["rw"] * 16, "r", "", "rw") as pages:
        yield pages


@pytest.fixture
def program() -> Iterator[OldProgram]:
    with OldProgram() as program:
        yield program


def reachable(program: OldProgram, iova: int) -> bool:
    try:
        program.device.dma.read(iova, 1)
    except DeviceError:
        return False
    return True


# GET_INFO.


@pytest.mark.parametrize(
    ("argsz", "result"),
    [(0, errno.EINVAL), (15, errno.EINVAL), (16, 0), (20, 0), (24, 0), (119, 0), (120, 0)],
)
def test_the_info_is_as_long_as_the_caller_says(
    program: OldProgram, argsz: int, result: int
) -> None:
    answer = program.ioctl(
        program.container, abi.VFIO_IOMMU_GET_INFO, argsz.to_bytes(4, "little") + b"\xee" * 140
    )
    assert answer.errno == result
    written = 0 if result else 120 if argsz == 120 else min(argsz, 24)
    assert answer.data[max(written, 4) :] == b"\xee" * (144 - max(written, 4))
    if not result:
        info = abi.Type1Info.parse(answer.data)
        assert (info.argsz, info.flags, info.iova_pgsizes) == (120, 3, 0x40201000)
        if argsz >= 20:
            assert info.cap_offset == (24 if argsz == 120 else 0)


def test_the_capabilities_are_a_chain(program: OldProgram, pages: Pages) -> None:
    assert program.map(pages.page(0), HERE) == 0
    answer = program.ioctl(
        program.container, abi.VFIO_IOMMU_GET_INFO, (4096).to_bytes(4, "little") + bytes(200)
    )
    data, at, seen = answer.data, 24, {}
    while at:
        head = InfoCapHeader.parse(data[at : at + 8])
        seen[head.id] = (head.version, at)
        at = head.next
    assert seen == {2: (1, 24), 3: (1, 56), 1: (1, 72)}
    migration = abi.Type1InfoCapMigration.parse(data[24:56])
    assert (migration.flags, migration.pgsize_bitmap) == (0, PAGE)
    assert migration.max_dirty_bitmap_size == 1 << 28
    assert abi.Type1InfoDmaAvail.parse(data[56:68]).avail == 65534
    ranges = abi.Type1InfoCapIovaRange.parse(data[72:88])
    assert ranges.nr_iovas == len(ALLOWED)
    rows = [abi.Type1IovaRange.parse(data[at : at + 16]) for at in (88, 104)]
    assert tuple((row.start, row.end) for row in rows) == ALLOWED
    assert not any(data[120:])


def test_info_that_cannot_be_read_or_written_is_efault(program: OldProgram) -> None:
    with Pages("rw", "") as memory:
        for argsz, room in ((16, 8), (24, 20), (120, 100)):
            at = memory.page(1) - room
            program.caller.write(at, argsz.to_bytes(4, "little") + bytes(room - 4))
            assert program.at(program.container, abi.VFIO_IOMMU_GET_INFO, at) == -errno.EFAULT


# MAP_DMA.


@pytest.mark.parametrize(
    ("members", "result"),
    [
        ({"argsz": 31}, errno.EINVAL),
        ({"argsz": 0}, errno.EINVAL),
        ({"argsz": 4096}, 0),
        ({"flags": 0}, errno.EINVAL),
        ({"flags": 8 | READ}, errno.EINVAL),
        ({"flags": VADDR | READ}, errno.EINVAL),
        ({"flags": VADDR}, errno.ENOENT),
        ({"flags": READ}, 0),
        ({"flags": WRITE}, 0),
        ({"size": 0}, errno.EINVAL),
        ({"size": 1}, errno.EINVAL),
        ({"iova": HERE + 1}, errno.EINVAL),
        ({"iova": END - PAGE, "size": 2 * PAGE}, errno.EINVAL),
        ({"iova": END - PAGE}, errno.EINVAL),
        ({"iova": ALLOWED[0][1] + 1}, errno.EINVAL),
        ({"iova": ALLOWED[0][1] + 1 - PAGE, "size": 2 * PAGE}, errno.EINVAL),
        ({"iova": ALLOWED[1][1] + 1}, errno.EINVAL),
        ({"iova": 0x7000}, errno.EEXIST),
        ({"iova": 0x6000, "size": 2 * PAGE}, errno.EEXIST),
        ({"iova": 0x6000, "size": 1 << 48, "page": 17}, errno.EEXIST),
        ({"page": 17}, errno.EFAULT),
        ({"page": 15, "size": 2 * PAGE}, errno.EFAULT),
        ({"page": 16}, errno.EFAULT),
        ({"page": 16, "flags": READ}, 0),
        ({"page": 15, "size": 2 * PAGE, "flags": READ}, 0),
        ({"iova": END - PAGE, "page": 17}, errno.EINVAL),
    ],
)
def test_a_mapping_checks_its_argument(
    program: OldProgram, pages: Pages, members: dict[str, int], result: int
) -> None:
    assert program.map(pages.page(0), 0x7000) == 0
    page = members.pop("page", 1)
    values = {"argsz": 32, "flags": READ | WRITE, "iova": HERE, "size": PAGE, **members}
    argument = abi.Type1DmaMap(vaddr=pages.page(page), **values)
    answer = program.ioctl(program.container, MAP, argument)
    assert answer == (result, bytes(argument))
    assert len(program.iommu.space) == (1 if result else 2)


def test_an_address_inside_a_page_or_past_the_end_is_refused(
    program: OldProgram, pages: Pages
) -> None:
    assert program.map(pages.page(0) + 8, HERE) == errno.EINVAL
    assert program.map(END - PAGE, HERE, 2 * PAGE) == errno.EINVAL
    assert program.map(END - PAGE, HERE) == errno.EFAULT
    assert program.at(program.container, MAP, 0) == -errno.EFAULT


def test_there_are_only_so_many_mappings(
    program: OldProgram, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type1, "ENTRIES", 2)
    assert program.map(pages.page(0), HERE) == program.map(pages.page(1), HERE + PAGE) == 0
    assert program.map(pages.page(1), HERE) == errno.EEXIST
    assert program.map(pages.page(1), END - PAGE) == errno.ENOSPC
    assert program.unmap(HERE, PAGE) == (0, PAGE)
    assert program.map(pages.page(1), HERE) == 0


def test_the_device_reads_and_writes_as_it_may(program: OldProgram, pages: Pages) -> None:
    dma = program.device.dma
    assert program.map(pages.page(0), HERE, flags=READ) == 0
    assert program.map(pages.page(1), HERE + PAGE, flags=WRITE) == 0
    ctypes.memmove(pages.page(0), b"given", 5)
    assert dma.read(HERE, 5) == b"given"
    dma.write(HERE + PAGE, b"taken")
    assert ctypes.string_at(pages.page(1), 5) == b"taken"
    with pytest.raises(DeviceError):
        dma.write(HERE, b"x")
    with pytest.raises(DeviceError):
        dma.read(HERE + PAGE, 1)


# UNMAP_DMA.


@pytest.fixture
def mapped(program: OldProgram, pages: Pages) -> OldProgram:
    """Pages 0 at ``HERE``, 1 to 4 behind it, and 5 behind a gap of 3."""
    assert program.map(pages.page(0), HERE) == 0
    assert program.map(pages.page(1), HERE + PAGE, 4 * PAGE) == 0
    assert program.map(pages.page(5), HERE + 8 * PAGE) == 0
    return program


@pytest.mark.parametrize(
    ("iova", "size", "flags", "answer"),
    [
        (HERE, PAGE, 0, (0, PAGE)),
        (HERE - PAGE, 2 * PAGE, 0, (0, PAGE)),
        (HERE, 16 * PAGE, 0, (0, 6 * PAGE)),
        (HERE, 6 * PAGE, 0, (0, 5 * PAGE)),
        (HERE + 5 * PAGE, 3 * PAGE, 0, (0, 0)),
        (END - PAGE, PAGE, 0, (0, 0)),
        (0, 0, ALL, (0, 6 * PAGE)),
        (HERE, 0, ALL, (errno.EINVAL, 0)),
        (0, PAGE, ALL, (errno.EINVAL, PAGE)),
        (HERE, 0, 0, (errno.EINVAL, 0)),
        (HERE, 100, 0, (errno.EINVAL, 100)),
        (HERE + 8, PAGE, 0, (errno.EINVAL, PAGE)),
        (END - PAGE, 2 * PAGE, 0, (errno.EINVAL, 2 * PAGE)),
        (HERE + PAGE, PAGE, 0, (errno.EINVAL, PAGE)),
        (HERE + 2 * PAGE, PAGE, 0, (errno.EINVAL, PAGE)),
        (HERE + 4 * PAGE, 2 * PAGE, 0, (errno.EINVAL, 2 * PAGE)),
        (HERE, 2 * PAGE, 0, (errno.EINVAL, 2 * PAGE)),
        (HERE, PAGE, 8, (errno.EINVAL, PAGE)),
    ],
)
def test_whole_mappings_are_unmapped(
    mapped: OldProgram, iova: int, size: int, flags: int, answer: tuple[int, int]
) -> None:
    before = [at for at in range(16) if reachable(mapped, HERE + at * PAGE)]
    assert before == [0, 1, 2, 3, 4, 8]
    assert mapped.unmap(iova, size, flags) == answer
    after = [at for at in range(16) if reachable(mapped, HERE + at * PAGE)]
    gone = 0 if answer[0] else answer[1]
    assert len(after) == len(before) - gone // PAGE


@pytest.mark.parametrize(
    ("iova", "size", "answer", "left"),
    [
        (HERE + 2 * PAGE, 64 * PAGE, (0, 0), [0, 1, 2, 3, 4, 8]),
        (HERE + PAGE, PAGE, (0, 4 * PAGE), [0, 8]),
        (HERE - PAGE, 3 * PAGE, (0, 5 * PAGE), [8]),
        (HERE + 6 * PAGE, 3 * PAGE, (0, PAGE), [0, 1, 2, 3, 4]),
    ],
)
def test_version_1_takes_what_begins_in_the_range(
    pages: Pages, iova: int, size: int, answer: tuple[int, int], left: list[int]
) -> None:
    with OldProgram(version=V1) as program:
        assert program.map(pages.page(0), HERE) == 0
        assert program.map(pages.page(1), HERE + PAGE, 4 * PAGE) == 0
        assert program.map(pages.page(5), HERE + 8 * PAGE) == 0
        assert program.unmap(iova, size) == answer
        assert [at for at in range(16) if reachable(program, HERE + at * PAGE)] == left


def test_a_size_that_cannot_be_told_has_been_unmapped_all_the_same(mapped: OldProgram) -> None:
    argument = abi.Type1DmaUnmap(argsz=24, iova=HERE, size=PAGE)
    with Pages("rw") as memory:
        at = memory.read_only(bytes(argument))
        assert mapped.at(mapped.container, UNMAP, at) == -errno.EFAULT
    assert not reachable(mapped, HERE)


# New addresses.


def test_a_mapping_gets_a_new_address(mapped: OldProgram, pages: Pages) -> None:
    def move(page: int, iova: int, size: int = PAGE) -> int:
        return mapped.map(pages.page(page), iova, size, VADDR)

    assert move(6, HERE) == errno.EINVAL
    assert mapped.unmap(HERE, PAGE, VADDR) == (0, PAGE)
    assert mapped.unmap(HERE, PAGE, VADDR) == (errno.EINVAL, PAGE)
    assert mapped.unmap(0, 0, VADDR | ALL) == (errno.EINVAL, 0)
    mapped.device.dma.write(HERE, b"old")
    assert move(6, 0) == errno.ENOENT
    assert move(6, HERE, 2 * PAGE) == errno.EINVAL
    assert move(6, HERE) == 0
    assert move(6, HERE) == errno.EINVAL
    mapped.device.dma.write(HERE, b"new")
    seen = ctypes.string_at(pages.page(0), 3) + ctypes.string_at(pages.page(6), 3)
    assert seen == b"oldnew"
    assert mapped.unmap(HERE + PAGE, 2 * PAGE, VADDR) == (errno.EINVAL, 2 * PAGE)


def test_while_an_address_is_missing_no_group_joins(mapped: OldProgram) -> None:
    assert mapped.unmap(0, 0, VADDR | ALL) == (0, 6 * PAGE)
    other = OldProgram(version=0, caller=mapped.caller)
    assert other.set_container() == errno.EBUSY
    assert other.unset_container() == errno.EINVAL
    assert mapped.unmap(0, 0, ALL) == (0, 6 * PAGE)
    assert other.set_container() == 0
    other.group.leave()


# DIRTY_PAGES.


@pytest.mark.parametrize(
    ("flags", "result"),
    [
        (0, errno.EINVAL),
        (8, errno.EINVAL),
        (8 | START, errno.EINVAL),
        (START | STOP, errno.EINVAL),
        (STOP | GET_BITMAP, errno.EINVAL),
        (GET_BITMAP, errno.EINVAL),  # without a range
        (STOP, 0),
        (START, 0),
    ],
)
def test_one_flag_says_what_to_do(program: OldProgram, flags: int, result: int) -> None:
    assert program.track(flags) == result


def test_version_1_tracks_nothing_and_reads_nothing() -> None:
    with OldProgram(version=V1) as program:
        assert program.at(program.container, DIRTY, 0) == -errno.EACCES
    with OldProgram() as program:
        assert program.at(program.container, DIRTY, 0) == -errno.EFAULT


@pytest.mark.parametrize(
    ("members", "bitmap", "result"),
    [
        ({}, {}, 0),
        ({"argsz": 47}, {}, errno.EINVAL),
        ({"argsz": 8}, {}, errno.EINVAL),
        ({"argsz": 1000}, {}, 0),
        ({"iova": END - PAGE, "size": PAGE}, {}, errno.EINVAL),
        ({"size": 0}, {}, errno.EINVAL),
        ({"size": PAGE + 1}, {}, errno.EINVAL),
        ({"iova": HERE + 1}, {}, errno.EINVAL),
        ({}, {"pgsize": 0}, errno.EINVAL),
        ({}, {"pgsize": 2 * PAGE}, errno.EINVAL),
        ({}, {"size": 0}, errno.EINVAL),
        ({}, {"size": 7}, errno.EINVAL),
        ({"size": 65 * PAGE}, {}, errno.EINVAL),
        ({"size": 64 * PAGE}, {}, 0),
        ({}, {"size": 1 << 28}, 0),
        ({}, {"size": (1 << 28) + 1}, errno.EINVAL),
        ({}, {"data": END - 8}, errno.EINVAL),
        ({}, {"data": (1 << 47) - PAGE - 7}, errno.EINVAL),
        ({"size": 2 * PAGE}, {}, errno.EINVAL),
        ({"size": 2 * PAGE}, {"data": 8}, errno.EINVAL),
        ({}, {"data": 8}, errno.EFAULT),
        ({"iova": 0}, {"data": 8}, 0),  # nothing is mapped there, and nothing written
    ],
)
def test_a_report_checks_its_argument(
    mapped: OldProgram, members: dict[str, int], bitmap: dict[str, int], result: int
) -> None:
    assert mapped.track(START) == 0
    words = ctypes.create_string_buffer(64)
    place = {"pgsize": PAGE, "size": 8, "data": ctypes.addressof(words), **bitmap}
    values = {"argsz": 48, "iova": HERE, "size": PAGE, **members}
    head = abi.Type1DirtyBitmap(argsz=values.pop("argsz"), flags=GET_BITMAP)
    asked = abi.Type1DirtyBitmapGet(bitmap=abi.Bitmap(**place), **values)
    answer = mapped.ioctl(mapped.container, DIRTY, bytes(head) + bytes(asked))
    assert answer.errno == result


def test_a_report_without_tracking_is_einval(mapped: OldProgram) -> None:
    assert mapped.dirty(HERE, PAGE)[0] == errno.EINVAL
    assert mapped.track(START) == mapped.track(STOP) == 0
    assert mapped.dirty(HERE, PAGE)[0] == errno.EINVAL


def test_reports_are_about_whole_mappings_and_forget_what_they_tell(mapped: OldProgram) -> None:
    dma = mapped.device.dma
    dma.write(HERE, b"before")
    assert mapped.track(START) == 0
    dma.write(HERE + PAGE - 1, b"xx")
    dma.write(HERE + 8 * PAGE, b"x")
    assert mapped.track(START) == 0  # changes nothing
    assert mapped.dirty(HERE + PAGE, 4 * PAGE) == (0, {0})
    assert mapped.dirty(HERE - 4 * PAGE, 64 * PAGE) == (0, {4, 12})
    assert mapped.dirty(HERE, 64 * PAGE) == (0, set())
    dma.write(HERE, b"x")
    assert mapped.track(STOP) == mapped.track(START) == 0
    assert mapped.dirty(HERE, 64 * PAGE) == (0, set())


def test_a_report_clears_clean_bits_and_leaves_those_of_gaps(mapped: OldProgram) -> None:
    assert mapped.track(START) == 0
    mapped.device.dma.write(HERE + 8 * PAGE, b"x")
    ones = (1 << 128) - 1
    # From a mapping on everything up to the end of its word is written.
    assert mapped.dirty(HERE, 128 * PAGE, ones) == (0, {8} | set(range(64, 128)))
    assert mapped.dirty(HERE - 2 * PAGE, 64 * PAGE, ones >> 64) == (0, {0, 1})


def test_a_device_that_cannot_be_tracked_makes_all_dirty(pages: Pages) -> None:
    with OldProgram() as tracked, OldProgram(Untracked(), caller=tracked.caller):
        assert tracked.map(pages.page(0), HERE, 3 * PAGE) == 0
        assert tracked.track(START) == 0
        assert tracked.dirty(HERE - PAGE, 5 * PAGE) == (0, {1, 2, 3})
        assert tracked.dirty(HERE, 3 * PAGE) == (0, {0, 1, 2})


def test_what_a_device_wrote_before_it_left_is_not_lost(pages: Pages) -> None:
    """Nobody saw it, so all that was mapped is dirty once more."""
    with OldProgram() as tracked, OldProgram(Untracked(), caller=tracked.caller) as other:
        assert tracked.map(pages.page(0), HERE, 3 * PAGE) == 0
        assert tracked.map(pages.page(3), HERE + 8 * PAGE) == 0
        assert tracked.track(START) == 0
        assert tracked.dirty(HERE, 16 * PAGE) == (0, {0, 1, 2, 8})
        assert other.unset_container() == 0
        assert tracked.map(pages.page(4), HERE + 9 * PAGE) == 0
        assert tracked.unmap(HERE + 8 * PAGE, PAGE) == (0, PAGE)
        assert tracked.map(pages.page(3), HERE + 8 * PAGE) == 0
        assert tracked.dirty(HERE, 16 * PAGE) == (0, {0, 1, 2})
        assert tracked.dirty(HERE, 16 * PAGE) == (0, set())
        # Nothing is tracked when it leaves: then there is nothing to know.
        assert other.set_container() == tracked.track(STOP) == other.unset_container() == 0
        assert tracked.track(START) == 0
        assert tracked.dirty(HERE, 16 * PAGE) == (0, set())


def unmap_with_bitmap(
    program: OldProgram, iova: int, size: int, **members: int
) -> tuple[int, int, set[int]]:
    words = ctypes.create_string_buffer(b"\xff" * 16, 16)
    place = {"pgsize": PAGE, "size": 16, "data": ctypes.addressof(words)}
    values = {"argsz": 48, "flags": BITMAP, **members}
    bitmap = abi.Bitmap(**{name: values.pop(name, place[name]) for name in place})
    argument = abi.Type1DmaUnmap(iova=iova, size=size, **values)
    answer = program.ioctl(program.container, UNMAP, bytes(argument) + bytes(bitmap))
    told = abi.Type1DmaUnmap.parse(answer.data[:24]).size
    return answer.errno, told, bits_of(words.raw)


@pytest.mark.parametrize(
    ("members", "result"),
    [
        ({"argsz": 47}, errno.EINVAL),
        ({"flags": BITMAP | ALL}, errno.EINVAL),
        ({"flags": BITMAP | VADDR}, errno.EINVAL),
        ({"pgsize": 8192}, errno.EINVAL),
        ({"size": 7}, errno.EINVAL),
        ({"data": END - 8}, errno.EINVAL),
        ({"data": 8}, errno.EFAULT),
    ],
)
def test_an_unmap_with_a_bitmap_that_fails_unmaps_nothing(
    mapped: OldProgram, members: dict[str, int], result: int
) -> None:
    assert unmap_with_bitmap(mapped, HERE, PAGE)[0] == errno.EINVAL  # not tracked
    assert mapped.track(START) == 0
    mapped.device.dma.write(HERE, b"x")
    size = members.pop("size", None)
    if size is None:
        seen = unmap_with_bitmap(mapped, HERE, PAGE, **members)
    else:
        bitmap = abi.Bitmap(pgsize=PAGE, size=size, data=0x10000)
        argument = abi.Type1DmaUnmap(argsz=48, flags=BITMAP, iova=HERE, size=PAGE)
        answer = mapped.ioctl(mapped.container, UNMAP, bytes(argument) + bytes(bitmap))
        seen = (answer.errno, PAGE, set(range(128)))
    assert seen == (result, PAGE, set(range(128)))
    assert reachable(mapped, HERE)
    assert mapped.dirty(HERE, PAGE) == (0, {0})


def test_an_unmap_tells_what_was_written_to_what_it_takes(mapped: OldProgram) -> None:
    assert mapped.track(START) == 0
    mapped.device.dma.write(HERE, b"x")
    mapped.device.dma.write(HERE + 3 * PAGE, b"x")
    mapped.device.dma.write(HERE + 8 * PAGE, b"x")
    assert unmap_with_bitmap(mapped, HERE, 2 * PAGE)[:2] == (errno.EINVAL, 2 * PAGE)
    errno_, size, bits = unmap_with_bitmap(mapped, HERE, 6 * PAGE)
    assert (errno_, size) == (0, 5 * PAGE)
    assert bits == {0, 3} | set(range(64, 128))
    assert mapped.dirty(HERE, 64 * PAGE) == (0, {8})
    assert not reachable(mapped, HERE)
    assert unmap_with_bitmap(mapped, HERE, 6 * PAGE) == (0, 0, set(range(128)))
