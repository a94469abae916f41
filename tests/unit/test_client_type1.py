"""The client's memory by way of a container: against the container that a front door serves."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from group_requests import CONTAINER, OldProgram
from in_process import PAGE, Scripted
from only_requests import OnlyRequests
from vfiomig.abi import vfio_iommu as abi
from vfiomig.client.chain import capability_chain
from vfiomig.client.dma import dirty_ranges
from vfiomig.client.requests import Requests
from vfiomig.client.transport import NO_FD
from vfiomig.client.type1 import ContainerSpace
from vfiomig.descriptors import Fd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig.abi.uapi import UapiStruct

HERE = 0x100000


class Untracked(Scripted):
    iommu_dirty_tracking = False


class Old(OnlyRequests):
    """A transport whose every descriptor is the container of a program."""

    def __init__(self, device: Scripted | None = None) -> None:
        super().__init__(NO_FD)
        self.program = OldProgram(device)

    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int:
        assert on > 2
        assert argument is not None
        container = self.program.caller.containers[CONTAINER]
        return container.ioctl(number, ctypes.addressof(argument), self.program.caller)


@pytest.fixture
def old() -> Iterator[Old]:
    old = Old()
    yield old
    old.program.close()


@pytest.fixture
def space(old: Old) -> Iterator[ContainerSpace]:
    files = [Fd(os.eventfd(0)) for _ in range(2)]
    space = ContainerSpace(Requests(old, "vfio0"), *files)
    yield space
    space.release()
    assert [file.closed for file in files] == [True, True]


def write(old: Old, *addresses: int) -> None:
    for iova in addresses:
        old.program.device.dma.write(iova, b"16 bytes of data")


def dirty(
    space: ContainerSpace, iova: int, length: int, page: int = PAGE, *, clear: bool = True
) -> list[tuple[int, int]]:
    bitmap = space.report_tracking(iova, length, page, clear=clear)
    return list(dirty_ranges(bitmap, iova, length, page))


def test_memory_is_held_until_it_is_unmapped(old: Old, space: ContainerSpace) -> None:
    with mmap.mmap(-1, 2 * PAGE) as memory:
        space.map(HERE, memory)
        write(old, HERE + PAGE - 8)
        assert memory[PAGE - 8 : PAGE + 8] == b"16 bytes of data"
        with pytest.raises(BufferError):
            memory.close()
        with pytest.raises(OSError) as refused:
            space.unmap(HERE, PAGE)
        assert refused.value.errno == errno.EINVAL
        with pytest.raises(BufferError):
            memory.close()
        assert space.unmap(HERE, 4 * PAGE) == 2 * PAGE
    with pytest.raises(OSError) as refused:
        space.unmap(HERE, PAGE)
    assert refused.value.errno == errno.ENOENT


def test_memory_that_is_refused_is_not_held(space: ContainerSpace) -> None:
    with mmap.mmap(-1, 2 * PAGE) as memory:
        with pytest.raises(OSError) as refused:
            space.map(HERE + 8, memory)
        assert refused.value.errno == errno.EINVAL


def test_parts_of_mappings_are_reported_although_the_container_tells_whole_ones(
    old: Old, space: ContainerSpace
) -> None:
    with mmap.mmap(-1, 8 * PAGE) as memory, mmap.mmap(-1, PAGE) as more:
        space.map(HERE, memory)
        space.map(HERE + 16 * PAGE, more)
        space.start_tracking()
        write(old, HERE, HERE + 3 * PAGE, HERE + 7 * PAGE, HERE + 16 * PAGE)
        # The container forgets all of these at once; they are told one after the other.
        assert dirty(space, HERE + 2 * PAGE, 2 * PAGE, clear=False) == [(HERE + 3 * PAGE, PAGE)]
        assert dirty(space, HERE + 2 * PAGE, 2 * PAGE) == [(HERE + 3 * PAGE, PAGE)]
        assert dirty(space, HERE + 2 * PAGE, 2 * PAGE) == []
        write(old, HERE + 4 * PAGE)
        assert dirty(space, HERE, 8 * PAGE, 2 * PAGE) == [
            (HERE, 2 * PAGE),
            (HERE + 4 * PAGE, 4 * PAGE),
        ]
        assert dirty(space, HERE, 64 * PAGE) == [(HERE + 16 * PAGE, PAGE)]
        assert dirty(space, HERE + 8 * PAGE, 8 * PAGE) == []
        write(old, HERE + PAGE)
        assert dirty(space, HERE, PAGE) == []
        assert space.unmap(HERE, 8 * PAGE) == 8 * PAGE  # what was kept of it is forgotten
        assert dirty(space, HERE, 64 * PAGE) == []
        assert space.unmap(HERE + 16 * PAGE, PAGE) == PAGE


def test_tracking_starts_with_nothing_and_only_once_it_was_asked_for(
    old: Old, space: ContainerSpace
) -> None:
    assert space.can_track()
    assert not space.tracking
    space.stop_tracking()
    with mmap.mmap(-1, PAGE) as memory:
        space.map(HERE, memory)
        for _ in range(2):  # the second time anew
            write(old, HERE)
            space.start_tracking()
            assert dirty(space, HERE, PAGE) == []
        write(old, HERE)
        space.stop_tracking()
        assert not space.tracking
        with pytest.raises(OSError) as refused:
            dirty(space, HERE, PAGE)
        assert refused.value.errno == errno.EINVAL
        space.unmap(HERE, PAGE)


@pytest.mark.parametrize(
    ("iova", "length", "page"),
    [
        (HERE + 8, PAGE, PAGE),
        (HERE, PAGE + 8, PAGE),
        (HERE, 0, PAGE),
        (HERE, PAGE, 0),
        (HERE, PAGE, 2048),
        (HERE, 3 * PAGE, 2 * PAGE),
        (HERE, 3 * PAGE, 3 * PAGE),
    ],
)
def test_a_report_is_made_of_pages(
    space: ContainerSpace, iova: int, length: int, page: int
) -> None:
    space.start_tracking()
    with pytest.raises(OSError) as refused:
        dirty(space, iova, length, page)
    assert refused.value.errno == errno.EINVAL


def test_of_a_device_that_nobody_tracks_all_that_is_mapped_is_dirty() -> None:
    old = Old(Untracked())
    space = ContainerSpace(Requests(old, "vfio0"), Fd(os.eventfd(0)))
    assert space.can_track()
    with mmap.mmap(-1, 2 * PAGE) as memory:
        space.map(HERE, memory)
        space.start_tracking()
        for _ in range(2):
            assert dirty(space, HERE - PAGE, 8 * PAGE) == [(HERE, 2 * PAGE)]
        space.unmap(HERE, 2 * PAGE)
    space.release()
    old.program.close()


def test_a_container_without_the_capability_does_not_track(
    old: Old, space: ContainerSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bare(on: int, number: int, argument: UapiStruct | None) -> int:
        assert number == abi.VFIO_IOMMU_GET_INFO
        assert isinstance(argument, abi.Type1Info)
        argument.flags = abi.VFIO_IOMMU_INFO_PGSIZES
        return 0

    monkeypatch.setattr(old, "ioctl", bare)
    assert not space.can_track()
    with pytest.raises(OSError, match="does not track") as refused:
        space.start_tracking()
    assert refused.value.errno == errno.EOPNOTSUPP


# The chain of capabilities.


def chain(*heads: tuple[int, int], size: int = 64) -> bytearray:
    """A buffer with a head (id, next) every 8 bytes from 24 on."""
    data = bytearray(size)
    for place, (number, following) in enumerate(heads):
        at = 24 + 8 * place
        data[at : at + 8] = number.to_bytes(4, "little") + following.to_bytes(4, "little")
    return data


def test_a_chain_is_followed_to_its_end() -> None:
    assert list(capability_chain(chain(), 0, 24, "it")) == []
    heads = (2, 40), (9, 0), (3, 0)
    assert list(capability_chain(chain(*heads), 24, 24, "it")) == [(2, 24), (3, 40)]


@pytest.mark.parametrize("heads", [[(1, 24)], [(1, 32), (2, 24)], [(1, 16)], [(1, 60)], [(1, 999)]])
def test_a_chain_that_makes_no_sense_is_eproto(heads: list[tuple[int, int]]) -> None:
    with pytest.raises(OSError, match="of the container") as refused:
        list(capability_chain(chain(*heads), 24, 24, "the container"))
    assert refused.value.errno == errno.EPROTO
