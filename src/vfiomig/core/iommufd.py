"""/dev/iommu: objects that programs make, and the dispatch of requests.

Every request is a struct whose first field is its size: below the command's minimum EINVAL, and
what lies beyond the fields known here must be zero (E2BIG), so that newer programs notice.
Requests and errnos: include/uapi/linux/iommufd.h.

An object counts its users, which keep it from being destroyed: a page table uses its IO address
space, a device that is attached uses its page table, and a bound device is used by itself.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from vfiomig.abi import iommufd as abi
from vfiomig.abi.ioctls import Dialect, FdKind, find
from vfiomig.abi.uapi import UapiStruct
from vfiomig.core import hwpt, ioas, iommu_options
from vfiomig.core.caller import Caller
from vfiomig.core.hwpt import BoundDevice, Hwpt
from vfiomig.core.ioas import Ioas
from vfiomig.core.vfio_compat import compat_ioctl
from vfiomig.iommu import Backings
from vfiomig.iommu.limits import ALIGNMENT, OF_DEVICE, OF_TABLE

__all__ = ("BoundDevice", "Iommufd", "read_extensible")

Object: TypeAlias = Ioas | Hwpt | BoundDevice
Handler: TypeAlias = Callable[["Iommufd", UapiStruct, Caller], int]
_Kind = TypeVar("_Kind", Ioas, Hwpt, BoundDevice)


class Iommufd:
    """What one open of /dev/iommu holds. Safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objects: dict[int, Object] = {}
        self._last_id = 0
        #: The memory that its programs have mapped.
        self.backings = Backings()
        #: Whether locked memory is counted for each process (1) or for each user (0).
        self.rlimit_mode = 0
        #: The id of the address space that stands for a container of the old interface, or 0.
        self.vfio_ioas = 0

    def ioctl(self, number: int, arg: int, caller: Caller) -> int:
        """Answer a request; raise ``OSError`` with its errno."""
        row = find(FdKind.IOMMUFD, number, Dialect.LANDED)
        served = SERVED.get(row.name) if row is not None else None
        if row is None or row.struct is None or served is None:
            return compat_ioctl(self, number, arg, caller)
        size = int.from_bytes(caller.read(arg, 4), "little")
        argument = read_extensible(row.struct, row.minsz, size, arg, caller)
        handler, responds = served
        failure = handler(self, argument, caller)
        if responds(argument):
            self._respond(argument, size, arg, caller)
        if failure:
            raise OSError(failure, row.name)
        return 0

    def _respond(self, argument: UapiStruct, size: int, arg: int, caller: Caller) -> None:
        try:
            caller.write(arg, bytes(argument)[:size])
        except OSError:
            # Nobody knows the id of what was made.
            if isinstance(argument, abi.IoasAlloc):
                self.remove(argument.out_ioas_id)
            elif isinstance(argument, abi.HwptAlloc):
                self.remove(argument.out_hwpt_id)
            raise

    def set_rlimit_mode(self, mode: int) -> None:
        """Choose how locked memory is counted: EBUSY once there are objects."""
        with self._lock:
            if self._objects:
                raise OSError(errno.EBUSY, "the iommufd has objects already")
            if mode > 1:
                raise OSError(errno.EINVAL, "for each user (0) or for each process (1)")
            self.rlimit_mode = mode

    def enter_group(self) -> None:
        """Stand for a container from here on, with an address space for its requests."""
        with self._lock:
            if not self.vfio_ioas:
                self.vfio_ioas = self._add_locked(Ioas())

    # Objects.

    def add(self, thing: Object) -> int:
        with self._lock:
            return self._add_locked(thing)

    def add_over(self, number: int, make: Callable[[Object], Hwpt]) -> int:
        """Add a page table that is made over the object ``number``; EINVAL if there is none."""
        with self._lock:
            parent = self._objects.get(number)
            if parent is None:
                raise OSError(errno.EINVAL, f"no object has the id {number}")
            return self._add_table_locked(make(parent))

    def find(self, number: int, kind: type[_Kind]) -> _Kind:
        """Find an object of that kind; ENOENT for any other id."""
        thing = self._objects.get(number)
        if not isinstance(thing, kind):
            raise OSError(errno.ENOENT, f"no {kind.__name__} has the id {number}")
        return thing

    def remove(self, number: int) -> int:
        """Destroy an object: ENOENT, or EBUSY while it is used."""
        with self._lock:
            thing = self._objects.get(number)
            if thing is None:
                return errno.ENOENT
            if thing.users:
                return errno.EBUSY
            self._remove_locked(number, thing)
            return 0

    def discard(self, number: int) -> None:
        """Remove a bound device: it was closed."""
        with self._lock:
            self._objects.pop(number, None)

    # Devices and page tables.

    def attach(self, number: int, device: BoundDevice) -> tuple[int, Hwpt]:
        """Count ``device`` as a user of a page table, or of one for an IOAS; return its id too.

        Raises:
            OSError: ENOENT, or EINVAL for an object of another kind or an IOMMU that cannot do
                what the page table does, or EADDRINUSE for IOVAs that it does not leave usable.
        """
        with self._lock:
            thing = self._objects.get(number)
            if thing is None:
                raise OSError(errno.ENOENT, f"no object has the id {number}")
            if isinstance(thing, BoundDevice):
                raise OSError(errno.EINVAL, f"the object {number} is no page table and no IOAS")
            if isinstance(thing, Hwpt) and thing.tracks and not device.tracks:
                raise OSError(errno.EINVAL, f"the IOMMU of {device.name} cannot track writes")
            space = (thing if isinstance(thing, Ioas) else thing.ioas).space
            space.limit(device, OF_DEVICE)
            try:
                if isinstance(thing, Ioas):
                    number, thing = self._automatic_locked(thing)
            except OSError:
                space.unlimit(device)
                raise
            thing.users += 1
            return number, thing

    def detach(self, number: int, table: Hwpt, device: BoundDevice) -> None:
        with self._lock:
            table.ioas.space.unlimit(device)
            table.users -= 1
            if table.automatic and not table.users:
                self._remove_locked(number, table)

    def _automatic_locked(self, over: Ioas) -> tuple[int, Hwpt]:
        """Find the page table for devices that are attached to the IOAS itself, or make it."""
        for number, thing in self._objects.items():
            if isinstance(thing, Hwpt) and thing.automatic and thing.ioas is over:
                return number, thing
        made = Hwpt(over, automatic=True)
        return self._add_table_locked(made), made

    def _add_table_locked(self, table: Hwpt) -> int:
        table.ioas.space.limit(table, OF_TABLE)
        table.ioas.users += 1
        return self._add_locked(table)

    def _add_locked(self, thing: Object) -> int:
        self._last_id += 1
        self._objects[self._last_id] = thing
        return self._last_id

    def _remove_locked(self, number: int, thing: Object) -> None:
        del self._objects[number]
        if number == self.vfio_ioas:
            self.vfio_ioas = 0
        if isinstance(thing, Hwpt):
            thing.ioas.space.unlimit(thing)
            thing.ioas.users -= 1
            thing.table.track(False)


def read_extensible(
    struct: type[UapiStruct], minsz: int, size: int, arg: int, caller: Caller
) -> UapiStruct:
    """Read a struct that may be older (shorter) or newer (longer) than the one known here.

    Raises:
        OSError: EINVAL below the minimum, EFAULT, E2BIG for a longer one whose rest says anything.
    """
    if size < minsz:
        raise OSError(errno.EINVAL, f"{struct.c_name} has {size} bytes, at least {minsz} is needed")
    known = min(size, struct.SIZE)
    for at in range(arg + struct.SIZE, arg + size, ALIGNMENT):
        if any(caller.read(at, min(ALIGNMENT, arg + size - at))):
            raise OSError(errno.E2BIG, f"{struct.c_name} has fields that are not known here")
    return struct.parse(caller.read(arg, known).ljust(struct.SIZE, b"\0"))


def destroy(context: Iommufd, argument: abi.IommuDestroy, caller: Caller) -> int:  # noqa: ARG001
    return context.remove(argument.id)


def always(argument: UapiStruct) -> bool:  # noqa: ARG001
    return True


def never(argument: UapiStruct) -> bool:  # noqa: ARG001
    return False


#: What answers a request, and when its struct is written back.
SERVED: dict[str, tuple[Handler, Callable[[UapiStruct], bool]]] = {
    "IOMMU_DESTROY": (destroy, never),  # type: ignore[dict-item]  # the row names the struct
    "IOMMU_IOAS_ALLOC": (ioas.alloc, always),  # type: ignore[dict-item]
    "IOMMU_IOAS_IOVA_RANGES": (ioas.iova_ranges, always),  # type: ignore[dict-item]
    "IOMMU_IOAS_MAP": (ioas.map_, always),  # type: ignore[dict-item]
    "IOMMU_IOAS_MAP_FILE": (ioas.map_file, always),  # type: ignore[dict-item]
    "IOMMU_IOAS_COPY": (ioas.copy, always),  # type: ignore[dict-item]
    "IOMMU_IOAS_UNMAP": (ioas.unmap, always),  # type: ignore[dict-item]
    "IOMMU_IOAS_ALLOW_IOVAS": (ioas.allow_iovas, never),  # type: ignore[dict-item]
    "IOMMU_OPTION": (iommu_options.option, always),  # type: ignore[dict-item]
    "IOMMU_VFIO_IOAS": (iommu_options.vfio_ioas, iommu_options.vfio_ioas_told),  # type: ignore[dict-item]
    "IOMMU_HWPT_ALLOC": (hwpt.alloc, always),  # type: ignore[dict-item]
    "IOMMU_GET_HW_INFO": (hwpt.get_hw_info, always),  # type: ignore[dict-item]
    "IOMMU_HWPT_SET_DIRTY_TRACKING": (hwpt.set_dirty_tracking, never),  # type: ignore[dict-item]
    "IOMMU_HWPT_GET_DIRTY_BITMAP": (hwpt.get_dirty_bitmap, never),  # type: ignore[dict-item]
}
