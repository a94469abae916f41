"""A device as programs open it: the device itself, and each open of it.

Theory of operation
-------------------
``VfioDevice`` is there as long as it is served; ``VfioDeviceFile`` is one open file description
of /dev/vfio/devices/vfioN. In the landed dialect an open is bound to an iommufd before anything
else, one open at a time, and the device is in use from BIND to the last close of that open. V6
knows no BIND: there the device is in use while any open exists, and binding is only allowed. Nor
does whoever comes by another way than the character device, which keeps all others out; while the
device's group is open (group.py) it can be used through the group alone.
See ``vfio_device_fops_cdev_open`` and ``vfio_df_ioctl_bind_iommufd`` in the kernel.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect, FdKind, find
from vfiomig.core import bind, info, irqs, precopy, regions, v6
from vfiomig.core.caller import Caller
from vfiomig.core.feature import device_feature
from vfiomig.core.migration import Migration
from vfiomig.fsm import Capability
from vfiomig.iommu import DirtyLog, DmaPort

if TYPE_CHECKING:
    from vfiomig.core.group import Group
    from vfiomig.core.iommufd import Iommufd
    from vfiomig.core.transfer import Migf
    from vfiomig.descriptors import HasFileno
    from vfiomig.device import Device

__all__ = ("VfioDevice", "VfioDeviceFile")

Handler: TypeAlias = Callable[["VfioDeviceFile", int, Caller], int]


class VfioDevice:
    """One served device."""

    def __init__(
        self, device: Device, name: str = "vfio0", dialect: Dialect = Dialect.LANDED
    ) -> None:
        device.check_capabilities(device.capabilities)
        self.device = device
        self.name = name
        self.dialect = dialect
        #: What the device can; V6 shows the seed's five states of it.
        self.capabilities = Capability(device.capabilities)
        shown = Capability.STOP_COPY if dialect is Dialect.V6 else self.capabilities
        self.migration = Migration(device, name, shown & self.capabilities)
        self.configuration = device.configuration
        self.irqs = irqs.Irqs(self.configuration)
        device.interrupts = self.irqs
        #: Parts of regions that are not the device's own, by region index.
        self.windows = regions.windows_of(self)
        #: The short way to those that are nothing but memory.
        self.plain_regions = regions.plain_regions(self)
        #: Where the memory of mapped regions is while the device is in use.
        self.placement: regions.Placement | None = None
        self.dirty_log: DirtyLog | None = None
        self.users = 0
        self.bound = False
        #: The group of the device, while that is open.
        self.group: Group | None = None
        #: Held while opens come and go, with the hooks that they call.
        self.open_lock = threading.Lock()
        self._log_lock = threading.Lock()
        device.dma = DmaPort(iommu_tracks=device.iommu_dirty_tracking)

    def open(
        self,
        memory: HasFileno | None = None,
        *,
        in_use: bool = False,
        group: Group | None = None,
    ) -> VfioDeviceFile:
        """Open the device once more.

        ``memory`` is a file of ``regions.memory_size`` bytes, all zeros, behind the descriptor
        of this open: there the program finds what it maps. It is borrowed until this returns.
        ``in_use``: by a way that knows no BIND, such as a vfio-user socket; the device is in
        use from here on, and its DMA port is the opener's to attach. ``group``: the same, through
        a group that is open, which is told when the open ends.

        Raises:
            OSError: EBUSY if another open is bound (``in_use``), or the device's group is open and
                this is another way; what the device's ``start`` refused with (V6 and ``in_use``;
                otherwise BIND meets both).
        """
        in_use = in_use or group is not None
        file = VfioDeviceFile(self, memory, binds=not in_use, group=group)
        if in_use or self.dialect is Dialect.V6:
            with self.open_lock:
                if self.group is not group:
                    raise OSError(errno.EBUSY, "the device's group is open")
                if in_use and self.bound:
                    raise OSError(errno.EBUSY, "the device is bound through its character device")
                file.use_locked()
        return file

    def enter_group(self, group: Group) -> None:
        """Let the device be used through ``group`` alone: EBUSY if it is open, or in use."""
        with self.open_lock:
            if self.group is not None or self.users:
                raise OSError(errno.EBUSY, "the group is open, or its device is in use")
            self.group = group

    def leave_group(self) -> None:
        with self.open_lock:
            self.group = None

    def reset(self) -> int:
        """Reset the function; return an errno or 0. DMA that waits for its user ends with it."""
        with self.device.dma.asking_nobody():
            self.irqs.reset()
            return self.migration.reset()

    def start_dirty_log(self, log: DirtyLog) -> None:
        """Begin DMA logging: EINVAL if there is a log already."""
        with self._log_lock:
            if self.dirty_log is not None:
                raise OSError(errno.EINVAL, "logging has been started already")
            self.dirty_log = log
            self.device.dma.logs = (log,)

    def stop_dirty_log(self) -> None:
        """End DMA logging; twice is no error."""
        with self._log_lock:
            self.dirty_log = None
            self.device.dma.logs = ()

    def data_ioctl(self, migf: Migf, number: int, arg: int, caller: Caller) -> int:
        """Answer a request on a data_fd of this device."""
        return precopy.data_ioctl(self, migf, number, arg, caller)


class VfioDeviceFile:
    """One open of a device. ``release`` is for its last close."""

    def __init__(
        self,
        device: VfioDevice,
        memory: HasFileno | None = None,
        *,
        binds: bool = True,
        group: Group | None = None,
    ) -> None:
        self.device = device
        #: Whether it is one of the character device, which alone knows BIND.
        self.binds = binds
        self._group = group
        self.placement = regions.Placement(device.device, memory) if memory is not None else None
        self.binding: bind.Binding | None = None
        #: Whether requests other than BIND are answered.
        self.in_use = False

    def ioctl(self, number: int, arg: int, caller: Caller) -> int:
        """Answer a request; raise ``OSError`` with its errno."""
        if number != vfio.VFIO_DEVICE_BIND_IOMMUFD and not self.in_use:
            raise OSError(errno.EINVAL, "the device has not been bound to an iommufd")
        row = find(FdKind.DEVICE, number, self.device.dialect)
        handler = SERVED.get(row.name) if row is not None else None
        if handler is None or (not self.binds and number in BOUND_ONLY):
            raise OSError(errno.ENOTTY, "no request of a device")
        return handler(self, arg, caller)

    def pread(self, offset: int, length: int, blocks: Callable[[], None] = lambda: None) -> bytes:
        """Read from the region that ``offset`` lies in; fewer bytes at its end."""
        if not self.in_use:
            self._require_access()
        return regions.read_region(self.device, offset, length, blocks)

    def pwrite(self, offset: int, data: bytes, blocks: Callable[[], None] = lambda: None) -> int:
        """Write to the region that ``offset`` lies in; return how many bytes it took."""
        self._require_access()
        return regions.write_region(self.device, offset, data, blocks)

    def require_mappable(self, offset: int, length: int, *, shared: bool) -> None:
        """Raise EINVAL unless a program may map this part of the file behind its descriptor."""
        self._require_access()
        placed = self.placement is not None and self.placement is self.device.placement
        if not placed or not regions.may_map(self.device.device, offset, length, shared=shared):
            raise OSError(errno.EINVAL, "these are not pages that may be mapped")

    def view(self, offset: int, length: int) -> memoryview:
        """Return memory that a program of this very process maps: EINVAL unless it may."""
        self._require_access()
        return regions.view(self.device.device, offset, length)

    def _require_access(self) -> None:
        if not self.in_use:
            raise OSError(errno.EINVAL, "the device has not been bound to an iommufd")

    def use_locked(self) -> None:
        """Count as a user of the device; the first one starts it."""
        device = self.device
        if not device.users:
            device.configuration.power_on()
            device.device.dma.master(device.configuration.masters)
            device.irqs.first_open()
            device.placement = self.placement
            if self.placement is not None:
                self.placement.enter()
            failure = device.migration.first_open()
            if failure:
                self._give_up_function_locked()
                raise OSError(failure, f"{device.name} does not start")
        device.users += 1
        self.in_use = True

    def bind(self, find_context: Callable[[], Iommufd]) -> int:
        """Tie this open to an iommufd; return the device's id there.

        Raises:
            OSError: EINVAL if this open or another one is bound or this one cannot be, the errno
                of ``find_context`` or of the device's ``start``, EBUSY if the device is in use
                by another way or its group is open.
        """
        device = self.device
        with device.open_lock:
            if not self.binds:
                raise OSError(errno.EINVAL, "this is no open of the character device")
            if device.group is not None:
                raise OSError(errno.EBUSY, "the device's group is open")
            if self.binding is not None:
                raise OSError(errno.EINVAL, "this open is bound already")
            context = find_context()
            if device.bound:
                raise OSError(errno.EINVAL, "another open is bound")
            if device.users and device.dialect is Dialect.LANDED:
                raise OSError(errno.EBUSY, "the device is in use by another way than this one")
            if not self.in_use:
                self.use_locked()
            device.bound = True
            self.binding = bind.Binding(context, device.name, device.device.dma)
            return self.binding.devid

    def unbind(self) -> None:
        """Undo ``bind``: in the landed dialect nobody uses the device then."""
        with self.device.open_lock:
            if self.device.dialect is Dialect.LANDED:
                self._leave_locked()
            self._unbind_locked()

    def release(self) -> None:
        """Last close: what this open held is given up, and the device with the last user."""
        with self.device.open_lock:
            self._leave_locked()
            self._unbind_locked()
            if self.placement is not None and self.placement is not self.device.placement:
                self.placement.close()
        if self._group is not None:
            self._group.leave()

    def _leave_locked(self) -> None:
        device = self.device
        if not self.in_use:
            return
        self.in_use = False
        device.users -= 1
        if not device.users:
            # Before the binding goes: a device may have DMA to finish in order to stop.
            device.migration.last_close()
            device.stop_dirty_log()
            self._give_up_function_locked()

    def _give_up_function_locked(self) -> None:
        device = self.device
        device.irqs.last_close()
        if device.placement is not None:
            device.placement.leave()
            device.placement = None

    def _unbind_locked(self) -> None:
        if self.binding is not None:
            self.binding.release()
            self.binding = None
            self.device.bound = False


def _feature(file: VfioDeviceFile, arg: int, caller: Caller) -> int:
    return device_feature(file.device, arg, caller)


def _mig_set_state(file: VfioDeviceFile, arg: int, caller: Caller) -> int:
    return v6.mig_set_state(file.device, arg, caller)


def _reset(file: VfioDeviceFile, arg: int, caller: Caller) -> int:  # noqa: ARG001 - no argument
    caller.blocks()
    failure = file.device.reset()
    if failure:
        raise OSError(failure, "the device did not reset")
    return 0


#: Requests that an open of the character device alone knows, besides BIND, which fails there.
BOUND_ONLY = frozenset({vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT})

SERVED: dict[str, Handler] = {
    "VFIO_DEVICE_BIND_IOMMUFD": bind.bind_iommufd,
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT": bind.attach_iommufd_pt,
    "VFIO_DEVICE_DETACH_IOMMUFD_PT": bind.detach_iommufd_pt,
    "VFIO_DEVICE_GET_INFO": info.device_get_info,
    "VFIO_DEVICE_GET_REGION_INFO": info.device_get_region_info,
    "VFIO_DEVICE_GET_IRQ_INFO": irqs.device_get_irq_info,
    "VFIO_DEVICE_SET_IRQS": irqs.device_set_irqs,
    "VFIO_DEVICE_RESET": _reset,
    "VFIO_DEVICE_FEATURE": _feature,
    "VFIO_DEVICE_MIG_SET_STATE": _mig_set_state,
}
