"""The first requests on a device that was opened, whatever way: from a transport to a client.

Theory of operation
-------------------
A device with an iommufd is bound to it first: a landed kernel answers nothing else before, except
EINVAL. A kernel of the V6 patch may know neither the request nor /dev/iommu, and a descriptor that
was handed over may be bound already or come from a group, so a refusal that such a kernel could
give is only remembered; it is the reason that is told if the device then answers neither the first
probe nor GET_INFO, which one that cannot migrate does answer. docs/protocol.md, chapter "dialects".

Some drivers keep the state of their former user (docs/protocol.md, FAULT-29). Whoever opens such a
device in a way that lets no other user in has it reset (``settle``).
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.client import diagnosis
from vfiomig.client.dialects import find_dialect
from vfiomig.client.dma import AddressSpace
from vfiomig.client.face import DeviceClient
from vfiomig.client.requests import Requests
from vfiomig.client.transport import NO_FD
from vfiomig.errors import RequestError
from vfiomig.fsm import State

if TYPE_CHECKING:
    from vfiomig.client.dma import DeviceMemory
    from vfiomig.client.transport import Transport

__all__ = ("connect", "settle")

log = logging.getLogger("vfiomig.client")

NO_DEVICE = "it is no VFIO device: name a descriptor of one, such as of /dev/vfio/devices/vfio0"
#: Why BIND was refused as a kernel refuses it that may serve the device all the same.
UNBOUND = {
    errno.EINVAL: "it cannot be bound to an iommufd: another program has it, or it is being reset",
    errno.ENOTTY: NO_DEVICE,
}
MINSZ = vfio.DeviceInfo.end_of("num_irqs")


def connect(
    transport: Transport,
    name: str,
    missing: str = "",
    memory: DeviceMemory | None = None,
    *,
    may_be_bound: bool = False,
) -> DeviceClient:
    """Bind the device, see that it answers, and make its client; close it if that fails.

    ``missing`` says why there is no iommufd, ``memory`` is what the device reaches without one.
    ``may_be_bound``: if the device is bound already, then to this iommufd.
    """
    reason, devid = missing, None
    try:
        if transport.iommufd != NO_FD:
            devid, reason = _bind(transport)
        requests = Requests(transport, name)
        dialect = find_dialect(requests)
        if dialect is None and reason:
            requests.on_device(vfio.VFIO_DEVICE_GET_INFO, vfio.DeviceInfo(argsz=MINSZ))
    except OSError as failure:
        _close(transport, memory)
        if failure.errno in {errno.ENOTTY, errno.EBADF}:
            reason = NO_DEVICE
        what_to_do = reason or diagnosis.advice(diagnosis.FIRST, failure)
        raise diagnosis.refused(name, failure, what_to_do) from None
    if memory is None:
        memory = AddressSpace(Requests(transport, name), devid, bound=may_be_bound)
    # A device that cannot migrate is of interest all the same, and of today's dialect.
    return DeviceClient(transport, name, dialect or Dialect.LANDED, memory)


def _bind(transport: Transport) -> tuple[int | None, str]:
    """Bind; return the device's id in the iommufd, or why that was refused."""
    argument = vfio.BindIommufd(
        argsz=vfio.BindIommufd.end_of("out_devid"), iommufd=transport.iommufd
    )
    try:
        transport.ioctl(transport.device, vfio.VFIO_DEVICE_BIND_IOMMUFD, argument)
    except OSError as refusal:
        if refusal.errno not in UNBOUND:
            raise
        return None, UNBOUND[refusal.errno]
    return argument.out_devid, ""


def _close(transport: Transport, memory: DeviceMemory | None) -> None:
    transport.close(transport.device)
    if transport.iommufd != NO_FD:
        transport.close(transport.iommufd)
    if memory is not None:
        memory.release()


def settle(client: DeviceClient) -> DeviceClient:
    """Reset a device that was left in another state than RUNNING: there is no other user."""
    try:
        state = client.state if client.capabilities else State.RUNNING
    except RequestError:
        return client  # whoever asks for the state will be told
    if state is State.RUNNING:
        return client
    try:
        client.reset()
    except RequestError as failure:
        client.close()
        what_to_do = f"its former user left it in {state.name}, and it does not reset"
        raise diagnosis.refused(client.name, failure, what_to_do) from None
    log.warning("%s was left in %s by its former user, and has been reset", client.name, state.name)
    client.mended.append(f"its former user left the device in {state.name}")
    return client
