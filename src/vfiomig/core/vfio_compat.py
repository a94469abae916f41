"""The requests of a container on an iommufd, which may stand for one.

Theory of operation
-------------------
A group may be put into an iommufd as well (``VFIO_GROUP_SET_CONTAINER``). The first such group
gives the iommufd an IO address space for these requests, which have no field for its id;
IOMMU_VFIO_IOAS tells and changes which one it is. A device of the group is bound to the iommufd
and attached to that space when it is opened (group.py).

What comes of a request is iommufd's: errnos are those of IOMMU_IOAS_MAP and IOMMU_IOAS_UNMAP, but
that an unmap of nothing is none; addresses cannot be changed, and dirty pages are asked for by
page table or by device. Version 1 cuts mappings where an unmap begins and ends, which is why large
pages are off then.

The order of checks is that of drivers/iommu/iommufd/vfio_compat.c, which every kernel with iommufd
has: its option IOMMUFD_VFIO_CONTAINER is only about who serves /dev/vfio/vfio.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from vfiomig.abi import iommufd as iommu_abi
from vfiomig.abi import vfio_iommu as abi
from vfiomig.abi.ioctls import Dialect, FdKind, find
from vfiomig.abi.vfio import InfoCapHeader
from vfiomig.core.caller import Caller
from vfiomig.core.ioas import Ioas, map_user, unmap_range
from vfiomig.core.type1 import PAGE_SIZES
from vfiomig.iommu.space import ALIGNMENT

if TYPE_CHECKING:
    from vfiomig.core.iommufd import Iommufd
    from vfiomig.iommu import IoSpace

__all__ = ("compat_ioas", "compat_ioctl")

Handler: TypeAlias = Callable[["Iommufd", int, Caller], int]

VERSIONS = frozenset({abi.VFIO_TYPE1_IOMMU, abi.VFIO_TYPE1v2_IOMMU})
READ, WRITE = abi.VFIO_DMA_MAP_FLAG_READ, abi.VFIO_DMA_MAP_FLAG_WRITE
#: Page sizes as long as there is no page table that could limit them.
ANY_PAGE_SIZE = (1 << 64) - ALIGNMENT
NO_LIMIT = 0xFFFF_FFFF


def compat_ioctl(context: Iommufd, number: int, arg: int, caller: Caller) -> int:
    """Answer a request of a container; raise ``OSError`` with its errno."""
    row = find(FdKind.CONTAINER, number, Dialect.LANDED)
    handler = SERVED.get(row.name) if row is not None else None
    if handler is None:
        raise OSError(errno.ENOTTY, "no request of an iommufd")
    return handler(context, arg, caller)


def compat_ioas(context: Iommufd) -> Ioas:
    """Return the space that stands for a container's; ENODEV if there is none."""
    number = context.vfio_ioas
    if not number:
        raise OSError(errno.ENODEV, "no group is in the iommufd, and no IOAS was chosen")
    return context.find(number, Ioas)


def _get_api_version(context: Iommufd, arg: int, caller: Caller) -> int:  # noqa: ARG001
    return abi.VFIO_API_VERSION


def _check_extension(context: Iommufd, arg: int, caller: Caller) -> int:  # noqa: ARG001
    if arg == abi.VFIO_DMA_CC_IOMMU:
        compat_ioas(context)
        return 1
    return int(arg in VERSIONS or arg == abi.VFIO_UNMAP_ALL)


def _set_iommu(context: Iommufd, arg: int, caller: Caller) -> int:  # noqa: ARG001
    if arg not in VERSIONS:
        raise OSError(errno.EINVAL, f"there is no IOMMU of type {arg}")
    ioas = compat_ioas(context)
    if arg == abi.VFIO_TYPE1_IOMMU:
        ioas.space.set_large_pages(False, in_use=ioas.users > 0)
    return 0


def _get_info(context: Iommufd, arg: int, caller: Caller) -> int:
    minsz = abi.Type1Info.end_of("iova_pgsizes")
    argsz = int.from_bytes(caller.read(arg, minsz)[:4], "little")
    if argsz < minsz:
        raise OSError(errno.EINVAL, f"argsz is {argsz}, at least {minsz} is needed")
    ioas = compat_ioas(context)
    at, parts = abi.Type1Info.SIZE, _capabilities(ioas)
    for offset, part, needs in parts:
        if at + needs <= argsz:
            caller.write(arg + at + offset, part)
    needed = at + max(needs for _, _, needs in parts)
    info = abi.Type1Info(
        argsz=needed,
        flags=abi.VFIO_IOMMU_INFO_PGSIZES | abi.VFIO_IOMMU_INFO_CAPS,
        iova_pgsizes=PAGE_SIZES if ioas.users else ANY_PAGE_SIZE,
        cap_offset=at if argsz >= needed else 0,
    )
    caller.write(arg, bytes(info)[:argsz])
    return 0


def _capabilities(ioas: Ioas) -> list[tuple[int, bytes, int]]:
    """Parts of the capabilities: where each belongs, and how much room there must be for it."""
    ranges = [abi.Type1IovaRange(start=first, end=last) for first, last in ioas.space.usable()]
    available = abi.Type1InfoDmaAvail(
        header=InfoCapHeader(id=abi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, version=1), avail=NO_LIMIT
    )
    iovas = abi.Type1InfoCapIovaRange(
        header=InfoCapHeader(id=abi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, version=1),
        nr_iovas=len(ranges),
    )
    second = -(-available.SIZE // 8) * 8
    link = (abi.Type1Info.SIZE + second).to_bytes(4, "little")
    parts = [(0, bytes(available), available.SIZE), (InfoCapHeader.next.offset, link, second)]
    at = second + iovas.SIZE
    for row in ranges:
        parts.append((at, bytes(row), at + row.SIZE))
        at += row.SIZE
    return [*parts, (second, bytes(iovas), at)]


def _map_dma(context: Iommufd, arg: int, caller: Caller) -> int:
    asked = abi.Type1DmaMap.parse(caller.read(arg, abi.Type1DmaMap.SIZE))
    if asked.argsz < asked.SIZE or asked.flags & ~(READ | WRITE):
        raise OSError(errno.EINVAL, "argsz or flags")
    flags = iommu_abi.IOMMU_IOAS_MAP_FIXED_IOVA
    flags |= iommu_abi.IOMMU_IOAS_MAP_READABLE * bool(asked.flags & READ)
    flags |= iommu_abi.IOMMU_IOAS_MAP_WRITEABLE * bool(asked.flags & WRITE)
    argument = iommu_abi.IoasMap(
        flags=flags, user_va=asked.vaddr, length=asked.size, iova=asked.iova
    )
    return map_user(context, compat_ioas(context).space, argument, caller)


def _unmap_dma(context: Iommufd, arg: int, caller: Caller) -> int:
    asked = abi.Type1DmaUnmap.parse(caller.read(arg, abi.Type1DmaUnmap.SIZE))
    everything = asked.flags & abi.VFIO_DMA_UNMAP_FLAG_ALL
    if asked.argsz < asked.SIZE or asked.flags != everything:
        raise OSError(errno.EINVAL, "argsz or flags")
    space = compat_ioas(context).space
    failure = 0
    if everything:
        if asked.iova or asked.size:
            raise OSError(errno.EINVAL, "all, or a range")
        asked.size = space.clear()
    else:
        asked.size, failure = _unmap(space, asked.iova, asked.size)
    caller.write(arg, bytes(asked))
    if failure:
        raise OSError(failure, "not all of the range was unmapped")
    return 0


def _unmap(space: IoSpace, iova: int, size: int) -> tuple[int, int]:
    """Remove mappings; return how many bytes they held, and the errno."""
    if not space.large_pages:
        space.cut(iova, iova + size)
    try:
        return unmap_range(space, iova, size)
    except OSError as refused:
        return 0, refused.errno or errno.EINVAL


SERVED: dict[str, Handler] = {
    "VFIO_GET_API_VERSION": _get_api_version,
    "VFIO_CHECK_EXTENSION": _check_extension,
    "VFIO_SET_IOMMU": _set_iommu,
    "VFIO_IOMMU_GET_INFO": _get_info,
    "VFIO_IOMMU_MAP_DMA": _map_dma,
    "VFIO_IOMMU_UNMAP_DMA": _unmap_dma,
}
