"""One IO address space: which IOVA leads to which memory.

Theory of operation
-------------------
Mappings never overlap and are kept sorted by IOVA, so a lookup is one bisection. A mapping can
only be removed whole, as iommufd has it: an unmap that would cut one is refused before anything
is removed. Rules and errnos: drivers/iommu/iommufd (``IOMMU_IOAS_MAP``, ``IOMMU_IOAS_UNMAP`` in
include/uapi/linux/iommufd.h), with an alignment of one page as an attached IOMMU asks for it.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from vfiomig.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("ALIGNMENT", "ALLOWED", "IoSpace", "Mapping", "Memory")

#: Bytes; IOVA and length of a mapping are multiples.
ALIGNMENT = 4096
#: IOVA ranges (first, last) that may be mapped: 48 bits without the window that x86 keeps for
#: message signalled interrupts.
ALLOWED = ((0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1))


class Memory(Protocol):
    """Memory that a mapping leads to. Addresses are those of the program that mapped it."""

    def read(self, address: int, length: int) -> bytes: ...
    def write(self, address: int, data: bytes | bytearray | memoryview) -> None: ...


@dataclass(frozen=True, slots=True)
class Mapping:
    """[iova, iova + length) leads to ``memory`` from ``address`` on."""

    iova: int
    length: int
    memory: Memory
    address: int
    readable: bool
    writable: bool

    @property
    def end(self) -> int:
        return self.iova + self.length


class IoSpace:
    """The mappings of one IO address space. Safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._mappings: list[Mapping] = []
        self._starts: list[int] = []

    def map(self, mapping: Mapping) -> None:
        """Add a mapping at its IOVA.

        Raises:
            RequestError: EINVAL (empty, unaligned, or in a reserved range), EOVERFLOW (past the
                end of the address space), EEXIST (overlaps another mapping).
        """
        last = mapping.end - 1
        if not mapping.length or (mapping.iova | mapping.length) % ALIGNMENT:
            raise RequestError(errno.EINVAL, "IOVA and length are multiples of the page size")
        if last >= 1 << 64:
            raise RequestError(errno.EOVERFLOW, "the mapping leaves the 64-bit address space")
        if not any(first <= mapping.iova and last <= end for first, end in ALLOWED):
            raise RequestError(errno.EINVAL, f"IOVA {mapping.iova:#x} lies in a reserved range")
        with self._lock:
            at = bisect_right(self._starts, mapping.iova)
            before_overlaps = at and self._mappings[at - 1].end > mapping.iova
            after_overlaps = at < len(self._starts) and self._starts[at] < mapping.end
            if before_overlaps or after_overlaps:
                raise RequestError(errno.EEXIST, f"IOVA {mapping.iova:#x} is mapped already")
            self._mappings.insert(at, mapping)
            self._starts.insert(at, mapping.iova)

    def map_anywhere(self, mapping: Mapping) -> Mapping:
        """Add a mapping wherever there is room; return it as it was placed."""
        with self._lock:
            placed = replace(mapping, iova=self.find_free(mapping.length))
            self.map(placed)
            return placed

    def find_free(self, length: int) -> int:
        """Return the lowest IOVA with ``length`` free bytes; ENOSPC if there is none."""
        with self._lock:
            for first, last in ALLOWED:
                at = first
                for mapping in self._mappings:
                    if mapping.end <= at:
                        continue
                    if mapping.iova >= at + length:
                        break
                    at = mapping.end
                if at + length - 1 <= last:
                    return at
        raise RequestError(errno.ENOSPC, f"no {length} contiguous bytes of IOVA are free")

    def unmap(self, iova: int, length: int) -> int:
        """Remove the mappings inside [iova, iova + length); return how many bytes they held.

        Raises:
            RequestError: ENOENT when there is none, or when one would have to be cut.
        """
        end = iova + length
        with self._lock:
            inside = [m for m in self._mappings if m.iova < end and m.end > iova]
            if not inside or inside[0].iova < iova or inside[-1].end > end:
                raise RequestError(
                    errno.ENOENT, f"[{iova:#x}, {end:#x}) does not hold whole mappings"
                )
            first = self._starts.index(inside[0].iova)
            del self._mappings[first : first + len(inside)]
            del self._starts[first : first + len(inside)]
        return sum(mapping.length for mapping in inside)

    def clear(self) -> int:
        """Remove every mapping; return how many bytes they held."""
        with self._lock:
            held = sum(mapping.length for mapping in self._mappings)
            self._mappings.clear()
            self._starts.clear()
        return held

    def __len__(self) -> int:
        return len(self._mappings)

    def pieces(self, iova: int, length: int) -> Iterator[tuple[Mapping, int, int]]:
        """Split an access into (mapping, address, length); EFAULT where nothing is mapped."""
        end = iova + length
        while iova < end:
            with self._lock:
                at = bisect_right(self._starts, iova) - 1
                mapping = self._mappings[at] if at >= 0 else None
            if mapping is None or mapping.end <= iova:
                raise RequestError(errno.EFAULT, f"nothing is mapped at IOVA {iova:#x}")
            size = min(end, mapping.end) - iova
            yield mapping, mapping.address + iova - mapping.iova, size
            iova += size
