"""The ways to a device of the kernel: its node, its group, its name, or a descriptor of it.

A kernel offers a device as a character device that is bound to an iommufd, or in a group, or as
both; the former is preferred. A device that was handed over as a descriptor stays in the state that
it is in, for that may be what it is handed over for; any other one is in RUNNING once it is open.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from vfiomig.abi import vfio_iommu
from vfiomig.abi.ioctls import Dialect
from vfiomig.client import diagnosis
from vfiomig.client.connecting import connect, settle
from vfiomig.client.group import choose_member, open_group_device
from vfiomig.client.kernel import KernelTransport, ioctl
from vfiomig.client.requests import Requests
from vfiomig.client.type1 import ContainerSpace
from vfiomig.descriptors import Fd
from vfiomig.errors import SpecError

if TYPE_CHECKING:
    from vfiomig.client.face import DeviceClient
    from vfiomig.client.sysfs import SysDevice, Sysfs

__all__ = ("open_descriptor", "open_group", "open_name", "open_node")

NODES = "/dev/vfio/devices"
GROUPS = "/dev/vfio"
IOMMU = "/dev/iommu"
NO_IOMMU = (
    f"{IOMMU} cannot be opened ({{reason}}): load the module iommufd, or let this user open it"
)


def open_node(node: str, sysfs: Sysfs) -> DeviceClient:
    """Open /dev/vfio/devices/NODE."""
    return _open_node(node, node, sysfs.of_node(node))


def open_group(group: str, name: str | None, sysfs: Sysfs) -> DeviceClient:
    """Open a device of /dev/vfio/GROUP, the only one if ``name`` is ``None``."""
    path = f"{GROUPS}/{group}"
    if name is None and not os.path.exists(path):
        missing = FileNotFoundError(errno.ENOENT, "")
        table = diagnosis.GROUP if os.path.exists(GROUPS) else diagnosis.CONTAINER
        raise diagnosis.refused(path, missing, diagnosis.advice(table, missing))
    if name is None:
        found: SysDevice | None = choose_member(group, sysfs)
    else:
        found = next((one for one in sysfs.members(group) if one.name == name), None)
    return _open_member(group, name or (found.name if found else ""), found, sysfs)


def open_name(name: str, sysfs: Sysfs) -> DeviceClient:
    """Open a device by its PCI address or mdev uuid, through its group if it has no node."""
    found = sysfs.find(name)
    if found is None:
        raise diagnosis.refused(name, OSError(errno.ENODEV, ""), _not_found(name, sysfs))
    has_node = found.node is not None and os.path.exists(f"{NODES}/{found.node}")
    has_group = found.group is not None and os.path.exists(f"{GROUPS}/{found.group}")
    if has_node and (os.path.exists(IOMMU) or not has_group):
        assert found.node is not None
        return _open_node(found.node, name, found)
    if has_group:
        assert found.group is not None
        return _open_member(found.group, name, found, sysfs)
    raise diagnosis.refused(name, OSError(errno.ENODEV, ""), diagnosis.not_bound(found))


def open_descriptor(
    number: int,
    sysfs: Sysfs,
    *,
    iommufd: int | None = None,
    container: int | None = None,
    keep: bool = False,
) -> DeviceClient:
    """Take over a descriptor of a device, and of what its memory is mapped through.

    ``keep``: copies of them, so that this can be done again.
    """
    name, missing = f"fd:{number}", ""
    other = iommufd if container is None else container
    if other == number:
        raise SpecError(
            f"descriptor {number} is named twice: it is a device, or what it belongs to"
        )
    with ExitStack() as taken:
        device = taken.enter_context(_take(number, keep=keep))
        if _is_container(device):
            what = diagnosis.NO_DEVICE_BUT_CONTAINER.format(number=number)
            raise diagnosis.refused(name, OSError(errno.ENOTTY, ""), what)
        given = None if other is None else taken.enter_context(_take(other, keep=keep))
        link = os.readlink(f"/proc/self/fd/{number}")
        taken.pop_all()
    about = _about(sysfs.of_node(Path(link).name), descriptor=link)
    if given is not None and container is not None:
        transport = KernelTransport(device, None, about)
        return connect(transport, name, memory=ContainerSpace(Requests(transport, name), given))
    is_given = given is not None
    if given is None:
        given, missing = _open_iommu()
    transport = KernelTransport(device, given, about)
    return connect(transport, name, missing, may_be_bound=is_given)


def _not_found(name: str, sysfs: Sysfs) -> str:
    if not (sysfs.root / "bus").is_dir():
        return f"{sysfs.root} is no sysfs, which names devices: run where it is mounted"
    lists = "lspci -D" if ":" in name else "mdevctl list"
    return f"{sysfs.root} has no such device: {lists} shows those that there are"


def _take(number: int, *, keep: bool) -> Fd:
    try:
        return Fd(os.dup(number) if keep else number)
    except (OSError, OverflowError):  # not open, or no number of a descriptor's
        how = (
            f"hand it over when this program is started: {number}<>PATH in a shell, or pass_fds "
            "in Python"
        )
        missing = OSError(errno.EBADF, "")
        raise diagnosis.refused(f"descriptor {number}", missing, how) from None


def _is_container(file: Fd) -> bool:
    """Tell a container, and an iommufd, which may stand for one, from a device."""
    try:
        return ioctl(file.fileno(), vfio_iommu.VFIO_GET_API_VERSION, 0) == 0
    except OSError:
        return False


def _open_node(node: str, name: str, found: SysDevice | None) -> DeviceClient:
    path = f"{NODES}/{node}"
    try:
        device = Fd(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as failure:
        raise diagnosis.refused(path, failure, _no_node(failure)) from None
    iommufd, missing = _open_iommu()
    client = connect(KernelTransport(device, iommufd, _about(found)), name, missing)
    # In V6 others may have it open as well.
    return client if client.dialect is Dialect.V6 else settle(client)


def _no_node(failure: OSError) -> str:
    if failure.errno == errno.ENOENT and not os.path.exists(GROUPS):
        return diagnosis.NO_VFIO
    if failure.errno == errno.ENOENT and not os.path.exists(NODES):
        return diagnosis.NO_NODES
    return diagnosis.advice(diagnosis.NODE, failure)


def _open_iommu() -> tuple[Fd | None, str]:
    """Open an iommufd, or say why there is none."""
    try:
        return Fd(os.open(IOMMU, os.O_RDWR | os.O_CLOEXEC)), ""
    except OSError as failure:
        return None, NO_IOMMU.format(reason=failure.strerror)


def _open_member(group: str, name: str, found: SysDevice | None, sysfs: Sysfs) -> DeviceClient:
    opened = open_group_device(group, name, found, sysfs)
    transport = KernelTransport(opened.device, None, _about(found, group=f"{GROUPS}/{group}"))
    memory = ContainerSpace(Requests(transport, name), opened.container, opened.group)
    return settle(connect(transport, name, memory=memory))


def _about(found: SysDevice | None, **more: str) -> dict[str, str | int | bool]:
    driver = {} if found is None or found.driver is None else {"driver": found.driver}
    return {**driver, **more}
