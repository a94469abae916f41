"""The client's memory: what it maps for the device, and how the device reaches it.

Theory of operation
-------------------
DMA_MAP brings a descriptor, and the file behind it is mapped here as well; or it brings none, and
each access is a DMA_READ or DMA_WRITE that the client answers. Both are memory of one IO address
space, so the device's port knows no difference, and its log of writes has both.

An unmap waits for the accesses to what is mapped here, as everywhere (iommu/space.py), and not for
the client's answers: QEMU gives none while one of its threads waits for ours.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio_user
from vfiomig.iommu import Backings, IoSpace, Mapping, Place
from vfiomig.wire import replies
from vfiomig.wire.layouts import DMA_ACCESS

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from vfiomig.descriptors import Fd
    from vfiomig.doors.vfio_user.line import Line
    from vfiomig.wire import Limits, Reply

__all__ = ("ClientMemory", "ClientSpace")

READ = vfio_user.VFIO_USER_F_DMA_REGION_READ
WRITE = vfio_user.VFIO_USER_F_DMA_REGION_WRITE
NOTHING = memoryview(b"")


class ClientMemory:
    """``iommu.Memory`` by messages; its addresses are IOVAs."""

    def __init__(self, line: Line, limits: Limits) -> None:
        self._line = line
        self._most_written = limits.data_out
        # The data of a read are in a message that the client sends.
        self._most_read = limits.in_one_piece(DMA_ACCESS.size)

    def read(self, address: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_into(address, memoryview(data))
        return bytes(data)

    def read_into(self, address: int, view: memoryview) -> int:
        for at in range(0, len(view), self._most_read):
            piece = view[at : at + self._most_read]
            answer = self._ask(vfio_user.VFIO_USER_DMA_READ, address + at, len(piece), into=piece)
            replies.dma_read_untrusted(answer, address + at, len(piece))
        return len(view)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        for at in range(0, len(view), self._most_written):
            piece = view[at : at + self._most_written]
            answer = self._ask(vfio_user.VFIO_USER_DMA_WRITE, address + at, len(piece), piece)
            replies.dma_write_untrusted(answer, address + at, len(piece))

    def asking_nobody(self) -> AbstractContextManager[None]:
        return self._line.asking_nobody()

    def _ask(
        self,
        command: int,
        address: int,
        length: int,
        data: memoryview = NOTHING,
        into: memoryview = NOTHING,
    ) -> Reply:
        answer = self._line.ask(command, DMA_ACCESS.pack(address, length), data, into)
        if answer.errno:
            raise OSError(answer.errno, "the client refuses the access")
        return answer


class ClientSpace(IoSpace):
    """The IO address space of one client: no IOMMU narrows it."""

    def __init__(self, memory: ClientMemory, most_maps: int) -> None:
        super().__init__(limits=())
        self._memory = memory
        self._most_maps = most_maps
        self._backings = Backings()

    def asking_nobody(self) -> AbstractContextManager[None]:
        return self._memory.asking_nobody()

    def map_asked(self, asked: vfio_user.DmaMap, file: Fd | None) -> None:
        """Do what a checked DMA_MAP asks for.

        Raises:
            OSError: EEXIST if it overlaps, ENOSPC for more maps than were agreed on, and what
                mapping the file says.
        """
        self.check(asked.addr, asked.size)
        if len(self) >= self._most_maps:
            raise OSError(errno.ENOSPC, f"there are {self._most_maps} maps already")
        writable = bool(asked.flags & WRITE)
        place = Place(self._memory, asked.addr)
        if file is not None:
            place = self._backings.of_file(
                file, asked.offset, asked.size, writable=writable, any_file=True
            )
        self.map(
            Mapping(
                iova=asked.addr,
                length=asked.size,
                memory=place.memory,
                address=place.address,
                readable=bool(asked.flags & READ),
                writable=writable,
                asks_user=file is None,
            )
        )
