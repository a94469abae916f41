"""/dev/vfio/N: the group of a device, and the older way to the device through it.

Theory of operation
-------------------
A group is opened once at a time, is put into a container (container.py), and then gives out
descriptors of its devices; every group here holds one. Each such descriptor keeps the group open:
its last close is when all of them and its own are closed. As long as the group is open, the
device cannot be used through its character device, and the other way round.

An iommufd may be the container (vfio_compat.py): then the device is bound to it and attached while
it is open, and not while the group is in it.

The order of checks is that of drivers/vfio/group.c and, for the name, of ``vfio_pci_core_match``.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

from vfiomig.abi import vfio_iommu as abi
from vfiomig.abi.ioctls import Dialect, FdKind, find
from vfiomig.core.bind import Binding
from vfiomig.core.caller import Caller
from vfiomig.core.container import Container
from vfiomig.core.iommufd import Iommufd

if TYPE_CHECKING:
    from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
    from vfiomig.descriptors import HasFileno

__all__ = ("Group", "read_name")

Handler: TypeAlias = Callable[["Group", int, Caller], int]

#: A name may be as long as a page, with the zero at its end.
NAME_SIZE = 4096


class Group:
    """A group with one device, which it knows by its PCI address. Safe for concurrent use."""

    def __init__(self, device: VfioDevice, address: str) -> None:
        self.device = device
        self.address = address
        self._lock = threading.Lock()
        #: What keeps it open: its own open file, and each one of its device.
        self._holders = 0
        self._container: Container | Iommufd | None = None
        #: What ties the open device to an iommufd.
        self._binding: Binding | None = None

    def open(self) -> None:
        """Open the group: EBUSY if it is open, or if its device is in use by another way."""
        with self._lock:
            self.device.enter_group(self)
            self._holders = 1

    def leave(self) -> None:
        """Last close of the group's own file, or of one of its device."""
        with self._lock:
            self._holders -= 1
            if not self.device.users:
                self._unbind_locked()
            if not self._holders:
                self._leave_container_locked()
                self.device.leave_group()

    def ioctl(self, number: int, arg: int, caller: Caller) -> int:
        """Answer a request; raise ``OSError`` with its errno."""
        row = find(FdKind.GROUP, number, Dialect.LANDED)
        if row is None:
            raise OSError(errno.ENOTTY, "no request of a group")
        return SERVED[row.name](self, arg, caller)

    def set_container(self, container: object) -> None:
        with self._lock:
            if self._container is not None:
                raise OSError(errno.EINVAL, "the group is in a container already")
            if isinstance(container, Iommufd):
                container.enter_group()
            elif isinstance(container, Container):
                if self._binding is not None:
                    raise OSError(errno.EBUSY, "the device still belongs to an iommufd")
                container.attach(self.device.device.dma)
            else:
                raise OSError(errno.EBADFD, "the descriptor is no container")
            self._container = container

    def unset_container(self) -> None:
        with self._lock:
            if self._container is None:
                raise OSError(errno.EINVAL, "the group is in no container")
            if self._holders > 1 and isinstance(self._container, Container):
                raise OSError(errno.EBUSY, "a descriptor of the device is open")
            self._leave_container_locked()

    def flags(self) -> int:
        with self._lock:
            if self._container is not None:
                return abi.VFIO_GROUP_FLAGS_VIABLE | abi.VFIO_GROUP_FLAGS_CONTAINER_SET
            return abi.VFIO_GROUP_FLAGS_VIABLE if self._binding is None else 0

    def open_device(self, memory: HasFileno | None = None) -> VfioDeviceFile:
        """Open the device; see ``VfioDevice.open`` for ``memory`` and what ``start`` may refuse.

        Raises:
            OSError: EINVAL before SET_CONTAINER and SET_IOMMU; ENODEV if the container is an
                iommufd that has no address space for it.
        """
        with self._lock, ExitStack() as undo:
            container = self._container
            if container is None or (isinstance(container, Container) and container.iommu is None):
                raise OSError(errno.EINVAL, "the group has no container, or that no IOMMU")
            if isinstance(container, Iommufd) and self._binding is None:
                undo.callback(self._unbind_locked)
                self._binding = Binding(container, self.device.name, self.device.device.dma)
                self._binding.attach_compat()
            file = self.device.open(memory, group=self)
            undo.pop_all()
            self._holders += 1
            return file

    def _unbind_locked(self) -> None:
        if self._binding is not None:
            self._binding.release()
            self._binding = None

    def _leave_container_locked(self) -> None:
        if isinstance(self._container, Container):
            self._container.detach(self.device.device.dma)
        self._container = None


def _get_status(group: Group, arg: int, caller: Caller) -> int:
    status = abi.GroupStatus.parse(caller.read(arg, abi.GroupStatus.SIZE))
    if status.argsz < status.SIZE:
        raise OSError(errno.EINVAL, f"argsz is {status.argsz}: too small")
    status.flags = group.flags()
    caller.write(arg, bytes(status))
    return 0


def _set_container(group: Group, arg: int, caller: Caller) -> int:
    number = int.from_bytes(caller.read(arg, 4), "little", signed=True)
    group.set_container(caller.opened(number))
    return 0


def _unset_container(group: Group, arg: int, caller: Caller) -> int:  # noqa: ARG001 - no argument
    group.unset_container()
    return 0


def _get_device_fd(group: Group, arg: int, caller: Caller) -> int:
    if not _is_called(group.address, read_name(arg, caller)):
        raise OSError(errno.ENODEV, f"the group's device is {group.address}")
    caller.blocks()
    return caller.return_device(group.device, group.open_device)


def read_name(address: int, caller: Caller) -> bytes:
    """Read up to the zero: EFAULT if memory ends before, EINVAL if it comes too late."""
    name = b""
    while len(name) < NAME_SIZE:
        at = address + len(name)
        # Page by page: behind the zero there may be nothing.
        chunk = caller.read(at, min(NAME_SIZE - len(name), NAME_SIZE - at % NAME_SIZE))
        name += chunk
        if 0 in chunk:
            return name[: name.index(0)]
    raise OSError(errno.EINVAL, "the name is longer than a page")


def _is_called(address: str, name: bytes) -> bool:
    """Tell whether a name is the device's: its address, and options behind a space.

    The one option there is, vf_token=UUID, is for functions with SR-IOV, which this one is not.
    """
    own = address.encode("ascii")
    rest = name[len(own) :]
    if not name.startswith(own) or rest[:1] not in {b"", b" "}:
        return False
    if rest.strip(b" "):
        raise OSError(errno.EINVAL, "an option that the device does not have")
    return True


SERVED: dict[str, Handler] = {
    "VFIO_GROUP_GET_STATUS": _get_status,
    "VFIO_GROUP_SET_CONTAINER": _set_container,
    "VFIO_GROUP_UNSET_CONTAINER": _unset_container,
    "VFIO_GROUP_GET_DEVICE_FD": _get_device_fd,
}
