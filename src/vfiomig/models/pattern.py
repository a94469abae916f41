"""``pattern``: a synthetic device of any size, dirty rate and capability set.

Theory of operation
-------------------
Its state is memory in blocks (``block_memory``) and BAR0. While it runs, and only then, a thread
may rewrite the memory piece by piece. A saving session keeps a flag per block that has yet to be
sent (``block_stream.Outgoing``): sending clears it, rewriting sets it again. Where nothing is
rewritten, and always in STOP_COPY, what is yielded is the memory itself in long runs; beside the
rewriting thread it is copies of single blocks, so that a buffer stays as it was handed out.
"""

from __future__ import annotations

import hashlib
import time
from math import ceil
from typing import TYPE_CHECKING, Final

from vfiomig.device import Buffer, Device, PrecopyInfo, Region, StateReader
from vfiomig.errors import SpecError
from vfiomig.fsm import SAVING_GROUP, Capability, State, parse_capabilities
from vfiomig.models import block_stream
from vfiomig.models.block_memory import BLOCK, BlockMemory
from vfiomig.models.block_stream import RUN, Outgoing, pack_header, pack_record, pack_tail
from vfiomig.models.rewriter import Rewriter

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Pattern",)

MODEL: Final = "pattern"
BAR0_SIZE: Final = 4096
#: Blocks that are copied before they are handed over together.
COPIED: Final = 8
PIECE: Final = 64 << 10
#: A slow rate is kept by smaller pieces, so many in a second.
PIECES_PER_SECOND: Final = 50
#: Pollers are told of new data at most this often while none of it is read.
DATA_READY_SECONDS: Final = 0.01


class Pattern(Device):
    """A synthetic device: pseudo-random memory and a BAR0 of 4 KiB.

    Keys:
      size     bytes of memory, K, M, G allowed (64M)
      seed     number that the power-on content follows from (0)
      caps     capability set: stop-copy+p2p+pre-copy, some of them, all, or none (all)
      dirty    bytes of its memory rewritten per second while it runs, K, M, G allowed (0)
      precopy  share of the state that is offered before STOP_COPY, 0 to 1 (1)
      poll     none: the data_fd does not answer poll(), as with most drivers (it does)
    """

    bar0 = Region(size=BAR0_SIZE)
    capabilities = Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY

    def __init__(
        self,
        size: int = 64 << 20,
        seed: int = 0,
        caps: str = "all",
        dirty: int = 0,
        precopy: float = 1.0,
        poll: str = "",
    ) -> None:
        if size < 1:
            raise SpecError(f"size={size}: the device has at least one byte")
        if not 0 <= seed < 1 << 64:
            raise SpecError(f"seed={seed}: give a number of at most 64 bits, 0 or greater")
        if dirty < 0:
            raise SpecError(f"dirty={dirty}: give bytes per second, 0 or greater")
        if not 0 <= precopy <= 1:
            raise SpecError(f"precopy={precopy}: give a share of the state from 0 to 1")
        if poll not in {"", "none"}:
            raise SpecError(f"poll={poll}: the only value is none; leave it out otherwise")
        self.capabilities = Capability(0) if caps == "none" else parse_capabilities(caps)
        self.poll = poll != "none"
        self._power_on_seed = self._seed = seed
        self._memory = BlockMemory(size, seed)
        self._offered = ceil(precopy * self._memory.blocks)
        self._rewriter = Rewriter(dirty, self._rewrite) if dirty else None
        self._piece = max(1, min(PIECE, dirty // PIECES_PER_SECOND))
        self._rewrite_at = 0
        self._tell_at = 0.0
        self._outgoing: Outgoing | None = None  # of the saving session
        self._precopied: Outgoing | None = None  # the same, from precopy() to save()

    # What its owner may ask, beside the protocol.

    @property
    def nbytes(self) -> int:
        """Bytes that ``digest`` covers: the memory and BAR0."""
        return self._memory.size + BAR0_SIZE

    def digest(self) -> str:
        """SHA-256 of the memory and BAR0, in hex. Ask while the device is stopped."""
        sha256 = hashlib.sha256()
        for first in range(0, self._memory.blocks, RUN):
            sha256.update(self._memory.view(first, min(RUN, self._memory.blocks - first)))
        sha256.update(self.bar0)
        return sha256.hexdigest()

    # Run levels. P2P quiescent still runs: the device has no peer-to-peer traffic to hold back.

    def start(self) -> None:
        if self._rewriter is not None:
            self._rewriter.start()

    quiesce = start

    def stop(self) -> None:
        if self._rewriter is not None:
            self._rewriter.stop()

    def step(self, origin: State, target: State) -> None:
        if origin not in SAVING_GROUP or target not in SAVING_GROUP:
            self._outgoing = self._precopied = None

    def reset(self) -> None:
        ran = self._rewriter is not None and self._rewriter.stop()
        self._seed = self._power_on_seed
        self._memory.restart(self._seed)
        self.bar0[:] = bytes(BAR0_SIZE)
        self._outgoing = self._precopied = None
        if ran:
            self.start()

    def _rewrite(self) -> int:
        """Rewrite the next piece; called by the rewriting thread."""
        memory, start = self._memory, self._rewrite_at
        block = start // BLOCK
        end = block * BLOCK + memory.length(block)
        size = min(self._piece, end - start)
        with memory.lock:
            memory.rewrite_locked(start, size)
            outgoing = self._outgoing
            if outgoing is not None:
                outgoing.changed(block)
        self._rewrite_at = (start + size) % memory.size
        if start + size == end:
            memory.measure(block, 1)
        if outgoing is not None and outgoing.at_temporary_end:
            self._tell(outgoing)
        return size

    def _tell(self, outgoing: Outgoing) -> None:
        """Wake pollers. Until somebody reads: the session may hear it before it is at its end."""
        if outgoing.changes_offered and time.monotonic() >= self._tell_at:
            self._tell_at = time.monotonic() + DATA_READY_SECONDS
            self.data_ready()

    # Saving.

    def precopy(self) -> Iterator[Buffer]:
        self._outgoing = self._precopied = self._session(self._offered)
        return self._send_precopy(self._outgoing)

    def save(self) -> Iterator[Buffer]:
        outgoing = self._precopied or self._session(0)
        self._outgoing, self._precopied = outgoing, None
        return self._send_rest(outgoing)

    def precopy_info(self) -> PrecopyInfo:
        outgoing = self._outgoing or self._session(self._offered)
        with self._memory.lock:
            return PrecopyInfo(outgoing.initial_bytes(), outgoing.dirty_bytes())

    def state_size(self) -> int:
        outgoing = self._outgoing or self._session(0)
        with self._memory.lock:
            return outgoing.all_bytes()

    def _session(self, offered: int) -> Outgoing:
        return Outgoing(self._memory, offered, block_stream.tail_bytes(self._memory, BAR0_SIZE))

    def _send_precopy(self, outgoing: Outgoing) -> Iterator[Buffer]:
        yield from self._send_header(outgoing)
        # Now, not while the device is down; of blocks that are sent now, one by one.
        self._memory.know_checksums(outgoing.offered, self._memory.blocks - outgoing.offered)
        while True:
            yield from self._send_blocks(outgoing, outgoing.offered)
            outgoing.at_temporary_end = True
            yield b""
            outgoing.at_temporary_end = False

    def _send_rest(self, outgoing: Outgoing) -> Iterator[Buffer]:
        outgoing.rewind()
        yield from self._send_header(outgoing)
        yield from self._send_blocks(outgoing, self._memory.blocks)
        outgoing.tail = 0
        yield pack_tail(self._memory, bytes(self.bar0))

    def _send_header(self, outgoing: Outgoing) -> Iterator[Buffer]:
        if outgoing.header:
            outgoing.header = 0
            yield pack_header(self._memory, MODEL, self._seed)

    def _send_blocks(self, outgoing: Outgoing, limit: int) -> Iterator[Buffer]:
        """Send the blocks below ``limit`` that wait for it, until none is left."""
        while (run := self._next_run(outgoing, limit)) is not None:
            first, count = run
            if self._precopied is outgoing:
                self._memory.know_checksums(first, count)
            yield pack_record(first, count)
            if self._rewriter is not None and self._precopied is outgoing:
                yield from self._copies(outgoing, first, count)
                continue
            view = self._memory.view(first, count)
            with self._memory.lock:
                outgoing.sent(first, count)
            yield view

    def _next_run(self, outgoing: Outgoing, limit: int) -> tuple[int, int] | None:
        with self._memory.lock:
            return outgoing.next_run(limit)

    def _copies(self, outgoing: Outgoing, first: int, count: int) -> Iterator[Buffer]:
        """Copy blocks out one by one, each as it is at one moment; hand over some at a time."""
        buffer = memoryview(bytearray(COPIED * BLOCK))
        for start in range(first, first + count, COPIED):
            size = 0
            for block in range(start, min(start + COPIED, first + count)):
                with self._memory.lock:
                    outgoing.sent(block, 1)
                    size += self._memory.copy_locked(block, buffer[size:])
            yield buffer[:size]

    # Loading.

    def load(self, state: StateReader) -> None:
        loaded = block_stream.load(state, MODEL, self._memory, BAR0_SIZE)
        self._seed = loaded.seed
        self._memory.adopt(loaded.seed)
        self.bar0[:] = loaded.bar0
