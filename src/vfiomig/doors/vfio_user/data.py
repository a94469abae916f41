"""MIG_DATA_READ and MIG_DATA_WRITE: bytes of the state, between the socket and the device.

Theory of operation
-------------------
Either is a ``Transfer`` of the current session, which may answer it at once or later, from its own
thread; later ones do not hold up other requests, so a read that waits wakes when a request ends
its session.

A read is answered by one message that begins with its length. When the piece of memory that the
device yields completes it, the message is sent right there, from the device's memory, in one
``sendmsg``; only what came before that piece in small parts has been gathered in a buffer. As many
bytes are sent as the device has for now, up to what was asked for.

A write's bytes are still in the socket when the session gets it. ``move`` receives them where the
device wants them, in whichever thread that is. If the device does not want them soon they are
received into a buffer, once, because what stands behind them in the socket must be reached, and
because those that came along with the head lie where the next message will.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from vfiomig.doors.vfio_user.line import ClientGone
from vfiomig.wire.layouts import MIG_DATA

if TYPE_CHECKING:
    from vfiomig.core.transfer import Migf
    from vfiomig.doors.vfio_user.line import Line
    from vfiomig.wire import Buffer, Request

__all__ = ("StateData",)

#: Transfers that wait for the device at the same time; a further one is not begun.
PENDING = 4
#: Seconds without progress after which the bytes of a write are taken out of the socket.
SOON = 0.005
#: How often is looked whether a client is still there for whom the device does nothing.
LOOK = 0.5
NOTHING = memoryview(b"")


class StateData:
    """The transfers of one client, and the buffers that they share."""

    def __init__(self, line: Line, *, tells_end: bool, pads: bool = False) -> None:
        """``tells_end``: the temporary end of pre-copy is ENOMSG, and not no bytes.

        ``pads``: replies are as long as what was asked for.
        """
        self.line = line
        self.tells_end = tells_end
        self.pads = pads
        self._lock = threading.Lock()
        #: Tells, under the lock, that a further transfer may begin.
        self._room = threading.Condition(self._lock)
        self._pending: dict[ReadTransfer | WriteTransfer, Migf] = {}
        self._spare: bytearray | None = None

    def read(self, migf: Migf, request: Request, size: int) -> None:
        """Answer MIG_DATA_READ, now or later."""
        self._submit(ReadTransfer(self, request, size), migf)

    def write(self, migf: Migf, request: Request, size: int) -> None:
        """Answer MIG_DATA_WRITE, now or later; its bytes are out of the socket afterwards."""
        transfer = WriteTransfer(self, request, size)
        if len(self._pending) >= PENDING:
            transfer.stage()
            self.line.lend()
        self._submit(transfer, migf)
        if not transfer.answered:
            transfer.settle()

    def _submit(self, transfer: ReadTransfer | WriteTransfer, migf: Migf) -> None:
        """Hand a transfer in, and note it if it is not answered at once."""
        if len(self._pending) >= PENDING:
            self._wait_for_room()
        migf.submit(transfer)
        with self._lock:
            if not transfer.answered:
                self._pending[transfer] = migf

    def _wait_for_room(self) -> None:
        with self._lock:
            while len(self._pending) >= PENDING:
                if not self._room.wait(LOOK) and self.line.hung_up:
                    raise ClientGone("it left while the device was at its transfers")

    def give_up(self) -> None:
        """Take back what waits: the client has gone."""
        for transfer, migf in list(self._pending.items()):
            migf.withdraw(transfer)

    def answered(self, transfer: ReadTransfer | WriteTransfer, buffer: bytearray | None) -> None:
        """Note that a transfer has its answer, and keep its buffer for another."""
        with self._lock:
            transfer.answered = True
            if self._pending:
                self._pending.pop(transfer, None)
                self._room.notify()
            if buffer is not None:
                self._spare = buffer

    def buffer(self, size: int) -> bytearray:
        """Return a buffer of ``size`` bytes or more."""
        with self._lock:
            spare, self._spare = self._spare, None
        return spare if spare is not None and len(spare) >= size else bytearray(size)


class ReadTransfer:
    """``core.transfer.Transfer`` of a MIG_DATA_READ."""

    __slots__ = ("_buffer", "_data", "_request", "_sent", "answered", "size")

    def __init__(self, data: StateData, request: Request, size: int) -> None:
        self._data = data
        self._request = request
        self._buffer: bytearray | None = None
        self._sent = False
        self.answered = False
        self.size = size

    def move(self, view: memoryview, done: int) -> int:
        end = done + len(view)
        if end == self.size:
            self._sent = True
            self._send(self._gathered(done), view)
        else:
            if self._buffer is None:
                self._buffer = self._data.buffer(self.size)
            self._buffer[done:end] = view
        return len(view)

    def finish(self, result: int) -> None:
        if not self._sent:
            if result >= 0 or (result == -errno.ENOMSG and not self._data.tells_end):
                self._send(self._gathered(max(result, 0)))
            else:
                line = self._data.line
                line.send(line.wire.error(self._request, -result))
        self._data.answered(self, self._buffer)

    def _gathered(self, size: int) -> memoryview:
        return NOTHING if self._buffer is None else memoryview(self._buffer)[:size]

    def _send(self, *pieces: memoryview) -> None:
        size = sum(map(len, pieces))
        padding: tuple[Buffer, ...] = ()
        if self._data.pads and size < self.size:
            padding = (bytes(self.size - size),)
        head = MIG_DATA.pack(MIG_DATA.size + size, size)
        line = self._data.line
        line.send(line.wire.reply(self._request, head, *filter(len, pieces), *padding))


class WriteTransfer:
    """``core.transfer.Transfer`` of a MIG_DATA_WRITE."""

    __slots__ = (
        "_buffer",
        "_data",
        "_here",
        "_lock",
        "_progress",
        "_request",
        "answered",
        "in_socket",
        "size",
    )

    def __init__(self, data: StateData, request: Request, size: int) -> None:
        self._data = data
        self._request = request
        self._here = request.data
        #: How many of its bytes have not been received.
        self.in_socket = size - len(request.data)
        #: Guards the two above, the buffer and the answer.
        self._lock = threading.Lock()
        self.answered = False
        #: Made by whoever waits for them to change, which is rare and not worth one per message.
        self._progress: threading.Condition | None = None
        self._buffer: bytearray | None = None
        self.size = size

    def move(self, view: memoryview, done: int) -> int:  # noqa: ARG002 - bytes come in their order
        with self._lock:
            here = self._here
            moved = min(len(here), len(view))
            view[:moved] = here[:moved]
            self._here = here[moved:]
            moved += self._receive(view[moved : moved + self.in_socket])
            if self._progress is not None:
                self._progress.notify()
        return moved

    def _receive(self, view: memoryview) -> int:
        """Receive all of ``view``, less if the client goes."""
        line, at = self._data.line, 0
        try:
            while at < len(view):
                at += line.receive_into(view[at:])
        except ClientGone:
            line.hang_up()
        self.in_socket -= at
        return at

    def settle(self) -> None:
        """Get the bytes out of where others are received: the device takes them, or a buffer.

        What nobody wants any more is dropped with the next message.
        """
        with self._lock:
            self._progress = threading.Condition(self._lock)
            while self.in_socket and not self.answered:
                left = self.in_socket
                self._progress.wait(SOON)
                if self.in_socket == left and not self.answered:
                    self._stage_locked()
            self._progress = None
            if self._here and not self.answered:
                self._stage_locked()

    def stage(self) -> None:
        """Get the bytes into a buffer."""
        with self._lock:
            self._stage_locked()

    def _stage_locked(self) -> None:
        if self._buffer is not None:
            return
        self._buffer = self._data.buffer(self.size)
        view = memoryview(self._buffer)
        size = len(self._here)
        view[:size] = self._here
        size += self._receive(view[size : size + self.in_socket])
        self.in_socket = 0
        self._here = view[:size]

    def finish(self, result: int) -> None:
        line = self._data.line
        if result == self.size:
            line.send(line.wire.reply(self._request))
        else:
            # Of a write that is taken in part load() has not wanted the rest, and will not.
            line.send(line.wire.error(self._request, errno.ENOMEM if result >= 0 else -result))
        with self._lock:
            self._data.answered(self, self._buffer)
            if self._progress is not None:
                self._progress.notify()
