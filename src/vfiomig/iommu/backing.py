"""What lies behind the addresses that a program maps for a device.

Theory of operation
-------------------
A guest's memory is, as a rule, a file that its program shares (a memfd, a file of a tmpfs or
hugetlbfs): named to ``IOMMU_IOAS_MAP_FILE``, or found behind the addresses of an
``IOMMU_IOAS_MAP``. Such a file is mapped here as well, and an access is a copy inside this process.
One mapping here serves all mappings of the file; it goes with the last of them. All other memory
is reached through the program (``memory.ProgramMemory``). One difference to a kernel is left there,
which pins pages: where the program maps other memory at an address without unmapping the IOVA
first, the device sees the new memory, or none.

A file that can shrink would kill this process with SIGBUS at the next touch behind its end. Only a
memfd that is sealed against that is touched directly; any other file is accessed by system calls
on this process's own memory, which fail instead. Of a file of huge pages the same is true, whose
pages may have been given back when no others are left.

The file is opened anew. The program's own open file description stays the program's alone: the
last close of a device, say, whose BAR is mapped for another device, must not wait for us.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import stat
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from vfiomig.descriptors import Fd
from vfiomig.errors import RequestError
from vfiomig.memory import MemoryFault, ProgramMemory, covers, read_maps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vfiomig.iommu.space import Memory

__all__ = ("Backings", "Place", "open_file_behind")

PAGE = mmap.PAGESIZE
#: Larger files (a device's, whose regions lie far apart) are mapped as far as they are needed.
WHOLE = 1 << 44
_LINE = re.compile(r"(\w+)-(\w+) (....) (\w+) (\w+):(\w+) (\d+) *(.*)")


class Place(NamedTuple):
    """Where memory is: an address, and what gives it a meaning."""

    memory: Memory
    address: int


class FileMemory:
    """A file that cannot shrink, from ``start`` on; addresses are offsets in the mapping."""

    __slots__ = ("__weakref__", "_map", "_size", "_start", "_view", "writable")

    def __init__(self, content: mmap.mmap, start: int, *, writable: bool) -> None:
        self._map = content
        self._view = memoryview(content)
        self._start = start
        self._size = len(content)
        self.writable = writable

    def holds(self, offset: int, length: int) -> bool:
        """Whether that part of the file is mapped here."""
        return self._start <= offset and offset + length <= self._start + self._size

    def address(self, offset: int) -> int:
        """Return where the byte at ``offset`` of the file is."""
        return offset - self._start

    def read(self, address: int, length: int) -> bytes:
        return self._map[address : address + length]

    def read_into(self, address: int, view: memoryview) -> int:
        length = len(view)
        view[:] = self._view[address : address + length]
        return length

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        length = data.nbytes if isinstance(data, memoryview) else len(data)
        self._map[address : address + length] = data


class ShrinkingFileMemory(ProgramMemory):
    """A file that may shrink; addresses are those of the mapping in this process."""

    __slots__ = ("_base", "_map", "_size", "_start", "writable")

    def __init__(self, content: mmap.mmap, start: int) -> None:
        super().__init__("self")
        self._map = content
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(content))
        self._start = start
        self._size = len(content)
        self.writable = True

    def holds(self, offset: int, length: int) -> bool:
        """Whether that part of the file is mapped here."""
        return self._start <= offset and offset + length <= self._start + self._size

    def address(self, offset: int) -> int:
        """Return where the byte at ``offset`` of the file is."""
        return self._base + offset - self._start


MappedFile: TypeAlias = FileMemory | ShrinkingFileMemory


class Segment(NamedTuple):
    """A line of /proc/PID/maps: addresses [low, high) are a file from ``offset`` on."""

    low: int
    high: int
    permissions: str
    offset: int
    device: int
    inode: int
    path: str


class Backings:
    """The memory of programs, each program and each file once. Safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: weakref.WeakValueDictionary[tuple[int, ...], MappedFile] = (
            weakref.WeakValueDictionary()
        )
        self._programs: weakref.WeakValueDictionary[int, ProgramMemory] = (
            weakref.WeakValueDictionary()
        )

    def of_program(
        self, process: int, thread: int, address: int, length: int, *, writable: bool
    ) -> Place:
        """Find what is behind a program's addresses, by any living ``thread`` of ``process``.

        Raises:
            MemoryFault: not all of it is there, or may be used so.
        """
        lines = read_maps(thread)
        if not covers(lines, address, length, writable=writable):
            raise MemoryFault(address, length)
        segment = shared_file(lines, address, length)
        with self._lock:
            if segment is not None:
                offset = segment.offset + address - segment.low
                with suppress(OSError):  # what cannot be mapped is reached otherwise
                    paths = _paths(thread, segment)
                    return self._map_locked(paths, segment[4:6], offset, length, writable=writable)
            return Place(self._program_locked(process, thread, address), address)

    def of_file(
        self, fd: Fd, offset: int, length: int, *, writable: bool, any_file: bool = False
    ) -> Place:
        """Find a part of the file that a program named.

        ``any_file``: one of a disk will do as well, if the descriptor could be mapped.

        Raises:
            OSError: EBADF (O_PATH), EINVAL (a file of no kind that is memory, or it ends before),
                EPERM, EACCES.
        """
        # The file is opened anew, and whoever named it shall reach no more of it than before.
        mode = fcntl.fcntl(fd.fileno(), fcntl.F_GETFL)
        if mode & os.O_PATH:
            raise RequestError(errno.EBADF, "the descriptor is for the file's path only")
        if any_file and mode & os.O_ACCMODE == os.O_WRONLY:
            raise RequestError(errno.EACCES, "the descriptor is for writing only")
        on_disk = any_file and stat.S_ISREG(os.fstat(fd.fileno()).st_mode)
        if not on_disk and not _is_memory(fd.fileno()):
            raise RequestError(errno.EINVAL, "the file is none of a tmpfs or hugetlbfs")
        if writable and mode & os.O_ACCMODE == os.O_RDONLY:
            raise RequestError(errno.EPERM, "the descriptor is for reading only")
        status = os.fstat(fd.fileno())
        if offset + length > status.st_size:
            raise RequestError(errno.EINVAL, f"the file ends at {status.st_size:#x}")
        path = f"/proc/self/fd/{fd.fileno()}"
        identity = (status.st_dev, status.st_ino)
        with self._lock:
            return self._map_locked([path], identity, offset, length, writable=writable)

    def _program_locked(self, process: int, thread: int, address: int) -> ProgramMemory:
        memory = self._programs.get(process)
        if memory is None or not memory.lives(address):  # it runs another program by now
            memory = self._programs[process] = ProgramMemory(thread)
        return memory

    def _map_locked(
        self,
        paths: Iterable[str],
        identity: tuple[int, ...],
        offset: int,
        length: int,
        *,
        writable: bool,
    ) -> Place:
        """Map the file with that device and inode, which one of ``paths`` leads to."""
        for key in (identity, (*identity, offset, length)):
            file = self._files.get(key)
            if file is not None and file.holds(offset, length):
                break
        else:
            key, file = _map_first(paths, identity, offset, length, writable=writable)
            self._files[key] = file
        if writable and not file.writable:
            raise RequestError(errno.EPERM, "the file may not be written")
        return Place(file, file.address(offset))


def _map_first(
    paths: Iterable[str],
    identity: tuple[int, ...],
    offset: int,
    length: int,
    *,
    writable: bool,
) -> tuple[tuple[int, ...], MappedFile]:
    """Map the first file that is the right one; return what it is known by as well."""
    for path in paths:
        with suppress(FileNotFoundError), _open(path, writable=writable) as fd:
            status = os.fstat(fd.fileno())
            if (status.st_dev, status.st_ino) != identity:
                continue
            if status.st_size > WHOLE:
                start = offset & -PAGE
                key = (*identity, offset, length)
                return key, _map(fd.fileno(), start, offset + length - start)
            if offset + length <= status.st_size:
                return identity, _map(fd.fileno(), 0, status.st_size)
    raise RequestError(errno.ENOENT, "nothing leads to that part of the file")


def open_file_behind(address: int, length: int, *, writable: bool) -> tuple[Fd, int] | None:
    """Open the shared file behind a range of this process's memory; return the offset there too.

    The descriptor is for writing only if that is wanted: it is for somebody else. ``None`` where
    the range is no one file's, or no descriptor leads to it any more.
    """
    access = os.O_RDWR if writable else os.O_RDONLY
    process = os.getpid()
    segment = shared_file(read_maps(process), address, length)
    if segment is None:
        return None
    for path in _paths(process, segment):
        with suppress(OSError):
            fd = Fd(os.open(path, access | os.O_CLOEXEC))
            status = os.fstat(fd.fileno())
            if (status.st_dev, status.st_ino) == segment[4:6]:
                return fd, segment.offset + address - segment.low
            fd.close()
    return None


def shared_file(lines: Iterable[str], address: int, length: int) -> Segment | None:
    """Return the segment that ``address`` lies in, if one shared file is behind all the range."""
    first: Segment | None = None
    end = address + length
    for segment in _segments(lines):
        if segment.high <= address:
            continue
        if segment.low >= end:
            break
        if segment.permissions[3] != "s" or not segment.inode:
            return None
        if first is None:
            first = segment
        elif segment[4:6] != first[4:6] or segment.offset - first.offset != segment.low - first.low:
            return None
    return first


def _segments(lines: Iterable[str]) -> Iterator[Segment]:
    for line in lines:
        match = _LINE.match(line)
        assert match is not None, f"a line of /proc/PID/maps: {line!r}"
        low, high, permissions, offset, major, minor, inode, path = match.groups()
        device = os.makedev(int(major, 16), int(minor, 16))
        yield Segment(
            int(low, 16), int(high, 16), permissions, int(offset, 16), device, int(inode), path
        )


def _paths(thread: int, segment: Segment) -> Iterator[str]:
    """Paths that may lead to the file of a segment: the program's descriptors of that name."""
    folder = f"/proc/{thread}/fd"
    for number in os.listdir(folder):
        with suppress(OSError):
            if os.readlink(f"{folder}/{number}") == segment.path and stat.S_ISREG(
                os.stat(f"{folder}/{number}").st_mode
            ):
                yield f"{folder}/{number}"
    # It may have closed them all; this way is for privileged processes only.
    path = f"/proc/{thread}/map_files/{segment.low:x}-{segment.high:x}"
    with suppress(OSError):
        if stat.S_ISREG(os.stat(path).st_mode):
            yield path


def _open(path: str, *, writable: bool) -> Fd:
    try:
        return Fd(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        if writable:
            raise
        return Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _map(fd: int, start: int, length: int) -> MappedFile:
    """Map a part of a file, for writing where that is possible."""
    both = mmap.PROT_READ | mmap.PROT_WRITE
    writable = _access(fd) == os.O_RDWR
    try:
        content = _map_as(both if writable else mmap.PROT_READ, fd, start, length)
    except PermissionError:  # sealed against writing
        writable = False
        content = _map_as(mmap.PROT_READ, fd, start, length)
    if _seals(fd) & fcntl.F_SEAL_SHRINK and os.fstatvfs(fd).f_bsize == PAGE:
        return FileMemory(content, start, writable=writable)
    if not writable:
        content.close()
        raise RequestError(errno.EPERM, "a file that can shrink is used only if it can be written")
    return ShrinkingFileMemory(content, start)


def _map_as(protection: int, fd: int, start: int, length: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, length, prot=protection, offset=start)
    except ValueError:  # Python finds that it has shrunk meanwhile
        raise RequestError(errno.EINVAL, "the file ends before") from None


def _access(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return 0


def _is_memory(fd: int) -> bool:
    """Whether it is a file of memory, which only a tmpfs or hugetlbfs has: as the kernel asks."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True
