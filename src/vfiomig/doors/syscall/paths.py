"""/dev/vfio with its devices, groups and container, and /dev/iommu, where there are none.

What stat says of them is made up here, of the folders as well. What a listing shows are device nodes
that open nothing (standin.py).
"""

from __future__ import annotations

import os
import posixpath
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from vfiomig.abi.ioctls import FdKind
from vfiomig.doors.syscall.about import About
from vfiomig.memory import MemoryFault

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

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
WORDS = (b"vfio", b"iommu", b"pci", b"/fd/", b"/dev/std")

MAJOR: Final = 510  # of the local and experimental range
FIRST_GROUP: Final = 0x400  # minor number
FILE_SYSTEM: Final = os.makedev(0, 0x5646)


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

    def about(self, path: str) -> About:
        """Tell of a directory, or of a character device that only its owner uses."""
        mode, links, node = self._mode(path)
        owner = os.geteuid(), os.getegid()
        return About(mode, links, self._inodes[path], FILE_SYSTEM, self._made, owner, node)

    def fill(self, root: Path) -> None:
        """Make the folders below ``root``, and what is listed in them."""
        (root / DEVICES[1:]).mkdir(parents=True)
        for path in self._nodes:
            _make_node(root / path[1:])

    def _mode(self, path: str) -> tuple[int, int, int]:
        """Mode, number of links and device number."""
        if self.is_folder(path):
            return stat.S_IFDIR | 0o755, 3 if path == VFIO else 2, 0
        if path == ANONYMOUS:
            return 0o600, 1, 0
        node = self._nodes[path]
        return node.mode, 1, node.device


def _make_node(path: Path) -> None:
    """Make an entry that readdir calls a character device, or at least an entry."""
    # The number 0:0 (a whiteout) is the one that needs no privilege; it opens nothing.
    with suppress(PermissionError):
        os.mknod(path, stat.S_IFCHR | 0o600, 0)
        return
    path.touch(0o600)


def read_path(memory: ProcessMemory, address: int) -> str | None:
    """Read a path if it could lead to us, or is empty; ``None`` for others, and for bad pointers.

    The kernel looks at what is not ours itself, and knows best how to fail.
    """
    try:
        data = memory.read(address, FIRST_LOOK)
    except MemoryFault:
        data = _read_up_to(memory, address, FIRST_LOOK)
    if b"\0" not in data and len(data) == FIRST_LOOK:
        data += _read_up_to(memory, address + FIRST_LOOK, PATH_MAX - FIRST_LOOK)
    text, end, _ = data.partition(b"\0")
    if end and (not text or any(word in text for word in WORDS)):
        return os.fsdecode(text)
    return None


def _read_up_to(memory: ProcessMemory, address: int, length: int) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: memory.read_into(address, buffer)])


def join(base: str, path: str) -> str:
    """Put a path together without ``//``, ``.`` and ``..``."""
    path = posixpath.normpath(posixpath.join(base, path))
    return path[1:] if path.startswith("//") else path
