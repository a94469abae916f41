"""VFIO_DEVICE_FEATURE as messages.

Most features are bytes behind a header, there as here, and go to the server as they are: its
checks are the ones that count. Three do not fit: the state gives out a data_fd, and two of the
DMA log hold pointers.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect, find_feature
from vfiomig.client.requests import GET, PROBE, SET
from vfiomig.client.transport import NO_FD
from vfiomig.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.abi.ioctls import FdKind
    from vfiomig.client.numbers import Numbers
    from vfiomig.client.vfio_user.dirty_log import DmaLog
    from vfiomig.client.vfio_user.remote import Remote
    from vfiomig.client.vfio_user.sessions import DataFd
    from vfiomig.core.caller import Caller

__all__ = ("Features",)

HEADER = vfio.DeviceFeature.SIZE
INDEX = vfio.VFIO_DEVICE_FEATURE_MASK
OPERATIONS = GET | SET | PROBE
MIGRATION = vfio.VFIO_DEVICE_FEATURE_MIGRATION
STATE = vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
#: Features that the wire has only where the extension was agreed on.
EXTENSION = {
    vfio.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: "no server tells the size of a device's state",
    vfio.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2: "no server tells of new initial data",
}
WITHOUT_IT = "without the extension mig_stream, which this one does not speak"


class Features:
    """The features of one device."""

    def __init__(self, remote: Remote, log: DmaLog, numbers: Numbers[FdKind | DataFd]) -> None:
        self._remote = remote
        self._numbers = numbers
        #: Index and operation of what is more than bytes: given the payload's address.
        self._special: dict[int, Callable[[int, Caller], None]] = {
            GET | STATE: self._get_state,
            SET | STATE: self._set_state,
            SET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START: log.start,
            SET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP: lambda _payload, _caller: log.stop(),
            GET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: log.report,
        }

    def ioctl(self, address: int, caller: Caller) -> None:
        """Answer VFIO_DEVICE_FEATURE."""
        header = vfio.DeviceFeature.parse(caller.read(address, HEADER))
        index, operation = header.flags & INDEX, header.flags & OPERATIONS
        has_it = self._remote.limits.mig_stream
        if index in EXTENSION and not has_it:
            raise RequestError(errno.ENOTTY, f"{EXTENSION[index]} {WITHOUT_IT}")
        try:
            self._use(header, address + HEADER, caller)
        except RequestError:
            raise
        except OSError as refusal:
            # libvfio-user has this one errno for whatever it lacks.
            lacks = operation & PROBE or index == MIGRATION or not self._remote.migratable
            if has_it or refusal.errno != errno.EINVAL or not lacks:
                raise
            raise OSError(errno.ENOTTY, "the device has no such feature") from None

    def _use(self, header: vfio.DeviceFeature, payload: int, caller: Caller) -> None:
        index, operation = header.flags & INDEX, header.flags & OPERATIONS
        row = find_feature(index, Dialect.LANDED)
        size = row.minsz - HEADER if row is not None else 0
        if header.argsz < HEADER + size and operation in {GET, SET}:
            if not self._remote.limits.mig_stream:
                # libvfio-user would take what is not there for what was asked.
                raise OSError(errno.EINVAL, f"argsz is {header.argsz}: too small")
            size = max(0, header.argsz - HEADER)
        elif header.flags in self._special and (index != STATE or self._remote.migratable):
            self._special[header.flags](payload, caller)
            return
        asked = bytes(
            vfio.DeviceFeature(argsz=min(header.argsz, HEADER + size), flags=header.flags)
        )
        if operation == SET:
            asked += caller.read(payload, size)
        answers = size if operation == GET else 0
        told = self._remote.feature_as_it_is(asked, answers)
        if answers:
            caller.write(payload, told[:answers])

    def _get_state(self, payload: int, caller: Caller) -> None:
        caller.read(payload, vfio.MigState.SIZE)  # as the kernel does, for nothing
        with self._remote.order:
            number = self._remote.query_locked()
        caller.write(payload, bytes(vfio.MigState(device_state=number, data_fd=NO_FD)))

    def _set_state(self, payload: int, caller: Caller) -> None:
        argument = vfio.MigState.parse(caller.read(payload, vfio.MigState.SIZE))
        argument.data_fd = NO_FD
        with self._remote.order:
            try:
                opened = self._remote.change_locked(argument.device_state)
            except OSError:
                # Written back after a failure too, and still holding the request.
                caller.write(payload, bytes(argument))
                raise
            data_fd = self._remote.sessions.open() if opened else None
        if data_fd is None:
            caller.write(payload, bytes(argument))
            return
        # From here on the change has happened, whether there is a number for it or not.
        argument.data_fd = self._numbers.install(data_fd)
        try:
            caller.write(payload, bytes(argument))
        except OSError:
            self._numbers.remove(argument.data_fd)
            raise
