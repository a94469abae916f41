"""What the payload of a request says, and how a client writes those that are more than a struct.

A function ``NAME_untrusted`` takes a `Request` that came in, looks at everything that concerns
lengths and counts, and raises `WireError` with EINVAL for what contradicts itself, and nothing
else. What the device thinks of the values is not decided here. `Request.refusal` is raised first.

Where the payload is the struct that an ioctl takes, the struct is handed back as it is, argsz
included: the kernel's own checks are `vfiomig.core`'s.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from vfiomig.abi import vfio, vfio_iommu, vfio_user
from vfiomig.errors import WireError
from vfiomig.wire.layouts import DMA_ACCESS, MIG_DATA, RANGE, REGION_ACCESS, WRITE_MULTI
from vfiomig.wire.messages import NOTHING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfiomig.wire.messages import Request
    from vfiomig.wire.version import Limits

#: (offset, region, number of bytes), the head of REGION_READ and REGION_WRITE.
pack_region_access = REGION_ACCESS.pack
unpack_region_access = REGION_ACCESS.unpack_from

END = 1 << 64
DMA_FLAGS = (
    vfio_user.VFIO_USER_F_DMA_REGION_READ
    | vfio_user.VFIO_USER_F_DMA_REGION_WRITE
    | vfio_user.VFIO_USER_F_DMA_REGION_MMAP
    | vfio_user.VFIO_USER_F_DMA_REGION_FILE_IO
)
DMA_BY_FD = vfio_user.VFIO_USER_F_DMA_REGION_MMAP | vfio_user.VFIO_USER_F_DMA_REGION_FILE_IO
WITH_BITMAP = vfio_iommu.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
ALL = vfio_iommu.VFIO_DMA_UNMAP_FLAG_ALL
WRITE_ONE = vfio_user.WriteOne.SIZE
WRITE_ONE_HEAD = vfio_user.WriteOne.end_of("count")
WRITE_ONE_MOST = WRITE_ONE - WRITE_ONE_HEAD


class Unmap(NamedTuple):
    """DMA_UNMAP; ``bitmap`` is what is asked about the memory's dirty pages, if anything is."""

    argsz: int
    flags: int
    addr: int
    size: int
    bitmap: vfio_user.Bitmap | None


class Write(NamedTuple):
    """One write of several."""

    offset: int
    region: int
    data: memoryview


class FeatureRequest(NamedTuple):
    """DEVICE_FEATURE; ``flags`` hold the index and the operation."""

    argsz: int
    flags: int
    payload: memoryview


def _invalid(what: str) -> WireError:
    return WireError(errno.EINVAL, what)


# Memory.


def dma_map_untrusted(request: Request) -> vfio_user.DmaMap:
    """Return what is to be mapped; of several descriptors the first one counts."""
    if request.refusal is not None:
        raise request.refusal
    asked = vfio_user.DmaMap.parse(request.body)
    if asked.argsz < asked.SIZE:
        raise _invalid(f"DMA_MAP with an argsz of {asked.argsz}, at least {asked.SIZE} is needed")
    if asked.flags & ~DMA_FLAGS:
        raise _invalid(f"DMA_MAP with unknown flags, {asked.flags:#x}")
    if asked.flags & DMA_BY_FD and not request.fds:
        raise _invalid("DMA_MAP says how to use its descriptor, and came without one")
    if not asked.size or asked.addr + asked.size > END or asked.offset + asked.size > END:
        raise _invalid(f"DMA_MAP of {asked.size:#x} bytes at {asked.addr:#x}")
    return asked


def dma_unmap_untrusted(request: Request) -> Unmap:
    if request.refusal is not None:
        raise request.refusal
    asked = vfio_user.DmaUnmap.parse(request.body)
    if asked.argsz < asked.SIZE:
        raise _invalid(f"DMA_UNMAP with an argsz of {asked.argsz}")
    if asked.flags & ~(WITH_BITMAP | ALL) or asked.flags == WITH_BITMAP | ALL:
        raise _invalid(f"DMA_UNMAP with flags {asked.flags:#x}")
    if asked.flags & ALL and (asked.addr or asked.size):
        raise _invalid("DMA_UNMAP of everything, and of a range")
    if asked.addr + asked.size > END:
        raise _invalid(f"DMA_UNMAP of {asked.size:#x} bytes at {asked.addr:#x}")
    bitmap = None
    if asked.flags & WITH_BITMAP:
        rest = request.body[asked.SIZE :]
        if len(rest) < vfio_user.Bitmap.SIZE:
            raise _invalid("DMA_UNMAP asks for a bitmap and does not say of what size")
        bitmap = vfio_user.Bitmap.parse(rest)
        if asked.argsz < asked.SIZE + bitmap.SIZE + bitmap.size:
            raise _invalid(f"DMA_UNMAP has no room for a bitmap of {bitmap.size} bytes")
    return Unmap(asked.argsz, asked.flags, asked.addr, asked.size, bitmap)


def dma_read_untrusted(request: Request, limits: Limits) -> tuple[int, int]:
    """Return (address, number of bytes) of the client's memory that are asked for."""
    if request.refusal is not None:
        raise request.refusal
    addr, size = DMA_ACCESS.unpack_from(request.body)
    if size > limits.data_out:
        raise WireError(errno.E2BIG, f"DMA_READ of {size} bytes, {limits.data_out} are the most")
    if addr + size > END:
        raise _invalid(f"DMA_READ of {size} bytes at {addr:#x}")
    return addr, size


def dma_write_untrusted(request: Request) -> tuple[int, int]:
    """Return (address, number of bytes) of the client's memory; the bytes are the data."""
    if request.refusal is not None:
        raise request.refusal
    addr, size = DMA_ACCESS.unpack_from(request.body)
    if size != request.data_size or addr + size > END:
        raise _invalid(f"DMA_WRITE of {size} bytes at {addr:#x} with {request.data_size}")
    return addr, size


# The device.


def device_info_untrusted(request: Request) -> vfio_user.DeviceInfo:
    if request.refusal is not None:
        raise request.refusal
    return vfio_user.DeviceInfo.parse(request.body)


def region_info_untrusted(request: Request) -> vfio.RegionInfo:
    if request.refusal is not None:
        raise request.refusal
    return vfio.RegionInfo.parse(request.body)


def irq_info_untrusted(request: Request) -> vfio.IrqInfo:
    if request.refusal is not None:
        raise request.refusal
    return vfio.IrqInfo.parse(request.body)


def set_irqs_untrusted(request: Request) -> tuple[vfio.IrqSet, memoryview]:
    """Return what is to be set, and one byte per interrupt if it comes as bools."""
    if request.refusal is not None:
        raise request.refusal
    asked = vfio.IrqSet.parse(request.body)
    bools = NOTHING
    fds = len(request.fds)
    kind = asked.flags & vfio.VFIO_IRQ_SET_DATA_TYPE_MASK
    if kind == vfio.VFIO_IRQ_SET_DATA_EVENTFD:
        if fds not in {0, asked.count}:
            raise _invalid(f"SET_IRQS of {asked.count} interrupts with {fds} descriptors")
    elif fds:
        raise _invalid("SET_IRQS came with descriptors and does not say that they are eventfds")
    if kind == vfio.VFIO_IRQ_SET_DATA_BOOL:
        bools = request.body[asked.SIZE :]
        if len(bools) != asked.count:
            raise _invalid(f"SET_IRQS of {asked.count} interrupts with {len(bools)} bools")
    return asked, bools


def region_read_untrusted(request: Request, limits: Limits) -> tuple[int, int, int]:
    """Return (offset, region, number of bytes)."""
    if request.refusal is not None:
        raise request.refusal
    access = offset, _, size = unpack_region_access(request.body)
    if size > limits.data_out or offset + size > END:
        raise _invalid(
            f"REGION_READ of {size} bytes at {offset:#x}, {limits.data_out} are the most"
        )
    return access


def region_write_untrusted(request: Request) -> tuple[int, int, int]:
    """Return (offset, region, number of bytes), which are the request's data."""
    if request.refusal is not None:
        raise request.refusal
    access = offset, _, size = unpack_region_access(request.body)
    if size != request.data_size or offset + size > END:
        raise _invalid(f"REGION_WRITE of {size} bytes at {offset:#x} with {request.data_size}")
    return access


def write_multi_untrusted(request: Request) -> list[Write]:
    if request.refusal is not None:
        raise request.refusal
    (count,) = WRITE_MULTI.unpack_from(request.body)
    rest = request.body[WRITE_MULTI.size :]
    if len(rest) != count * WRITE_ONE:
        raise _invalid(f"REGION_WRITE_MULTI of {count} writes with {len(rest)} bytes")
    writes = []
    for at in range(0, len(rest), WRITE_ONE):
        offset, region, length = REGION_ACCESS.unpack_from(rest, at)
        if length > WRITE_ONE_MOST or offset + length > END:
            raise _invalid(f"a write of {length} bytes at {offset:#x} among several")
        data = rest[at + WRITE_ONE_HEAD :][:length]
        writes.append(Write(offset, region, data))
    return writes


# Features and migration.


def feature_untrusted(request: Request) -> FeatureRequest:
    if request.refusal is not None:
        raise request.refusal
    asked = vfio.DeviceFeature.parse(request.body)
    return FeatureRequest(asked.argsz, asked.flags, request.body[asked.SIZE :])


def mig_data_untrusted(request: Request, limits: Limits) -> int:
    """Return how many bytes of state MIG_DATA_READ asks for, or MIG_DATA_WRITE brings."""
    if request.refusal is not None:
        raise request.refusal
    argsz, size = MIG_DATA.unpack_from(request.body)
    if request.command == vfio_user.VFIO_USER_MIG_DATA_WRITE:
        if size != request.data_size:
            raise _invalid(f"MIG_DATA_WRITE of {size} bytes with {request.data_size}")
    elif size > limits.data_out:
        raise _invalid(f"MIG_DATA_READ of {size} bytes, {limits.data_out} are the most")
    if argsz < MIG_DATA.size + size:
        raise _invalid(f"MIG_DATA of {size} bytes with an argsz of {argsz}")
    return int(size)


def precopy_info_untrusted(request: Request) -> vfio.PrecopyInfo:
    if request.refusal is not None:
        raise request.refusal
    return vfio.PrecopyInfo.parse(request.body)


# Writing.


def feature(flags: int, payload: bytes = b"", room: int = 0) -> bytes:
    """Make the payload of DEVICE_FEATURE; ``room`` is for what the reply has in addition."""
    size = vfio.DeviceFeature.SIZE + len(payload)
    return bytes(vfio.DeviceFeature(argsz=size + room, flags=flags)) + payload


def logging_start(page_size: int, ranges: Iterable[tuple[int, int]]) -> bytes:
    """Make what DMA_LOGGING_START carries in DEVICE_FEATURE."""
    packed = [RANGE.pack(iova, length) for iova, length in ranges]
    control = vfio_user.DmaLoggingControl(page_size=page_size, num_ranges=len(packed))
    return bytes(control) + b"".join(packed)
