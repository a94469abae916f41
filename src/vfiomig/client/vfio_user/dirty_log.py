"""The device's DMA log over a socket: what the server logged, and what was logged here.

Theory of operation
-------------------
Who writes knows what was written: the server what it wrote into files that it maps, this client
what came in messages. So a log is kept here too, and a report takes the server's bits into it
before it is made from there; either alone would miss writes. Checks are the kernel's
(``core.dma_logging``), and what the server keeps for itself does not show: libvfio-user reports
exactly one mapping at a time, of whatever was written in it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio, vfio_user
from vfiomig.client.dma import dirty_ranges
from vfiomig.client.requests import GET, SET
from vfiomig.client.vfio_user.memory import PAGE
from vfiomig.core.dma_logging import read_ranges, read_report, tell
from vfiomig.errors import RequestError
from vfiomig.iommu import DirtyLog
from vfiomig.iommu.dirty import bitmap_size
from vfiomig.wire import requests

if TYPE_CHECKING:
    from vfiomig.client.vfio_user.memory import Given, SharedMemory
    from vfiomig.client.vfio_user.remote import Remote
    from vfiomig.core.caller import Caller

__all__ = ("DmaLog",)

START = vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
STOP = vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
REPORT = vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT


class DmaLog:
    """The log of one device. ``payload`` is the address of what stands behind a feature's header."""

    def __init__(self, remote: Remote, memory: SharedMemory) -> None:
        self._remote = remote
        self._memory = memory
        self._log: DirtyLog | None = None

    def start(self, payload: int, caller: Caller) -> None:
        control = vfio.DmaLoggingControl.parse(caller.read(payload, vfio.DmaLoggingControl.SIZE))
        ranges = read_ranges(control, caller.read)
        with self._memory.lock:
            if self._log is not None:
                raise OSError(errno.EINVAL, "logging has been started already")
            if not self._remote.limits.mig_stream and not self._memory.has_dma():
                # Such a server of libvfio-user says yes to a PROBE, and aborts at the request.
                raise OSError(errno.ENOTTY, "the server's device has no DMA")
            log = DirtyLog(ranges)
            self._memory.log_into(log)  # before the server logs, so that no write is in neither
            try:
                asked = requests.logging_start(control.page_size, ranges)
                told = self._remote.feature(SET | START, asked)
            except BaseException:
                self._memory.log_into(None)
                raise
            self._log = log
        page_size = int.from_bytes(told[:8], "little")
        if page_size >= PAGE and not page_size & (page_size - 1):
            control.page_size = page_size
        try:
            caller.write(payload, bytes(control))
        except OSError:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop; stopping twice is no error, whatever the server thinks of that."""
        with self._memory.lock:
            try:
                self._remote.feature(SET | STOP)
            except RequestError:
                raise
            except OSError as refusal:
                if self._log is not None or refusal.errno != errno.EINVAL:
                    raise
            self._log = None
            self._memory.log_into(None)

    def report(self, payload: int, caller: Caller) -> None:
        asked = read_report(payload, caller)
        with self._memory.lock:
            if self._log is not None:
                for given in self._memory.within(asked.iova, asked.length):
                    if given.by_file:
                        self._collect(given, asked.iova, asked.iova + asked.length)
            tell(self._log, asked, caller)

    def _collect(self, given: Given, start: int, end: int) -> None:
        """Take over what the server logged of one mapping, at least of [start, end) of it."""
        mapping = given.mapping
        room = self._remote.limits.data_out - vfio_user.DmaLoggingReport.SIZE
        most = room // 8 * 64 * PAGE
        whole = not self._remote.limits.mig_stream  # libvfio-user: all of it or nothing
        if most <= 0 or (whole and mapping.length > most):
            raise OSError(
                errno.E2BIG,
                f"the server tells of {max(0, most):#x} bytes at most, and of {mapping.length:#x} "
                "at once; map the memory in smaller pieces",
            )
        if whole:
            start, end = mapping.iova, mapping.end
        start, end = max(start, mapping.iova), min(end, mapping.end)
        while start < end:
            length = min(end - start, most)
            for dirty, size in self._ask(start, length):
                self._memory.mark(dirty, size)
            start += length

    def _ask(self, iova: int, length: int) -> list[tuple[int, int]]:
        asked = vfio_user.DmaLoggingReport(iova=iova, length=length, page_size=PAGE)
        size = bitmap_size(length, PAGE)
        told = self._remote.feature(GET | REPORT, bytes(asked), size=asked.SIZE + size, room=size)
        bitmap = told[asked.SIZE : asked.SIZE + size]
        return list(dirty_ranges(bitmap, iova, length, PAGE))
