"""IO address spaces of an iommufd: what answers the IOMMU_IOAS_* requests.

Checks come in the order of drivers/iommu/iommufd (ioas.c, and behind it io_pagetable.c): the
fields, the ids, the IOVA, and last the memory, which a page table over the space would pin. Where
there is no page table yet a kernel looks at the memory when one comes; here it is looked at once,
when it is mapped.
"""

from __future__ import annotations

import errno
from bisect import bisect
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from vfiomig.abi import iommufd as abi
from vfiomig.iommu import IoSpace, Mapping
from vfiomig.iommu.limits import overlaps

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.core.caller import Caller
    from vfiomig.core.iommufd import Iommufd
    from vfiomig.iommu import Place

    Request: TypeAlias = abi.IoasMap | abi.IoasMapFile | abi.IoasCopy

__all__ = (
    "Ioas",
    "alloc",
    "allow_iovas",
    "copy",
    "iova_ranges",
    "map_",
    "map_file",
    "map_user",
    "unmap",
    "unmap_range",
)

U64_MAX = (1 << 64) - 1
FIXED = abi.IOMMU_IOAS_MAP_FIXED_IOVA
WRITEABLE = abi.IOMMU_IOAS_MAP_WRITEABLE
READABLE = abi.IOMMU_IOAS_MAP_READABLE


@dataclass(slots=True, eq=False)
class Ioas:
    """An IO address space that the user made."""

    space: IoSpace = field(default_factory=lambda: IoSpace(limits=()))
    #: Page tables over it.
    users: int = 0


def alloc(context: Iommufd, argument: abi.IoasAlloc, caller: Caller) -> int:  # noqa: ARG001
    if argument.flags:
        raise OSError(errno.EOPNOTSUPP, "unknown flags")
    argument.out_ioas_id = context.add(Ioas())
    return 0


def iova_ranges(context: Iommufd, argument: abi.IoasIovaRanges, caller: Caller) -> int:
    """List the usable ranges; EMSGSIZE, with their number, if they do not fit."""
    if argument.reserved:
        raise OSError(errno.EOPNOTSUPP, "a reserved field is set")
    space = context.find(argument.ioas_id, Ioas).space
    usable, room = space.usable(), argument.num_iovas
    for at, (start, last) in enumerate(usable[:room]):
        row = abi.IovaRange(start=start, last=last)
        caller.write(argument.allowed_iovas + at * row.SIZE, bytes(row))
    argument.num_iovas = len(usable)
    argument.out_iova_alignment = space.alignment
    return errno.EMSGSIZE if len(usable) > room else 0


def allow_iovas(context: Iommufd, argument: abi.IoasAllowIovas, caller: Caller) -> int:
    """Make sure of ranges, which no attachment may narrow from here on."""
    if argument.reserved:
        raise OSError(errno.EOPNOTSUPP, "a reserved field is set")
    space = context.find(argument.ioas_id, Ioas).space
    ranges: list[tuple[int, int]] = []  # sorted
    for at in range(argument.num_iovas):
        address = argument.allowed_iovas + at * abi.IovaRange.SIZE
        row = abi.IovaRange.parse(caller.read(address, abi.IovaRange.SIZE))
        place = bisect(ranges, (row.start, row.last))
        if row.start >= row.last or overlaps(
            ranges[max(0, place - 1) : place + 1], row.start, row.last
        ):
            raise OSError(errno.EINVAL, "an empty range, or ranges that overlap")
        ranges.insert(place, (row.start, row.last))
    space.allow(ranges)
    return 0


def map_(context: Iommufd, argument: abi.IoasMap, caller: Caller) -> int:
    if argument.reserved:
        raise OSError(errno.EOPNOTSUPP, "a reserved field is set")
    _check(argument.flags, argument.length, argument.iova)
    space = context.find(argument.ioas_id, Ioas).space
    return map_user(context, space, argument, caller)


def map_user(context: Iommufd, space: IoSpace, argument: abi.IoasMap, caller: Caller) -> int:
    """Map the caller's memory into a space that has been found."""
    if not argument.length:
        raise OSError(errno.EINVAL, "an empty mapping")
    if argument.user_va + argument.length > U64_MAX:
        raise OSError(errno.EOVERFLOW, "user_va + length")
    length, start = argument.length, argument.user_va

    def find() -> Place:
        writable = bool(argument.flags & WRITEABLE)
        return caller.memory(start, length, writable=writable, known=context.backings)

    return _place(space, argument, start, find)


def map_file(context: Iommufd, argument: abi.IoasMapFile, caller: Caller) -> int:
    _check(argument.flags, argument.length, argument.iova)
    space = context.find(argument.ioas_id, Ioas).space
    if not argument.length:
        raise OSError(errno.EINVAL, "an empty mapping")
    length, start = argument.length, argument.start
    if start + length - 1 > U64_MAX:
        raise OSError(errno.EOVERFLOW, "start + length")
    with caller.file(argument.fd) as fd:

        def find() -> Place:
            writable = bool(argument.flags & WRITEABLE)
            return context.backings.of_file(fd, start, length, writable=writable)

        return _place(space, argument, start, find)


def copy(context: Iommufd, argument: abi.IoasCopy, caller: Caller) -> int:  # noqa: ARG001
    """Map again what is mapped elsewhere, in this or another address space."""
    _check(argument.flags, argument.length, argument.src_iova, argument.dst_iova)
    source = context.find(argument.src_ioas_id, Ioas).space
    if not argument.length:
        raise OSError(errno.EINVAL, "an empty copy")
    if argument.src_iova + argument.length - 1 > U64_MAX:
        raise OSError(errno.EOVERFLOW, "src_iova + length")
    pieces = source.pieces(argument.src_iova, argument.length)
    target = context.find(argument.dst_ioas_id, Ioas).space
    shift = argument.dst_iova - argument.src_iova
    copies = [
        replace(
            piece,
            iova=piece.iova + shift,
            readable=bool(argument.flags & READABLE),
            writable=bool(argument.flags & WRITEABLE),
        )
        for piece in pieces
    ]
    if argument.flags & FIXED:
        target.map(*copies)
    else:
        argument.dst_iova = target.map_anywhere(*copies, hint=copies[0].address)
    return 0


def unmap(context: Iommufd, argument: abi.IoasUnmap, caller: Caller) -> int:  # noqa: ARG001
    space = context.find(argument.ioas_id, Ioas).space
    if (argument.iova, argument.length) == (0, U64_MAX):
        argument.length = space.clear()
        return 0
    if U64_MAX in {argument.iova, argument.length}:
        raise OSError(errno.EOVERFLOW, "iova or length")
    argument.length, failure = unmap_range(space, argument.iova, argument.length)
    if failure or not argument.length:
        raise OSError(errno.ENOENT, "nothing whole is mapped there")
    return 0


def unmap_range(space: IoSpace, iova: int, length: int) -> tuple[int, int]:
    """Remove mappings until one would be cut; return their bytes, and ENOENT in that case.

    Raises:
        OSError: EINVAL (an empty range), EOVERFLOW.
    """
    if not length:
        raise OSError(errno.EINVAL, "nothing to unmap")
    if iova + length - 1 > U64_MAX:
        raise OSError(errno.EOVERFLOW, "iova + length")
    with space.lock:
        found = space.overlapping_locked(iova, length)
        if found and found[0].iova < iova:
            return 0, errno.ENOENT
        cuts = bool(found) and found[-1].end > iova + length
        return space.remove_locked(found[:-1] if cuts else found), errno.ENOENT * cuts


def _check(flags: int, *numbers: int) -> None:
    """Check what the requests that map have in common."""
    if flags & ~(FIXED | WRITEABLE | READABLE):
        raise OSError(errno.EOPNOTSUPP, "unknown flags")
    if U64_MAX in numbers:
        raise OSError(errno.EOVERFLOW, "an IOVA or the length")
    if not flags & (WRITEABLE | READABLE):
        raise OSError(errno.EINVAL, "a mapping that nobody may use")


def _place(
    space: IoSpace, argument: abi.IoasMap | abi.IoasMapFile, start: int, find: Callable[[], Place]
) -> int:
    """Map what ``find`` finds, which is looked for when the IOVA is known to be free."""
    fixed = argument.flags & FIXED
    if fixed:
        space.check(argument.iova, argument.length)
    else:
        space.find_free(argument.length, start)
    if start % space.alignment:
        raise OSError(errno.EINVAL, "the memory does not begin at a page")
    memory, address = find()
    mapping = Mapping(
        iova=argument.iova,
        length=argument.length,
        memory=memory,
        address=address,
        readable=bool(argument.flags & READABLE),
        writable=bool(argument.flags & WRITEABLE),
    )
    if fixed:
        space.map(mapping)
    else:
        argument.iova = space.map_anywhere(mapping, hint=start)
    return 0
