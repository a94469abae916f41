"""The type1 IOMMU of a container: mappings of the program's memory, and what it tells of itself.

Theory of operation
-------------------
It is a page table over one IO address space, as an iommufd has them, so devices and their logs see
no difference; what differs is what programs may ask. Version 2 unmaps whole mappings only, like
iommufd, and says EINVAL where that says ENOENT. Version 1 was never strict: a request that begins
inside a mapping does nothing, and one that covers the first byte of a mapping takes all of it.

The order of checks is that of drivers/vfio/vfio_iommu_type1.c before ranges up to the last byte of
all addresses were made to work, when EOVERFLOW took EINVAL's place for those beyond. Memory is not
counted as locked (docs/protocol.md, CHOICE-17). The lock of the address space is not held while the
memory of the program is touched, so what was checked before is checked again.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from vfiomig.abi import vfio_iommu as abi
from vfiomig.abi.ioctls import Dialect, FdKind, find
from vfiomig.abi.vfio import InfoCapHeader
from vfiomig.core import type1_dirty
from vfiomig.core.caller import Caller
from vfiomig.iommu import Backings, IoSpace, Mapping, PageTable
from vfiomig.iommu.space import ALLOWED
from vfiomig.memory import MemoryFault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.iommu import DmaPort

__all__ = ("Type1", "check_extension")

Handler: TypeAlias = Callable[["Type1", int, Caller], int]

END = 1 << 64
PAGE = type1_dirty.PAGE
#: Page sizes of the IOMMU: 4 KiB, 2 MiB, 1 GiB.
PAGE_SIZES = PAGE | 1 << 21 | 1 << 30
#: Mappings that there may be at a time.
ENTRIES = 0xFFFF

READ, WRITE = abi.VFIO_DMA_MAP_FLAG_READ, abi.VFIO_DMA_MAP_FLAG_WRITE
NEW_ADDRESS = abi.VFIO_DMA_MAP_FLAG_VADDR
WITH_BITMAP = abi.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
ALL, ADDRESS_ONLY = abi.VFIO_DMA_UNMAP_FLAG_ALL, abi.VFIO_DMA_UNMAP_FLAG_VADDR

#: What VFIO_CHECK_EXTENSION answers with 1: always, and once there is an IOMMU.
ALWAYS = frozenset({abi.VFIO_TYPE1_IOMMU, abi.VFIO_TYPE1v2_IOMMU, abi.VFIO_UNMAP_ALL})
IN_USE = frozenset({abi.VFIO_UPDATE_VADDR, abi.VFIO_DMA_CC_IOMMU})


def check_extension(extension: int, *, in_use: bool) -> int:
    return int(extension in ALWAYS or (in_use and extension in IN_USE))


class Type1:
    """The IOMMU of one container. Safe for concurrent use."""

    def __init__(self, version: int) -> None:
        """``version``: VFIO_TYPE1_IOMMU or VFIO_TYPE1v2_IOMMU; EINVAL for another."""
        if version not in {abi.VFIO_TYPE1_IOMMU, abi.VFIO_TYPE1v2_IOMMU}:
            raise OSError(errno.EINVAL, f"{version} is an extension, and no IOMMU")
        self.is_v2 = version == abi.VFIO_TYPE1v2_IOMMU
        self.space = IoSpace()
        self.table = PageTable(self.space)
        self.backings = Backings()
        #: Held while tracking is turned on or off.
        self.lock = threading.Lock()
        self._ports: list[DmaPort] = []
        #: IOVAs of mappings whose address in the program is going to change, under ``space.lock``.
        self._moving: set[int] = set()
        #: IOVAs of mappings that are dirty as a whole, under ``space.lock``: a device that has
        #: left may have written there, and its IOMMU did not see it.
        self.unseen: set[int] = set()

    @property
    def tracks(self) -> bool:
        """Whether the writes of every device are seen; if not, all that is mapped is dirty."""
        return all(port.iommu_tracks for port in self._ports)

    def attach(self, port: DmaPort) -> None:
        with self.space.lock:
            if self._moving:
                raise OSError(errno.EBUSY, "addresses of mappings are being changed")
        self._ports.append(port)
        port.attach(self.table)

    def detach(self, port: DmaPort) -> None:
        port.attach(None)
        with self.space.lock:
            self._ports.remove(port)
            if not port.iommu_tracks and self.table.log is not None:
                self.unseen |= {m.iova for m in self.space.overlapping_locked(0, END)}

    def release(self) -> None:
        """Give everything up: no group is left."""
        self.table.track(False)
        self.space.clear()

    def ioctl(self, number: int, arg: int, caller: Caller) -> int:
        """Answer a request; raise ``OSError`` with its errno."""
        row = find(FdKind.CONTAINER, number, Dialect.LANDED)
        handler = SERVED.get(row.name) if row is not None else None
        if handler is None:
            raise OSError(errno.ENOTTY, "no request of a type1 IOMMU")
        return handler(self, arg, caller)

    def find_whole_locked(self, iova: int, length: int) -> list[Mapping]:
        """Return the mappings in [iova, iova + length); EINVAL if one would be cut."""
        found = self.space.overlapping_locked(iova, length)
        if found and (found[0].iova < iova or found[-1].end > iova + length):
            raise OSError(errno.EINVAL, "the range cuts a mapping")
        return found

    # Mapping.

    def map(self, argument: abi.Type1DmaMap, caller: Caller) -> None:
        iova, size, start = argument.iova, argument.size, argument.vaddr
        with self.space.lock:
            if self.space.overlapping_locked(iova, size):
                raise OSError(errno.EEXIST, f"IOVA {iova:#x} is mapped already")
        if len(self.space) >= ENTRIES:
            raise OSError(errno.ENOSPC, f"there are {ENTRIES} mappings")
        self.space.check(iova, size)
        readable, writable = bool(argument.flags & READ), bool(argument.flags & WRITE)
        memory, address = caller.memory(start, size, writable=writable, known=self.backings)
        self.space.map(
            Mapping(iova, size, memory, address, readable=readable, writable=writable),
        )

    def move(self, argument: abi.Type1DmaMap, caller: Caller) -> None:
        """Give a mapping its new address: ENOENT if there is none, EINVAL if it has one."""
        iova, size = argument.iova, argument.size
        with self.space.lock:
            found = self.space.overlapping_locked(iova, size)
            if not found:
                raise OSError(errno.ENOENT, f"nothing is mapped at IOVA {iova:#x}")
            former = found[0]
            if iova not in self._moving or (former.iova, former.length) != (iova, size):
                raise OSError(errno.EINVAL, "no mapping of that size waits for an address")
            self._moving.remove(iova)
        # As in the kernel, which has the pages and does not look: a wrong address changes nothing.
        with suppress(MemoryFault):
            memory, address = caller.memory(
                argument.vaddr, size, writable=former.writable, known=self.backings
            )
            with self.space.lock:
                self.space.replace_locked(former, replace(former, memory=memory, address=address))

    # Unmapping.

    def unmap(self, argument: abi.Type1DmaUnmap, bitmap: abi.Bitmap | None, caller: Caller) -> int:
        """Remove mappings, or only their addresses; return how many bytes they hold."""
        with self.space.lock:
            going = self._going_locked(argument)
            if argument.flags & ADDRESS_ONLY:
                return self._forget_addresses_locked(going)
            if bitmap is None:
                return self.remove_locked(going)
        report = type1_dirty.Report(self, argument.iova, bitmap.data, caller)
        return sum(report.tell(mapping, remove=True) for mapping in going)

    def remove_locked(self, mappings: Sequence[Mapping]) -> int:
        gone = {mapping.iova for mapping in mappings}
        self._moving -= gone
        self.unseen -= gone
        return self.space.remove_locked(mappings)

    def _going_locked(self, argument: abi.Type1DmaUnmap) -> list[Mapping]:
        if argument.flags & ALL:
            return self.space.overlapping_locked(0, END)
        if self.is_v2:
            return self.find_whole_locked(argument.iova, argument.size)
        found = self.space.overlapping_locked(argument.iova, argument.size)
        return [] if found and found[0].iova < argument.iova else found

    def _forget_addresses_locked(self, mappings: Sequence[Mapping]) -> int:
        going = {mapping.iova for mapping in mappings}
        if going & self._moving:
            raise OSError(errno.EINVAL, "a mapping waits for its new address already")
        self._moving |= going
        return sum(mapping.length for mapping in mappings)


def _get_info(iommu: Type1, arg: int, caller: Caller) -> int:
    minsz = abi.Type1Info.end_of("iova_pgsizes")
    argsz = int.from_bytes(caller.read(arg, minsz)[:4], "little")
    if argsz < minsz:
        raise OSError(errno.EINVAL, f"argsz is {argsz}, at least {minsz} is needed")
    info = abi.Type1Info(
        argsz=argsz,
        flags=abi.VFIO_IOMMU_INFO_PGSIZES | abi.VFIO_IOMMU_INFO_CAPS,
        iova_pgsizes=PAGE_SIZES,
    )
    capabilities = _chain(info.SIZE, _capabilities(iommu))
    needed = info.SIZE + len(capabilities)
    if argsz < needed:
        info.argsz = needed  # the caller comes back with as much room
    else:
        caller.write(arg + info.SIZE, capabilities)
        info.cap_offset = info.SIZE
    caller.write(arg, bytes(info)[:argsz])
    return 0


def _capabilities(iommu: Type1) -> list[tuple[UapiStruct, bytes]]:
    """Each capability, and what follows its struct."""
    ranges = [abi.Type1IovaRange(start=first, end=last) for first, last in ALLOWED]
    migration = abi.Type1InfoCapMigration(
        header=InfoCapHeader(id=abi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, version=1),
        pgsize_bitmap=PAGE,
        max_dirty_bitmap_size=type1_dirty.LARGEST_BITMAP,
    )
    available = abi.Type1InfoDmaAvail(
        header=InfoCapHeader(id=abi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, version=1),
        avail=ENTRIES - len(iommu.space),
    )
    iovas = abi.Type1InfoCapIovaRange(
        header=InfoCapHeader(id=abi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, version=1),
        nr_iovas=len(ranges),
    )
    return [(migration, b""), (available, b""), (iovas, b"".join(map(bytes, ranges)))]


def _chain(offset: int, capabilities: Sequence[tuple[UapiStruct, bytes]]) -> bytes:
    """Put capabilities one behind the other, from ``offset`` of the struct on."""
    chain = b""
    for number, (head, rest) in enumerate(capabilities, start=1):
        data = bytes(head) + rest
        data = data.ljust(-(-len(data) // 8) * 8, b"\0")
        if number < len(capabilities):
            following = offset + len(chain) + len(data)
            data = data[:4] + following.to_bytes(4, "little") + data[8:]
        chain += data
    return chain


def _map_dma(iommu: Type1, arg: int, caller: Caller) -> int:
    argument = abi.Type1DmaMap.parse(caller.read(arg, abi.Type1DmaMap.SIZE))
    access, moves = argument.flags & (READ | WRITE), argument.flags & NEW_ADDRESS
    if argument.argsz < argument.SIZE or argument.flags & ~(READ | WRITE | NEW_ADDRESS):
        raise OSError(errno.EINVAL, "argsz or flags")
    if bool(access) is bool(moves):
        raise OSError(errno.EINVAL, "either an access or a new address")
    iova, size, start = argument.iova, argument.size, argument.vaddr
    if not size or (iova | size | start) % PAGE or max(iova, start) + size > END:
        raise OSError(errno.EINVAL, "no whole pages, or beyond the end of all addresses")
    caller.blocks()
    (iommu.move if moves else iommu.map)(argument, caller)
    return 0


def _unmap_dma(iommu: Type1, arg: int, caller: Caller) -> int:
    argument = abi.Type1DmaUnmap.parse(caller.read(arg, abi.Type1DmaUnmap.SIZE))
    flags = argument.flags
    if argument.argsz < argument.SIZE or flags & ~(WITH_BITMAP | ALL | ADDRESS_ONLY):
        raise OSError(errno.EINVAL, "argsz or flags")
    bitmap = None
    if flags & WITH_BITMAP:
        if flags & (ALL | ADDRESS_ONLY) or argument.argsz < argument.SIZE + abi.Bitmap.SIZE:
            raise OSError(errno.EINVAL, "flags that exclude each other, or argsz")
        bitmap = abi.Bitmap.parse(caller.read(arg + argument.SIZE, abi.Bitmap.SIZE))
        type1_dirty.check_bitmap(argument.size, bitmap)
    iova, size = argument.iova, argument.size
    if flags & ALL:
        if iova or size:
            raise OSError(errno.EINVAL, "all, or a range")
    elif not size or (iova | size) % PAGE or iova + size > END:
        raise OSError(errno.EINVAL, "no whole pages, or beyond the end of all addresses")
    if bitmap is not None and iommu.table.log is None:
        raise OSError(errno.EINVAL, "dirty pages are not tracked")
    caller.blocks()
    argument.size = iommu.unmap(argument, bitmap, caller)
    caller.write(arg, bytes(argument))
    return 0


SERVED: dict[str, Handler] = {
    "VFIO_IOMMU_GET_INFO": _get_info,
    "VFIO_IOMMU_MAP_DMA": _map_dma,
    "VFIO_IOMMU_UNMAP_DMA": _unmap_dma,
    "VFIO_IOMMU_DIRTY_PAGES": type1_dirty.dirty_pages,
}
