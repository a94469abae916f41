"""What a serial port is connected to: a plug that leads back, or a listening unix socket.

Theory of operation
-------------------
``exchange`` moves what can move between a UART and the line, without waiting, and is called with
the card's lock held after whatever may have changed something: an access of the driver, or news
from the socket. Nothing is kept in between, so a byte is in the UART or in the socket, never in
both or neither, and who is slow holds up the other: bytes for which the socket has no room stay
in ``tx``, and the socket is read only as far as the receiver has room.

Each direction of a connection is READY (try it), WAITING (the last try found nothing to read, or
no room to write) or OVER. A thread waits for what is WAITING and for the hang-up, and for the next
client while there is none; one client is served at a time. What a client leaves behind unread is
held for the receiver, so that the next one need not wait until the driver has read it.

``close`` says to the client that no more is read, and only then takes what it had written by
then: so every byte that a client was told is written is in the card, and a card that is stopped
and started elsewhere delivers it there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import threading
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, Protocol

from vfiomig.descriptors import Fd
from vfiomig.errors import DeviceError, SpecError
from vfiomig.models.uart16550 import CTS, DCD, DSR, DTR, RTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.models.uart16550 import Uart16550

__all__ = ("Line", "LoopbackPlug", "SocketLine")

log = logging.getLogger("vfiomig.models")

#: sockaddr_un has so many bytes for a path, with the zero behind it.
PATH_BYTES: Final = 108
DRAIN_BYTES: Final = 64 << 10
#: Of clients that have gone so much is taken at least, before the next has to wait.
HELD: Final = 1 << 20
#: Until a client is accepted again where descriptors or memory were short.
RETRY_MS: Final = 1000
HANGUP: Final = select.POLLHUP | select.POLLERR


class Line(Protocol):
    """What a port is connected to."""

    def lines(self, outputs: int) -> int:
        """Tell the modem status lines, by the DTR and RTS of the port."""

    def open(self) -> None:
        """Get ready to be attended; raise ``DeviceError`` if that cannot be."""

    def attend(self, lock: threading.Lock, settle: Callable[[], None]) -> None:
        """From here on call ``settle``, with ``lock`` held, whenever there is news.

        Raises:
            DeviceError: EAGAIN, no thread can be had.
        """

    def close(self) -> bytes:
        """Undo both; return the bytes that were on their way to the port."""

    def exchange(self, uart: Uart16550, held: bytearray) -> None:
        """Move what can move, both ways; the lock is held.

        To ``held`` it may append what goes into the receiver before anything else that comes.
        """


class LoopbackPlug:
    """A plug with wires: data comes back, RTS as CTS, and DTR as DSR and DCD."""

    def lines(self, outputs: int) -> int:
        return (CTS if outputs & RTS else 0) | (DSR | DCD if outputs & DTR else 0)

    def open(self) -> None:
        """Nothing to do: it is always there."""

    def attend(self, lock: threading.Lock, settle: Callable[[], None]) -> None:
        """Nothing to do: all its news come from the port itself."""

    def close(self) -> bytes:
        return b""

    def exchange(self, uart: Uart16550, held: bytearray) -> None:  # noqa: ARG002 - nothing waits
        if uart.tx:
            data = uart.tx[: uart.room]
            uart.sent(len(data))
            uart.receive(data)


class Direction(Enum):
    """Where one direction of a connection is."""

    READY = auto()
    WAITING = auto()
    OVER = auto()


class Client:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.setblocking(False)
        self.input = self.output = Direction.READY
        self.gone = False  # it has closed: what it wrote is all that there will be

    @property
    def over(self) -> bool:
        return self.input is self.output is Direction.OVER

    @property
    def events(self) -> int | None:
        """What to poll it for, beside its hang-up; ``None``: nothing, it has hung up."""
        if self.gone:
            return None
        waits_in = self.input is Direction.WAITING
        waits_out = self.output is Direction.WAITING
        return select.POLLIN * waits_in | select.POLLOUT * waits_out

    def note(self, events: int) -> None:
        """Take in what a poll said."""
        if events & HANGUP:
            self.gone = True
            self.output = Direction.OVER
        if events & (select.POLLIN | HANGUP) and self.input is Direction.WAITING:
            self.input = Direction.READY
        if events & select.POLLOUT and self.output is Direction.WAITING:
            self.output = Direction.READY

    def send(self, data: bytearray) -> int:
        """Write what it takes now; return how much that is."""
        try:
            return self.socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self.output = Direction.WAITING
        except OSError:
            self.output = Direction.OVER  # gone: what is left waits for the next client
        return 0

    def receive(self, size: int) -> bytes:
        """Read what is there now, at most ``size`` bytes."""
        try:
            data = self.socket.recv(size)
        except BlockingIOError:
            self.input = Direction.WAITING
            return b""
        except OSError:
            data = b""  # it closed without reading everything: nothing is left to read here
        if not data:
            self.input = Direction.OVER
        return data

    def drain(self) -> bytes:
        """End the connection; return everything that was written to it."""
        parts = []
        with self.socket:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RD)
            self.input = Direction.READY
            while part := self.receive(DRAIN_BYTES):
                parts.append(part)
            self.input = self.output = Direction.OVER
        return b"".join(parts)


class SocketLine:
    """A unix socket that listens at ``path``: a cable, plugged in with and without a client."""

    def __init__(self, path: str) -> None:
        if not 0 < len(os.fsencode(path)) < PATH_BYTES or "\0" in path:
            raise SpecError(f"socket:{path}: give a path of 1 to {PATH_BYTES - 1} bytes")
        self.path = path
        self._client: Client | None = None
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._wake: Fd | None = None
        self._polling = False
        self._closing = False
        self._pause = False

    def lines(self, outputs: int) -> int:  # noqa: ARG002 - the client sees bytes only
        return CTS | DSR | DCD

    def open(self) -> None:
        self._listener = _listen(self.path)

    def attend(self, lock: threading.Lock, settle: Callable[[], None]) -> None:
        assert self._listener is not None
        self._closing = self._pause = False
        self._wake = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        thread = threading.Thread(
            target=self._attend,
            args=(lock, settle, self._listener, self._wake),
            name=f"vfiomig-line {self.path}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as problem:
            self._wake.close()
            raise DeviceError(errno.EAGAIN, f"no thread for {self.path}: {problem}") from problem
        self._thread = thread

    def close(self) -> bytes:
        """Stop listening and attending, from any thread that does not hold the lock."""
        if self._thread is not None and self._wake is not None:
            self._closing = True
            os.eventfd_write(self._wake.fileno(), 1)
            self._thread.join()
            self._wake.close()
            self._thread = self._wake = None
        listener, self._listener = self._listener, None
        if listener is None:
            return b""
        written = []
        with listener:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            self._accept(listener)
            while self._client is not None:  # those whose turn had not come may have written too
                written.append(self._client.drain())
                self._client = None
                self._accept(listener)
        return b"".join(written)

    def exchange(self, uart: Uart16550, held: bytearray) -> None:
        client = self._client
        if client is None:
            return
        before = client.events
        while uart.tx and client.output is Direction.READY:
            uart.sent(client.send(uart.tx))
        while uart.room and client.input is Direction.READY:
            uart.receive(client.receive(uart.room))
        if client.gone and client.input is Direction.READY and len(held) < HELD:
            held += client.drain()
        if client.over:
            client.socket.close()
            self._client = None
        if self._polling and (client.over or client.events != before) and self._wake is not None:
            os.eventfd_write(self._wake.fileno(), 1)

    # The thread.

    def _attend(
        self,
        lock: threading.Lock,
        settle: Callable[[], None],
        listener: socket.socket,
        wake: Fd,
    ) -> None:
        while True:
            with lock:
                client = self._client
                poller, timeout = self._poller(listener, wake)
                self._polling = True
            ready = dict(poller.poll(timeout))
            with lock:
                self._polling = False
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(wake.fileno())
                if self._closing:
                    return
                if self._client is None and ready.get(listener.fileno()):
                    self._accept(listener)
                elif client is not None and client is self._client:
                    client.note(ready.get(client.socket.fileno(), 0))
                settle()

    def _poller(self, listener: socket.socket, wake: Fd) -> tuple[select.poll, int | None]:
        poller = select.poll()
        poller.register(wake, select.POLLIN)
        if self._client is not None:
            if (events := self._client.events) is not None:
                poller.register(self._client.socket, events)
        elif not self._pause:
            poller.register(listener, select.POLLIN)
        timeout, self._pause = (RETRY_MS if self._pause else None), False
        return poller, timeout

    def _accept(self, listener: socket.socket) -> None:
        if self._client is not None:
            return
        try:
            self._client = Client(listener.accept()[0])
        except BlockingIOError:
            return
        except OSError as problem:
            log.warning("%s: a client cannot be accepted: %s", self.path, problem)
            self._pause = True


def _listen(path: str) -> socket.socket:
    """Listen at ``path``, in place of a socket that nobody listens at any more.

    Raises:
        DeviceError: with the errno of what is in the way.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        if _is_abandoned(path):
            os.unlink(path)
        listener.bind(path)
        listener.listen()
    except OSError as problem:
        listener.close()
        failure = problem.errno or errno.EINVAL
        raise DeviceError(
            failure,
            f"the port cannot listen at {path}: {os.strerror(failure)};"
            " choose another path, or end the program that has this one",
        ) from problem
    return listener


def _is_abandoned(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # no room for one more client: somebody is there
    return False
