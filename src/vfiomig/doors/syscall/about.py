"""What stat and statx say of a file, as the structs that x86-64 programs get."""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

__all__ = ("About",)

STATX_BASIC_STATS: Final = 0x7FF
_STAT = struct.Struct("<QQQIIIIQqqq6Q24x")  # struct stat of x86-64
#: struct statx up to its first timestamp, a timestamp, and the device numbers behind the four.
_STATX_HEAD = struct.Struct("<IIQIIIHHQQQQ")
_STATX_TIME = struct.Struct("<qI4x")
_STATX_DEVICES = struct.Struct("<IIII")
_STATX_SIZE: Final = 256


class About(NamedTuple):
    """A file that was made at one time, by its owner, and never changed."""

    mode: int
    links: int
    inode: int
    device: int
    made: int
    owner: tuple[int, int]
    node: int = 0
    size: int = 0

    @classmethod
    def of(cls, seen: os.stat_result) -> About:
        return cls(
            seen.st_mode,
            seen.st_nlink,
            seen.st_ino,
            seen.st_dev,
            seen.st_mtime_ns,
            (seen.st_uid, seen.st_gid),
            size=seen.st_size,
        )

    def stat(self) -> bytes:
        """Return ``struct stat``."""
        times = divmod(self.made, 10**9) * 3
        head = self.device, self.inode, self.links, self.mode, *self.owner, 0, self.node
        return _STAT.pack(*head, self.size, 4096, 0, *times)

    def statx(self) -> bytes:
        """Return ``struct statx`` with the basic fields."""
        head = _STATX_HEAD.pack(
            *(STATX_BASIC_STATS, 4096, 0, self.links, *self.owner, self.mode, 0),
            *(self.inode, self.size, 0, 0),
        )
        made = _STATX_TIME.pack(*divmod(self.made, 10**9))
        numbers = (
            *(os.major(self.node), os.minor(self.node)),
            *(os.major(self.device), os.minor(self.device)),
        )
        # Access, birth (which is not among the basic fields), change, modification.
        whole = head + made + bytes(16) + made + made + _STATX_DEVICES.pack(*numbers)
        return whole.ljust(_STATX_SIZE, b"\0")
