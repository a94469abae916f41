"""What each command means: the table, and the commands that are little more than an ioctl.

A handler looks at its request, lends the receiver's role (line.py), has ``core`` do what the
kernel would, and replies. It raises ``OSError`` with the errno that is replied instead.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from vfiomig.abi import vfio, vfio_iommu, vfio_user
from vfiomig.core.regions import region_offset
from vfiomig.doors.vfio_user.caller import ScratchCaller
from vfiomig.doors.vfio_user.feature import device_feature
from vfiomig.fsm import SessionKind
from vfiomig.iommu.dirty import UNIT, bitmap_size
from vfiomig.wire import Request, requests

if TYPE_CHECKING:
    from vfiomig.doors.vfio_user.visit import Visit

__all__ = ("HANDLERS", "Handler")

Handler: TypeAlias = Callable[["Visit", Request], None]

pack_region_access = requests.pack_region_access
#: Where each region begins, for ``core``, and how far an offset in it can reach.
OFFSETS = tuple(region_offset(index) for index in range(vfio.VFIO_PCI_NUM_REGIONS))
REGIONS, REGION_ROOM = len(OFFSETS), OFFSETS[1] - OFFSETS[0]
U32_MAX = 0xFFFF_FFFF


# The device.


def get_info(visit: Visit, request: Request) -> None:
    """Reply with the four words that the wire knows; the kernel's struct has two more."""
    asked = requests.device_info_untrusted(request)
    visit.line.lend()
    argument = bytearray(bytes(asked).ljust(vfio.DeviceInfo.SIZE, b"\0"))
    visit.ioctl(vfio.VFIO_DEVICE_GET_INFO, argument)
    visit.reply(request, argument[: asked.SIZE])


def get_region_info(visit: Visit, request: Request) -> None:
    """Reply with as much as argsz has room for; the descriptor comes with all of it."""
    asked = requests.region_info_untrusted(request)
    visit.line.lend()
    room = asked.argsz
    asked.argsz = min(room, asked.SIZE)
    argument = bytearray(bytes(asked))
    visit.ioctl(vfio.VFIO_DEVICE_GET_REGION_INFO, argument)
    needed = vfio.RegionInfo.parse(argument).argsz
    if asked.SIZE < needed <= room:
        asked.argsz = needed
        argument = bytearray(bytes(asked).ljust(needed, b"\0"))
        visit.ioctl(vfio.VFIO_DEVICE_GET_REGION_INFO, argument)
    info = vfio.RegionInfo.from_buffer(argument)
    if needed > room:
        # Here the flag says that they are in the reply, and argsz that there are some.
        info.flags &= ~vfio.VFIO_REGION_INFO_FLAG_CAPS
    fds = []
    if info.flags & vfio.VFIO_REGION_INFO_FLAG_MMAP:
        if not visit.limits.fds_out:
            info.flags &= ~vfio.VFIO_REGION_INFO_FLAG_MMAP
        elif needed <= room:
            fds = [visit.opened.memory.fileno()]
    visit.reply(request, bytes(argument), fds=fds)


def get_irq_info(visit: Visit, request: Request) -> None:
    argument = bytearray(bytes(requests.irq_info_untrusted(request)))
    visit.line.lend()
    visit.ioctl(vfio.VFIO_DEVICE_GET_IRQ_INFO, argument)
    visit.reply(request, argument)


def set_irqs(visit: Visit, request: Request) -> None:
    """Set eventfds, which come beside the message, or act on interrupts."""
    asked, bools = requests.set_irqs_untrusted(request)
    data = bytes(bools)
    visit.line.lend()
    if asked.flags & vfio.VFIO_IRQ_SET_DATA_EVENTFD:
        # The numbers of the descriptors, counted as they came; without any, all are taken away.
        count = min(asked.count, visit.served.irqs.count(asked.index))  # core refuses more
        numbers = range(count) if request.fds else [-1] * count
        data = b"".join(number.to_bytes(4, "little", signed=True) for number in numbers)
        asked.argsz = min(asked.argsz + len(data), U32_MAX)  # it counts what is in the message
    visit.ioctl(vfio.VFIO_DEVICE_SET_IRQS, bytearray(bytes(asked) + data), request.fds)
    visit.reply(request)


def region_read(visit: Visit, request: Request) -> None:
    offset, region, size = requests.region_read_untrusted(request, visit.limits)
    if region >= REGIONS or offset >= REGION_ROOM:
        raise _nowhere(region, offset)
    data = visit.file.pread(OFFSETS[region] + offset, size, visit.line.lend)
    visit.line.send(visit.wire.reply_region_read(request, offset, region, data))


def region_write(visit: Visit, request: Request) -> None:
    offset, region, _ = requests.region_write_untrusted(request)
    data = bytes(visit.line.data_of(request))
    visit.line.lend()
    took = _write(visit, region, offset, data)
    visit.reply(request, pack_region_access(offset, region, took))


def _write(visit: Visit, region: int, offset: int, data: bytes) -> int:
    if region >= REGIONS or offset >= REGION_ROOM:
        raise _nowhere(region, offset)
    return visit.file.pwrite(OFFSETS[region] + offset, data)


def _nowhere(region: int, offset: int) -> OSError:
    return OSError(errno.EINVAL, f"region {region} has no offset {offset:#x}")


def region_write_multi(visit: Visit, request: Request) -> None:
    """Make writes in turn; the reply says how many were made before the first that failed."""
    writes = [
        (write.region, write.offset, bytes(write.data))
        for write in requests.write_multi_untrusted(request)
    ]
    visit.line.lend()
    made = 0
    try:
        for region, offset, data in writes:
            _write(visit, region, offset, data)
            made += 1
    except OSError:
        if not made:
            raise
    visit.reply(request, bytes(vfio_user.WriteMulti(wr_cnt=made)))


def reset(visit: Visit, request: Request) -> None:
    if request.refusal is not None:  # there is nothing in it to be looked at
        raise request.refusal
    visit.line.lend()
    visit.ioctl(vfio.VFIO_DEVICE_RESET, bytearray())
    visit.reply(request)


# Memory.


def dma_map(visit: Visit, request: Request) -> None:
    asked = requests.dma_map_untrusted(request)
    visit.line.lend()
    if request.fds:
        with ScratchCaller(bytearray(), request.fds).file(0) as file:
            visit.space.map_asked(asked, file)
    else:
        visit.space.map_asked(asked, None)
    visit.reply(request)


def dma_unmap(visit: Visit, request: Request) -> None:
    """Unmap one mapping or all, and tell what the device has written to it if that is asked."""
    asked = requests.dma_unmap_untrusted(request)
    head = bytes(request.body[: vfio_user.DmaUnmap.SIZE])
    visit.line.lend()
    if asked.bitmap is None:
        if asked.flags & vfio_iommu.VFIO_DMA_UNMAP_FLAG_ALL:
            visit.space.clear()
        else:
            visit.space.unmap(asked.addr, asked.size, one=True)
        visit.reply(request, head)
        return
    log, bitmap = visit.served.dirty_log, asked.bitmap
    if log is None or bitmap.pgsize < UNIT or bitmap.pgsize & (bitmap.pgsize - 1):
        raise OSError(errno.EINVAL, "no DMA logging, or no page size of which it could tell")
    if bitmap.size < bitmap_size(asked.size, bitmap.pgsize):
        raise OSError(errno.EINVAL, f"a bitmap of {bitmap.size} bytes is too small")
    if bitmap.size > visit.limits.data_out:
        raise OSError(errno.E2BIG, f"a bitmap has {visit.limits.data_out} bytes at most")
    visit.space.unmap(asked.addr, asked.size, one=True)
    bits = log.report(asked.addr, asked.size, bitmap.pgsize).ljust(bitmap.size, b"\0")
    visit.reply(request, head + bytes(bitmap), bits)


# Migration.


def mig_data_read(visit: Visit, request: Request) -> None:
    size = requests.mig_data_untrusted(request, visit.limits)
    visit.line.lend()
    visit.data.read(visit.opened.session(SessionKind.SAVING), request, size)


def mig_data_write(visit: Visit, request: Request) -> None:
    """Take bytes of the state. The role is kept until they are out of the socket."""
    size = requests.mig_data_untrusted(request, visit.limits)
    visit.data.write(visit.opened.session(SessionKind.RESUMING), request, size)


def mig_get_precopy_info(visit: Visit, request: Request) -> None:
    argument = bytearray(bytes(requests.precopy_info_untrusted(request)))
    visit.line.lend()
    visit.opened.precopy_info(argument)
    visit.reply(request, argument)


HANDLERS: dict[int, Handler] = {
    vfio_user.VFIO_USER_DMA_MAP: dma_map,
    vfio_user.VFIO_USER_DMA_UNMAP: dma_unmap,
    vfio_user.VFIO_USER_DEVICE_GET_INFO: get_info,
    vfio_user.VFIO_USER_DEVICE_GET_REGION_INFO: get_region_info,
    vfio_user.VFIO_USER_DEVICE_GET_IRQ_INFO: get_irq_info,
    vfio_user.VFIO_USER_DEVICE_SET_IRQS: set_irqs,
    vfio_user.VFIO_USER_REGION_READ: region_read,
    vfio_user.VFIO_USER_REGION_WRITE: region_write,
    vfio_user.VFIO_USER_REGION_WRITE_MULTI: region_write_multi,
    vfio_user.VFIO_USER_DEVICE_RESET: reset,
    vfio_user.VFIO_USER_DEVICE_FEATURE: device_feature,
    vfio_user.VFIO_USER_MIG_DATA_READ: mig_data_read,
    vfio_user.VFIO_USER_MIG_DATA_WRITE: mig_data_write,
    vfio_user.VFIO_USER_MIG_GET_PRECOPY_INFO: mig_get_precopy_info,
}
