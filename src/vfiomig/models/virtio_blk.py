"""``virtio_blk``: a virtio 1.x block device that a guest's stock driver uses by DMA.

Theory of operation
-------------------
The transport, the rings and the question of who answers when are those of ``virtio_pci``. Here
is what a request means: a header of 16 bytes, data, and a status byte in the last place that the
device may write. A request that cannot be carried out, because it leaves the disk, writes what
is read-only, or names memory that is not there, fails with VIRTIO_BLK_S_IOERR; one whose header
or status byte is missing breaks the ring. See "Block Device" in the VIRTIO specification, 1.2.

A driver that does not ask for VIRTIO_BLK_F_FLUSH knows no flush, so each of its writes to a file
is durable before it is acknowledged.

The content of a memory disk travels in the state, in pre-copy what was ever written and then what
is written again (``virtio_stream``). A file does not: it is storage that both sides reach.
"""

from __future__ import annotations

import errno
import struct
import time
from typing import TYPE_CHECKING, Final

from vfiomig.device import Buffer, PciIdentity, PrecopyInfo, StateReader
from vfiomig.errors import DeviceError, SpecError
from vfiomig.fsm import SAVING_GROUP, Capability, State, parse_capabilities
from vfiomig.models import virtio_stream
from vfiomig.models.virtio_disk import SECTOR, FileDisk, MemoryDisk, Segments
from vfiomig.models.virtio_pci import QUEUE_SIZE, VirtioPci, virtio_capabilities
from vfiomig.models.virtio_registers import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
)
from vfiomig.models.virtqueue import Chain, RingBroken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("VirtioBlk",)

VIRTIO_BLK_F_SEG_MAX: Final = 1 << 2
VIRTIO_BLK_F_RO: Final = 1 << 5
VIRTIO_BLK_F_BLK_SIZE: Final = 1 << 6
VIRTIO_BLK_F_FLUSH: Final = 1 << 9
FEATURES: Final = (
    VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX
    | VIRTIO_BLK_F_SEG_MAX | VIRTIO_BLK_F_BLK_SIZE | VIRTIO_BLK_F_FLUSH
)  # fmt: skip

VIRTIO_BLK_T_IN: Final = 0
VIRTIO_BLK_T_OUT: Final = 1
VIRTIO_BLK_T_FLUSH: Final = 4
VIRTIO_BLK_T_GET_ID: Final = 8
VIRTIO_BLK_S_OK: Final = 0
VIRTIO_BLK_S_IOERR: Final = 1
VIRTIO_BLK_S_UNSUPP: Final = 2
VIRTIO_BLK_ID_BYTES: Final = 20

REQUEST: Final = struct.Struct("<IIQ")  # struct virtio_blk_req: type, reserved, sector
#: struct virtio_blk_config up to num_queues: capacity, then seg_max and blk_size among zeroes.
CONFIG: Final = struct.Struct("<Q4xI4xI8x4x")
#: Header and status byte have a descriptor each.
SEG_MAX: Final = QUEUE_SIZE - 2

DEFAULT_SIZE: Final = 64 << 20
#: A request with more data is not answered by whoever notified, but by the device's own thread.
SHORT: Final = 256 << 10
#: Pollers are told of new data at most this often while none of it is read.
DATA_READY_SECONDS: Final = 0.01


class VirtioBlk(VirtioPci):
    """A virtio 1.x block device for the stock driver of a guest, over memory or a file.

    Keys:
      size      bytes of memory, K, M, G allowed, that are part of the state (64M)
      path      a file or block device instead, not part of the state: both sides open it (none)
      readonly  yes: writes fail (no)
      serial    what the guest reads as its serial number, up to 20 characters (vfiomig)
      caps      capability set: stop-copy+p2p+pre-copy, some of them, all, or none (all)
      iommu     yes: offer VIRTIO_F_ACCESS_PLATFORM, for guests that have an IOMMU (no)
    """

    pci = PciIdentity(
        vendor=0x1AF4, device=0x1042, subsystem_vendor=0x1AF4, subsystem=0x1100,
        class_code=0x010000, revision=1,
    )  # fmt: skip
    pci_capabilities = virtio_capabilities(1, CONFIG.size)
    capabilities = Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY

    def __init__(
        self,
        size: int = 0,
        path: str = "",
        readonly: bool = False,
        serial: str = "vfiomig",
        caps: str = "all",
        iommu: bool = False,
    ) -> None:
        if path and size:
            raise SpecError("give path=FILE or size=BYTES, not both")
        if len(serial.encode()) > VIRTIO_BLK_ID_BYTES:
            raise SpecError(f"serial={serial}: at most {VIRTIO_BLK_ID_BYTES} bytes")
        self.capabilities = Capability(0) if caps == "none" else parse_capabilities(caps)
        self._disk = FileDisk(path, readonly=readonly) if path else MemoryDisk(size or DEFAULT_SIZE)
        self._readonly = readonly
        self._serial = serial.encode().ljust(VIRTIO_BLK_ID_BYTES, b"\0")
        self._outgoing: virtio_stream.Outgoing | None = None  # of the saving session
        self._precopied: virtio_stream.Outgoing | None = None  # the same, from precopy to save
        self._tell_at = 0.0
        self._partly_loaded = False
        features = FEATURES | VIRTIO_BLK_F_RO * readonly | VIRTIO_F_ACCESS_PLATFORM * iommu
        super().__init__(features, CONFIG.pack(self._disk.size // SECTOR, SEG_MAX, SECTOR))

    # Requests.

    def answer(self, chain: Chain, *, may_wait: bool) -> int | None:
        header, outgoing = _cut(chain.readable, REQUEST.size)
        kind, _, sector = REQUEST.unpack(b"".join([self.dma.read(*part) for part in header]))
        incoming, status_byte = _cut(chain.writable, _total(chain.writable) - 1)
        carry_out = REQUESTS.get(kind)
        status, written = VIRTIO_BLK_S_UNSUPP, 0
        if carry_out is not None:
            data = incoming if kind != VIRTIO_BLK_T_OUT else outgoing
            try:
                moved = carry_out(self, sector, data, may_wait)
            except OSError:  # of the disk, or of the place in memory
                status = VIRTIO_BLK_S_IOERR
            else:
                if moved is None:
                    return None
                status, written = VIRTIO_BLK_S_OK, moved
        self.dma.write(status_byte[0][0], bytes((status,)))
        return written + 1

    # Each returns the bytes that it wrote to the driver's memory; None: not without a wait.

    def _read(self, sector: int, data: Segments, may_wait: bool) -> int | None:
        length = self._check(sector, data)
        if may_wait:
            self._disk.read(self.dma, sector * SECTOR, data)
        elif length > SHORT or not self._disk.read_cached(self.dma, sector * SECTOR, data):
            return None
        return length

    def _write(self, sector: int, data: Segments, may_wait: bool) -> int | None:
        length = self._check(sector, data)
        if self._readonly:
            raise DeviceError(errno.EROFS, "the disk is read-only")
        self._disk.durable_writes = not self.common.features & VIRTIO_BLK_F_FLUSH
        if may_wait:
            self._disk.write(self.dma, sector * SECTOR, data)
        elif length > SHORT or not self._disk.write_cached(self.dma, sector * SECTOR, data):
            return None
        self._tell()
        return 0

    def _flush(self, sector: int, data: Segments, may_wait: bool) -> int | None:  # noqa: ARG002 - one signature for all
        if not may_wait and not self._disk.prompt:
            return None
        self._disk.flush()
        return 0

    def _get_id(self, sector: int, data: Segments, may_wait: bool) -> int:  # noqa: ARG002 - as above
        at = 0
        for address, length in data:
            piece = self._serial[at : at + length]
            self.dma.write(address, piece)
            at += len(piece)
        return at

    def _check(self, sector: int, data: Segments) -> int:
        """Return the length of a transfer that lies on the disk."""
        length = _total(data)
        if length % SECTOR or sector * SECTOR + length > self._disk.size:
            raise DeviceError(errno.EIO, f"{length} bytes at sector {sector} are not on the disk")
        return length

    # Run levels.

    def start(self) -> None:
        self._disk.open()
        super().start()

    def stop(self) -> None:
        super().stop()
        self._disk.close()

    def step(self, origin: State, target: State) -> None:
        if origin not in SAVING_GROUP or target not in SAVING_GROUP:
            self._end_session()

    def reset(self) -> None:
        """Forget the driver, not what is on the disk, unless that is a part of another's."""
        super().reset()
        self._end_session()
        if self._partly_loaded and isinstance(self._disk, MemoryDisk):
            self._disk.clear()
        self._partly_loaded = False

    # Sessions.

    def precopy(self) -> Iterator[Buffer]:
        self._outgoing = self._precopied = self._session()
        return self._outgoing.early()

    def save(self) -> Iterator[Buffer]:
        self._outgoing, self._precopied = self._precopied or self._session(), None
        return self._outgoing.rest(self.save_transport())

    def precopy_info(self) -> PrecopyInfo:
        initial, dirty, _ = (self._outgoing or self._preview()).sizes()
        return PrecopyInfo(initial, dirty)

    def state_size(self) -> int:
        return (self._outgoing or self._preview()).sizes()[2]

    def load(self, state: StateReader) -> None:
        self._partly_loaded = True
        self.load_transport(virtio_stream.load(state, self._disk))
        self._partly_loaded = False

    def _session(self) -> virtio_stream.Outgoing:
        unsent = self._disk.begin() if isinstance(self._disk, MemoryDisk) else None
        return virtio_stream.Outgoing(self._disk, unsent, self.transport_size())

    def _preview(self) -> virtio_stream.Outgoing:
        """A session that would begin now, to ask it for sizes."""
        unsent = self._disk.unsent() if isinstance(self._disk, MemoryDisk) else None
        return virtio_stream.Outgoing(self._disk, unsent, self.transport_size())

    def _end_session(self) -> None:
        self._outgoing = self._precopied = None
        if isinstance(self._disk, MemoryDisk):
            self._disk.end()

    def _tell(self) -> None:
        """Wake pollers. Until somebody reads: the session may hear it before it is at its end."""
        outgoing = self._outgoing
        if outgoing is not None and outgoing.at_temporary_end:
            now = time.monotonic()
            if now >= self._tell_at:
                self._tell_at = now + DATA_READY_SECONDS
                self.data_ready()


REQUESTS: Final[dict[int, Callable[[VirtioBlk, int, Segments, bool], int | None]]] = {
    VIRTIO_BLK_T_IN: VirtioBlk._read,
    VIRTIO_BLK_T_OUT: VirtioBlk._write,
    VIRTIO_BLK_T_FLUSH: VirtioBlk._flush,
    VIRTIO_BLK_T_GET_ID: VirtioBlk._get_id,
}


def _total(segments: Segments) -> int:
    return sum([length for _, length in segments])


def _cut(segments: Segments, length: int) -> tuple[Segments, Segments]:
    """Cut memory in two behind ``length`` bytes; empty parts are left out.

    Raises:
        RingBroken: there are not as many.
    """
    for at, (address, size) in enumerate(segments):
        if 0 <= length <= size:
            first = [*segments[:at], (address, length)] if length else segments[:at]
            rest = [(address + length, size - length)] if length < size else []
            return first, rest + segments[at + 1 :]
        length -= size
    raise RingBroken("a request has no room for its header or its status byte")
