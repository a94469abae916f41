"""From a TARGET to a ``DeviceClient``.

Theory of operation
-------------------
Whatever the transport, the device is bound to an iommufd first: a landed kernel answers nothing
else before, except EINVAL. A kernel of the V6 patch may know neither the request nor /dev/iommu,
so a refusal that such a kernel could give is only remembered; it is the reason that is told if
the device then does not answer the first probe. docs/protocol.md, chapter "dialects".
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.client.dialects import ABSENT, find_dialect
from vfiomig.client.face import DeviceClient
from vfiomig.client.kernel import KernelTransport
from vfiomig.client.local import LocalTransport
from vfiomig.client.requests import Requests
from vfiomig.client.transport import NO_FD
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.descriptors import Fd
from vfiomig.errors import SpecError, TargetError

if TYPE_CHECKING:
    from vfiomig.client.transport import Transport
    from vfiomig.device import Device

__all__ = ("open_device", "open_target")

MODEL = "model:"
CHARACTER_DEVICE = re.compile(r"/dev/vfio/devices/(?:noiommu-)?vfio\d+")
IOMMU = "/dev/iommu"

WHEN_OPENING = {
    errno.ENOENT: "there is no such device: look into /dev/vfio/devices, and bind the PCI "
    "function to the VFIO driver that migrates it",
    errno.EACCES: "this user may not: give it the device node (chown, or a udev rule)",
    errno.EPERM: "this user may not: give it the device node (chown, or a udev rule)",
    errno.EBUSY: "another program has it: end that one first",
    errno.ENODEV: "the device went away: bind the PCI function to its VFIO driver again",
}
NO_IOMMU = (
    f"{IOMMU} cannot be opened ({{reason}}): load the module iommufd, or let this user open it"
)
IN_USE = "it cannot be bound to an iommufd: another program has it, or it is being reset"
SILENT = "it does not answer the first request: see the kernel's log (dmesg)"


def open_target(target: str, dialect: Dialect | str | None = None) -> DeviceClient:
    """Open ``model:SPEC``, a device of this process, or ``/dev/vfio/devices/vfioN``.

    ``dialect`` is what a model is served in; a device of the kernel has the kernel's.

    Raises:
        SpecError: the TARGET means nothing; the message says what would.
        TargetError: it cannot be opened; the message says what to do.
    """
    target = os.fspath(target)
    if target.startswith(MODEL):
        from vfiomig.models import make

        spec = target.removeprefix(MODEL)
        return open_device(make(spec), dialect=dialect, name=spec.partition(",")[0])
    if CHARACTER_DEVICE.fullmatch(target) is None:
        raise SpecError(
            f"unknown target {target!r}: use model:SPEC, such as model:pattern,size=64M, or a "
            "device of the kernel, such as /dev/vfio/devices/vfio0"
        )
    if dialect is not None:
        raise SpecError(
            f"the dialect of {target} is the kernel's: leave the dialect out; it is found out"
        )
    return _open_character_device(target)


def open_device(
    device: Device, dialect: Dialect | str | None = None, name: str | None = None
) -> DeviceClient:
    """Serve ``device`` in this process and open it.

    Raises:
        TargetError: the device refuses to start.
    """
    name = name or type(device).__name__
    served = VfioDevice(device, name, _dialect(dialect))
    try:
        transport = LocalTransport(served)
    except OSError as refusal:
        raise _refused(name, refusal, "the device does not start: see its start()") from refusal
    return connect(transport, name)


def _dialect(name: Dialect | str | None) -> Dialect:
    try:
        return Dialect(name or Dialect.LANDED)
    except ValueError:
        known = " or ".join(Dialect)
        raise SpecError(f"unknown dialect {name!r}; choose {known}") from None


def _open_character_device(path: str) -> DeviceClient:
    try:
        device = Fd(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as failure:
        advice = WHEN_OPENING.get(failure.errno or 0, "see the kernel's log (dmesg)")
        raise _refused(path, failure, advice) from None
    try:
        iommufd, missing = Fd(os.open(IOMMU, os.O_RDWR | os.O_CLOEXEC)), ""
    except OSError as failure:
        iommufd, missing = None, NO_IOMMU.format(reason=failure.strerror)
    return connect(KernelTransport(device, iommufd), Path(path).name, missing)


def connect(transport: Transport, name: str, missing: str = "") -> DeviceClient:
    """Bind the device, see that it answers, and make its client; close it if that fails.

    ``missing`` says why there is no iommufd.
    """
    reason, devid = missing, None
    try:
        if transport.iommufd != NO_FD:
            devid = _bind(transport)
            reason = IN_USE if devid is None else ""
        dialect = find_dialect(Requests(transport, name))
        if dialect is None and reason:
            raise OSError(errno.EINVAL, reason)
    except OSError as failure:
        _close(transport)
        raise _refused(name, failure, reason or SILENT) from None
    # A device that cannot migrate is of interest all the same, and of today's dialect.
    return DeviceClient(transport, name, dialect or Dialect.LANDED, devid)


def _bind(transport: Transport) -> int | None:
    """Bind; return the device's id in the iommufd.

    ``None``: it was refused as by a kernel that may serve the device all the same.
    """
    argument = vfio.BindIommufd(
        argsz=vfio.BindIommufd.end_of("out_devid"), iommufd=transport.iommufd
    )
    try:
        transport.ioctl(transport.device, vfio.VFIO_DEVICE_BIND_IOMMUFD, argument)
    except OSError as refusal:
        if refusal.errno not in ABSENT:
            raise
        return None
    return argument.out_devid


def _close(transport: Transport) -> None:
    transport.close(transport.device)
    if transport.iommufd != NO_FD:
        transport.close(transport.iommufd)


def _refused(name: str, failure: OSError, advice: str) -> TargetError:
    number = failure.errno or errno.EIO
    word = errno.errorcode.get(number, str(number))
    return TargetError(number, f"{name} cannot be opened: {word}; {advice}")
