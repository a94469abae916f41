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

from vfiomig.abi import vfio
from vfiomig.core.regions import memory_size, region_offset
from vfiomig.descriptors import create_sealed_memfd
from vfiomig.doors.vfio_user.caller import BASE, ScratchCaller
from vfiomig.doors.vfio_user.commands import HANDLERS
from vfiomig.doors.vfio_user.data import StateData
from vfiomig.doors.vfio_user.dma import ClientMemory, ClientSpace
from vfiomig.doors.vfio_user.line import ClientGone, Line, close_all
from vfiomig.errors import WireError
from vfiomig.wire import Capabilities, ServerConnection, command_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from vfiomig.core.transfer import Migf
    from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
    from vfiomig.descriptors import Fd
    from vfiomig.fsm import SessionKind
    from vfiomig.wire import Buffer, Limits, Request

__all__ = ("OURS", "Visit")

log = logging.getLogger("vfiomig.doors.vfio_user")

#: What this server says of itself.
OURS = Capabilities(
    max_msg_fds=253,  # as many as the kernel passes at once
    max_data_xfer_size=16 << 20,
    mig_stream=1,
    migration_pgsize=4096,
    write_multiple=True,
    pgsizes=4096,
    max_dma_maps=65535,
    max_bitmap_size=16 << 20,
)
#: Where each region begins, for ``core``, and how far an offset in it can reach.
OFFSETS = tuple(region_offset(index) for index in range(vfio.VFIO_PCI_NUM_REGIONS))
REGION_ROOM = OFFSETS[1] - OFFSETS[0]
_UCRED = struct.Struct("3i")


class Visit:
    """One client, as a context. ``greet`` begins it and ``serve`` is its life."""

    def __init__(self, served: VfioDevice, sock: socket.socket) -> None:
        """Take ``sock`` over."""
        self.served = served
        self.wire = ServerConnection(OURS)
        self.line = Line(sock, self.wire)
        #: The last session that the client opened; dead when something has ended it.
        self.migf: Migf | None = None
        self._file: VfioDeviceFile | None = None
        self._memory: Fd | None = None
        self._process = _process_of(sock)
        self.limits: Limits
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
        if self._file is not None:
            self._file.release()
            self.served.irqs.set_grows(False)
            self.served.device.dma.attach(None)
            self.space.clear()
        if self._memory is not None:
            self._memory.close()
        self.line.close()

    # Life.

    def greet(self) -> None:
        """Agree on a version, and take the device into use.

        Raises:
            ClientGone: it left, or will not do.
        """
        request = self.line.next_request()
        try:
            reply = self.wire.answer_version(request)
            self._open()
        except OSError as refusal:
            self.line.send(self.wire.farewell or self.wire.error(request, _errno_of(refusal)))
            raise ClientGone(f"it is refused: {refusal.strerror}") from None
        finally:
            close_all(request.fds)
        self.line.send(reply)

    def _open(self) -> None:
        limits = self.wire.limits
        assert limits is not None
        self.limits = limits
        size = memory_size(self.served.device)
        if size:
            name = f"vfiomig-{self.served.name}"
            self._memory = create_sealed_memfd(name, size)
        self.space = ClientSpace(ClientMemory(self.line, limits.data_out), limits.max_dma_maps)
        self.data = StateData(self.line, tells_end=limits.mig_stream)
        self._file = self.served.open(self._memory, in_use=True)
        self.served.device.dma.space = self.space
        # A message has room for a few descriptors, so many vectors are given by several.
        self.served.irqs.set_grows(True)

    def serve(self) -> None:
        """Execute what the client asks for until it leaves.

        Raises:
            ClientGone: it left, which is the only end.
        """
        while True:
            request = self.line.next_request()
            try:
                HANDLERS.get(request.command, refuse)(self, request)
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
    def file(self) -> VfioDeviceFile:
        """The open of the device."""
        assert self._file is not None
        return self._file

    @property
    def memory(self) -> Fd:
        """The file in which mapped regions are."""
        assert self._memory is not None
        return self._memory

    def reply(
        self, request: Request, head: Buffer = b"", data: Buffer = b"", fds: Sequence[int] = ()
    ) -> None:
        self.line.send(self.wire.reply(request, head, data), fds)

    def ioctl(self, number: int, argument: bytearray, fds: Sequence[int] = ()) -> None:
        """Make a request of the device's; ``argument`` is read and written."""
        caller = ScratchCaller(argument, fds, self._process)
        self.file.ioctl(number, BASE, caller)
        if caller.migf is not None:
            self.migf = caller.migf

    def precopy_info(self, argument: bytearray) -> None:
        """Make VFIO_MIG_GET_PRECOPY_INFO of the session."""
        if self.migf is None:
            raise _no_session()
        number, caller = vfio.VFIO_MIG_GET_PRECOPY_INFO, ScratchCaller(argument)
        self.served.data_ioctl(self.migf, number, BASE, caller)

    def session(self, kind: SessionKind) -> Migf:
        """Return the session for a transfer: EBADF if it is one of the other direction."""
        migf = self.migf
        if migf is None:
            raise _no_session()
        if migf.kind is not kind:
            raise OSError(errno.EBADF, f"the session is one of {migf.kind.name}")
        return migf

    def read_region(self, region: int, offset: int, size: int) -> bytes:
        if region >= len(OFFSETS) or offset >= REGION_ROOM:
            raise OSError(errno.EINVAL, f"region {region} has no offset {offset:#x}")
        return self.file.pread(OFFSETS[region] + offset, size)

    def write_region(self, region: int, offset: int, data: bytes) -> int:
        if region >= len(OFFSETS) or offset >= REGION_ROOM:
            raise OSError(errno.EINVAL, f"region {region} has no offset {offset:#x}")
        return self.file.pwrite(OFFSETS[region] + offset, data)


def refuse(visit: Visit, request: Request) -> None:  # noqa: ARG001
    """Refuse a command that is none, or was too short to be one."""
    raise request.refusal or WireError(errno.EINVAL, "no command of a client's")


def _no_session() -> OSError:
    return OSError(errno.EINVAL, "no data transfer session was opened so far")


def _errno_of(refusal: OSError) -> int:
    return refusal.errno or errno.EIO


def _process_of(sock: socket.socket) -> int | None:
    """Return the process at the other end, if it can be told."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    process: int = _UCRED.unpack(credentials)[0]
    return process or None
