"""DEVICE_FEATURE: the ioctl's argument out of a message, and the message out of what it became.

The wire has no pointers. What the kernel's struct points to, the ranges of DMA_LOGGING_START and
the bitmap of DMA_LOGGING_REPORT, stands behind the struct, which is eight bytes shorter for it. Here
the pointer is put back in, to a place right behind the argument.

A reply to GET has the feature's struct; one to SET or PROBE is what was asked.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio, vfio_user
from vfiomig.abi.ioctls import Dialect, find_feature
from vfiomig.doors.vfio_user.caller import BASE
from vfiomig.iommu.dirty import bitmap_size
from vfiomig.wire import requests

if TYPE_CHECKING:
    from vfiomig.doors.vfio_user.visit import Visit
    from vfiomig.wire import Request

__all__ = ("device_feature",)

GET, PROBE = vfio.VFIO_DEVICE_FEATURE_GET, vfio.VFIO_DEVICE_FEATURE_PROBE
START = vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
REPORT = vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
#: What a client may only use if it knows the rest of the extension.
OF_EXTENSION = {
    vfio.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    vfio.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
}
#: Structs of the wire that lack the pointer at the end of the kernel's.
WITHOUT_POINTER = {START: vfio_user.DmaLoggingControl.SIZE, REPORT: vfio_user.DmaLoggingReport.SIZE}
HEADER = vfio.DeviceFeature.SIZE
POINTER = 8
U32_MAX = 0xFFFF_FFFF


def device_feature(visit: Visit, request: Request) -> None:
    asked = requests.feature_untrusted(request)
    index = asked.flags & vfio.VFIO_DEVICE_FEATURE_MASK
    if index in OF_EXTENSION and not visit.limits.mig_stream:
        raise OSError(errno.ENOTTY, "a feature of the extension, which was not agreed on")
    payload = bytes(asked.payload)
    visit.line.lend()
    operates = not asked.flags & PROBE
    if operates and index in WITHOUT_POINTER:
        reply = _with_pointer(visit, asked.argsz, asked.flags, payload, WITHOUT_POINTER[index])
    else:
        row = find_feature(index, Dialect.LANDED)
        size = row.minsz if row and operates and asked.flags & GET else HEADER + len(payload)
        reply = _header(asked.argsz, asked.flags) + payload.ljust(size - HEADER, b"\0")
        visit.ioctl(vfio.VFIO_DEVICE_FEATURE, reply)
        del reply[size:]
    visit.reply(request, reply)


def _header(argsz: int, flags: int) -> bytearray:
    return bytearray(bytes(vfio.DeviceFeature(argsz=argsz, flags=flags)))


def _with_pointer(visit: Visit, argsz: int, flags: int, payload: bytes, size: int) -> bytearray:
    """Serve a feature whose struct of ``size`` bytes has a pointer in the kernel."""
    struct, behind = payload[:size], payload[size:]
    if len(struct) < size:
        raise OSError(errno.EINVAL, "the message ends before the feature's struct does")
    if flags & (GET | vfio.VFIO_DEVICE_FEATURE_MASK) == GET | REPORT:
        behind = bytes(_room_for_bitmap(struct, argsz, visit.limits.data_out))
    argument = _header(min(argsz + POINTER, U32_MAX), flags) + struct
    argument += (BASE + len(argument) + POINTER).to_bytes(POINTER, "little") + behind
    visit.ioctl(vfio.VFIO_DEVICE_FEATURE, argument)
    del argument[HEADER + size : HEADER + size + POINTER]
    argument[:HEADER] = _header(argsz, flags)
    return argument


def _room_for_bitmap(report: bytes, argsz: int, most: int) -> int:
    """Return how many bytes of bitmap a report has, if they fit where they are to go."""
    asked = vfio_user.DmaLoggingReport.parse(report)
    if not asked.page_size:
        return 0  # core refuses it
    size = bitmap_size(asked.length, asked.page_size)
    if HEADER + asked.SIZE + size > argsz:
        raise OSError(errno.EINVAL, f"argsz has no room for a bitmap of {size} bytes")
    if size > most:
        raise OSError(errno.E2BIG, f"a bitmap of {size} bytes: ask for parts, up to {most} each")
    return size
