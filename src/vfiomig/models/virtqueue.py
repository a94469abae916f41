"""The split virtqueue of a virtio device: requests out of guest memory, and answers back into it.

Theory of operation
-------------------
A queue is three areas of the driver's memory: the descriptor table, the ring of chains that the
driver made available, and the ring of those that the device has used. Ring indices run freely
modulo 65536; a position is the index modulo the queue's size. See "Split Virtqueues" in the
VIRTIO specification, version 1.2.

``look`` copies the whole available ring, and the whole table if something new is in there: one
long copy costs less than several short ones, and what a driver changes meanwhile cannot confuse
the device between a check and its use. ``publish`` writes the used elements before the index
that makes them the driver's, and ``look`` comes after it for the driver's wishes about
interrupts: neither an interrupt nor a chain can be missed between the two.

The driver is not trusted. What breaks the rules of the ring is ``RingBroken``, and memory that
cannot be reached a ``DeviceError``; after either only a reset of the queue helps. A chain is
walked for at most as many descriptors as a queue may have, so loops end.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from vfiomig.errors import VfioMigError

if TYPE_CHECKING:
    from vfiomig.iommu import DmaPort

__all__ = ("NO_VECTOR", "Chain", "RingBroken", "Virtqueue")

#: The vector of what is to raise no MSI-X interrupt (VIRTIO_MSI_NO_VECTOR).
NO_VECTOR: Final = 0xFFFF

DESCRIPTOR: Final = struct.Struct("<QIHH")  # struct virtq_desc: addr, len, flags, next
USED_ELEMENT: Final = struct.Struct("<II")  # struct virtq_used_elem: id, len
INDEX: Final = struct.Struct("<H")
#: Both rings begin with flags and idx.
RING_HEAD: Final = struct.Struct("<HH")
IDX: Final = 2

VIRTQ_DESC_F_NEXT: Final = 1
VIRTQ_DESC_F_WRITE: Final = 2
VIRTQ_DESC_F_INDIRECT: Final = 4
VIRTQ_AVAIL_F_NO_INTERRUPT: Final = 1


class RingBroken(VfioMigError):
    """The driver broke the rules of the ring; the message says which."""


class Chain(NamedTuple):
    """One request: (address, length) of what the device reads, and of what it writes."""

    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]


class Virtqueue:
    """One queue, as the driver has set it up, and how far the device is in it."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """Return to the queue of a device that no driver has touched."""
        self.size = self.max_size
        self.vector = NO_VECTOR
        self.enabled = False
        self.descriptors = self.driver = self.device = 0
        #: Index of the next chain to take, and of the next used element to write.
        self.next_avail = self.next_used = 0
        self.event_idx = self.indirect = False
        self.forget()

    def forget(self) -> None:
        """Drop what was copied out of guest memory."""
        self._flags = self._used_event = 0
        self._avail_event: int | None = None  # as last written; unknown
        self._heads: deque[int] = deque()
        self._table = b""

    @property
    def well_formed(self) -> bool:
        """Whether the driver's size and addresses are what a queue may have."""
        size = self.size
        aligned = not (self.descriptors % 16 or self.driver % 2 or self.device % 4)
        return aligned and 0 < size <= self.max_size and not size & (size - 1)

    # From the driver.

    @property
    def waiting(self) -> int:
        """How many chains the last look found that have not been taken."""
        return len(self._heads)

    def look(self, dma: DmaPort) -> None:
        """See which chains the driver has made available, and what it wants to be told."""
        size = self.size
        ring = dma.read(self.driver, RING_HEAD.size + 2 * size + 2 * self.event_idx)
        self._flags, idx = RING_HEAD.unpack_from(ring)
        if self.event_idx:
            (self._used_event,) = INDEX.unpack_from(ring, len(ring) - 2)
        count = (idx - self.next_avail) & 0xFFFF
        if count > size:
            raise RingBroken(f"{count} chains are available in a queue of {size}")
        if not count:
            self._heads.clear()
            return
        self._table = dma.read(self.descriptors, size * DESCRIPTOR.size)
        positions = range(self.next_avail, self.next_avail + count)
        self._heads = deque(
            [INDEX.unpack_from(ring, RING_HEAD.size + 2 * (at % size))[0] for at in positions]
        )

    def first(self, dma: DmaPort) -> Chain:
        """Return the next of the chains that wait; it goes on waiting until ``take``."""
        head = self._heads[0]
        table, limit, at = self._table, self.size, head
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        inside = False  # an indirect table
        for _ in range(self.max_size + 1):
            if at >= limit:
                raise RingBroken(f"chain {head} leads to descriptor {at} of {limit}")
            address, length, flags, following = DESCRIPTOR.unpack_from(table, at * DESCRIPTOR.size)
            if flags & VIRTQ_DESC_F_INDIRECT:
                if inside or flags & VIRTQ_DESC_F_NEXT or not self.indirect:
                    raise RingBroken(f"chain {head} has an indirect table where none may be")
                table, inside, at = self._indirect_table(dma, head, address, length), True, 0
                limit = length // DESCRIPTOR.size
                continue
            parts = writable if flags & VIRTQ_DESC_F_WRITE else readable
            if writable and parts is readable:
                raise RingBroken(f"chain {head} has a readable part behind a writable one")
            if length:
                parts.append((address, length))
            if not flags & VIRTQ_DESC_F_NEXT:
                return Chain(head, readable, writable)
            at = following
        raise RingBroken(f"chain {head} has more than {self.max_size} descriptors: a loop")

    def _indirect_table(self, dma: DmaPort, head: int, address: int, length: int) -> bytes:
        count, rest = divmod(length, DESCRIPTOR.size)
        if rest or not 0 < count <= self.max_size:
            raise RingBroken(f"chain {head} has an indirect table of {length} bytes")
        return dma.read(address, length)

    def take(self) -> None:
        """Take the chain that ``first`` gave: from here on the device owes its answer."""
        self._heads.popleft()
        self.next_avail = (self.next_avail + 1) & 0xFFFF

    def arm_and_look(self, dma: DmaPort) -> bool:
        """Ask for a notification of the next chain; tell whether one came meanwhile."""
        if self._arm(dma):
            self.look(dma)
        return bool(self._heads)

    def _arm(self, dma: DmaPort) -> bool:
        """Ask for a notification, unless that is asked for already.

        Until then a driver with VIRTIO_F_EVENT_IDX keeps quiet; any other always notifies.
        """
        if not self.event_idx or self._avail_event == self.next_avail:
            return False
        at = self.device + RING_HEAD.size + self.size * USED_ELEMENT.size
        dma.write(at, INDEX.pack(self.next_avail))
        self._avail_event = self.next_avail
        return True

    # To the driver.

    def publish(self, dma: DmaPort, done: list[tuple[int, int]]) -> bool:
        """Give chains back, each with the bytes written to it; tell whether to interrupt.

        It ends with a look, which serves ``arm_and_look`` as well where no chain is left.
        """
        elements = b"".join([USED_ELEMENT.pack(head, written) for head, written in done])
        position = self.next_used % self.size
        room = (self.size - position) * USED_ELEMENT.size
        ring = self.device + RING_HEAD.size
        dma.write(ring + position * USED_ELEMENT.size, elements[:room])
        if len(elements) > room:
            dma.write(ring, elements[room:])
        old, self.next_used = self.next_used, (self.next_used + len(done)) & 0xFFFF
        dma.write(self.device + IDX, INDEX.pack(self.next_used))
        if not self._heads:
            self._arm(dma)
        self.look(dma)
        if not self.event_idx:
            return not self._flags & VIRTQ_AVAIL_F_NO_INTERRUPT
        passed = (self.next_used - self._used_event - 1) & 0xFFFF
        return passed < (self.next_used - old) & 0xFFFF
