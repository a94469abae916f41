"""Which IOVAs of an address space may be used at all.

Theory of operation
-------------------
A space that nobody uses has all 64 bits, byte by byte. Each page table over it and each device
that is attached through one narrows it for as long as it stays: a page table to what its format
can say, a device by the window that message signalled interrupts go to. A program can make sure
of ranges that it will need; who would narrow those, or what is mapped, is refused. See
``IOMMU_IOAS_IOVA_RANGES`` and ``IOMMU_IOAS_ALLOW_IOVAS`` in include/uapi/linux/iommufd.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

__all__ = ("ALIGNMENT", "ALLOWED", "OF_DEVICE", "OF_TABLE", "IovaLimits", "Limit", "overlaps")

#: The first byte and the last.
Range: TypeAlias = tuple[int, int]

#: Bytes; with a page table, IOVA and length of a mapping are multiples.
ALIGNMENT = 4096
LAST = (1 << 64) - 1


class Limit(NamedTuple):
    """What one user of a space asks of it."""

    reserved: tuple[Range, ...]
    alignment: int = 1


#: A page table of 48 bits.
OF_TABLE = Limit(((1 << 48, LAST),), ALIGNMENT)
#: A device on x86, whose interrupts are writes to this window.
OF_DEVICE = Limit(((0xFEE0_0000, 0xFEEF_FFFF),))


class IovaLimits:
    """The limits of one space; its lock is held by whoever uses them."""

    def __init__(self, limits: Iterable[Limit]) -> None:
        #: By who asks: what it asks, and how many times.
        self._asked: dict[Hashable, tuple[Limit, int]] = {limit: (limit, 1) for limit in limits}
        #: What the program makes sure of; automatic placement uses nothing else then.
        self.allowed: Sequence[Range] = ()
        #: Whether pages larger than ``ALIGNMENT`` may be used; if not, smaller ones neither.
        self.large_pages = True

    def add(self, owner: Hashable, limit: Limit) -> None:
        """Count one more use by ``owner``."""
        self._asked[owner] = limit, self._asked.get(owner, (limit, 0))[1] + 1

    def remove(self, owner: Hashable) -> None:
        limit, uses = self._asked.pop(owner)
        if uses > 1:
            self._asked[owner] = limit, uses - 1

    @property
    def alignment(self) -> int:
        least = 1 if self.large_pages else ALIGNMENT
        return max([least, *(limit.alignment for limit, _ in self._asked.values())])

    def reserves(self, first: int, last: int) -> bool:
        """Whether any of [first, last] may not be mapped."""
        return any(overlaps(limit.reserved, first, last) for limit, _ in self._asked.values())

    def usable(self) -> list[Range]:
        """Return the ranges that may be mapped, in their order."""
        return gaps(one for limit, _ in self._asked.values() for one in limit.reserved)

    def automatic(self) -> list[Range]:
        """Return the ranges in which an IOVA is chosen: never 0, and never the last page."""
        wanted = gaps(gaps(self.allowed)) or [(0, LAST)]  # those that touch are one
        edges = (ALIGNMENT, LAST - ALIGNMENT)
        meets = [
            (max(first, start, edges[0]), min(last, end, edges[1]))
            for first, last in wanted
            for start, end in self.usable()
        ]
        return [(first, last) for first, last in meets if first <= last]


def gaps(ranges: Iterable[Range]) -> list[Range]:
    """Return what is between ranges, which may overlap."""
    found, at = [], 0
    for first, last in sorted(ranges):
        if at < first:
            found.append((at, first - 1))
        at = max(at, last + 1)
    if at <= LAST:
        found.append((at, LAST))
    return found


def overlaps(ranges: Iterable[Range], first: int, last: int) -> bool:
    return any(start <= last and first <= end for start, end in ranges)


_both = IovaLimits((OF_TABLE, OF_DEVICE))
#: What is left when one device is attached.
ALLOWED = tuple(_both.usable())
