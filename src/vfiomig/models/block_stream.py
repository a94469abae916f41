"""The state of ``pattern`` as bytes: how it is framed, what has yet to be sent, how it is read.

Theory of operation
-------------------
::

    header   what the state is of: model, version, block size, size, seed; its CRC-32
    record   "BLKS", first block, number of blocks; its CRC-32; the blocks' bytes    any number
    tail     "TAIL", 0, number of blocks; its CRC-32; BAR0; the CRC-32 of every block;
             the CRC-32 of BAR0 and that table

Numbers are little endian. Blocks may come more than once, as pre-copy sends what changed again:
the last one counts. Nothing in the stream tells one device from another of the same parameters,
nor when it was made, so a state that moves on unchanged is framed into the same bytes.

What is wrong with the framing is refused as soon as it is read. Damage to a block is found at the
end, by comparing the checksums of what is in the memory: they are computed by a thread of their
own while more blocks arrive.
"""

from __future__ import annotations

import re
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

from vfiomig.errors import StateRejected
from vfiomig.models.block_memory import BLOCK, BlockMemory
from vfiomig.models.sealed import CHECKSUM, identity, read_header, read_sealed, sealed

if TYPE_CHECKING:
    from vfiomig.device import StateReader

__all__ = ("Header", "Loaded", "Outgoing", "load", "pack_header", "pack_record", "pack_tail")

VERSION: Final = 1
HEADER: Final = struct.Struct("<24sIIQQ")
RECORD: Final = struct.Struct("<4sII")
BLOCKS: Final = b"BLKS"
TAIL: Final = b"TAIL"
HEADER_BYTES: Final = HEADER.size + CHECKSUM.size
RECORD_BYTES: Final = RECORD.size + CHECKSUM.size
#: A record holds at most so many blocks: one view that a door hands over without asking again.
RUN: Final = 64
#: Blocks that are read before their checksums are computed.
READ_AHEAD: Final = 16

_PENDING_RUN = re.compile(rb"\x01{1,%d}" % RUN)


class Header(NamedTuple):
    """What a state is of, beside the model."""

    version: int
    block: int
    size: int
    seed: int


class Loaded(NamedTuple):
    """What a state holds beside the blocks, which are in the memory already."""

    seed: int
    bar0: bytes


def pack_header(memory: BlockMemory, model: str, seed: int) -> bytes:
    return sealed(HEADER.pack(identity(model), VERSION, BLOCK, memory.size, seed))


def pack_record(first: int, count: int) -> bytes:
    return sealed(RECORD.pack(BLOCKS, first, count))


def pack_tail(memory: BlockMemory, bar0: bytes) -> bytes:
    checksums = struct.pack(f"<{memory.blocks}I", *map(memory.checksum, range(memory.blocks)))
    return sealed(RECORD.pack(TAIL, 0, memory.blocks)) + sealed(bar0 + checksums)


def tail_bytes(memory: BlockMemory, bar0: int) -> int:
    return RECORD_BYTES + bar0 + CHECKSUM.size * (memory.blocks + 1)


class Outgoing:
    """What a saving session has yet to send. Its methods want the memory's lock.

    ``offered`` blocks, from the first on, are for pre-copy; the others wait for STOP_COPY.
    """

    def __init__(self, memory: BlockMemory, offered: int, tail: int) -> None:
        self._memory = memory
        self._pending = bytearray(b"\1") * memory.blocks
        self._next = 0  # where the search for the next run begins
        self._sent_once = 0  # blocks from here on were never sent
        self.offered = offered
        self.header = HEADER_BYTES
        self.tail = tail
        self.at_temporary_end = False

    def next_run(self, limit: int) -> tuple[int, int] | None:
        """Choose blocks below ``limit`` to send: (first, count); ``None`` when none is left."""
        run = _PENDING_RUN.search(self._pending, self._next, limit)
        if run is None:
            run = _PENDING_RUN.search(self._pending, 0, min(self._next, limit))
        return (run.start(), run.end() - run.start()) if run else None

    def rewind(self) -> None:
        """Search from the first block on, so that runs are as long as they can be."""
        self._next = 0

    def sent(self, first: int, count: int) -> None:
        self._pending[first : first + count] = bytes(count)
        self._next = first + count
        self._sent_once = max(self._sent_once, self._next)

    def changed(self, block: int) -> None:
        """Have a block sent again."""
        self._pending[block] = 1

    @property
    def changes_offered(self) -> bool:
        """Whether something that pre-copy may send has changed since."""
        return self._pending.find(1, 0, self.offered) >= 0

    def initial_bytes(self) -> int:
        """What pre-copy has yet to send for the first time."""
        return self.header + self._bytes(self._sent_once, max(self._sent_once, self.offered))

    def dirty_bytes(self) -> int:
        """What pre-copy has to send again."""
        return self._bytes(0, min(self._sent_once, self.offered))

    def all_bytes(self) -> int:
        """What the session has yet to send until it ends."""
        return self.header + self._bytes(0, self._memory.blocks) + self.tail

    def _bytes(self, start: int, stop: int) -> int:
        records = sum(1 for _ in _PENDING_RUN.finditer(self._pending, start, stop))
        size = self._pending.count(1, start, stop) * BLOCK + records * RECORD_BYTES
        last = self._memory.blocks - 1
        if start <= last < stop and self._pending[last]:
            size -= BLOCK - self._memory.length(last)
        return size


def load(state: StateReader, model: str, memory: BlockMemory, bar0_size: int) -> Loaded:
    """Read a whole state into ``memory``; may raise ``StateRejected`` only, whatever comes."""
    header = _read_header(state, model, memory)
    verifier = ThreadPoolExecutor(1, "vfiomig-verify")
    try:
        measured = _read_blocks(state, memory, verifier)
        content = read_sealed(state, bar0_size + CHECKSUM.size * memory.blocks, "tail")
        if state.read(1):
            raise StateRejected("bytes follow the end of the state")
        for future in measured:
            future.result()
    finally:
        verifier.shutdown(cancel_futures=True)
    expected = struct.unpack(f"<{memory.blocks}I", content[bar0_size:])
    for block in range(memory.blocks):
        if memory.checksum(block) != expected[block]:
            raise StateRejected(f"block {block} of the state is damaged")
    return Loaded(header.seed, content[:bar0_size])


def _read_header(state: StateReader, model: str, memory: BlockMemory) -> Header:
    header = Header(*read_header(state, HEADER, model))
    own = Header(VERSION, BLOCK, memory.size, header.seed)
    for field, theirs, ours in zip(Header._fields, header, own, strict=True):
        if theirs != ours:
            raise StateRejected(f"the state has {field} {theirs}, this device {ours}")
    return header


def _read_blocks(
    state: StateReader, memory: BlockMemory, verifier: ThreadPoolExecutor
) -> list[Future[None]]:
    """Read records until the tail; return the measuring of what came."""
    missing = bytearray(b"\1") * memory.blocks
    measured = []
    while True:
        kind, first, count = RECORD.unpack(read_sealed(state, RECORD.size, "record"))
        end = first + count
        if kind == TAIL and not first and count == memory.blocks:
            break
        if kind != BLOCKS or not count or end > memory.blocks:
            raise StateRejected(f"a record of the state makes no sense: {kind!r} {first} {count}")
        for start in range(first, end, READ_AHEAD):
            some = min(READ_AHEAD, end - start)
            view = memory.overwritten(start, some)
            if state.readinto(view) < len(view):
                raise StateRejected(f"the state ends in the blocks from {start} on")
            measured.append(verifier.submit(memory.measure, start, some))
        missing[first:end] = bytes(count)
    if (block := missing.find(1)) >= 0:
        raise StateRejected(f"the state lacks block {block}")
    return measured
