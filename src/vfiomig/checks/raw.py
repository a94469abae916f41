"""Requests as a careless program makes them: nothing is refused here, nothing interpreted.

``DeviceClient`` is a good citizen: it sends no request that it knows to be wrong, and reads every
answer for its user. A checker needs the bad requests, every field of the answers, and the errno.
A result here is an errno, 0 for success; a failure of the device raises nothing, but for the last
one: a connection that is no more.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.checks.evidence import Gone

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import ReadableBuffer, WriteableBuffer

    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.client import DeviceClient
    from vfiomig.client.transport import Transport

__all__ = ("GET", "PROBE", "SET", "UNSET_FD", "FeatureReply", "InfoReply", "Raw", "Reply")

GET = vfio.VFIO_DEVICE_FEATURE_GET
SET = vfio.VFIO_DEVICE_FEATURE_SET
PROBE = vfio.VFIO_DEVICE_FEATURE_PROBE
HEADER = vfio.DeviceFeature.SIZE
STATE = vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE

#: Stored in ``data_fd`` before a request: what is still there afterwards nobody has written.
UNSET_FD = -77

#: How often in a row a call is made again that was interrupted.
INTERRUPTED = 1000


class Reply(NamedTuple):
    """What came of a request for a state: its errno, and both fields as they are afterwards."""

    errno: int
    device_state: int
    data_fd: int


class FeatureReply(NamedTuple):
    """What came of a feature request, and its header and payload afterwards."""

    errno: int
    header: bytes
    payload: bytes


class InfoReply(NamedTuple):
    """What came of VFIO_MIG_GET_PRECOPY_INFO, and the fields afterwards."""

    errno: int
    flags: int
    initial_bytes: int
    dirty_bytes: int


class Raw:
    """The requests on one open device."""

    def __init__(self, client: DeviceClient) -> None:
        self.transport: Transport = client._transport
        self.dialect = client.dialect
        #: Set when a check is over, or is given up, and a thread of it is not: the numbers of its
        #: descriptors will be somebody else's.
        self.barred = False

    def _outcome(self, call: Callable[[], int]) -> int:
        """Make a call, again if it is interrupted; return its result, or a negative errno.

        Raises:
            Gone: no call reaches the device any more.
        """
        for _ in range(INTERRUPTED):
            if self.barred:
                raise Gone("it was closed meanwhile")
            try:
                return call()
            except InterruptedError:
                continue
            except OSError as failure:
                if self.transport.lost:
                    raise Gone(self.transport.lost) from None
                return -(failure.errno or errno.EIO)
        return -errno.EINTR

    def ioctl(self, on: int, number: int, argument: UapiStruct | None = None) -> int:
        return -min(0, self._outcome(lambda: self.transport.ioctl(on, number, argument)))

    def on_device(self, number: int, argument: UapiStruct | None = None) -> int:
        return self.ioctl(self.transport.device, number, argument)

    # Features.

    def feature(self, flags: int, payload: bytes = b"", argsz: int | None = None) -> FeatureReply:
        """Make a VFIO_DEVICE_FEATURE request; ``argsz`` is that of header and payload."""
        buffer = bytearray(HEADER) + payload
        header = vfio.DeviceFeature.from_buffer(buffer)
        header.argsz = len(buffer) if argsz is None else argsz
        header.flags = flags
        result = self.on_device(vfio.VFIO_DEVICE_FEATURE, header)
        return FeatureReply(result, bytes(buffer[:HEADER]), bytes(buffer[HEADER:]))

    def feature_at(self, address: int) -> int:
        """Make the request whose struct lies at ``address``, if there is any memory."""
        return self.on_device(vfio.VFIO_DEVICE_FEATURE, vfio.DeviceFeature.from_address(address))

    # States.

    def set_state(self, target: int, data_fd: int = UNSET_FD) -> Reply:
        if self.dialect is Dialect.V6:
            asked = vfio.MigSetState(argsz=16, device_state=target, data_fd=data_fd)
            result = self.on_device(vfio.VFIO_DEVICE_MIG_SET_STATE, asked)
            return Reply(result, asked.device_state, asked.data_fd)
        payload = bytes(vfio.MigState(device_state=target, data_fd=data_fd))
        answer = self.feature(SET | STATE, payload)
        told = vfio.MigState.parse(answer.payload)
        return Reply(answer.errno, told.device_state, told.data_fd)

    def get_state(self) -> Reply:
        """Ask where the device is; V6 has no such request but the one that it always refuses."""
        if self.dialect is Dialect.V6:
            reply = self.set_state(vfio.VFIO_DEVICE_STATE_ERROR)
            refused = reply.errno == errno.EINVAL
            return reply._replace(errno=0) if refused else reply
        payload = bytes(vfio.MigState(device_state=0xFFFF, data_fd=UNSET_FD))
        answer = self.feature(GET | STATE, payload)
        told = vfio.MigState.parse(answer.payload)
        return Reply(answer.errno, told.device_state, told.data_fd)

    def reset(self) -> int:
        return self.on_device(vfio.VFIO_DEVICE_RESET)

    # Sessions.

    def info(self, data_fd: int, flags: int = 0, argsz: int = vfio.PrecopyInfo.SIZE) -> InfoReply:
        argument = vfio.PrecopyInfo(argsz=argsz, flags=flags)
        result = self.ioctl(data_fd, vfio.VFIO_MIG_GET_PRECOPY_INFO, argument)
        return InfoReply(result, argument.flags, argument.initial_bytes, argument.dirty_bytes)

    def read(self, data_fd: int, buffer: WriteableBuffer) -> int:
        """Read; return how many bytes came, or a negative errno."""
        view = memoryview(buffer).cast("B")
        return self._outcome(lambda: self.transport.readinto(data_fd, view))

    def write(self, data_fd: int, data: ReadableBuffer) -> int:
        """Write; return how many bytes were taken, or a negative errno."""
        view = memoryview(data).cast("B")
        return self._outcome(lambda: self.transport.write(data_fd, view))

    def close(self, number: int) -> int:
        if self.barred:
            return errno.EBADF
        try:
            self.transport.close(number)
        except OSError as failure:
            return failure.errno or errno.EIO
        return 0
