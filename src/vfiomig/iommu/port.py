"""A device's way to memory: reads and writes by IOVA."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.errors import DeviceError, RequestError

if TYPE_CHECKING:
    from vfiomig.iommu.dirty import DirtyLog
    from vfiomig.iommu.space import IoSpace

__all__ = ("DmaPort",)


class DmaPort:
    """DMA of one device. Without an attached space every access fails, as behind an IOMMU.

    A failing access raises ``DeviceError(EFAULT)``: the device's own error, which its author may
    catch; what came before the failing byte has been transferred.
    """

    def __init__(self) -> None:
        self.space: IoSpace | None = None
        self.logs: tuple[DirtyLog, ...] = ()

    def read(self, iova: int, length: int) -> bytes:
        """Read ``length`` bytes of the owning program's memory."""
        chunks = []
        try:
            for mapping, address, size in self._space(iova).pieces(iova, length):
                if not mapping.readable:
                    raise RequestError(errno.EFAULT, "the mapping may not be read")
                chunks.append(mapping.memory.read(address, size))
        except OSError as fault:
            raise DeviceError(errno.EFAULT, f"DMA read at IOVA {iova:#x}: {fault}") from fault
        return b"".join(chunks)

    def write(self, iova: int, data: bytes | bytearray | memoryview) -> None:
        """Write to the owning program's memory; every byte that was written is logged."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            for mapping, address, size in self._space(iova).pieces(iova, len(view)):
                if not mapping.writable:
                    raise RequestError(errno.EFAULT, "the mapping may not be written")
                try:
                    mapping.memory.write(address, view[done : done + size])
                finally:
                    # After the write, and whatever became of it: logged before, a report in
                    # between would forget the page while its old bytes are still in place.
                    for log in self.logs:
                        log.mark(iova + done, size)
                done += size
        except OSError as fault:
            raise DeviceError(errno.EFAULT, f"DMA write at IOVA {iova:#x}: {fault}") from fault

    def _space(self, iova: int) -> IoSpace:
        if self.space is None:
            raise RequestError(errno.EFAULT, f"no IO address space is attached (IOVA {iova:#x})")
        return self.space
