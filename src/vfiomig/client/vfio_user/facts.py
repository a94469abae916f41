"""What a device is made of, asked for once, while it runs.

None of it ever changes, and libvfio-user tells it neither in STOP nor in STOP_COPY. The answers
to VFIO_DEVICE_GET_INFO and its neighbours are made of it as the kernel makes them.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from vfiomig.abi import vfio
from vfiomig.client.vfio_user.remote import REGION_LIMIT
from vfiomig.core.regions import region_offset
from vfiomig.errors import RequestError
from vfiomig.wire import replies

if TYPE_CHECKING:
    from vfiomig.abi.vfio_user import DeviceInfo
    from vfiomig.client.vfio_user.remote import Remote
    from vfiomig.core.caller import Caller
    from vfiomig.wire.replies import Areas

__all__ = ("Facts", "gather")


class Region(NamedTuple):
    """A region; ``areas`` may be mapped, all of it if that is ``None``."""

    size: int
    flags: int
    areas: Areas | None


class Facts(NamedTuple):
    """A device. Regions and interrupts that the server denies are ``None``."""

    info: DeviceInfo
    regions: tuple[Region | None, ...]
    irqs: tuple[vfio.IrqInfo | None, ...]

    def region_at(self, place: int) -> tuple[int, int, Region]:
        """Return what lies at a place of the device's descriptor: index, offset, region.

        Raises:
            OSError: EINVAL, there is nothing.
        """
        index, offset = divmod(place - region_offset(0), REGION_LIMIT)
        region = self.regions[index] if 0 <= index < len(self.regions) else None
        if region is None or offset >= region.size:
            raise OSError(errno.EINVAL, "no region lies there")
        return index, offset, region

    # What the kernel answers.

    def device_get_info(self, address: int, caller: Caller) -> None:
        minsz = vfio.DeviceInfo.end_of("num_irqs")
        argsz = int.from_bytes(caller.read(address, minsz)[:4], "little")
        if argsz < minsz:
            raise OSError(errno.EINVAL, f"argsz is {argsz}, at least {minsz} is needed")
        told = self.info
        answer = vfio.DeviceInfo(
            argsz=argsz,
            flags=told.flags & ~vfio.VFIO_DEVICE_FLAGS_CAPS,
            num_regions=told.num_regions,
            num_irqs=told.num_irqs,
        )
        caller.write(address, bytes(answer)[:argsz])

    def device_get_region_info(self, address: int, caller: Caller) -> None:
        asked = vfio.RegionInfo.parse(caller.read(address, vfio.RegionInfo.SIZE))
        if asked.argsz < asked.SIZE or asked.index >= len(self.regions):
            raise OSError(errno.EINVAL, "argsz or index")
        region = self.regions[asked.index]
        if region is None:
            raise OSError(errno.EINVAL, f"no region has the index {asked.index}")
        info = vfio.RegionInfo(
            flags=region.flags,
            index=asked.index,
            size=region.size,
            offset=region_offset(asked.index),
        )
        answer = bytearray(replies.region_info(info, region.areas, asked.argsz))
        if info.argsz <= asked.argsz:
            answer[:4] = asked.argsz.to_bytes(4, "little")  # what is enough stays as it is
        caller.write(address, bytes(answer))

    def device_get_irq_info(self, address: int, caller: Caller) -> None:
        asked = vfio.IrqInfo.parse(caller.read(address, vfio.IrqInfo.SIZE))
        irq = self.irqs[asked.index] if asked.index < len(self.irqs) else None
        if asked.argsz < asked.SIZE or irq is None:
            raise OSError(errno.EINVAL, "argsz or index")
        asked.flags, asked.count = irq.flags, irq.count
        caller.write(address, bytes(asked))


def gather(remote: Remote) -> Facts:
    """Ask for everything.

    Raises:
        RequestError: the server claims what cannot be, or there is no connection any more.
    """
    info = remote.info()
    regions = tuple(_region(remote, index) for index in range(info.num_regions))
    irqs = tuple(_irq(remote, index) for index in range(vfio.VFIO_PCI_NUM_IRQS))
    return Facts(info, regions, irqs)


def _region(remote: Remote, index: int) -> Region | None:
    try:
        info, areas = remote.region(index)
    except RequestError:
        raise
    except OSError as refusal:
        _require_absent(refusal)  # VGA, where there is none
        return None
    return Region(info.size, info.flags & ~vfio.VFIO_REGION_INFO_FLAG_CAPS, areas)


def _irq(remote: Remote, index: int) -> vfio.IrqInfo | None:
    try:
        return remote.irq(index)
    except RequestError:
        raise
    except OSError as refusal:
        _require_absent(refusal)  # ERR of a device that is not PCI Express
        return None


def _require_absent(refusal: OSError) -> None:
    """See that a refusal says that there is none, and is not about a descriptor on the way."""
    if refusal.errno in {errno.EMFILE, errno.ENFILE}:
        raise refusal
