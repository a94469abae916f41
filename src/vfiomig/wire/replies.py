"""What the payload of a reply says, and how a server writes those that are more than a struct.

A function ``NAME_untrusted`` takes a `Reply` that came in without an errno and raises `WireError`
with EPROTO if it is no answer to what was asked, and nothing else. The connection can go on, since
the framing was right. Peers that answer with less, or more, than the specification says are put up
with where what they mean is certain.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vfiomig.abi import vfio, vfio_user
from vfiomig.abi.uapi import UapiStruct
from vfiomig.errors import WireError
from vfiomig.wire.commands import command_name
from vfiomig.wire.layouts import AREA, DMA_ACCESS, MIG_DATA, REGION_ACCESS, WRITE_MULTI
from vfiomig.wire.messages import NOTHING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.wire.messages import Reply

Struct = TypeVar("Struct", bound=UapiStruct)
Areas = list[tuple[int, int]]


class RegionReply(NamedTuple):
    """GET_REGION_INFO; ``areas`` may be mapped, and nothing says so if it is ``None``.

    Where ``info.argsz`` is more than was asked with, the reply was cut: ask again with as much.
    """

    info: vfio.RegionInfo
    areas: Areas | None


def _wrong(reply: Reply, what: str) -> WireError:
    return WireError(errno.EPROTO, f"the answer to {command_name(reply.command)} {what}")


def _parse(reply: Reply, struct: type[Struct]) -> Struct:
    if reply.refusal is not None:
        raise reply.refusal
    if len(reply.body) < struct.SIZE:
        raise _wrong(reply, f"has {len(reply.body)} bytes, at least {struct.SIZE} are needed")
    return struct.parse(reply.body)


def device_info_untrusted(reply: Reply) -> vfio_user.DeviceInfo:
    return _parse(reply, vfio_user.DeviceInfo)


def irq_info_untrusted(reply: Reply) -> vfio.IrqInfo:
    return _parse(reply, vfio.IrqInfo)


def precopy_info_untrusted(reply: Reply) -> vfio.PrecopyInfo:
    return _parse(reply, vfio.PrecopyInfo)


def region_info_untrusted(reply: Reply) -> RegionReply:
    info = _parse(reply, vfio.RegionInfo)
    if not info.flags & vfio.VFIO_REGION_INFO_FLAG_CAPS or info.argsz > len(reply.body):
        return RegionReply(info, None)
    at, areas = info.cap_offset, None
    while at:
        header = _capability(reply, at, vfio.InfoCapHeader)
        if header.id == vfio.VFIO_REGION_INFO_CAP_SPARSE_MMAP and areas is None:
            areas = _areas(reply, at)
        if header.next and header.next <= at:
            raise _wrong(reply, "has capabilities that do not come to an end")
        at = header.next
    return RegionReply(info, areas)


def _capability(reply: Reply, at: int, struct: type[Struct]) -> Struct:
    if at < vfio.RegionInfo.SIZE or at + struct.SIZE > len(reply.body):
        raise _wrong(reply, f"has a capability at {at}, outside of its {len(reply.body)} bytes")
    return struct.parse(reply.body[at:])


def _areas(reply: Reply, at: int) -> Areas:
    head = _capability(reply, at, vfio.RegionInfoCapSparseMmap)
    first = at + head.SIZE
    if head.nr_areas * AREA.size > len(reply.body) - first:
        raise _wrong(reply, f"says that there are {head.nr_areas} areas, and they are not there")
    return [AREA.unpack_from(reply.body, first + n * AREA.size) for n in range(head.nr_areas)]


def region_read_untrusted(reply: Reply, count: int) -> None:
    """Look at the answer to a read of ``count`` bytes, which are the reply's data."""
    if reply.refusal is not None:
        raise reply.refusal
    if len(reply.body) < REGION_ACCESS.size:
        if not count and not reply.body:
            return  # libvfio-user answers a read of nothing with a header
        raise _wrong(reply, "is too short")
    _, _, got = REGION_ACCESS.unpack_from(reply.body)
    if got != count or reply.data_size != count:
        raise _wrong(reply, f"has {reply.data_size} bytes and says {got}, {count} were asked for")


def region_write_untrusted(reply: Reply, count: int) -> None:
    """Look at the answer to a write of ``count`` bytes."""
    if reply.refusal is not None:
        raise reply.refusal
    if not count and not reply.body:
        return  # see region_read_untrusted
    if len(reply.body) < REGION_ACCESS.size:
        raise _wrong(reply, "is too short")
    _, _, took = REGION_ACCESS.unpack_from(reply.body)
    if took != count:
        raise _wrong(reply, f"says {took} bytes, {count} were written")


def write_multi_untrusted(reply: Reply) -> int:
    """Return how many writes were done."""
    if reply.refusal is not None:
        raise reply.refusal
    if len(reply.body) < WRITE_MULTI.size:
        raise _wrong(reply, "is too short")
    (count,) = WRITE_MULTI.unpack_from(reply.body)
    return int(count)


def dma_unmap_untrusted(reply: Reply, bitmap_size: int = 0) -> memoryview:
    """Return the bitmap, if one was asked for."""
    if reply.refusal is not None:
        raise reply.refusal
    if not bitmap_size:
        return NOTHING  # a server without DMA answers with a header
    head = vfio_user.DmaUnmap.SIZE + vfio_user.Bitmap.SIZE
    if len(reply.body) < head + bitmap_size:
        raise _wrong(reply, f"has no bitmap of {bitmap_size} bytes")
    return reply.body[head : head + bitmap_size]


def dma_read_untrusted(reply: Reply, addr: int, count: int) -> None:
    """Look at the answer to a read of the client's memory; the bytes are the reply's data."""
    if reply.refusal is not None:
        raise reply.refusal
    if len(reply.body) < DMA_ACCESS.size:
        raise _wrong(reply, "is too short")
    where, got = DMA_ACCESS.unpack_from(reply.body)
    if (where, got, reply.data_size) != (addr, count, count):
        raise _wrong(reply, f"has {reply.data_size} bytes, {count} were asked for")


def dma_write_untrusted(reply: Reply, addr: int, count: int) -> None:
    """Look at the answer to a write; QEMU before 10.2 answers with a header."""
    if reply.refusal is not None:
        raise reply.refusal
    if not reply.body:
        return
    if len(reply.body) < DMA_ACCESS.size or DMA_ACCESS.unpack_from(reply.body) != (addr, count):
        raise _wrong(reply, f"is not about the {count} bytes that were written")


def feature_untrusted(reply: Reply, size: int = 0) -> memoryview:
    """Return what stands behind the feature's header, at least ``size`` bytes."""
    if reply.refusal is not None:
        raise reply.refusal
    payload = reply.body[vfio.DeviceFeature.SIZE :]
    if len(reply.body) < vfio.DeviceFeature.SIZE or len(payload) < size:
        raise _wrong(reply, f"has {len(reply.body)} bytes, {size} of payload were expected")
    return payload


def mig_read_untrusted(reply: Reply, asked: int) -> int:
    """Return how many bytes of state came, of the ``asked`` ones; they are the first data.

    libvfio-user pads its replies to the size that was asked for.
    """
    if reply.refusal is not None:
        raise reply.refusal
    if len(reply.body) < MIG_DATA.size:
        raise _wrong(reply, "is too short")
    _, size = MIG_DATA.unpack_from(reply.body)
    if size > asked or size > reply.data_size:
        raise _wrong(reply, f"has {reply.data_size} bytes and says {size}, {asked} was the most")
    return int(size)


# Writing.


def region_info(info: vfio.RegionInfo, areas: Sequence[tuple[int, int]] | None, room: int) -> bytes:
    """Make the answer to GET_REGION_INFO that fits an argsz of ``room``.

    ``argsz`` says how much all of it needs, and capabilities are all there or none.
    """
    if areas is None:
        info.argsz = info.SIZE
        return bytes(info)
    header = vfio.InfoCapHeader(id=vfio.VFIO_REGION_INFO_CAP_SPARSE_MMAP, version=1)
    head = vfio.RegionInfoCapSparseMmap(header=header, nr_areas=len(areas))
    packed = [AREA.pack(offset, size) for offset, size in areas]
    info.flags |= vfio.VFIO_REGION_INFO_FLAG_CAPS
    info.argsz = info.SIZE + head.SIZE + AREA.size * len(packed)
    if info.argsz > room:
        info.cap_offset = 0
        return bytes(info)
    info.cap_offset = info.SIZE
    return bytes(info) + bytes(head) + b"".join(packed)
