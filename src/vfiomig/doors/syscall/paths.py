"""/dev/vfio/devices/vfioN and /dev/iommu, for a program on a machine that has neither.

Only absolute paths are ours; ``//`` and ``..`` in them are understood. A listing of
/dev/vfio/devices is a real directory of this process with an empty file for every device, so
that the program's own readdir works; opening such a file through it is seen by its inode.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from vfiomig.descriptors import Fd

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from vfiomig.memory import ProcessMemory

__all__ = ("DEVICES", "IOMMU", "DevTree", "read_path")

VFIO = "/dev/vfio"
DEVICES = "/dev/vfio/devices"
IOMMU = "/dev/iommu"
PATH_MAX = 4096
#: Bytes that tell nearly every path from one of ours.
FIRST_LOOK = 64

_MAJOR = 510  # of the local and experimental range
_STAT = struct.Struct("<QQQIIIIQqqq6Q24x")  # struct stat of x86-64
_STATX = struct.Struct("<IIQIIIHHQQQQ4x12x4x12x4x12x4x12x8x8x112x")


class DevTree:
    """Paths of the served devices, and what stat says of them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._devices = {f"{DEVICES}/{name}": number for number, name in enumerate(names)}
        self._directory = tempfile.TemporaryDirectory(prefix="vfiomig-dev-")
        root = Path(self._directory.name)
        (root / "devices").mkdir()
        for name in names:
            (root / "devices" / name).touch()
        self._folders = {VFIO: root, DEVICES: root / "devices"}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._directory.cleanup()

    def has(self, path: str) -> bool:
        return path in self._devices or path in self._folders or path == IOMMU

    def device(self, path: str) -> int | None:
        """Return the number of the device at ``path``."""
        return self._devices.get(path)

    def is_folder(self, path: str) -> bool:
        return path in self._folders

    def open_folder(self, path: str) -> Fd:
        return Fd(os.open(self._folders[path], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def inside(self, directory: str, path: str) -> str | None:
        """Name a relative path that starts in a folder of ours, ``directory`` as /proc has it."""
        for name, folder in self._folders.items():
            if directory == str(folder):
                return posixpath.normpath(f"{name}/{path}")
        return None

    def stat(self, path: str) -> bytes:
        """Return ``struct stat``: a directory, or a character device that only its owner uses."""
        mode, links, rdev = self._mode(path)
        return _STAT.pack(
            0,
            self._number(path),
            links,
            mode,
            os.getuid(),
            os.getgid(),
            0,
            rdev,
            0,
            4096,
            0,
            *NO_TIMES,
        )

    def statx(self, path: str) -> bytes:
        """Return ``struct statx`` with the basic fields."""
        mode, links, rdev = self._mode(path)
        data = bytearray(256)
        struct.pack_into(
            "<IIQIIIHHQ",
            data,
            0,
            STATX_BASIC,
            4096,
            0,
            links,
            os.getuid(),
            os.getgid(),
            mode,
            0,
            self._number(path),
        )
        struct.pack_into("<II", data, 0x80, os.major(rdev), os.minor(rdev))
        return bytes(data)

    def check_access(self, path: str, mode: int) -> None:
        """Answer access(2): everything but executing a device."""
        if mode & os.X_OK and not self.is_folder(path):
            raise OSError(errno.EACCES, path)

    def _number(self, path: str) -> int:
        return 1 + sorted([*self._devices, *self._folders, IOMMU]).index(path)

    def _mode(self, path: str) -> tuple[int, int, int]:
        """Mode, number of links and device number."""
        if self.is_folder(path):
            return stat.S_IFDIR | 0o755, 2, 0
        minor = 0 if path == IOMMU else 1 + self._devices[path]
        return stat.S_IFCHR | 0o600, 1, os.makedev(_MAJOR, minor)


NO_TIMES = (0,) * 6
STATX_BASIC = 0x7FF


def read_path(memory: ProcessMemory, address: int) -> str | None:
    """Read a path if it could be one of ours; ``None`` for others, and for bad pointers.

    The kernel looks at what is not ours itself, and knows best how to fail.
    """
    data = bytearray(PATH_MAX)
    with contextlib.suppress(OSError):
        got = memory.read_into(address, memoryview(data)[:FIRST_LOOK])
        head = bytes(data[:got])
        if b"\0" not in head:
            if got < FIRST_LOOK:
                return None
            got += memory.read_into(address + got, memoryview(data)[got:])
        text, end, _ = bytes(data[:got]).partition(b"\0")
        if end and (b"vfio" in text or b"iommu" in text):
            path = os.fsdecode(text)
            return "/" + posixpath.normpath(path).lstrip("/") if path[0] == "/" else path
    return None
