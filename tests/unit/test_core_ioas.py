"""IOAS_COPY and IOAS_MAP_FILE: every errno in the kernel's order, and what they lead to."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from in_process import PAGE, Pages, Program
from iommu_requests import FIXED, READABLE, U64_MAX, WRITABLE, Iommu, words
from vfiomig.abi import iommufd as abi
from vfiomig.abi import vfio
from vfiomig.descriptors import Fd, create_sealed_memfd
from vfiomig.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTACH = vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT
END = U64_MAX + 1
HERE = 0x40000


@pytest.fixture
def pages() -> Iterator[Pages]:
    with Pages("rw", "rw", "r", "rw") as pages:
        yield pages


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as program:
        yield program


@pytest.fixture
def iommu(program: Program) -> Iommu:
    return Iommu(program.caller)


# COPY.


class Two:
    """Two address spaces; the first has pages 0 and 1 writable and 2 readable at ``HERE``."""

    def __init__(self, iommu: Iommu, pages: Pages) -> None:
        self.iommu = iommu
        self.source, self.target = iommu.alloc(), iommu.in_use()
        for number, flags in enumerate((7, 7, FIXED | READABLE)):
            iova = HERE + number * PAGE
            assert iommu.map(self.source, pages.page(number), iova=iova, flags=flags)[0] == 0
        taken = iommu.map(self.target, pages.page(3), iova=0x5000)
        assert taken == (0, 0x5000)


@pytest.fixture
def two(iommu: Iommu, pages: Pages) -> Two:
    return Two(iommu, pages)


@pytest.mark.parametrize(
    ("members", "result"),
    [
        ({"flags": 8, "src_iova": U64_MAX}, errno.EOPNOTSUPP),
        ({"flags": FIXED, "src_iova": U64_MAX}, errno.EOVERFLOW),
        ({"flags": FIXED, "dst_iova": U64_MAX}, errno.EOVERFLOW),
        ({"flags": FIXED, "length": U64_MAX}, errno.EOVERFLOW),
        ({"flags": FIXED, "source": 99}, errno.EINVAL),
        ({"source": 99, "length": 0}, errno.ENOENT),
        ({"length": 0, "target": 99}, errno.EINVAL),
        ({"src_iova": END - PAGE, "length": 2 * PAGE, "target": 99}, errno.EOVERFLOW),
        ({"src_iova": HERE + 3 * PAGE, "target": 99}, errno.ENOENT),
        ({"src_iova": HERE - PAGE, "length": 2 * PAGE}, errno.ENOENT),
        ({"src_iova": HERE + 2 * PAGE, "length": 2 * PAGE}, errno.ENOENT),
        ({"target": 99, "length": 8}, errno.ENOENT),
        ({"length": 8, "dst_iova": 0x5000}, errno.EINVAL),
        ({"dst_iova": 0x808}, errno.EINVAL),
        ({"dst_iova": 0xFEE0_0000}, errno.EINVAL),
        ({"dst_iova": END - PAGE}, errno.EINVAL),
        ({"dst_iova": END - PAGE, "length": 2 * PAGE}, errno.EOVERFLOW),
        ({"dst_iova": 0x4000, "length": 2 * PAGE}, errno.EEXIST),
        ({"dst_iova": 0x5000, "src_iova": HERE + 2 * PAGE}, errno.EEXIST),
        ({"dst_iova": 0x5000, "src_iova": HERE + 8}, errno.EEXIST),
        ({"src_iova": HERE + 2 * PAGE}, errno.EPERM),
        ({"src_iova": HERE, "length": 3 * PAGE}, errno.EPERM),
        ({"src_iova": HERE + 8}, errno.EINVAL),
        ({"src_iova": HERE + 2 * PAGE, "flags": FIXED | READABLE}, 0),
    ],
)
def test_a_copy_checks_its_argument_and_copies_all_or_nothing(
    two: Two, members: dict[str, int], result: int
) -> None:
    iommu = two.iommu
    asked = {"source": two.source, "target": two.target, "src_iova": HERE, **members}
    source, target = asked.pop("source"), asked.pop("target")
    assert iommu.copy(source, target, **asked) == (result, asked.get("dst_iova", 0))
    held = PAGE if result else 2 * PAGE
    assert iommu.unmap(two.target, 0, U64_MAX) == (0, held)


def test_a_copy_leads_to_the_same_memory_across_mappings(
    two: Two, program: Program, pages: Pages
) -> None:
    iommu = two.iommu
    assert program.ioctl(ATTACH, words(12, 0, two.target)).errno == 0
    readable = FIXED | READABLE
    asked = {"src_iova": HERE, "dst_iova": 0x8000, "length": 3 * PAGE}
    assert iommu.copy(two.source, two.target, flags=readable, **asked) == (0, 0x8000)
    program.caller.write(pages.page(1) - 2, b"abcd")
    dma = program.served.device.dma
    assert dma.read(0x8000 + PAGE - 2, 4) == b"abcd"
    with pytest.raises(DeviceError):
        dma.write(0x8000, b"x")
    # The original may go; and what was mapped for writing may be copied so from a copy without.
    assert iommu.unmap(two.source, 0, U64_MAX) == (0, 3 * PAGE)
    asked = {"src_iova": 0x8000, "dst_iova": 0x10000, "length": 2 * PAGE}
    assert iommu.copy(two.target, two.target, **asked) == (0, 0x10000)
    dma.write(0x10000 + PAGE, b"x")
    assert program.caller.read(pages.page(1), 1) == b"x"


def test_a_copy_may_be_put_wherever_there_is_room(two: Two) -> None:
    flags = READABLE | WRITABLE
    asked = {"flags": flags, "src_iova": HERE, "dst_iova": 0x5000}
    assert two.iommu.copy(two.source, two.target, **asked) == (0, PAGE)
    assert two.iommu.copy(two.source, two.source, **asked) == (0, PAGE)


def test_part_of_a_mapping_may_be_copied(iommu: Iommu, program: Program, pages: Pages) -> None:
    ioas = iommu.alloc()
    iommu.map(ioas, pages.page(0), iova=HERE, length=2 * PAGE)
    assert iommu.copy(ioas, ioas, src_iova=HERE + PAGE, dst_iova=0x9000) == (0, 0x9000)
    program.ioctl(ATTACH, words(12, 0, ioas))
    program.caller.write(pages.page(1), b"page 1")
    assert program.served.device.dma.read(0x9000, 6) == b"page 1"


# MAP_FILE.


@pytest.fixture
def memfd() -> Iterator[Fd]:
    with create_sealed_memfd("guest", 4 * PAGE) as memfd:
        yield memfd


@pytest.mark.parametrize(
    ("members", "result"),
    [
        ({"flags": 8, "iova": U64_MAX}, errno.EOPNOTSUPP),
        ({"flags": FIXED, "iova": U64_MAX}, errno.EOVERFLOW),
        ({"flags": FIXED, "length": U64_MAX}, errno.EOVERFLOW),
        ({"flags": FIXED, "ioas": 99}, errno.EINVAL),
        ({"ioas": 99, "length": 0}, errno.ENOENT),
        ({"length": 0, "fd": 999}, errno.EINVAL),
        ({"start": END - PAGE, "length": 2 * PAGE, "fd": 999}, errno.EOVERFLOW),
        ({"fd": 999, "iova": 0x5000}, errno.EBADF),
        ({"fd": -1}, errno.EBADF),
        ({"iova": 0x5000, "start": 8}, errno.EEXIST),
        ({"iova": 0x808}, errno.EINVAL),
        ({"iova": 0xFEE0_0000}, errno.EINVAL),
        ({"start": 8}, errno.EINVAL),
        ({"start": 4 * PAGE}, errno.EINVAL),
        ({"start": 3 * PAGE, "length": 2 * PAGE}, errno.EINVAL),
        ({"start": 3 * PAGE}, 0),
        ({"length": 4 * PAGE, "iova": 0x6000}, 0),
    ],
)
def test_a_file_mapping_checks_its_argument(
    iommu: Iommu, pages: Pages, memfd: Fd, members: dict[str, int], result: int
) -> None:
    ioas = iommu.in_use()
    iommu.map(ioas, pages.page(0), iova=0x5000)
    asked = {"ioas": ioas, "fd": memfd.fileno(), **members}
    seen, iova = iommu.map_file(asked.pop("ioas"), asked.pop("fd"), **asked)
    assert (seen, iova) == (result, asked.get("iova", 0))
    held = PAGE if result else PAGE + asked.get("length", PAGE)
    assert iommu.unmap(ioas, 0, U64_MAX) == (0, held)


def test_only_files_of_memory_are_mapped(iommu: Iommu) -> None:
    ioas = iommu.alloc()
    reader, writer = map(Fd, os.pipe())
    with reader, writer, Fd(os.open("/proc/self/exe", os.O_RDONLY)) as program:
        for fd in (reader, program):
            result = iommu.map_file(ioas, fd.fileno(), flags=FIXED | READABLE)
            assert result == (errno.EINVAL, 0)


def test_the_path_of_a_file_is_no_access_to_it(iommu: Iommu, memfd: Fd) -> None:
    ioas = iommu.alloc()
    with Fd(os.open(f"/proc/self/fd/{memfd.fileno()}", os.O_PATH | os.O_CLOEXEC)) as path:
        assert iommu.map_file(ioas, path.fileno(), flags=FIXED | READABLE) == (errno.EBADF, 0)


def test_a_file_mapping_leads_to_the_file(iommu: Iommu, program: Program, memfd: Fd) -> None:
    ioas, dma = iommu.alloc(), program.served.device.dma
    program.ioctl(ATTACH, words(12, 0, ioas))
    number = memfd.fileno()
    assert iommu.map_file(ioas, number, start=PAGE, iova=HERE, length=2 * PAGE) == (0, HERE)
    assert iommu.map_file(ioas, number, flags=READABLE, start=3 * PAGE) == (0, PAGE)
    dma.write(HERE + PAGE - 1, b"ab")
    assert os.pread(number, 4, 2 * PAGE - 2) == b"\0ab\0"
    os.pwrite(number, b"last", 4 * PAGE - 4)
    assert dma.read(2 * PAGE - 4, 4) == b"last"
    with pytest.raises(DeviceError):
        dma.write(PAGE, b"x")
    memfd.close()
    assert dma.read(HERE + PAGE - 1, 2) == b"ab"  # the program may close it
    assert iommu.unmap(ioas, 0, U64_MAX) == (0, 3 * PAGE)


def test_a_file_is_written_only_if_the_program_may(iommu: Iommu, memfd: Fd) -> None:
    ioas = iommu.alloc()
    path = f"/proc/self/fd/{memfd.fileno()}"
    with Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as reader:
        assert iommu.map_file(ioas, reader.fileno())[0] == errno.EPERM
        assert iommu.map_file(ioas, reader.fileno(), flags=FIXED | READABLE) == (0, 0)
    sealed = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with Fd(sealed) as fd:
        os.truncate(fd.fileno(), PAGE)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
        assert iommu.map_file(ioas, fd.fileno(), iova=PAGE)[0] == errno.EPERM
        assert iommu.map_file(ioas, fd.fileno(), iova=PAGE, flags=FIXED | READABLE)[0] == 0
    assert iommu.unmap(ioas, 0, U64_MAX) == (0, 2 * PAGE)


def test_a_mapping_whose_answer_faults_stays_as_in_the_kernel(iommu: Iommu, memfd: Fd) -> None:
    ioas = iommu.alloc()
    argument = abi.IoasMapFile(
        size=40, flags=7, ioas_id=ioas, fd=memfd.fileno(), length=PAGE, iova=HERE
    )
    with Pages("rw") as page:
        address = page.read_only(bytes(argument))
        assert iommu.at(abi.IOMMU_IOAS_MAP_FILE, address) == errno.EFAULT
    assert iommu.unmap(ioas, HERE, PAGE) == (0, PAGE)
