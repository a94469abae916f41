"""/dev/vfio with its devices, groups and container, and /dev/iommu, where there are none.

What stat says of them is made up here, of the folders as well. A listing is a real directory, so
that the program's own readdir works on it: it is made, under a temporary name, when the program
first opens a folder, and its entries are device nodes that open nothing. A descriptor of it is recognized by where it leads.
"""

from __future__ import annotations

import os
import posixpath
import stat
import struct
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from vfiomig.abi.ioctls import FdKind
from vfiomig.descriptors import Fd
from vfiomig.memory import MemoryFault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.memory import ProcessMemory

__all__ = (
    "ANONYMOUS",
    "CONTAINER",
    "DEVICES",
    "IOMMU",
    "VFIO",
    "DevTree",
    "join",
    "read_path",
)

VFIO = "/dev/vfio"
DEVICES = "/dev/vfio/devices"
CONTAINER = "/dev/vfio/vfio"
IOMMU = "/dev/iommu"
#: What stands for the path of a device that a group gave out: it has none.
ANONYMOUS = "anon_inode:[vfio-device]"
PATH_MAX = 4096
#: Bytes that tell nearly every path from one of ours.
FIRST_LOOK = 64
#: What a path of ours, or one that leads to a descriptor of ours, contains.
WORDS = (b"vfio", b"iommu", b"/fd/", b"/dev/std")

MAJOR: Final = 510  # of the local and experimental range
FIRST_GROUP: Final = 0x400  # minor number
FILE_SYSTEM: Final = os.makedev(0, 0x5646)
STATX_BASIC_STATS: Final = 0x7FF
_STAT = struct.Struct("<QQQIIIIQqqq6Q24x")  # struct stat of x86-64
#: struct statx up to its first timestamp, a timestamp, and the device numbers behind the four.
_STATX_HEAD = struct.Struct("<IIQIIIHHQQQQ")
_STATX_TIME = struct.Struct("<qI4x")
_STATX_DEVICES = struct.Struct("<IIII")


class Node(NamedTuple):
    """A device node: what an open of it is, and of which device or group."""

    kind: FdKind
    number: int
    device: int
    mode: int = stat.S_IFCHR | 0o600


class DevTree:
    """Paths of the served devices, and what stat says of them."""

    def __init__(self, names: Sequence[str]) -> None:
        """``names``: of the devices, the first of which is in group 0."""
        self._nodes = {
            IOMMU: Node(FdKind.IOMMUFD, 0, os.makedev(MAJOR, 0)),
            CONTAINER: Node(FdKind.CONTAINER, 0, os.makedev(10, 196), stat.S_IFCHR | 0o666),
        }
        for n, name in enumerate(names):
            minor = os.makedev(MAJOR, FIRST_GROUP + n)
            self._nodes[f"{VFIO}/{n}"] = Node(FdKind.GROUP, n, minor)
            minor = os.makedev(MAJOR, 1 + n)
            self._nodes[f"{DEVICES}/{name}"] = Node(FdKind.DEVICE, n, minor)
        paths = (VFIO, DEVICES, *self._nodes, ANONYMOUS)
        self._inodes = {path: inode for inode, path in enumerate(paths, start=2)}
        self._made = time.time_ns()
        self._lock = threading.Lock()
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        if self._directory is not None:
            self._directory.cleanup()

    @property
    def is_made(self) -> bool:
        """Whether there is a real directory, to which descriptors could lead."""
        return self._directory is not None

    def has(self, path: str) -> bool:
        return path in self._inodes

    def node(self, path: str) -> Node:
        """Return what is at ``path``, which is one of ours and no folder."""
        return self._nodes[path]

    def device(self, path: str) -> int | None:
        """Return the number of the device, or of its group, at ``path``."""
        node = self._nodes.get(path)
        has_number = node is not None and node.kind in {FdKind.DEVICE, FdKind.GROUP}
        return node.number if node is not None and has_number else None

    def is_folder(self, path: str) -> bool:
        return path in {VFIO, DEVICES}

    def open_folder(self, path: str) -> Fd:
        """Open the real directory that stands for a folder."""
        return Fd(os.open(self._root() + path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def name_of(self, link: str) -> str:
        """Return the path of ours that a path of the real directory stands for, or ``link``."""
        if self._directory is None or not link.startswith(self._directory.name):
            return link
        return link[len(self._directory.name) :] or "/"

    def stat(self, path: str) -> bytes:
        """Return ``struct stat``: a directory, or a character device that only its owner uses."""
        mode, links, rdev = self._mode(path)
        owner = os.geteuid(), os.getegid()
        times = divmod(self._made, 10**9) * 3
        inode = self._inodes[path]
        return _STAT.pack(FILE_SYSTEM, inode, links, mode, *owner, 0, rdev, 0, 4096, 0, *times)

    def statx(self, path: str) -> bytes:
        """Return ``struct statx`` with the basic fields."""
        mode, links, rdev = self._mode(path)
        owner = os.geteuid(), os.getegid()
        head = _STATX_HEAD.pack(
            STATX_BASIC_STATS, 4096, 0, links, *owner, mode, 0, self._inodes[path], 0, 0, 0
        )
        made = _STATX_TIME.pack(*divmod(self._made, 10**9))
        numbers = (os.major(rdev), os.minor(rdev), os.major(FILE_SYSTEM), os.minor(FILE_SYSTEM))
        # Access, birth (which is not among the basic fields), change, modification.
        return (head + made + bytes(16) + made + made + _STATX_DEVICES.pack(*numbers)).ljust(
            256, b"\0"
        )

    def _mode(self, path: str) -> tuple[int, int, int]:
        """Mode, number of links and device number."""
        if self.is_folder(path):
            return stat.S_IFDIR | 0o755, 3 if path == VFIO else 2, 0
        if path == ANONYMOUS:
            return 0o600, 1, 0
        node = self._nodes[path]
        return node.mode, 1, node.device

    def _root(self) -> str:
        with self._lock:
            if self._directory is None:
                directory = tempfile.TemporaryDirectory(prefix="vfiomig-dev-")
                Path(directory.name + DEVICES).mkdir(parents=True)
                for path in self._nodes:
                    _make_node(directory.name + path)
                self._directory = directory
            return self._directory.name


def _make_node(path: str) -> None:
    """Make an entry that readdir calls a character device, or at least an entry."""
    # The number 0:0 (a whiteout) is the one that needs no privilege; it opens nothing.
    with suppress(PermissionError):
        os.mknod(path, stat.S_IFCHR | 0o600, 0)
        return
    Path(path).touch(0o600)


def read_path(memory: ProcessMemory, address: int) -> str | None:
    """Read a path if it could lead to us; ``None`` for others, and for bad pointers.

    The kernel looks at what is not ours itself, and knows best how to fail.
    """
    try:
        data = memory.read(address, FIRST_LOOK)
    except MemoryFault:
        data = _read_up_to(memory, address, FIRST_LOOK)
    if b"\0" not in data and len(data) == FIRST_LOOK:
        data += _read_up_to(memory, address + FIRST_LOOK, PATH_MAX - FIRST_LOOK)
    text, end, _ = data.partition(b"\0")
    if end and any(word in text for word in WORDS):
        return os.fsdecode(text)
    return None


def _read_up_to(memory: ProcessMemory, address: int, length: int) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: memory.read_into(address, buffer)])


def join(base: str, path: str) -> str:
    """Put a path together without ``//``, ``.`` and ``..``."""
    path = posixpath.normpath(posixpath.join(base, path))
    return path[1:] if path.startswith("//") else path
