"""One IO address space: which IOVA leads to which memory.

Theory of operation
-------------------
Mappings never overlap and are kept sorted by IOVA, so a lookup is one bisection. A mapping can
only be removed whole: what would cut one is refused. Rules, errnos and their order: drivers/iommu/iommufd (``IOMMU_IOAS_MAP``, ``..._COPY``
and ``..._UNMAP`` in include/uapi/linux/iommufd.h); limits.py says which IOVAs there are.

A device's access is made while ``lock`` is held (port.py), from the lookup to the last byte and
its mark in the logs. So when an unmap has returned, nothing is under way to what it removed, and
its owner may give that memory to somebody else; nothing more than one uncontended lock is paid
for this. Large accesses are made in pieces, between which others get their turn.

Memory that is reached by asking whoever uses the device is not accessed under the lock: they may
wait for an unmap and answer nobody meanwhile. Nothing of theirs is mapped here, so it is theirs
as well to know what is under way to memory that they have unmapped.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left, bisect_right
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from vfiomig.errors import RequestError
from vfiomig.iommu.limits import (
    ALIGNMENT,
    ALLOWED,
    OF_DEVICE,
    OF_TABLE,
    IovaLimits,
    Limit,
    overlaps,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from vfiomig.iommu.dirty import DirtyLog

__all__ = ("ALIGNMENT", "ALLOWED", "IoSpace", "Mapping", "Memory")


class Memory(Protocol):
    """Memory that mappings lead to, by addresses that it alone gives a meaning."""

    def read(self, address: int, length: int) -> bytes:
        """Return all of it, or raise ``OSError``."""

    def read_into(self, address: int, view: memoryview) -> int:
        """Fill ``view``; return the number of bytes before the first that cannot be read."""

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of it, or raise ``OSError`` behind what could be written."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """[iova, iova + length) leads to ``memory`` from ``address`` on."""

    iova: int
    length: int
    memory: Memory
    address: int
    readable: bool
    writable: bool
    #: Whether a copy of it may be writable: the memory was mapped for writing in the first place.
    may_write: bool | None = None
    #: Whether an access asks whoever uses the device, and waits for the answer.
    asks_user: bool = False
    #: What an IOVA and its address differ by.
    shift: int = field(init=False)
    #: Whether an access may be made under the lock, as it is allowed and asks nobody.
    reads_at_once: bool = field(init=False)
    writes_at_once: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", self.address - self.iova)
        object.__setattr__(self, "reads_at_once", self.readable and not self.asks_user)
        object.__setattr__(self, "writes_at_once", self.writable and not self.asks_user)
        if self.may_write is None:
            object.__setattr__(self, "may_write", self.writable)

    @property
    def end(self) -> int:
        return self.iova + self.length


class IoSpace:
    """The mappings of one IO address space. Safe for concurrent use.

    ``limits`` hold from the start, whoever uses it: those of a device behind a page table.
    """

    def __init__(self, limits: Iterable[Limit] = (OF_TABLE, OF_DEVICE)) -> None:
        #: Held during an access. ``_locked`` methods and ``logs`` are for who holds it.
        self.lock = threading.Lock()
        #: Whether there was memory for reading and writing to which accesses ask the user.
        self.asks_user = False
        #: Logs of page tables of this space: they forget what is unmapped.
        self.logs: list[DirtyLog] = []
        self._limits = IovaLimits(limits)
        self._mappings: list[Mapping] = []
        self._starts: list[int] = []

    def asking_nobody(self) -> AbstractContextManager[None]:
        """Let accesses that ask the user fail at once meanwhile; here none does."""
        return nullcontext()

    # What may be mapped.

    @property
    def alignment(self) -> int:
        """What IOVA, length and address of a mapping are multiples of."""
        return self._limits.alignment

    def usable(self) -> list[tuple[int, int]]:
        """Return the ranges, first byte and last, that may be mapped."""
        with self.lock:
            return self._limits.usable()

    def limit(self, owner: Hashable, limit: Limit) -> None:
        """Narrow the space for ``owner``, which calls ``unlimit`` as often.

        Raises:
            RequestError: EADDRINUSE if that conflicts with a mapping, or what ``allow`` promised.
        """
        with self.lock:
            self._require_aligned_locked(limit.alignment)
            for first, last in limit.reserved:
                mapped = any(m.iova <= last and first < m.end for m in self._mappings)
                if mapped or overlaps(self._limits.allowed, first, last):
                    raise RequestError(
                        errno.EADDRINUSE, f"IOVA {first:#x} to {last:#x} is in use, or promised"
                    )
            self._limits.add(owner, limit)

    def unlimit(self, owner: Hashable) -> None:
        with self.lock:
            self._limits.remove(owner)

    def allow(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Promise that these ranges stay usable, in place of what was promised before.

        Raises:
            RequestError: EADDRINUSE if one of them is not usable.
        """
        with self.lock:
            for first, last in ranges:
                if self._limits.reserves(first, last):
                    raise RequestError(
                        errno.EADDRINUSE, f"IOVA {first:#x} to {last:#x} is reserved"
                    )
            self._limits.allowed = ranges

    @property
    def large_pages(self) -> bool:
        """Whether an IOMMU may map in pages that are larger than the system's."""
        return self._limits.large_pages

    def set_large_pages(self, on: bool, *, in_use: bool) -> None:
        """Allow large pages or not; ``in_use`` tells whether page tables hold the mappings.

        Raises:
            RequestError: EINVAL when there are such mappings, EADDRINUSE for those that are no
                whole pages.
        """
        with self.lock:
            if not on and self._limits.large_pages:
                if in_use and self._mappings:
                    raise RequestError(errno.EINVAL, "there are mappings, maybe in large pages")
                self._require_aligned_locked(ALIGNMENT)
            self._limits.large_pages = on

    def _require_aligned_locked(self, alignment: int) -> None:
        if any((m.iova | m.length | m.address) % alignment for m in self._mappings):
            raise RequestError(errno.EADDRINUSE, "a mapping does not consist of pages")

    # Mappings.

    def map(self, *mappings: Mapping) -> None:
        """Add mappings, each of which begins where the one before ends: all of them or none.

        Raises:
            RequestError: as ``check``; then EPERM (write access to memory that was mapped for
                reading) and EINVAL (an address inside a page).
        """
        with self.lock:
            self._map_locked(mappings)

    def map_anywhere(self, *mappings: Mapping, hint: int = 0) -> int:
        """Add mappings wherever there is room for them; return the first one's IOVA."""
        with self.lock:
            iova = self._find_free_locked(sum(mapping.length for mapping in mappings), hint)
            shift = iova - mappings[0].iova
            self._map_locked([replace(m, iova=m.iova + shift) for m in mappings])
            return iova

    def check(self, iova: int, length: int) -> None:
        """Refuse what cannot be mapped.

        Raises:
            RequestError: EINVAL (empty, unaligned, or in a reserved range), EOVERFLOW (past the
                end of the address space), EEXIST (overlaps another mapping).
        """
        with self.lock:
            self._check_locked(iova, length)

    def find_free(self, length: int, hint: int = 0) -> int:
        """Return the lowest IOVA with ``length`` free bytes, which is never 0.

        It is aligned like ``hint``, the address that it shall lead to, so that large pages can
        be used.

        Raises:
            RequestError: EINVAL (unaligned), EOVERFLOW (half the address space), ENOSPC.
        """
        with self.lock:
            return self._find_free_locked(length, hint)

    def unmap(self, iova: int, length: int, *, one: bool = False) -> int:
        """Remove the mappings inside [iova, iova + length); return how many bytes they held.

        ``one``: only a single mapping that is just this range.

        Raises:
            RequestError: ENOENT when there is none, or when one would have to be cut.
        """
        end = iova + length
        with self.lock:
            inside = self.overlapping_locked(iova, length)
            cuts = not inside or inside[0].iova < iova or inside[-1].end > end
            if cuts or (one and inside[0].length != length):
                raise RequestError(
                    errno.ENOENT, f"[{iova:#x}, {end:#x}) does not hold whole mappings"
                )
            return self.remove_locked(inside)

    def cut(self, *places: int) -> None:
        """Let no mapping lie across these IOVAs: one that does becomes two."""
        with self.lock:
            for iova in places:
                mapping = self.find_locked(iova, 1)
                if mapping is not None and mapping.iova < iova:
                    self._cut_locked(mapping, iova - mapping.iova)

    def _cut_locked(self, mapping: Mapping, length: int) -> None:
        at = bisect_left(self._starts, mapping.iova)
        rest = replace(
            mapping,
            iova=mapping.iova + length,
            length=mapping.length - length,
            address=mapping.address + length,
        )
        self._mappings[at : at + 1] = [replace(mapping, length=length), rest]
        self._starts.insert(at + 1, rest.iova)

    def clear(self) -> int:
        """Remove every mapping; return how many bytes they held."""
        with self.lock:
            return self.remove_locked(self._mappings.copy())

    def pieces(self, iova: int, length: int) -> list[Mapping]:
        """Return what [iova, iova + length) leads to, cut to it; ENOENT if there is a gap."""
        end, found = iova + length, []
        with self.lock:
            while iova < end:
                mapping = self.find_locked(iova, 1)
                if mapping is None:
                    raise RequestError(errno.ENOENT, f"nothing is mapped at IOVA {iova:#x}")
                stop = min(end, mapping.end)
                address = iova + mapping.shift
                found.append(replace(mapping, iova=iova, length=stop - iova, address=address))
                iova = stop
        return found

    def mapped_length(self, iova: int, length: int) -> int:
        """Return how much of [iova, iova + length) is mapped before the first gap."""
        at = iova
        with self.lock:
            while at < iova + length and (mapping := self.find_locked(at, 1)) is not None:
                at = mapping.end
        return min(at - iova, length)

    def find_locked(self, iova: int, length: int) -> Mapping | None:
        """Return the one mapping that holds the whole access, if there is one."""
        at = bisect_right(self._starts, iova) - 1
        if at < 0:
            return None
        mapping = self._mappings[at]
        return mapping if iova + length <= mapping.iova + mapping.length else None

    def overlapping_locked(self, iova: int, length: int) -> list[Mapping]:
        """Return the mappings that lie in [iova, iova + length), whole or in part."""
        first = bisect_right(self._starts, iova)
        if first and self._mappings[first - 1].end > iova:
            first -= 1
        return self._mappings[first : bisect_left(self._starts, iova + length, first)]

    def remove_locked(self, mappings: Sequence[Mapping]) -> int:
        """Remove neighbouring mappings of this space; return how many bytes they held."""
        if mappings:
            first = bisect_left(self._starts, mappings[0].iova)
            del self._mappings[first : first + len(mappings)]
            del self._starts[first : first + len(mappings)]
        for log in self.logs:
            for mapping in mappings:
                log.forget(mapping.iova, mapping.length)
        return sum(mapping.length for mapping in mappings)

    def replace_locked(self, former: Mapping, new: Mapping) -> None:
        """Let a mapping, if it is still there, lead to other memory."""
        at = bisect_left(self._starts, former.iova)
        if at < len(self._mappings) and self._mappings[at] is former:
            self._mappings[at] = new

    def __len__(self) -> int:
        return len(self._mappings)

    def _map_locked(self, mappings: tuple[Mapping, ...] | list[Mapping]) -> None:
        self._check_locked(mappings[0].iova, sum(mapping.length for mapping in mappings))
        for mapping in mappings:
            if mapping.writable and not mapping.may_write:
                raise RequestError(errno.EPERM, "the memory was mapped for reading only")
            if mapping.address % self._limits.alignment:
                raise RequestError(errno.EINVAL, "the memory does not begin at a page")
            if mapping.asks_user and mapping.readable and mapping.writable:
                self.asks_user = True
        at = bisect_right(self._starts, mappings[0].iova)
        self._mappings[at:at] = mappings
        self._starts[at:at] = [mapping.iova for mapping in mappings]

    def _check_locked(self, iova: int, length: int) -> None:
        if not length or (iova | length) % self._limits.alignment:
            raise RequestError(errno.EINVAL, "IOVA and length are multiples of the page size")
        last = iova + length - 1
        if last >= 1 << 64:
            raise RequestError(errno.EOVERFLOW, "the mapping leaves the 64-bit address space")
        if self._limits.reserves(iova, last):
            raise RequestError(errno.EINVAL, f"IOVA {iova:#x} lies in a reserved range")
        at = bisect_right(self._starts, iova)
        before_overlaps = at and self._mappings[at - 1].end > iova
        after_overlaps = at < len(self._starts) and self._starts[at] <= last
        if before_overlaps or after_overlaps:
            raise RequestError(errno.EEXIST, f"IOVA {iova:#x} is mapped already")

    def _find_free_locked(self, length: int, hint: int) -> int:
        if length % self._limits.alignment:
            raise RequestError(errno.EINVAL, "the length is a multiple of the page size")
        if not 0 < length < (1 << 63) - 1:
            raise RequestError(errno.EOVERFLOW, f"{length} bytes are more than any room")
        step = 1 << (length - 1).bit_length()
        if hint:
            step = min(step, hint & -hint)
        if step < self._limits.alignment:
            raise RequestError(errno.EINVAL, "the memory does not begin at a page")
        offset = hint % ALIGNMENT
        for first, last in self._limits.automatic():
            at = _round_up(first, step) | offset
            for mapping in self._mappings:
                if mapping.end <= at:
                    continue
                if mapping.iova >= at + length:
                    break
                at = _round_up(mapping.end, step) | offset
            if at + length - 1 <= last:
                return at
        raise RequestError(errno.ENOSPC, f"no {length} contiguous bytes of IOVA are free")


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
