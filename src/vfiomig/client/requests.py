"""Requests on a device, made of the kernel's structs.

Nothing is interpreted here: a failure is the ``OSError`` of the transport, an answer is in the
struct that was handed over. A request that a signal interrupted is made again, except a change
of state, which may have happened by then: ``client.face`` looks first.
"""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.errors import RequestError

if TYPE_CHECKING:
    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.client.transport import Transport

__all__ = ("GET", "PROBE", "SET", "Requests", "failed", "said_about")

GET = vfio.VFIO_DEVICE_FEATURE_GET
SET = vfio.VFIO_DEVICE_FEATURE_SET
PROBE = vfio.VFIO_DEVICE_FEATURE_PROBE
HEADER = vfio.DeviceFeature.SIZE


class Requests:
    """The requests of one client. ``name`` is what messages call the device."""

    def __init__(self, transport: Transport, name: str) -> None:
        self.transport = transport
        self.name = name
        #: VFIO_PRECOPY_INFO_REINIT is an answer, not an echo: the opt-in succeeded.
        self.precopy_v2 = False

    def on_device(self, number: int, argument: UapiStruct | None = None) -> int:
        return self.on(self.transport.device, number, argument)

    def on(self, fd: int, number: int, argument: UapiStruct | None = None) -> int:
        while True:
            try:
                return self.transport.ioctl(fd, number, argument)
            except InterruptedError:
                continue

    def probe(self, index: int, operations: int = 0) -> None:
        """Ask whether a feature has these operations; ``OSError`` if not."""
        self.feature(index, PROBE | operations)

    def feature(self, index: int, operation: int, payload: UapiStruct | None = None) -> None:
        """Use a feature; ``payload`` holds what was written back, after a failure too."""
        while True:
            try:
                return self.feature_once(index, operation, payload)
            except InterruptedError:
                continue

    def feature_once(self, index: int, operation: int, payload: UapiStruct | None) -> None:
        size = 0 if payload is None else payload.SIZE
        buffer = bytearray(HEADER + size)
        if payload is not None:
            buffer[HEADER:] = bytes(payload)
        header = vfio.DeviceFeature.from_buffer(buffer)
        header.argsz = HEADER + size
        header.flags = operation | index
        try:
            self.transport.ioctl(self.transport.device, vfio.VFIO_DEVICE_FEATURE, header)
        finally:
            if payload is not None:
                ctypes.memmove(ctypes.addressof(payload), ctypes.addressof(header) + HEADER, size)


def failed(name: str, what: str, failure: OSError) -> RequestError:
    """Make the error that a client raises for a failed request on device ``name``."""
    number = failure.errno or errno.EIO
    word = errno.errorcode.get(number, str(number))
    return RequestError(number, f"{name}: {what} failed with {word} ({failure.strerror})")


def said_about(failure: OSError) -> str:
    """Return what a transport has to say about a failure, beyond the errno; in brackets."""
    return f" ({failure.strerror})" if isinstance(failure, RequestError) else ""
