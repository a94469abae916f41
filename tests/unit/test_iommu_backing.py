"""Memory behind a program's addresses: which is mapped here, which is not, and how it ends."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from in_process import PAGE
from vfiomig.descriptors import Fd, create_sealed_memfd
from vfiomig.errors import DeviceError, RequestError
from vfiomig.iommu import Backings, DmaPort, IoSpace, Mapping, Place, backing
from vfiomig.iommu.backing import (
    FileMemory,
    ShrinkingFileMemory,
    open_file_behind,
    shared_file,
)
from vfiomig.memory import MemoryFault, ProcessGone, ProgramMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20


class Child:
    """A copy of this process that has the memory of ``content`` and does what it is told."""

    def __init__(self, *content: mmap.mmap, then: Callable[[], None] = lambda: None) -> None:
        self.addresses = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in content]
        told, self._tell = map(Fd, os.pipe())
        self._told, ready = map(Fd, os.pipe())
        self.pid = os.fork()
        if not self.pid:
            try:
                self._tell.close()
                os.write(ready.fileno(), b"r")
                if os.read(told.fileno(), 1) == b"t":
                    then()
                    os.write(ready.fileno(), b"d")
                    os.read(told.fileno(), 1)
            finally:
                os._exit(0)
        told.close()
        ready.close()
        os.read(self._told.fileno(), 1)

    def do(self) -> None:
        """Have it do ``then``."""
        os.write(self._tell.fileno(), b"t")
        os.read(self._told.fileno(), 1)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._tell.close()
        self._told.close()


@contextmanager
def child(*content: mmap.mmap, then: Callable[[], None] = lambda: None) -> Iterator[Child]:
    made = Child(*content, then=then)
    try:
        yield made
    finally:
        made.end()


def anonymous(size: int = MIB) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def find(known: Backings, who: Child, number: int = 0, offset: int = 0, length: int = MIB) -> Place:
    address = who.addresses[number] + offset
    return known.of_program(who.pid, who.pid, address, length, writable=True)


@pytest.fixture
def sealed() -> Iterator[Fd]:
    with create_sealed_memfd("guest ram", MIB) as memfd:
        yield memfd


@pytest.fixture
def memfd() -> Iterator[Fd]:
    with Fd(os.memfd_create("guest ram", os.MFD_CLOEXEC)) as memfd:
        os.truncate(memfd.fileno(), MIB)
        yield memfd


# What is found.


def test_a_sealed_memfd_is_mapped_here_and_reached_without_the_program(sealed: Fd) -> None:
    with mmap.mmap(sealed.fileno(), MIB) as content, child(content) as program:
        place = find(Backings(), program, offset=PAGE, length=PAGE)
        assert isinstance(place.memory, FileMemory)
        place.memory.write(place.address + 5, b"by DMA")
        assert content[PAGE + 5 : PAGE + 11] == b"by DMA"
        content[PAGE] = 7
        assert place.memory.read(place.address, 1) == b"\7"
        into = bytearray(3)
        assert place.memory.read_into(place.address + 5, memoryview(into)) == 3
        assert into == b"by "


def test_a_file_that_can_shrink_is_reached_by_calls_that_fail_instead(memfd: Fd) -> None:
    with mmap.mmap(memfd.fileno(), MIB) as content, child(content) as program:
        place = find(Backings(), program)
        assert isinstance(place.memory, ShrinkingFileMemory)
        memory, end = place.memory, place.address + MIB
        memory.write(place.address, b"by DMA")
        assert content[:6] == b"by DMA"
        os.truncate(memfd.fileno(), PAGE)
        assert memory.read(place.address, 6) == b"by DMA"
        with pytest.raises(MemoryFault):
            memory.read(end - PAGE, 8)
        with pytest.raises(MemoryFault):
            memory.write(place.address + PAGE - 2, b"abcd")
        assert os.pread(memfd.fileno(), 2, PAGE - 2) == b"ab"
        assert memory.read_into(place.address + PAGE - 2, memoryview(bytearray(4))) == 2
        assert memory.read_into(place.address + PAGE, memoryview(bytearray(4))) == 0


def test_a_file_that_shrinks_while_it_is_mapped_is_einval(
    memfd: Fd, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = backing._access

    def shrinking(fd: int) -> int:
        os.truncate(memfd.fileno(), 0)
        return access(fd)

    monkeypatch.setattr(backing, "_access", shrinking)
    with pytest.raises(RequestError) as refused:
        Backings().of_file(memfd, 0, PAGE, writable=True)
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize(("writable", "access"), [(False, os.O_RDONLY), (True, os.O_RDWR)])
def test_a_descriptor_for_somebody_else_allows_no_more_than_is_wanted(
    memfd: Fd, writable: bool, access: int
) -> None:
    with mmap.mmap(memfd.fileno(), MIB) as content:
        address = ctypes.addressof(ctypes.c_char.from_buffer(content))
        found = open_file_behind(address + PAGE, PAGE, writable=writable)
        assert found is not None
        fd, offset = found
        with fd:
            assert os.fstat(fd.fileno()).st_ino == os.fstat(memfd.fileno()).st_ino
            assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == access
        assert offset == PAGE


@pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS])
def test_private_memory_is_reached_through_the_program(sealed: Fd, flags: int) -> None:
    number = -1 if flags & mmap.MAP_ANONYMOUS else sealed.fileno()
    with mmap.mmap(number, MIB, flags=flags) as content:
        content[:] = b"x" * MIB
        with child(content) as program:
            place = find(Backings(), program)
            assert type(place.memory) is ProgramMemory
            place.memory.write(place.address + 8, memoryview(b"by DMA"))
            assert place.memory.read(place.address + 7, 8) == b"xby DMAx"
            assert content[8:14] == b"x" * 6  # it is the child's own
            assert not any(os.pread(sealed.fileno(), 16, 0))


def test_one_mapping_here_serves_all_of_a_file_and_goes_with_the_last(sealed: Fd) -> None:
    def mapped() -> int:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            return sum("guest ram" in line for line in maps)

    with mmap.mmap(sealed.fileno(), MIB) as content, child(content) as program:
        known, before, space = Backings(), mapped(), IoSpace()
        for number in range(4):
            place = find(known, program, offset=number * PAGE, length=PAGE)
            space.map(Mapping(number * PAGE, PAGE, *place, readable=True, writable=True))
        named = known.of_file(sealed, 0, MIB, writable=True)
        assert named.memory is place.memory
        assert mapped() == before + 1
        del place, named
        space.unmap(0, 2 * PAGE)
        assert mapped() == before + 1
        space.clear()
        assert mapped() == before


def test_a_file_that_has_grown_is_mapped_again(memfd: Fd) -> None:
    known = Backings()
    first = known.of_file(memfd, 0, MIB, writable=True)
    os.truncate(memfd.fileno(), 2 * MIB)
    second = known.of_file(memfd, MIB, MIB, writable=True)
    second.memory.write(second.address, b"new")
    first.memory.write(first.address, b"old")
    assert os.pread(memfd.fileno(), 3, 0) == b"old"
    assert os.pread(memfd.fileno(), 3, MIB) == b"new"


def test_of_a_huge_sparse_file_only_what_is_needed_is_mapped() -> None:
    offset = 0x56 << 56
    with (
        create_sealed_memfd("device", offset + MIB) as memfd,
        mmap.mmap(memfd.fileno(), PAGE, offset=offset) as content,
        child(content) as program,
    ):
        known = Backings()
        place = find(known, program, length=PAGE)
        assert isinstance(place.memory, FileMemory)
        place.memory.write(place.address + 4, b"bar")
        assert content[4:7] == b"bar"
        assert find(known, program, length=PAGE).memory is place.memory


def test_the_programs_own_description_of_the_file_is_not_kept(sealed: Fd) -> None:
    other = Fd(os.open(f"/proc/self/fd/{sealed.fileno()}", os.O_RDWR | os.O_CLOEXEC))
    lock = fcntl.fcntl
    flock = (fcntl.F_WRLCK).to_bytes(2, "little") + bytes(30)
    lock(other.fileno(), fcntl.F_OFD_SETLK, flock)
    place = Backings().of_file(other, 0, MIB, writable=True)
    other.close()
    # The lock belonged to the description: another one gets it now.
    lock(sealed.fileno(), fcntl.F_OFD_SETLK, flock)
    assert place.memory.read(place.address, 1) == b"\0"


def test_memory_that_is_not_there_or_may_not_be_written_is_a_fault() -> None:
    with anonymous(2 * PAGE) as content, child(content) as program:
        with pytest.raises(MemoryFault):
            find(Backings(), program, length=MIB << 10)
        address = program.addresses[0]
        libc = ctypes.CDLL(None)
        assert not libc.mprotect(ctypes.c_void_p(address), PAGE, mmap.PROT_READ)
        with child(content) as other:
            with pytest.raises(MemoryFault):
                find(Backings(), other, length=PAGE)
            Backings().of_program(other.pid, other.pid, address, PAGE, writable=False)
        assert not libc.mprotect(ctypes.c_void_p(address), PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


LOW = 0x7F0000000000


def lines(*rows: str) -> list[str]:
    """Lines of a /proc/PID/maps: ``pages from, to, permissions, offset in pages, inode``."""
    out = []
    for row in rows:
        low, high, permissions, offset, inode = row.split()
        first, last = LOW + int(low) * PAGE, LOW + int(high) * PAGE
        out.append(
            f"{first:x}-{last:x} {permissions} {int(offset) * PAGE:08x} 00:01 {inode}    /memfd:a b\n"
        )
    return out


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (["0 9 rw-s 3 77"], True),
        (["0 4 rw-s 3 77", "4 9 r--s 7 77"], True),  # split by a change of protection
        (["0 4 rw-s 3 77", "4 9 rw-s 8 77"], False),
        (["0 4 rw-s 3 77", "4 9 rw-s 7 78"], False),
        (["0 4 rw-s 3 77", "4 9 rw-p 7 77"], False),
        (["0 9 rw-p 3 77"], False),
        (["0 9 rw-s 0 0"], False),
        (["0 1 rw-p 0 0", "1 9 rw-s 3 77", "9 10 rw-p 0 0"], True),
    ],
)
def test_a_range_is_a_files_if_all_of_it_is(rows: list[str], found: bool) -> None:
    segment = shared_file(lines(*rows), LOW + 2 * PAGE, 6 * PAGE)
    assert (segment is not None) is found
    if segment is not None:
        assert (segment.inode, segment.path, segment.offset) == (77, "/memfd:a b", 3 * PAGE)


# How it ends.


def test_a_program_that_has_ended_is_an_error_of_the_device() -> None:
    with anonymous() as content:
        program = Child(content)
        port = DmaPort()
        port.space = IoSpace()
        place = find(Backings(), program)
        port.space.map(Mapping(PAGE, MIB, *place, readable=True, writable=True))
        port.write(PAGE, b"x")
        program.end()
        for access in (
            lambda: port.write(PAGE, b"x"),
            lambda: port.read(PAGE, 8),
            lambda: port.read_into(PAGE, bytearray(8)),
        ):
            with pytest.RaisesExc(DeviceError, check=lambda error: error.errno == errno.EFAULT):
                access()
    with pytest.raises(ProcessGone):
        find(Backings(), program)


def test_another_program_in_the_same_process_is_never_touched() -> None:
    program_text = "import time; print('here', flush=True); time.sleep(60)"
    reader, writer = map(Fd, os.pipe())

    def execute() -> None:
        os.dup2(writer.fileno(), 1)
        os.execv(sys.executable, [sys.executable, "-c", program_text])

    with reader, writer, anonymous() as content:
        program = Child(content, then=execute)
        known = Backings()
        place = find(known, program)
        place.memory.write(place.address, b"x")
        os.write(program._tell.fileno(), b"t")
        assert os.read(reader.fileno(), 4) == b"here"
        with open(f"/proc/{program.pid}/maps", encoding="utf-8") as maps:
            stack = next(line for line in maps if "[stack]" in line)
        address = int(stack.partition("-")[0], 16)
        for at in (place.address, address):
            with pytest.raises(MemoryFault):
                place.memory.write(at, b"x")
            assert place.memory.read_into(at, memoryview(bytearray(1))) == 0
        fresh = known.of_program(program.pid, program.pid, address, PAGE, writable=True)
        assert fresh.memory is not place.memory
        assert len(fresh.memory.read(fresh.address, 8)) == 8
        program.end()


def test_memory_that_the_program_unmapped_is_an_error_of_the_device() -> None:
    with anonymous() as content:
        address = ctypes.addressof(ctypes.c_char.from_buffer(content))
        libc = ctypes.CDLL(None)

        def unmap() -> None:
            libc.munmap(ctypes.c_void_p(address + PAGE), ctypes.c_size_t(PAGE))

        with child(content, then=unmap) as program:
            place = find(Backings(), program, length=2 * PAGE)
            place.memory.write(place.address, bytes(2 * PAGE))
            program.do()
            with pytest.raises(MemoryFault):
                place.memory.write(place.address, bytes(2 * PAGE))
            with pytest.raises(MemoryFault):
                place.memory.read(place.address + PAGE, 1)


def test_files_elsewhere_are_reached_as_well(tmp_path: Path) -> None:
    file = tmp_path / "ram"
    file.write_bytes(b"x" * MIB)
    with (
        Fd(os.open(file, os.O_RDWR | os.O_CLOEXEC)) as fd,
        mmap.mmap(fd.fileno(), MIB) as content,
        child(content) as program,
    ):
        place = find(Backings(), program)
        assert not isinstance(place.memory, FileMemory)  # it can shrink
        place.memory.write(place.address + 1, b"by DMA")
        assert content[:8] == b"xby DMAx"
