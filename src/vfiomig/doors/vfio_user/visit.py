"""One client, from its VERSION to its leaving, and what the device is for it.

Theory of operation
-------------------
A visit is one open of the device: with VERSION the device comes into use, and whichever way the
client leaves, in any state and in the middle of any message, the open is released. That ends the
session, drops interrupts and mappings, and brings the device back to RUNNING for the next one.

Requests are executed one at a time and in the order in which they came. What waits for the device
in a data transfer session is answered later and holds nothing up (data.py).
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from typing import TYPE_CHECKING

from vfiomig.doors.vfio_user.compat import KERNEL
from vfiomig.doors.vfio_user.data import StateData
from vfiomig.doors.vfio_user.dma import ClientMemory, ClientSpace
from vfiomig.doors.vfio_user.line import ClientGone, Line, close_all
from vfiomig.doors.vfio_user.opened import Opened
from vfiomig.errors import WireError
from vfiomig.wire import ServerConnection, command_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
    from vfiomig.doors.vfio_user.compat import Behaviour
    from vfiomig.doors.vfio_user.trace import Trace
    from vfiomig.wire import Buffer, Limits, Request

__all__ = ("Visit",)

log = logging.getLogger("vfiomig.doors.vfio_user")

_UCRED = struct.Struct("3i")


class Visit:
    """One client, as a context. ``greet`` begins it and ``serve`` is its life."""

    def __init__(
        self,
        served: VfioDevice,
        sock: socket.socket,
        behaviour: Behaviour = KERNEL,
        trace: Trace | None = None,
    ) -> None:
        """Take ``sock`` over."""
        self.served = served
        self.behaviour = behaviour
        ours, room = behaviour.capabilities, behaviour.head_room
        self.wire = (
            ServerConnection(ours, head_room=room)
            if trace is None
            else trace.connection(served, ours, room)
        )
        self.line = Line(sock, self.wire)
        #: The process at the other end, if it can be told.
        self.process = _process_of(sock)
        self._opened: Opened | None = None
        # These are there once a version has been agreed on.
        self.limits: Limits
        self.file: VfioDeviceFile
        self.space: ClientSpace
        self.data: StateData

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Whoever makes DMA by messages must not wait while the device stops for it.
        self.line.hang_up()
        if self._opened is not None:
            self.data.give_up()
            if self.behaviour.stays_open:
                self.served.irqs.reset()
                self.served.stop_dirty_log()
            else:
                self._opened.close()
            self.served.device.dma.attach(None)
            self.space.clear()
        self.line.close()

    # Life.

    def greet(self, opened: Opened | None = None) -> None:
        """Agree on a version, and take the device into use, if it was not left ``opened``.

        Raises:
            ClientGone: it left, or will not do.
        """
        request = self.line.next_request()
        try:
            reply = self.wire.answer_version(request)
            self._open(opened)
        except OSError as refusal:
            self.line.send(self.wire.farewell or self.wire.error(request, _errno_of(refusal)))
            raise ClientGone(f"it is refused: {refusal.strerror}") from None
        finally:
            close_all(request.fds)
        self.line.send(reply)

    def _open(self, opened: Opened | None) -> None:
        limits = self.wire.limits
        assert limits is not None
        self.limits = limits
        self.space = ClientSpace(ClientMemory(self.line, limits), limits.max_dma_maps)
        self.data = StateData(
            self.line, tells_end=limits.mig_stream, pads=self.behaviour.pads_reads
        )
        self._opened = opened or Opened(self.served)
        self.file = self._opened.file
        self.served.device.dma.space = self.space

    def serve(self) -> None:
        """Execute what the client asks for until it leaves.

        Raises:
            ClientGone: it left, which is the only end.
        """
        next_request, handler = self.line.next_request, self.behaviour.handlers.get
        while True:
            request = next_request()
            try:
                handler(request.command, refuse)(self, request)
            except OSError as refusal:
                self.line.send(self.wire.error(request, _errno_of(refusal)))
            except ClientGone:
                raise
            except Exception:
                name = command_name(request.command)
                log.exception("a client's %s could not be executed: it gets EIO", name)
                self.line.send(self.wire.error(request, errno.EIO))
            finally:
                if request.fds:
                    close_all(request.fds)

    # What the handlers use.

    @property
    def opened(self) -> Opened:
        """The device in use."""
        assert self._opened is not None
        return self._opened

    def reply(
        self, request: Request, head: Buffer = b"", data: Buffer = b"", fds: Sequence[int] = ()
    ) -> None:
        self.line.send(self.wire.reply(request, head, data), fds)

    def ioctl(self, number: int, argument: bytearray, fds: Sequence[int] = ()) -> None:
        """Make a request of the device's; ``argument`` is read and written."""
        self.opened.ioctl(number, argument, fds, self.process)


def refuse(visit: Visit, request: Request) -> None:  # noqa: ARG001
    """Refuse a command that is none, or was too short to be one."""
    raise request.refusal or WireError(errno.EINVAL, "no command of a client's")


def _errno_of(refusal: OSError) -> int:
    return refusal.errno or errno.EIO


def _process_of(sock: socket.socket) -> int | None:
    """Return the process at the other end, if it can be told."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    process: int = _UCRED.unpack(credentials)[0]
    return process or None
