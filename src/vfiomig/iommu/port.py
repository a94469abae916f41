"""A device's way to memory: reads and writes by IOVA.

Theory of operation
-------------------
An access looks its mapping up, moves its bytes and marks what it wrote in the logs, all under the
lock of the IO address space (space.py says why, and when not). Nearly every access lies inside one
mapping and takes the short way through; what does not, or what is long, goes piece by piece.

A write is marked after its bytes are there, and whatever became of it: marked before, a report in
between would forget the page while its old bytes are still in place. Since the logs are looked up
after the bytes as well, a write that is under way when logging starts is in the log. One without
the lock is marked before as well, for the report that comes with an unmap.
"""

from __future__ import annotations

import errno
import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from vfiomig.errors import DeviceError, RequestError
from vfiomig.iommu.table import PageTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfiomig.iommu.dirty import DirtyLog
    from vfiomig.iommu.space import IoSpace, Memory

__all__ = ("DmaPort",)

#: Bytes for which an access keeps others from the address space, at most.
PIECE = 1 << 20
NO_MASTER = "the function may not master the bus: PCI_COMMAND_MASTER is not set"


class DmaPort:
    """DMA of one device. Without an attached space every access fails, as behind an IOMMU.

    A failing access raises ``DeviceError(EFAULT)``: the device's own error, which its author may
    catch; what came before the failing byte has been transferred. Any thread may use it.
    """

    def __init__(self, *, iommu_tracks: bool = True) -> None:
        #: What accesses go through now.
        self.table: PageTable | None = None
        self._attached: PageTable | None = None
        self._masters = True
        self._lock = threading.Lock()
        #: Whether the IOMMU in front of the device can track its writes.
        self.iommu_tracks = iommu_tracks
        #: What the device itself logs its writes in.
        self.logs: tuple[DirtyLog, ...] = ()

    @property
    def space(self) -> IoSpace | None:
        """The IO address space that the device is attached to."""
        return None if self._attached is None else self._attached.space

    @space.setter
    def space(self, space: IoSpace | None) -> None:
        self.attach(None if space is None else PageTable(space))

    def attach(self, table: PageTable | None) -> None:
        """Change the page table; nothing is under way through the former one afterwards."""
        with self._lock:
            self._attached = table
            self._settle_locked()

    @property
    def is_master(self) -> bool:
        """Whether the device may do DMA; who may not leaves memory alone, and fails at nothing."""
        return self._masters

    @property
    def asks_user(self) -> bool:
        """Whether an access may wait for whoever uses the device, who must not wait for it then.

        So a hook for an access of the user's leaves such DMA to a thread.
        """
        return self._attached is not None and self._attached.space.asks_user

    @contextmanager
    def asking_nobody(self) -> Iterator[None]:
        """Let accesses that wait for the user fail at once, and none begin, as in a reset."""
        space = self.space
        with nullcontext() if space is None else space.asking_nobody():
            yield

    def master(self, on: bool) -> None:
        """Let the device do DMA, or not, as a PCI function's bus master bit does."""
        with self._lock:
            self._masters = on
            self._settle_locked()

    def _settle_locked(self) -> None:
        former, self.table = self.table, self._attached if self._masters else None
        if former is not None and former is not self.table:
            with former.space.lock:  # an access that comes later looks at self.table again
                pass

    def read(self, iova: int, length: int) -> bytes:
        """Read ``length`` bytes of the owning program's memory."""
        table = self.table
        if table is not None and length <= PIECE:
            space = table.space
            with space.lock:
                mapping = space.find_locked(iova, length)
                if mapping is not None and mapping.reads_at_once and self.table is table:
                    try:
                        return mapping.memory.read(iova + mapping.shift, length)
                    except OSError as fault:
                        raise _failed("read", iova, fault) from fault
        chunks: list[bytes] = []

        def move(memory: Memory, address: int, _at: int, size: int) -> None:
            chunks.append(memory.read(address, size))

        self._in_pieces(iova, length, move, writes=False)
        return b"".join(chunks)

    def read_into(self, iova: int, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` with the owning program's memory."""
        view = memoryview(buffer).cast("B")
        length = len(view)
        table = self.table
        if table is not None and length <= PIECE:
            space = table.space
            with space.lock:
                mapping = space.find_locked(iova, length)
                if mapping is not None and mapping.reads_at_once and self.table is table:
                    try:
                        _fill(mapping.memory, iova + mapping.shift, view)
                    except OSError as fault:
                        raise _failed("read", iova, fault) from fault
                    return

        def move(memory: Memory, address: int, at: int, size: int) -> None:
            _fill(memory, address, view[at : at + size])

        self._in_pieces(iova, length, move, writes=False)

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Write to the owning program's memory; every byte that was written is logged."""
        length = data.nbytes if isinstance(data, memoryview) else len(data)
        table = self.table
        if table is not None and 0 < length <= PIECE:
            space = table.space
            with space.lock:
                mapping = space.find_locked(iova, length)
                if mapping is not None and mapping.writes_at_once and self.table is table:
                    try:
                        mapping.memory.write(iova + mapping.shift, data)
                    except OSError as fault:
                        raise _failed("write", iova, fault) from fault
                    finally:
                        for log in self.logs:
                            log.mark(iova, length)
                        if table.log is not None:
                            table.log.mark(iova, length)
                    return
        view = memoryview(data).cast("B")

        def move(memory: Memory, address: int, at: int, size: int) -> None:
            memory.write(address, view[at : at + size])

        self._in_pieces(iova, length, move, writes=True)

    def _in_pieces(
        self,
        iova: int,
        length: int,
        move: Callable[[Memory, int, int, int], None],
        *,
        writes: bool,
    ) -> None:
        """Make an access mapping by mapping: ``move(memory, address, bytes before, size)``."""
        done = 0
        try:
            while done < length:
                done += self._piece(iova + done, length - done, done, move, writes=writes)
        except OSError as fault:
            raise _failed("write" if writes else "read", iova, fault) from fault

    def _piece(
        self,
        iova: int,
        left: int,
        done: int,
        move: Callable[[Memory, int, int, int], None],
        *,
        writes: bool,
    ) -> int:
        table = self.table
        if table is None:
            reason = "no IO address space is attached" if self._masters else NO_MASTER
            raise RequestError(errno.EFAULT, f"{reason} (IOVA {iova:#x})")
        with table.space.lock:
            if self.table is not table:
                return 0  # attached elsewhere meanwhile: look there
            mapping = table.space.find_locked(iova, 1)
            if mapping is None:
                raise RequestError(errno.EFAULT, f"nothing is mapped at IOVA {iova:#x}")
            if not (mapping.writable if writes else mapping.readable):
                verb = "written" if writes else "read"
                raise RequestError(errno.EFAULT, f"the mapping of {iova:#x} may not be {verb}")
            size = min(left, mapping.end - iova, PIECE)
            if not mapping.asks_user:
                try:
                    move(mapping.memory, iova + mapping.shift, done, size)
                finally:
                    self._mark(table, iova, size * writes)
                return size
        self._mark(table, iova, size * writes)
        try:
            move(mapping.memory, iova + mapping.shift, done, size)
        finally:
            self._mark(table, iova, size * writes)
        return size

    def _mark(self, table: PageTable, iova: int, written: int) -> None:
        if written:
            for log in (*self.logs, *filter(None, (table.log,))):
                log.mark(iova, written)


def _fill(memory: Memory, address: int, view: memoryview) -> None:
    if memory.read_into(address, view) != len(view):
        raise RequestError(errno.EFAULT, "the memory behind the mapping is not there any more")


def _failed(verb: str, iova: int, fault: OSError) -> DeviceError:
    return DeviceError(errno.EFAULT, f"DMA {verb} at IOVA {iova:#x}: {fault}")
