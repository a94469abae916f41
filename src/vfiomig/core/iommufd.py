"""/dev/iommu: IO address spaces that programs fill and attach devices to.

Every request is a struct whose first field is its size: below the command's minimum EINVAL, and
what lies beyond the fields known here must be zero (E2BIG), so that newer programs notice.
Requests and errnos: include/uapi/linux/iommufd.h.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from vfiomig.abi import iommufd as abi
from vfiomig.abi.ioctls import Dialect, FdKind, find
from vfiomig.abi.uapi import UapiStruct
from vfiomig.core.caller import Caller
from vfiomig.iommu import IoSpace, Mapping
from vfiomig.iommu.space import ALIGNMENT, ALLOWED

__all__ = ("AttachedTable", "Iommufd", "read_extensible")

U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1


@dataclass(slots=True)
class Ioas:
    """An IO address space that the user made."""

    space: IoSpace = field(default_factory=IoSpace)
    users: int = 0


@dataclass(slots=True)
class AttachedTable:
    """The page table that attaching to an IOAS makes by itself; it goes with the device."""

    ioas: Ioas
    users: int = 1


@dataclass(slots=True)
class BoundDevice:
    """A device that was bound to this iommufd; it goes when the device is closed."""

    name: str
    users: int = 1


Object: TypeAlias = Ioas | AttachedTable | BoundDevice
Handler: TypeAlias = Callable[["Iommufd", UapiStruct, Caller], int]


class Iommufd:
    """What one open of /dev/iommu holds. Safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objects: dict[int, Object] = {}
        self._last_id = 0

    def ioctl(self, number: int, arg: int, caller: Caller) -> int:
        """Answer a request; raise ``OSError`` with its errno."""
        row = find(FdKind.IOMMUFD, number, Dialect.LANDED)
        served = SERVED.get(row.name) if row is not None else None
        if row is None or row.struct is None or served is None:
            raise OSError(errno.ENOTTY, "no request of an iommufd")
        size = int.from_bytes(caller.read(arg, 4), "little")
        argument = read_extensible(row.struct, row.minsz, size, arg, caller)
        handler, responds = served
        failure = handler(self, argument, caller)
        if responds:
            self._respond(argument, size, arg, caller)
        if failure:
            raise OSError(failure, row.name)
        return 0

    def _respond(self, argument: UapiStruct, size: int, arg: int, caller: Caller) -> None:
        try:
            caller.write(arg, bytes(argument)[:size])
        except OSError:
            if isinstance(argument, abi.IoasAlloc):
                self.discard(argument.out_ioas_id)  # nobody knows its id
            raise

    def add(self, thing: Object) -> int:
        with self._lock:
            self._last_id += 1
            self._objects[self._last_id] = thing
            return self._last_id

    def discard(self, number: int) -> None:
        """Remove an object whatever still uses it: its owner is gone."""
        with self._lock:
            self._objects.pop(number, None)

    def ioas(self, number: int) -> Ioas:
        """Find an IO address space; ENOENT for any other id."""
        thing = self._objects.get(number)
        if not isinstance(thing, Ioas):
            raise OSError(errno.ENOENT, f"no IOAS has the id {number}")
        return thing

    def attach(self, number: int) -> tuple[int, AttachedTable]:
        """Make the page table through which a device uses an IOAS; return its id as well."""
        with self._lock:
            thing = self._objects.get(number)
            if thing is None:
                raise OSError(errno.ENOENT, f"no object has the id {number}")
            if not isinstance(thing, Ioas):
                raise OSError(errno.EINVAL, f"the object {number} is no IOAS")
            thing.users += 1
        table = AttachedTable(thing)
        return self.add(table), table

    def detach(self, number: int, table: AttachedTable) -> None:
        with self._lock:
            table.ioas.users -= 1
            self._objects.pop(number, None)

    def remove(self, number: int) -> int:
        with self._lock:
            thing = self._objects.get(number)
            if thing is None:
                return errno.ENOENT
            if thing.users:
                return errno.EBUSY
            del self._objects[number]
            return 0


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


def ioas_alloc(context: Iommufd, argument: abi.IoasAlloc, caller: Caller) -> int:  # noqa: ARG001
    if argument.flags:
        raise OSError(errno.EOPNOTSUPP, "unknown flags")
    argument.out_ioas_id = context.add(Ioas())
    return 0


def ioas_iova_ranges(context: Iommufd, argument: abi.IoasIovaRanges, caller: Caller) -> int:
    """List the usable ranges; EMSGSIZE, with their number, if they do not fit."""
    if argument.reserved:
        raise OSError(errno.EOPNOTSUPP, "a reserved field is set")
    context.ioas(argument.ioas_id)
    room = argument.num_iovas
    for at, (start, last) in enumerate(ALLOWED[:room]):
        row = abi.IovaRange(start=start, last=last)
        caller.write(argument.allowed_iovas + at * row.SIZE, bytes(row))
    argument.num_iovas = len(ALLOWED)
    argument.out_iova_alignment = ALIGNMENT
    return errno.EMSGSIZE if len(ALLOWED) > room else 0


def ioas_map(context: Iommufd, argument: abi.IoasMap, caller: Caller) -> int:
    known = (
        abi.IOMMU_IOAS_MAP_FIXED_IOVA | abi.IOMMU_IOAS_MAP_WRITEABLE | abi.IOMMU_IOAS_MAP_READABLE
    )
    if argument.flags & ~known or argument.reserved:
        raise OSError(errno.EOPNOTSUPP, "unknown flags, or a reserved field is set")
    if U64_MAX in {argument.iova, argument.length}:
        raise OSError(errno.EOVERFLOW, "iova or length")
    readable = bool(argument.flags & abi.IOMMU_IOAS_MAP_READABLE)
    writable = bool(argument.flags & abi.IOMMU_IOAS_MAP_WRITEABLE)
    if not readable and not writable:
        raise OSError(errno.EINVAL, "a mapping that nobody may use")
    space = context.ioas(argument.ioas_id).space
    if not argument.length:
        raise OSError(errno.EINVAL, "an empty mapping")
    if argument.user_va + argument.length > U64_MAX:
        raise OSError(errno.EOVERFLOW, "user_va + length")
    if argument.user_va % ALIGNMENT:
        raise OSError(errno.EINVAL, "user_va is not aligned to a page")
    mapping = Mapping(
        iova=argument.iova,
        length=argument.length,
        memory=caller.memory(),
        address=argument.user_va,
        readable=readable,
        writable=writable,
    )
    present = caller.check(mapping.address, mapping.length, writable=writable)
    if argument.flags & abi.IOMMU_IOAS_MAP_FIXED_IOVA:
        space.map(mapping)
    else:
        mapping = space.map_anywhere(mapping)
    if not present:  # only now: that the IOVA is taken comes before it
        space.unmap(mapping.iova, mapping.length)
        raise OSError(errno.EFAULT, "not all of the memory is there, or may be used so")
    argument.iova = mapping.iova
    return 0


def ioas_unmap(context: Iommufd, argument: abi.IoasUnmap, caller: Caller) -> int:  # noqa: ARG001
    space = context.ioas(argument.ioas_id).space
    if (argument.iova, argument.length) == (0, U64_MAX):
        argument.length = space.clear()
        return 0
    if U64_MAX in {argument.iova, argument.length}:
        raise OSError(errno.EOVERFLOW, "iova or length")
    if not argument.length:
        raise OSError(errno.EINVAL, "nothing to unmap")
    if argument.iova + argument.length > U64_MAX:
        raise OSError(errno.EOVERFLOW, "iova + length")
    argument.length = space.unmap(argument.iova, argument.length)
    return 0


#: What answers a request, and whether its struct is written back.
SERVED: dict[str, tuple[Handler, bool]] = {
    "IOMMU_DESTROY": (destroy, False),  # type: ignore[dict-item]  # the row names the struct
    "IOMMU_IOAS_ALLOC": (ioas_alloc, True),  # type: ignore[dict-item]
    "IOMMU_IOAS_IOVA_RANGES": (ioas_iova_ranges, True),  # type: ignore[dict-item]
    "IOMMU_IOAS_MAP": (ioas_map, True),  # type: ignore[dict-item]
    "IOMMU_IOAS_UNMAP": (ioas_unmap, True),  # type: ignore[dict-item]
}
