"""The state of ``virtio_blk`` as bytes: how it is framed, what has yet to be sent, how it is read.

Theory of operation
-------------------
::

    header   what the state is of: model, version, kind of disk, its size; its CRC-32
    record   "BLKS", first block, number of blocks, CRC-32 of their bytes; its CRC-32; the bytes
    tail     "TAIL", 0, its length, CRC-32 of its content; its CRC-32; the content

Numbers are little endian. There are records for a disk in memory only, any number of them, and
of a block that comes more than once the last one counts. A block that never comes is zero.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Final

from vfiomig.errors import StateRejected
from vfiomig.models.sealed import (
    CHECKSUM,
    identity,
    read_exactly,
    read_header,
    read_sealed,
    sealed,
)
from vfiomig.models.virtio_disk import BLOCK, RUN, FileDisk, MemoryDisk, Unsent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig.device import Buffer, StateReader

__all__ = ("Outgoing", "load")

MODEL: Final = "virtio_blk"
VERSION: Final = 1
HEADER: Final = struct.Struct("<24sI8sIQ")
RECORD: Final = struct.Struct("<4sIII")
BLOCKS: Final = b"BLKS"
TAIL: Final = b"TAIL"
#: No tail is longer; what it holds is the transport's.
TAIL_LIMIT: Final = 1 << 16
HEADER_BYTES: Final = HEADER.size + CHECKSUM.size
RECORD_BYTES: Final = RECORD.size + CHECKSUM.size


def _header(disk: MemoryDisk | FileDisk) -> bytes:
    kind = b"memory" if isinstance(disk, MemoryDisk) else b"file"
    return sealed(HEADER.pack(identity(MODEL), VERSION, kind, BLOCK, disk.size))


def _record(kind: bytes, first: int, count: int, content: Buffer) -> bytes:
    return sealed(RECORD.pack(kind, first, count, zlib.crc32(content)))


class Outgoing:
    """A saving session: ``early`` while the device may run, then ``rest``."""

    def __init__(self, disk: MemoryDisk | FileDisk, unsent: Unsent | None, tail: int) -> None:
        self._disk = disk
        self._unsent = unsent
        self._tail = tail
        self._header = _header(disk)
        self.at_temporary_end = False

    def sizes(self) -> tuple[int, int, int]:
        """Bytes for early to send for the first time, and again; bytes for rest if it came now."""
        new, changed, runs = self._unsent.sizes() if self._unsent is not None else (0, 0, 0)
        framing = runs * RECORD_BYTES
        initial, dirty = (new + framing, changed) if new else (0, changed and changed + framing)
        initial += len(self._header)
        return initial, dirty, initial + dirty + RECORD_BYTES + self._tail

    def early(self) -> Iterator[Buffer]:
        """Send what there is, copied, as the device may write there; again and again."""
        copy = memoryview(bytearray(RUN * BLOCK if self._unsent is not None else 0))
        yield from self._send_header()
        while True:
            for first, count, view in self._runs():
                content = copy[: len(view)]
                content[:] = view
                yield _record(BLOCKS, first, count, content)
                yield content
            self.at_temporary_end = True
            yield b""
            self.at_temporary_end = False

    def rest(self, tail: bytes) -> Iterator[Buffer]:
        """Send the rest, of a device that is stopped."""
        yield from self._send_header()
        for first, count, view in self._runs():
            yield _record(BLOCKS, first, count, view)
            yield view
        self._tail = 0
        yield _record(TAIL, 0, len(tail), tail)
        yield tail

    def _send_header(self) -> Iterator[Buffer]:
        header, self._header = self._header, b""
        if header:
            yield header

    def _runs(self) -> Iterator[tuple[int, int, memoryview]]:
        if self._unsent is not None:
            assert isinstance(self._disk, MemoryDisk)
            while (run := self._unsent.next_run()) is not None:
                yield *run, self._disk.content(*run)


def load(state: StateReader, disk: MemoryDisk | FileDisk) -> bytes:
    """Read a whole state: the content into ``disk``, and return the tail.

    Raises:
        StateRejected: whatever is wrong with it.
    """
    _check_header(state, disk)
    if isinstance(disk, MemoryDisk):
        disk.clear()
    while True:
        kind, first, count, checksum = RECORD.unpack(read_sealed(state, RECORD.size, "record"))
        if kind == TAIL and not first and count <= TAIL_LIMIT:
            break
        if kind != BLOCKS or not isinstance(disk, MemoryDisk):
            raise StateRejected(f"a record of the state makes no sense: {kind!r} {first} {count}")
        if not 0 < count <= RUN or first + count > disk.blocks:
            raise StateRejected(f"the state has blocks {first} to {first + count - 1}")
        view = disk.overwritten(first, count)
        if state.readinto(view) < len(view):
            raise StateRejected(f"the state ends in the blocks from {first} on")
        if zlib.crc32(view) != checksum:
            raise StateRejected(f"a block from {first} on is damaged in the state")
    tail = read_exactly(state, count, "tail")
    if zlib.crc32(tail) != checksum:
        raise StateRejected("the tail of the state is damaged")
    if state.read(1):
        raise StateRejected("bytes follow the end of the state")
    return tail


def _check_header(state: StateReader, disk: MemoryDisk | FileDisk) -> None:
    names = ("version", "kind of disk", "block", "size")
    theirs = read_header(state, HEADER, MODEL)
    _, *ours = HEADER.unpack_from(_header(disk))
    for name, their, our in zip(names, theirs, ours, strict=True):
        if their != our:
            raise StateRejected(f"the state has {name} {_text(their)}, this device {_text(our)}")


def _text(value: bytes | int) -> str:
    return value.rstrip(b"\0").decode(errors="replace") if isinstance(value, bytes) else str(value)
