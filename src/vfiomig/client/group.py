"""Opening a device by its group and a container, for kernels without the character device.

The order is that of every such program: container, group, is it viable, put the one into the
other, give the container its IOMMU, ask for the device by name. Each step has its own ways to
fail, and its own advice (diagnosis.py). Requests: include/uapi/linux/vfio.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from vfiomig.abi import vfio_iommu as abi
from vfiomig.client import diagnosis
from vfiomig.client.kernel import ioctl
from vfiomig.descriptors import Fd
from vfiomig.errors import SpecError

if TYPE_CHECKING:
    from vfiomig.client.sysfs import SysDevice, Sysfs

__all__ = ("GroupDevice", "choose_member", "open_group_device")

FOLDER = "/dev/vfio"
CONTAINER = "/dev/vfio/vfio"


class GroupDevice(NamedTuple):
    """A device that is ready for requests, and what keeps it so."""

    device: Fd
    group: Fd
    container: Fd


def open_group_device(group: str, name: str, found: SysDevice | None, sysfs: Sysfs) -> GroupDevice:
    """Open the device ``name`` of /dev/vfio/GROUP; ``found`` is what sysfs knows of it.

    Raises:
        TargetError: with the step that failed, and what to do.
    """
    with ExitStack() as opened:
        container = opened.enter_context(_open(CONTAINER, diagnosis.CONTAINER))
        version = _ask("VFIO_GET_API_VERSION", container, abi.VFIO_GET_API_VERSION, 0)
        if version != abi.VFIO_API_VERSION:
            failure = OSError(errno.EPROTO, "")
            raise diagnosis.refused(CONTAINER, failure, f"it speaks version {version} of VFIO")
        file = opened.enter_context(_open(f"{FOLDER}/{group}", diagnosis.GROUP))
        _enter(container, file, group, sysfs)
        _set_iommu(container, group)
        number = _get_device(file, name, f"{name} in {FOLDER}/{group}", found)
        opened.pop_all()
        return GroupDevice(Fd(number), file, container)


def choose_member(group: str, sysfs: Sysfs) -> SysDevice:
    """Return the one device of a group that can be asked for.

    Raises:
        SpecError: there are several, or sysfs does not tell; the message says how to name one.
    """
    members = sysfs.members(group)
    ready = [member for member in members if member.node is not None] or members
    if len(ready) == 1:
        return ready[0]
    path = f"{FOLDER}/{group}"
    if not ready:
        raise SpecError(
            f"{sysfs.root} does not tell which device is in {path}: name it, as in "
            f"{path}:0000:01:00.0"
        )
    names = ", ".join(member.name for member in ready)
    raise SpecError(f"{path} has several devices: name one, as in {path}:{ready[0].name}; {names}")


def _enter(container: Fd, group: Fd, name: str, sysfs: Sysfs) -> None:
    path = f"{FOLDER}/{name}"
    status = abi.GroupStatus(argsz=abi.GroupStatus.SIZE)
    _ask(path, group, abi.VFIO_GROUP_GET_STATUS, ctypes.addressof(status))
    if not status.flags & abi.VFIO_GROUP_FLAGS_VIABLE:
        raise diagnosis.refused(
            path, OSError(errno.EPERM, ""), diagnosis.not_viable(path, sysfs.members(name))
        )
    number = ctypes.c_int(container.fileno())
    in_the_way = {errno.EBUSY: diagnosis.not_viable(path, sysfs.members(name))}
    _ask(path, group, abi.VFIO_GROUP_SET_CONTAINER, ctypes.addressof(number), in_the_way)


def _set_iommu(container: Fd, group: str) -> None:
    kind = abi.VFIO_NOIOMMU_IOMMU if group.startswith("noiommu-") else abi.VFIO_TYPE1v2_IOMMU
    table = diagnosis.SET_IOMMU
    if not _ask(CONTAINER, container, abi.VFIO_CHECK_EXTENSION, kind):
        raise diagnosis.refused(CONTAINER, OSError(errno.ENODEV, ""), table[errno.ENODEV])
    _ask(CONTAINER, container, abi.VFIO_SET_IOMMU, kind, table)


def _get_device(group: Fd, name: str, what: str, found: SysDevice | None) -> int:
    text = ctypes.create_string_buffer(os.fsencode(name))
    table = diagnosis.DEVICE_FD
    if found is not None and found.node is None:
        table = {**table, errno.ENODEV: diagnosis.not_bound(found)}
    return _ask(what, group, abi.VFIO_GROUP_GET_DEVICE_FD, ctypes.addressof(text), table)


def _open(path: str, table: dict[int, str]) -> Fd:
    try:
        return Fd(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as failure:
        raise diagnosis.refused(path, failure, diagnosis.advice(table, failure)) from None


def _ask(what: str, on: Fd, number: int, argument: int, table: dict[int, str] | None = None) -> int:
    while True:
        try:
            return ioctl(on.fileno(), number, argument)
        except InterruptedError:
            continue
        except OSError as failure:
            raise diagnosis.refused(what, failure, diagnosis.advice(table or {}, failure)) from None
