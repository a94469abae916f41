"""The three DMA logging features: the device tells which memory it wrote.

The log itself is ``iommu.DirtyLog``; here are the checks, in the kernel's order
(``vfio_ioctl_device_feature_logging_start`` and its neighbours). Logging has nothing to do with
the migration state: it goes on through arcs and resets until it is stopped or the device closed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.iommu import DirtyLog
from vfiomig.iommu.dirty import bitmap_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.core.caller import Caller
    from vfiomig.core.vfio_device import VfioDevice

__all__ = ("lacks_logging", "read_ranges", "read_report", "report", "start", "stop", "tell")

PAGE = 4096
#: As many ranges as fit a page of the kernel's.
MAX_RANGES = PAGE // vfio.DmaLoggingRange.SIZE
END = 1 << 64


def lacks_logging(device: VfioDevice) -> int:
    return 0 if device.device.dma_logging else errno.ENOTTY


def start(device: VfioDevice, operation: int, payload: int, caller: Caller) -> None:  # noqa: ARG001 - SET only
    control = vfio.DmaLoggingControl.parse(caller.read(payload, vfio.DmaLoggingControl.SIZE))
    ranges = read_ranges(control, caller.read)
    # The hint is what the log keeps if a report could ask for it; units inside are finer anyway.
    if control.page_size < PAGE or control.page_size & (control.page_size - 1):
        control.page_size = PAGE
    device.start_dirty_log(DirtyLog(ranges))
    try:
        caller.write(payload, bytes(control))
    except OSError:
        device.stop_dirty_log()
        raise


def read_ranges(
    control: vfio.DmaLoggingControl, read: Callable[[int, int], bytes]
) -> list[tuple[int, int]]:
    """Read the (iova, length) ranges that the caller wants logged, and check them."""
    if not control.num_ranges:
        raise OSError(errno.EINVAL, "no range to log")
    if control.num_ranges > MAX_RANGES:
        raise OSError(errno.E2BIG, f"more than {MAX_RANGES} ranges")
    ranges: list[tuple[int, int]] = []
    for at in range(control.num_ranges):
        address = control.ranges + at * vfio.DmaLoggingRange.SIZE
        element = vfio.DmaLoggingRange.parse(read(address, vfio.DmaLoggingRange.SIZE))
        _check_range(element.iova, element.length, control.page_size, ranges)
        ranges.append((element.iova, element.length))
    return ranges


def _check_range(iova: int, length: int, page_size: int, earlier: list[tuple[int, int]]) -> None:
    # The kernel masks with page_size - 1 and never asks whether that is a power of two.
    if (iova | length) & ((page_size - 1) % END):
        raise OSError(errno.EINVAL, f"[{iova:#x}, +{length:#x}) is not made of pages")
    if iova + length >= END:
        raise OSError(errno.EOVERFLOW, "the range reaches the end of the address space")
    if any(iova < other + size and other < iova + length for other, size in earlier):
        raise OSError(errno.EINVAL, "the range overlaps an earlier one")


def stop(device: VfioDevice, operation: int, payload: int, caller: Caller) -> None:  # noqa: ARG001 - no payload
    """Stop; stopping twice is no error."""
    device.stop_dirty_log()


def report(device: VfioDevice, operation: int, payload: int, caller: Caller) -> None:  # noqa: ARG001 - GET only
    """Set the bits of what was written, and forget it. Bits in the caller's bitmap stay set."""
    tell(device.dirty_log, read_report(payload, caller), caller)


def read_report(payload: int, caller: Caller) -> vfio.DmaLoggingReport:
    """Read what the caller wants reported, and check it."""
    asked = vfio.DmaLoggingReport.parse(caller.read(payload, vfio.DmaLoggingReport.SIZE))
    if asked.page_size < PAGE or asked.page_size & (asked.page_size - 1):
        raise OSError(errno.EINVAL, "page_size is a power of two from 4096 on")
    if asked.iova + asked.length >= END:
        raise OSError(errno.EOVERFLOW, "the report reaches the end of the address space")
    return asked


def tell(log: DirtyLog | None, asked: vfio.DmaLoggingReport, caller: Caller) -> None:
    """Set the bits in the caller's bitmap."""
    if log is None:
        raise OSError(errno.EINVAL, "logging has not been started")
    # Also where there is nothing to tell: a bitmap that cannot be written is not found out about
    # only in the report that matters.
    size = bitmap_size(asked.length, asked.page_size)
    if not caller.check(asked.bitmap, size, writable=True):
        raise OSError(errno.EFAULT, "the bitmap cannot be written")
    log.report_into(asked.iova, asked.length, asked.page_size, caller, asked.bitmap)
