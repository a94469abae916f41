"""A guest in a test: memory, and a driver of ``virtio_blk`` that can also misbehave.

The driver knows the device by its BAR and its rings only. ``Bench`` puts a device, a driver and
memory together without any front door; what the device interrupts is noted there.
"""

from __future__ import annotations

import errno
import struct
import time
from typing import TYPE_CHECKING, Protocol, Self, cast

from vfiomig.errors import RequestError
from vfiomig.iommu import DirtyLog, DmaPort, IoSpace, Mapping

if TYPE_CHECKING:
    import mmap

    from vfiomig.models.virtio_blk import VirtioBlk

DEADLINE = 10.0
PAGE = 4096
#: Where the guest's memory lies in IOVA space.
BASE = 0x4000_0000
MEMORY = 8 << 20
COMMON, ISR, CONFIG, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
VERSION_1, INDIRECT, EVENT_IDX, FLUSH = 1 << 32, 1 << 28, 1 << 29, 1 << 9
IN, OUT, FLUSHES, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2
NEXT, WRITE, IN_TABLE = 1, 2, 4
NO_VECTOR = 0xFFFF
EVERYTHING = (1 << 64) - 1

DESCRIPTOR = struct.Struct("<QIHH")


class Guest:
    """Memory of a guest, at addresses from 0."""

    def __init__(self, memory: bytearray | mmap.mmap | None = None) -> None:
        # To a type checker an mmap, which can be shared, is what nearly every test has.
        self.bytes = cast("bytearray", memory if memory is not None else bytearray(MEMORY))

    def read(self, address: int, length: int) -> bytes:
        self._check(address, length)
        return bytes(self.bytes[address : address + length])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self._check(address, len(data))
        self.bytes[address : address + len(data)] = data

    def read_into(self, address: int, view: bytearray | memoryview) -> int:
        self._check(address, len(view))
        view[:] = self.bytes[address : address + len(view)]
        return len(view)

    def _check(self, address: int, length: int) -> None:
        if not 0 <= address <= address + length <= len(self.bytes):
            raise RequestError(errno.EFAULT, f"{address:#x} is not the guest's memory")


class Bar(Protocol):
    """How a driver reaches BAR 4."""

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...


class Heard:
    """``self.interrupts`` of a device: notes them."""

    def __init__(self) -> None:
        self._level = False
        self.messages: list[int] = []

    def intx(self, level: bool) -> None:
        self._level = level

    def high(self) -> bool:
        return self._level

    def msi(self, vector: int) -> None:
        raise AssertionError("the device has no MSI")

    def msix(self, vector: int) -> None:
        self.messages.append(vector)


class Bench:
    """A running device with guest memory behind its DMA. Use it as ``bar`` of a ``Driver``."""

    def __init__(self, device: VirtioBlk, guest: Guest | None = None) -> None:
        self.device = device
        self.guest = guest or Guest()
        self.heard = Heard()
        device.interrupts = self.heard  # type: ignore[assignment]  # as core puts its own there
        device.dma = DmaPort()
        device.dma.space = IoSpace()
        device.dma.space.map(Mapping(BASE, MEMORY, self.guest, 0, readable=True, writable=True))
        device.start()

    def read(self, offset: int, length: int) -> bytes:
        return type(self.device).bar4.read(self.device, offset, length)

    def write(self, offset: int, data: bytes) -> None:
        type(self.device).bar4.write(self.device, offset, data)

    def log(self) -> DirtyLog:
        """Log the device's writes from here on."""
        log = DirtyLog([(BASE, MEMORY)])
        self.device.dma.logs = (log,)
        return log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.device.stop()


class Request:
    """A request that the driver has built; ``head`` is its descriptor."""

    def __init__(self, slots: list[int], reads: list[tuple[int, int]], status_at: int) -> None:
        self.slots = slots  # descriptors, given back with the answer
        self.head = slots[0]
        self.reads = reads
        self.status_at = status_at
        self.written = -1
        self.status = -1
        self.data = b""


class Driver:
    """The guest's side of one device. Offsets in ``guest`` are IOVA less ``BASE``."""

    def __init__(self, bar: Bar, guest: Guest) -> None:
        self.bar = bar
        self.guest = guest
        self.features = 0
        self.size = 0
        self.table, self.avail, self.used = 0x1000, 0x3000, 0x5000
        self.buffers = 0x10000
        self.stride = 0x4000
        self.next_avail = self.next_used = self.kicked_at = 0
        self.free: list[int] = []
        self.pending: dict[int, Request] = {}
        self.kicks = 0

    # Registers.

    def get(self, offset: int, width: int) -> int:
        return int.from_bytes(self.bar.read(offset, width), "little")

    def put(self, offset: int, width: int, value: int) -> None:
        self.bar.write(offset, value.to_bytes(width, "little"))

    @property
    def status(self) -> int:
        return self.get(20, 1)

    def offered(self) -> int:
        words = []
        for select in (0, 1):
            self.put(0, 4, select)
            words.append(self.get(4, 4))
        return words[0] | words[1] << 32

    def reset(self) -> None:
        self.put(20, 1, 0)
        deadline = time.monotonic() + DEADLINE
        while self.status:
            assert time.monotonic() < deadline, "the device does not reset"
            time.sleep(0.001)
        self.next_avail = self.next_used = self.kicked_at = 0
        self.pending.clear()

    def negotiate(self, wanted: int = EVERYTHING) -> bool:
        """Settle the features; tell whether the device agreed."""
        self.put(20, 1, ACKNOWLEDGE)
        self.put(20, 1, ACKNOWLEDGE | DRIVER)
        self.features = self.offered() & wanted
        return self.settle(self.features)

    def settle(self, features: int) -> bool:
        for select in (0, 1):
            self.put(8, 4, select)
            self.put(12, 4, features >> 32 * select & 0xFFFF_FFFF)
        self.put(20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return bool(self.status & FEATURES_OK)

    def set_up_queue(self, size: int, *, enable: int = 1) -> bool:
        self.size = size
        self.free = list(range(size))
        for offset in (self.table, self.avail, self.used):
            self.guest.bytes[offset : offset + 0x2000] = bytes(0x2000)
        self.put(22, 2, 0)
        self.put(24, 2, size)
        for register, offset in ((32, self.table), (40, self.avail), (48, self.used)):
            self.put(register, 4, BASE + offset & 0xFFFF_FFFF)
            self.put(register + 4, 4, BASE + offset >> 32)
        self.put(28, 2, enable)
        return self.get(28, 2) == 1

    def start(
        self, features: int = EVERYTHING, size: int = 16, vectors: tuple[int, int] | None = (0, 1)
    ) -> None:
        """Do all that a driver does from probe to DRIVER_OK."""
        self.reset()
        assert self.negotiate(features)
        if vectors is not None:
            self.put(16, 2, vectors[0])
            self.put(22, 2, 0)
            self.put(26, 2, vectors[1])
        assert self.set_up_queue(size)
        self.put(20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    # Rings.

    def pack(self, offset: int, layout: str, *values: int) -> None:
        struct.pack_into("<" + layout, self.guest.bytes, offset, *values)

    def unpack(self, offset: int, layout: str) -> int:
        value: int = struct.unpack_from("<" + layout, self.guest.bytes, offset)[0]
        return value

    def describe(self, table: int, index: int, *fields: int) -> None:
        """Write a descriptor: address (IOVA), length, flags, next."""
        DESCRIPTOR.pack_into(self.guest.bytes, table + index * DESCRIPTOR.size, *fields)

    def build(
        self, kind: int, sector: int, out: bytes = b"", room: int = 0, *,
        parts: int = 1, indirect: bool = False,
    ) -> Request:  # fmt: skip
        """Lay a request out in memory: header, data in ``parts``, status byte."""
        count = 2 + (parts if out or room else 0)
        slots = [self.free.pop() for _ in range(1 if indirect else count)]
        place = self.buffers + slots[0] * self.stride
        header, status_at, table, data = place, place + 16, place + 32, place + 0x1000
        self.pack(header, "IIQ", kind, 0, sector)
        self.guest.bytes[status_at] = 0xEE
        self.guest.bytes[data : data + len(out)] = out
        length = (len(out) or room) // parts
        spans = [(data + number * length, length) for number in range(count - 2)]
        chain = [(BASE + header, 16, 0)]
        chain += [(BASE + at, size, WRITE * (not out)) for at, size in spans]
        chain.append((BASE + status_at, 1, WRITE))
        order = range(count) if indirect else slots
        for number, (at, fields) in enumerate(zip(order, chain, strict=True)):
            more = number < count - 1
            following = order[number + 1] if more else 0
            address, size, flags = fields
            target = table if indirect else self.table
            self.describe(target, at, address, size, flags | NEXT * more, following)
        if indirect:
            self.describe(self.table, slots[0], BASE + table, count * 16, IN_TABLE, 0)
        return Request(slots, [] if out else spans, status_at)

    def offer(self, request: Request) -> None:
        """Make a request available, without a notification."""
        self.pending[request.head] = request
        self.offer_head(request.head)

    def offer_head(self, head: int) -> None:
        self.pack(self.avail + 4 + 2 * (self.next_avail % self.size), "H", head)
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        self.pack(self.avail + 2, "H", self.next_avail)

    def kick(self, *, always: bool = False) -> None:
        """Notify the device if it wants that."""
        if self.features & EVENT_IDX and not always:
            event = self.unpack(self.used + 4 + 8 * self.size, "H")
            passed = (self.next_avail - event - 1) & 0xFFFF
            if not passed < (self.next_avail - self.kicked_at) & 0xFFFF:
                return
        self.kicked_at = self.next_avail
        self.kicks += 1
        self.put(NOTIFY, 2, 0)

    def collect(self) -> list[Request]:
        """Take what the device has used."""
        done = []
        while self.next_used != self.unpack(self.used + 2, "H"):
            at = self.used + 4 + 8 * (self.next_used % self.size)
            request = self.pending.pop(self.unpack(at, "I"))
            request.written = self.unpack(at + 4, "I")
            request.status = self.guest.bytes[request.status_at]
            request.data = b"".join(
                bytes(self.guest.bytes[at : at + size]) for at, size in request.reads
            )
            self.free += request.slots
            self.next_used = (self.next_used + 1) & 0xFFFF
            done.append(request)
        if self.features & EVENT_IDX:  # interrupt for the next one
            self.pack(self.avail + 4 + 2 * self.size, "H", self.next_used)
        return done

    def wait(self, *requests: Request) -> None:
        """Return when these are answered."""
        deadline = time.monotonic() + DEADLINE
        while any(request.status < 0 for request in requests):
            self.collect()
            assert time.monotonic() < deadline, "the device does not answer"
            time.sleep(0.0002)

    def run(self, *requests: Request) -> Request:
        """Offer requests, notify, and wait for them; return the last one."""
        for request in requests:
            self.offer(request)
        self.kick()
        self.wait(*requests)
        return requests[-1]

    # Whole requests.

    def read(self, sector: int, length: int, *, parts: int = 1, indirect: bool = False) -> bytes:
        request = self.build(IN, sector, room=length, parts=parts, indirect=indirect)
        self.run(request)
        assert (request.status, request.written) == (OK, length + 1)
        return request.data

    def write(self, sector: int, data: bytes, *, parts: int = 1, indirect: bool = False) -> None:
        request = self.run(self.build(OUT, sector, data, parts=parts, indirect=indirect))
        assert (request.status, request.written) == (OK, 1)
