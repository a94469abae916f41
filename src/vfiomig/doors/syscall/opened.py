"""What the program's descriptors stand for, and how to tell whose a descriptor is.

Theory of operation
===================
A descriptor of ours is a placeholder in the program's table: a memfd for a device, an iommufd or
a data_fd without poll, a pipe end for a data_fd with it. Every open has a placeholder of its own,
so what /proc/TID/fd/N links to tells which open a number means, after dup, fork, exec and
hand-over as well. Nothing is cached: a number may mean something else in the next call. The link
is read, not followed: a file system that does not answer could hold up everybody else.

When a session is over nobody can tell any more when the program closes its data_fd (readiness.py),
and all of them answer alike. They leave the table; one open for each kind stays and stands for
all. Such a pipe is known by a mark that it carries itself: its time of modification.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.core.caller import Caller
    from vfiomig.core.container import Container
    from vfiomig.core.group import Group
    from vfiomig.core.iommufd import Iommufd
    from vfiomig.core.transfer import Migf
    from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
    from vfiomig.descriptors import Fd
    from vfiomig.doors.syscall.readiness import DataPipe

__all__ = (
    "ContainerOpen",
    "DataOpen",
    "DeviceOpen",
    "GroupOpen",
    "Held",
    "IommufdOpen",
    "Opened",
    "PathOpen",
    "Table",
    "link_of",
)

#: Nanoseconds since 1970 that no other pipe has as its time of modification: "VFIO" and a number.
MARK: Final = 0x5646_494F * 10**9


@dataclass(slots=True, eq=False)
class Held:
    """An open that calls keep alive while they are being answered, as in the kernel."""

    label: str = field(init=False)
    #: One entry for each such call.
    calls: list[None] = field(default_factory=list, init=False)
    closed: bool = field(default=False, init=False)
    _left: threading.Event = field(default_factory=threading.Event, init=False)

    def ioctl(self, number: int, arg: int, caller: Caller) -> int:
        raise NotImplementedError

    def release(self) -> None:
        """Give up what the open held."""
        raise NotImplementedError

    def enter(self) -> None:
        """Note that a call is being answered; EBADF if it lost a race against the last close."""
        self.calls.append(None)
        if self.closed:
            self.leave()
            raise OSError(errno.EBADF, f"{self.label} was closed")

    def leave(self) -> None:
        """Note that a call has been answered."""
        self.calls.pop()
        if self.closed:
            self._left.set()

    def close(self) -> None:
        """Last close: wait for calls whose maker died, then give up what the open held."""
        self.closed = True
        while True:
            self._left.clear()
            if not self.calls:
                break
            self._left.wait()
        self.release()


@dataclass(slots=True, eq=False)
class DeviceOpen(Held):
    """One open of /dev/vfio/devices/vfioN, or one that a group gave out."""

    number: int
    file: VfioDeviceFile
    flags: int
    #: Where read and write go on: nobody seeks, so in the first region to begin with.
    position: int = field(default=0, init=False)
    #: Regions of the device are answered by code of its author, which may take its time.
    hooked: bool = field(init=False)

    def __post_init__(self) -> None:
        device = self.file.device
        self.label = device.name
        self.hooked = any(r._reader or r._writer for r in device.device.regions.values())

    def ioctl(self, number: int, arg: int, caller: Caller) -> int:
        return self.file.ioctl(number, arg, caller)

    def release(self) -> None:
        self.file.release()


@dataclass(slots=True, eq=False)
class GroupOpen(Held):
    """The open of /dev/vfio/N, the group of device N."""

    number: int
    group: Group
    flags: int

    def __post_init__(self) -> None:
        self.label = f"group{self.number}"

    def ioctl(self, number: int, arg: int, caller: Caller) -> int:
        return self.group.ioctl(number, arg, caller)

    def release(self) -> None:
        self.group.leave()


@dataclass(slots=True, eq=False)
class ContainerOpen:
    """One open of /dev/vfio/vfio."""

    context: Container
    flags: int
    label: str = "container"


@dataclass(slots=True, eq=False)
class IommufdOpen:
    """One open of /dev/iommu."""

    context: Iommufd
    flags: int
    label: str = "iommu"


@dataclass(slots=True, eq=False)
class PathOpen:
    """What O_PATH gives: it names ``label`` and holds nothing open."""

    label: str
    flags: int = 0


@dataclass(slots=True, eq=False)
class DataOpen:
    """A data_fd of device ``number``. ``pipe`` is ``None`` where the device has no poll."""

    number: int
    device: VfioDevice
    migf: Migf
    mark: int
    pipe: DataPipe | None = None
    label: str = field(init=False)

    def __post_init__(self) -> None:
        self.label = f"{self.device.name}:{self.migf.kind.name.lower()}"


Opened: TypeAlias = DeviceOpen | GroupOpen | ContainerOpen | IommufdOpen | DataOpen | PathOpen


def link_of(fd: Fd) -> bytes:
    """Return what tells a descriptor of this process from all others."""
    return os.readlink(b"/proc/self/fd/%d" % fd.fileno())


class Table:
    """All opens, by the link to their placeholder. Safe for concurrent use.

    ``refused`` is told of a thread whose descriptors this process may not look at.
    """

    def __init__(self, refused: Callable[[int], None] = lambda tid: None) -> None:  # noqa: ARG005
        self._refused = refused
        self._lock = threading.Lock()
        self._by_link: dict[bytes, Opened] = {}
        self._over: dict[int, DataOpen] = {}

    def __len__(self) -> int:
        return len(self._by_link)

    @staticmethod
    def mark(number: int, *, saving: bool) -> int:
        """Return the mark of data_fds of device ``number`` whose session is over."""
        return MARK + 2 * number + saving

    def add(self, link: bytes, opened: Opened) -> None:
        with self._lock:
            self._by_link[link] = opened

    def remove(self, opened: Opened) -> None:
        with self._lock:
            for link in [name for name, known in self._by_link.items() if known is opened]:
                del self._by_link[link]

    def retire(self, opened: DataOpen) -> None:
        """Let the mark of ``opened`` stand for it from here on."""
        with self._lock:
            self._over.setdefault(opened.mark, opened)
        self.remove(opened)

    def all(self) -> list[Opened]:
        with self._lock:
            return list(self._by_link.values())

    def find(self, tid: int, fd: int) -> Opened | None:
        """Tell what number ``fd`` of the thread means; ``None`` if it is not ours, or not open."""
        try:
            link = os.readlink(b"/proc/%d/fd/%d" % (tid, fd & 0xFFFF_FFFF))
        except PermissionError:
            self._refused(tid)
            return None
        except OSError:
            return None
        opened = self._by_link.get(link)
        if opened is None and self._over and link.startswith(b"pipe:"):
            with suppress(OSError):
                mark = os.stat(f"/proc/{tid}/fd/{fd & 0xFFFF_FFFF}").st_mtime_ns
                return self._over.get(mark)
        return opened

    def find_open(self, tid: int, fd: int) -> Opened | None:
        """Find what a call works on: EBADF for what was opened with O_PATH."""
        opened = self.find(tid, fd)
        if type(opened) is PathOpen:
            raise OSError(errno.EBADF, f"{opened.label} was opened with O_PATH")
        return opened
