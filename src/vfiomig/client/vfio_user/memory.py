"""The memory that the server's device may reach, and the answers to its reads and writes there.

Theory of operation
-------------------
The iommufd is this process's own (``core.iommufd``): it checks every request as the kernel does,
and holds the IO address space. What is mapped there goes to the server as well, with the
descriptor of the file behind the memory where one shared file is behind all of it. Other memory,
and a file that the server cannot map, it reaches by messages, DMA_READ and DMA_WRITE. They are
answered from the same address space, with the same checks as an access by a device of this
process, at any time: the channel's attendant is there from the first mapping on.

What a server writes by messages is logged here. What it writes into a file that it maps, only the
server can know; when such memory is taken away while its writes are logged, what it wrote comes
along with the answer.
"""

from __future__ import annotations

import errno
import threading
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from vfiomig.abi import iommufd, vfio_iommu, vfio_user
from vfiomig.client.dma import dirty_ranges
from vfiomig.client.vfio_user.channel import done
from vfiomig.core.ioas import Ioas
from vfiomig.core.iommufd import Iommufd
from vfiomig.errors import RequestError
from vfiomig.iommu import DirtyLog, DmaPort, IoSpace, Mapping
from vfiomig.iommu.backing import open_file_behind
from vfiomig.iommu.dirty import bitmap_size
from vfiomig.iommu.limits import Limit
from vfiomig.wire import replies, requests
from vfiomig.wire.layouts import DMA_ACCESS

if TYPE_CHECKING:
    from vfiomig.client.vfio_user.remote import Remote
    from vfiomig.core.caller import Caller
    from vfiomig.wire import Buffers, Request

__all__ = ("PAGE", "Given", "SharedMemory")

#: What dirty bits are asked for in: the finest that there is.
PAGE = 4096
EVERYTHING = 1 << 64
#: An IOVA at which no memory is ever mapped.
NOWHERE = 1 << 62
#: What a server asks of the memory that it is given.
PAGES = Limit(((NOWHERE, EVERYTHING - 1),), PAGE)
WITH_BITMAP = vfio_iommu.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
#: Requests of an iommufd that need nothing of a server.
PLAIN = frozenset({iommufd.IOMMU_DESTROY, iommufd.IOMMU_IOAS_ALLOC, iommufd.IOMMU_IOAS_IOVA_RANGES})


class Given(NamedTuple):
    """Memory that the server knows."""

    mapping: Mapping
    #: The server has a descriptor of it, and does not ask for it.
    by_file: bool


class SharedMemory:
    """The iommufd of one client, and what the server was given of it."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._iommufd = Iommufd()
        self._port = DmaPort()
        #: Held while memory comes and goes, and while its dirty bits are asked for.
        self.lock = threading.Lock()
        self._given: dict[int, Given] = {}
        self._space: IoSpace | None = None
        remote.channel.answer = self._answer

    # Requests of the iommufd, and of the device about it.

    def ioctl(self, number: int, address: int, caller: Caller) -> int:
        """Answer a request on the iommufd."""
        with self.lock:
            if number == iommufd.IOMMU_IOAS_MAP:
                return self._map_locked(address, caller)
            if number == iommufd.IOMMU_IOAS_UNMAP:
                return self._unmap_locked(address, caller)
            if number not in PLAIN:
                raise OSError(errno.ENOTTY, "there is no IOMMU behind a socket")
            return self._iommufd.ioctl(number, address, caller)

    def attach(self, number: int) -> None:
        """Give the server the memory of an address space, whose id this is."""
        with self.lock:
            space = self._iommufd.find(number, Ioas).space
            if space is self._space:
                return
            self._detach_locked()
            space.limit(self, PAGES)
            self._space = self._port.space = space
            try:
                with space.lock:
                    mappings = space.overlapping_locked(0, EVERYTHING)
                for mapping in mappings:
                    self._give(mapping)
            except BaseException:
                self._detach_locked()
                raise

    def detach(self) -> None:
        """Take everything back; once more is harmless."""
        with self.lock:
            self._detach_locked()

    def _detach_locked(self) -> None:
        if self._space is not None:
            for given in list(self._given.values()):
                self._take_back(given)
            self._space.unlimit(self)
            self._space = self._port.space = None

    def _map_locked(self, address: int, caller: Caller) -> int:
        self._iommufd.ioctl(iommufd.IOMMU_IOAS_MAP, address, caller)
        asked = iommufd.IoasMap.parse(caller.read(address, iommufd.IoasMap.SIZE))
        space = self._iommufd.find(asked.ioas_id, Ioas).space
        if space is not self._space:
            return 0
        with space.lock:
            mapping = space.find_locked(asked.iova, asked.length)
        assert mapping is not None
        try:
            self._give(mapping)
        except BaseException:
            space.unmap(asked.iova, asked.length)
            raise
        return 0

    def _unmap_locked(self, address: int, caller: Caller) -> int:
        asked = iommufd.IoasUnmap.parse(caller.read(address, iommufd.IoasUnmap.SIZE))
        leaving = self.within(asked.iova, asked.length)
        # From here on nothing of it is answered; what the server keeps is, again.
        self._iommufd.ioctl(iommufd.IOMMU_IOAS_UNMAP, address, caller)
        space = self._iommufd.find(asked.ioas_id, Ioas).space
        if space is self._space:
            try:
                for given in leaving:
                    self._take_back(given)
            finally:
                for given in leaving:
                    if given.mapping.iova in self._given:
                        space.map(given.mapping)
        return 0

    def within(self, iova: int, length: int) -> list[Given]:
        """Return what of the given memory lies in a range, whole or in part."""
        if self._space is None:
            return []
        with self._space.lock:
            mappings = self._space.overlapping_locked(iova, length)
        return [self._given[mapping.iova] for mapping in mappings]

    # Messages to the server.

    def has_dma(self) -> bool:
        """Find out whether the server's device has DMA; libvfio-user without accepts anything."""
        nothing = vfio_user.DmaUnmap(argsz=vfio_user.DmaUnmap.SIZE, addr=NOWHERE, size=PAGE)
        try:
            self._remote.channel.call(done, vfio_user.VFIO_USER_DMA_UNMAP, bytes(nothing))
        except RequestError:
            raise
        except OSError:
            return True
        return False

    def _give(self, mapping: Mapping) -> None:
        limits = self._remote.limits
        if len(self._given) >= limits.max_dma_maps:
            raise OSError(errno.ENOSPC, f"the server takes {limits.max_dma_maps} pieces of memory")
        self._remote.channel.attend()  # before there is something to ask for
        found = None
        if limits.fds_out:
            address, length = mapping.address, mapping.length
            found = open_file_behind(address, length, writable=mapping.writable)
        by_file = found is not None
        if found is not None:
            fd, offset = found
            with fd:
                by_file = self._give_file(mapping, fd.fileno(), offset)
        if not by_file:
            self._send_map(mapping, 0, [])
        self._given[mapping.iova] = Given(mapping, by_file)

    def _give_file(self, mapping: Mapping, fd: int, offset: int) -> bool:
        """Give the server a file; ``False`` if it cannot map it."""
        try:
            self._send_map(mapping, offset, [fd])
        except RequestError:
            raise
        except OSError:
            return False
        return True

    def _send_map(self, mapping: Mapping, offset: int, fds: list[int]) -> None:
        flags = vfio_user.VFIO_USER_F_DMA_REGION_READ * mapping.readable
        flags |= vfio_user.VFIO_USER_F_DMA_REGION_WRITE * mapping.writable
        asked = vfio_user.DmaMap(
            argsz=vfio_user.DmaMap.SIZE,
            flags=flags,
            offset=offset,
            addr=mapping.iova,
            size=mapping.length,
        )
        with self._remote.only_while_it_runs("memory is given to it"):
            self._remote.channel.call(done, vfio_user.VFIO_USER_DMA_MAP, bytes(asked), fds=fds)

    def _take_back(self, given: Given) -> None:
        mapping = given.mapping
        size = bitmap_size(mapping.length, PAGE)
        logged = given.by_file and self._port.logs
        if logged and size > self._remote.limits.data_out:
            # More bits than fit a message: all of it counts as written.
            self.mark(mapping.iova, mapping.length)
            logged = ()
        asked = vfio_user.DmaUnmap(
            argsz=vfio_user.DmaUnmap.SIZE,
            flags=0,
            addr=mapping.iova,
            size=mapping.length,
        )
        payload = bytes(asked)
        if logged:
            asked.argsz += vfio_user.Bitmap.SIZE + size
            asked.flags = WITH_BITMAP
            payload = bytes(asked) + bytes(vfio_user.Bitmap(pgsize=PAGE, size=size))
        parse = partial(replies.dma_unmap_untrusted, bitmap_size=size if logged else 0)
        with self._remote.only_while_it_runs("memory is taken from it"):
            bitmap = self._remote.channel.call(parse, vfio_user.VFIO_USER_DMA_UNMAP, payload)
        del self._given[mapping.iova]
        for start, length in dirty_ranges(bitmap, mapping.iova, mapping.length, PAGE):
            self.mark(start, length)

    # What the server asks for.

    def _answer(self, request: Request, data: memoryview) -> Buffers:
        connection = self._remote.channel.connection
        try:
            if request.command == vfio_user.VFIO_USER_DMA_WRITE:
                addr, count = requests.dma_write_untrusted(request)
                self._port.write(addr, data)
                return connection.reply(request, DMA_ACCESS.pack(addr, count))
            addr, count = requests.dma_read_untrusted(request, self._remote.limits)
            buffer = bytearray(count)
            self._port.read_into(addr, buffer)
            return connection.reply(request, DMA_ACCESS.pack(addr, count), buffer)
        except OSError as refusal:  # a WireError, or the DeviceError of an access that faults
            return connection.error(request, refusal.errno or errno.EFAULT)

    # What was written.

    def log_into(self, log: DirtyLog | None) -> None:
        """Log what the server writes by messages; ``None`` ends it."""
        self._port.logs = () if log is None else (log,)

    def mark(self, iova: int, length: int) -> None:
        """Log what the server says that it wrote."""
        for log in self._port.logs:
            log.mark(iova, length)
