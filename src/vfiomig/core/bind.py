"""BIND_IOMMUFD, ATTACH_IOMMUFD_PT and DETACH_IOMMUFD_PT: a device gets its memory.

Order of checks: ``vfio_df_ioctl_bind_iommufd``, ``vfio_df_ioctl_attach_pt`` and
``vfio_df_ioctl_detach_pt`` in the kernel; the structs are in include/uapi/linux/vfio.h.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.core.hwpt import BoundDevice
from vfiomig.core.iommufd import Iommufd, read_extensible
from vfiomig.core.vfio_compat import compat_ioas

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.core.hwpt import Hwpt
    from vfiomig.core.vfio_device import VfioDeviceFile
    from vfiomig.iommu import DmaPort

__all__ = ("Binding", "attach_iommufd_pt", "bind_iommufd", "detach_iommufd_pt")


class Binding:
    """What ties one open of a device to an iommufd. Safe for concurrent use."""

    def __init__(self, context: Iommufd, name: str, port: DmaPort) -> None:
        self._device = BoundDevice(name, tracks=port.iommu_tracks)
        self.devid = context.add(self._device)
        self._context = context
        self._port = port
        self._lock = threading.Lock()
        self._attached: tuple[int, Hwpt] | None = None

    def attach(self, number: int) -> int:
        """Let the device reach what the page table or IOAS ``number`` maps; return the table's id.

        A device that is attached elsewhere is replaced without a moment of neither. When this
        returns, none of its accesses is under way through the former page table.
        """
        with self._lock:
            former, self._attached = self._attached, self._context.attach(number, self._device)
            self._port.attach(self._attached[1].table)
            if former is not None:
                self._context.detach(*former, self._device)
            return self._attached[0]

    def attach_compat(self) -> None:
        """Attach to the address space that stands for a container's: ENODEV if there is none."""
        compat_ioas(self._context)
        self.attach(self._context.vfio_ioas)

    def detach(self) -> None:
        with self._lock:
            self._port.attach(None)
            if self._attached is not None:
                self._context.detach(*self._attached, self._device)
                self._attached = None

    def release(self) -> None:
        self.detach()
        self._context.discard(self.devid)


def bind_iommufd(file: VfioDeviceFile, arg: int, caller: Caller) -> int:
    """Bind, once in the life of an open; from here on the device is in use."""
    size = int.from_bytes(caller.read(arg, 4), "little")
    struct = vfio.BindIommufd
    argument = read_extensible(struct, struct.end_of("out_devid"), size, arg, caller)
    assert isinstance(argument, vfio.BindIommufd)
    # No device here asks for a token, and one that is not asked for is refused.
    if argument.flags or argument.iommufd < 0:
        raise OSError(errno.EINVAL, "flags, or no iommufd")
    caller.blocks()
    devid = file.bind(lambda: _iommufd(caller, argument.iommufd))
    try:
        caller.write(arg + struct.out_devid.offset, devid.to_bytes(4, "little"))
    except OSError:
        file.unbind()
        raise
    return 0


def attach_iommufd_pt(file: VfioDeviceFile, arg: int, caller: Caller) -> int:
    """Attach to a page table or an IOAS, replacing what was; the table's id is written back."""
    struct = vfio.AttachIommufdPt
    minsz = struct.end_of("pt_id")
    argsz, flags, pt_id = _words(caller.read(arg, minsz))
    if argsz < minsz or flags & ~vfio.VFIO_DEVICE_ATTACH_PASID:
        raise OSError(errno.EINVAL, "argsz or flags")
    _refuse_pasid(flags & vfio.VFIO_DEVICE_ATTACH_PASID, argsz, struct.SIZE)
    binding = _bound(file)
    table = binding.attach(pt_id)
    try:
        caller.write(arg + struct.pt_id.offset, table.to_bytes(4, "little"))
    except OSError:
        binding.detach()
        raise
    return 0


def detach_iommufd_pt(file: VfioDeviceFile, arg: int, caller: Caller) -> int:
    """Take the device's memory away; detaching twice is no error."""
    struct = vfio.DetachIommufdPt
    minsz = struct.end_of("flags")
    argsz, flags = _words(caller.read(arg, minsz))
    if argsz < minsz or flags & ~vfio.VFIO_DEVICE_DETACH_PASID:
        raise OSError(errno.EINVAL, "argsz or flags")
    _refuse_pasid(flags & vfio.VFIO_DEVICE_DETACH_PASID, argsz, struct.SIZE)
    _bound(file).detach()
    return 0


def _iommufd(caller: Caller, number: int) -> Iommufd:
    context = caller.opened(number)
    if not isinstance(context, Iommufd):
        raise OSError(errno.EBADFD, f"descriptor {number} is no iommufd")
    return context


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


def _refuse_pasid(asked: int, argsz: int, size: int) -> None:
    if asked:
        failure = errno.EINVAL if argsz < size else errno.EOPNOTSUPP
        raise OSError(failure, "no device here has PASIDs")


def _bound(file: VfioDeviceFile) -> Binding:
    if file.binding is None:  # V6 only: there a device is used without it
        raise OSError(errno.EINVAL, "the device has not been bound to an iommufd")
    return file.binding
