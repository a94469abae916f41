"""The socket to one client: whole messages out, messages in, received by threads in turns.

Theory of operation
-------------------
Two things wait for what a client sends: the server's thread for the next request, and whoever
makes DMA by messages for its reply, in any thread, also in that of a request which is being
executed. Only one may receive at a time. So there is a receiver's role, and *whoever waits takes
it*: the server's thread has it while it has nothing to do, lends it while it executes a request,
and a thread that waits for a reply receives by itself if nobody else does. What comes in for
somebody else is handed over: a reply to its waiter, a request to a queue. There is no further
thread, and a request that needs nobody costs two operations on a free lock.

What is handed out of a receive buffer holds until the next call for one. So a request is looked
at before the role is lent, and one that is queued gets bytes of its own. The queue is bounded;
while it is full nobody receives, and the client waits for us as we wait for it.

Nothing waits for ever on a client. One that stalls in the middle of a message, or does not read
its replies, is given up after ``STALLED`` seconds: both are timeouts of the socket, so they cost
nothing. A reply to DMA has a deadline as well. ``hang_up`` wakes everybody, and ``asking_nobody``
whoever waits for a reply to DMA: while the device is reset there is no DMA, and the client may be
one that answers nothing before it has the reply to its reset.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from vfiomig.descriptors import Fd, passed_descriptors, poll_until, rights
from vfiomig.errors import WireError
from vfiomig.wire import Request, command_name, rest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from vfiomig.wire import Buffer, Buffers, Reply, ServerConnection

__all__ = ("ClientGone", "Line", "close_all")

log = logging.getLogger("vfiomig.doors.vfio_user")

#: Seconds without a byte in the middle of a message, in either direction.
STALLED = 10.0
#: Seconds for the reply to a DMA message. QEMU waits 5 for its own requests, so one that waits
#: for us in the meantime is still answered.
DMA_SECONDS = 4.0
#: Requests, and bytes of their data, that wait while another one is executed.
QUEUED = 64
QUEUED_BYTES = 32 << 20
#: Requests that a client may leave unanswered because the device was reset, and is asked more.
MOST_DROPPED = 64
#: Room for as many descriptors as the kernel passes in one call.
ROOM = socket.CMSG_SPACE(253 * 4)
#: As plain numbers: those of an enum cost more than the call that they are for.
CLOEXEC, CTRUNC, WAITALL = map(
    int, (socket.MSG_CMSG_CLOEXEC, socket.MSG_CTRUNC, socket.MSG_WAITALL)
)
NOWHERE = memoryview(b"")
_TIMEVAL = struct.Struct("@qq")


class ClientGone(Exception):
    """The client left, stalled, or broke the protocol; the message is for the log."""


class _Waiter:
    """Somebody who waits for a reply: where its data go, and what became of it."""

    __slots__ = ("answer", "done", "ended", "into")

    def __init__(self, into: memoryview) -> None:
        self.into = into
        self.done = False
        #: By a reset of the device, which waits for no answer.
        self.ended = False
        #: Apart from the receive buffer; nothing, if the client went while it was received.
        self.answer: Reply | None = None


class Line:
    """The connection to one client. Requests are for one thread, all else is for any."""

    def __init__(self, sock: socket.socket, wire: ServerConnection) -> None:
        """Take ``sock`` over."""
        self.wire = wire
        self._socket = sock
        self._fd, self._recvmsg_into = sock.fileno(), sock.recvmsg_into
        sock.settimeout(None)
        seconds = _TIMEVAL.pack(int(STALLED), int(STALLED % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        self.over = False
        self._sending = threading.Lock()
        self._role = threading.Lock()
        self._mine = False  # the server's thread has the role
        #: Guards what is below, and tells that the role is free or something was handed over.
        self._turns = threading.Condition()
        self._waiting = 0
        self._waiters: dict[int, _Waiter] = {}
        self._owed = 0  # replies that nobody waits for any more
        self._dropped: set[int] = set()  # requests that a reset has ended, likewise
        self._asks_nobody = False
        #: Readable while that is so.
        self._interrupt = Fd(os.eventfd(0, os.EFD_CLOEXEC))
        self._arrivals = select.poll()
        self._arrivals.register(sock, select.POLLIN)
        self._arrivals.register(self._interrupt, select.POLLIN)
        self._queue: deque[Request] = deque()
        self._queued_bytes = 0

    # Life.

    def hang_up(self) -> None:
        """Let everybody who waits for the client wake; what is sent from here on is dropped."""
        self.over = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._turns:
            self._turns.notify_all()

    def close(self) -> None:
        """Close the socket, and the descriptors of what was not executed."""
        self.hang_up()
        self.lend()
        with self._role, self._sending:
            self._socket.close()
            self._interrupt.close()
            close_all(self.wire.close())
        for request in self._queue:
            close_all(request.fds)
        self._queue.clear()

    @property
    def hung_up(self) -> bool:
        """Whether the client has gone, as far as one can tell without receiving."""
        if self.over:
            return True
        events = select.POLLRDHUP | select.POLLHUP | select.POLLERR
        return bool(poll_until(self._socket, events, 0) & events)

    # Sending.

    def send(self, buffers: Buffers, fds: Sequence[int] = ()) -> None:
        """Send one message; nothing if there are no buffers or the client has gone."""
        if not buffers:
            return
        with self._sending:
            if self.over:
                return
            try:
                if len(buffers) == 1 and not fds:  # nearly always, and then it fits
                    sent = os.write(self._fd, buffers[0])  # send() costs a third more
                    if sent == len(buffers[0]):
                        return
                    buffers = rest(buffers, sent)
                self._send_locked(buffers, fds)
            except OSError as failure:
                self._give_up(failure)

    def _send_locked(self, buffers: Buffers, fds: Sequence[int] = ()) -> None:
        while buffers:
            sent = self._socket.sendmsg(buffers, rights(fds))
            buffers, fds = rest(buffers, sent), ()

    def _give_up(self, failure: OSError) -> None:
        if isinstance(failure, BlockingIOError):
            log.warning("a client has not read its replies for %g seconds: it is given up", STALLED)
        else:
            log.debug("a client is gone: %s", failure)
        self.hang_up()

    # Requests, for the server's thread.

    def next_request(self) -> Request:
        """Return the next request, which holds until ``lend``.

        Raises:
            ClientGone: there will be none.
        """
        while True:
            if self._queue:
                return self._unqueue()
            if not self._mine:
                if not self._role.acquire(blocking=False):
                    self._wait_for(lambda: self._queue or not self._role.locked())
                    continue
                self._mine = True
            message = self._next()
            if message.__class__ is Request:  # nearly always, and the cheapest question
                return message
            if message is not None:
                self._hand_over_reply(message)  # type: ignore[arg-type]

    def lend(self) -> None:
        """Let others receive: the request was looked at, and is going to be executed."""
        if self._mine:
            self._mine = False
            self._role.release()
            if self._waiting:
                self._tell()

    def _unqueue(self) -> Request:
        with self._turns:
            request = self._queue.popleft()
            self._queued_bytes -= request.data_size
            self._turns.notify_all()  # somebody may wait for room
            return request

    # Turns.

    def _tell(self) -> None:
        with self._turns:
            self._turns.notify_all()

    def _wait_for(self, what: Callable[[], object], deadline: float | None = None) -> None:
        with self._turns:
            self._waiting += 1
            left = None if deadline is None else deadline - time.monotonic()
            self._turns.wait_for(what, left)
            self._waiting -= 1

    @property
    def _room(self) -> bool:
        """Whether one more request may be queued."""
        return len(self._queue) < QUEUED and self._queued_bytes < QUEUED_BYTES

    # Receiving, for whoever has the role.

    def _next(self, deadline: float | None = None) -> Request | Reply | None:
        """Return the next message, receiving bytes if there is none; nothing if it needs more."""
        wire = self.wire
        try:
            if (message := wire.next()) is not None:
                return message
            if deadline is not None and not self._has_arrived(deadline):
                return None
            count, ancillary, flags, _ = self._recvmsg_into([wire.buffer()], ROOM, CLOEXEC)
            if not count or ancillary or flags & CTRUNC:
                self._received(count, passed_descriptors(ancillary), lost=bool(flags & CTRUNC))
            else:
                wire.received(count)
            return wire.next()
        except WireError as error:
            self.send(wire.farewell)
            raise ClientGone(str(error.strerror)) from None
        except BlockingIOError:
            if wire.between_messages:
                return None  # it has nothing to ask, and may take its time
            raise _stalled() from None
        except OSError as failure:
            raise _broken(failure) from None

    def _has_arrived(self, deadline: float) -> bool:
        """Wait for bytes; ``False`` when time is up, or nobody is to wait any more."""
        left = max(0.0, deadline - time.monotonic())
        ready = self._arrivals.poll(math.ceil(left * 1000))
        return any(number == self._fd for number, _ in ready)

    def _received(self, count: int, fds: list[int], *, lost: bool) -> None:
        """Note what came, if it is more than some bytes, or less."""
        whole = self.wire.between_messages
        close_all(self.wire.received(count, fds, lost=lost))
        if not count:
            raise ClientGone("it left" if whole else "it left within a message")

    def receive_into(self, view: memoryview) -> int:
        """Receive data of the message at hand, at least one byte.

        Raises:
            ClientGone: it left, or stalls.
        """
        try:
            count = self._socket.recv_into(view[: self.wire.missing], 0, WAITALL)
        except BlockingIOError:
            raise _stalled() from None
        except OSError as failure:
            raise _broken(failure) from None
        if not count:
            raise ClientGone("it left within a message")
        self.wire.took(count)
        return count

    def data_of(self, request: Request) -> memoryview:
        """Return all data of a request; they hold as long as it does."""
        if request.data_size == len(request.data):
            return request.data
        data = memoryview(bytearray(request.data_size))
        at = len(request.data)
        data[:at] = request.data
        while at < len(data):
            at += self.receive_into(data[at:])
        return data

    def _enqueue(self, request: Request) -> None:
        """Keep a request for the server's thread, apart from the receive buffer."""
        request.body = memoryview(bytes(request.body))
        try:
            request.data = memoryview(bytes(self.data_of(request)))
        except ClientGone:
            close_all(request.fds)
            raise
        with self._turns:
            self._queue.append(request)
            self._queued_bytes += request.data_size
            self._turns.notify_all()

    def _hand_over_reply(self, reply: Reply) -> None:
        """Give a reply to whoever waits for it, its data in place."""
        close_all(reply.fds)
        with self._turns:
            waiter = self._waiters.pop(reply.msg_id, None)
            if waiter is None and reply.msg_id in self._dropped:
                self._dropped.remove(reply.msg_id)
            elif waiter is None:
                self._owed -= 1
        if waiter is None:
            log.debug("the late answer to a %s is dropped", command_name(reply.command))
            return
        try:
            if waiter.into and not reply.errno:
                self._place(reply, waiter.into)
            reply.body, reply.data = memoryview(bytes(reply.body)), NOWHERE
            waiter.answer = reply
        finally:
            waiter.done = True
            self._tell()

    def _place(self, reply: Reply, into: memoryview) -> None:
        at = min(len(reply.data), len(into))
        into[:at] = reply.data[:at]
        while self.wire.missing and at < len(into):
            at += self.receive_into(into[at:])

    # Requests of the server's own, for any thread.

    def ask(
        self, command: int, head: Buffer, data: Buffer = b"", into: memoryview = NOWHERE
    ) -> Reply:
        """Ask the client and wait for its answer, whose data go to ``into``.

        Raises:
            OSError: ENODEV if the client has gone, ETIMEDOUT if it does not answer in time, or
                still owes an earlier answer, ECANCELED if the device is reset meanwhile.
        """
        waiter = _Waiter(into)
        with self._sending:
            self._require_answers()
            outgoing = self.wire.request(command, head, data)
            self._waiters[outgoing.msg_id] = waiter
            waiter.ended = self._asks_nobody  # since a moment ago
            try:
                self._send_locked(outgoing.buffers)
            except OSError as failure:
                self._give_up(failure)
        try:
            self._await(waiter, time.monotonic() + DMA_SECONDS)
        except ClientGone as gone:
            log.debug("DMA gets no answer: %s", gone)
            self.hang_up()
        with self._turns:
            if self._waiters.pop(outgoing.msg_id, None) is None:
                self._turns.wait_for(lambda: waiter.done)  # just being received
            elif waiter.ended:
                self._dropped.add(outgoing.msg_id)
            else:
                self._owed += 1
        if waiter.answer is not None:
            return waiter.answer
        self._require_here()
        if waiter.ended:
            raise _reset()
        raise OSError(errno.ETIMEDOUT, f"the client did not answer within {DMA_SECONDS:g} seconds")

    def _require_answers(self) -> None:
        self._require_here()
        if self._asks_nobody:
            raise _reset()
        if self._owed or len(self._dropped) >= MOST_DROPPED:
            raise OSError(errno.ETIMEDOUT, "the client still owes the answer to earlier DMA")

    def _require_here(self) -> None:
        if self.over:
            raise OSError(errno.ENODEV, "the client has gone")

    def _await(self, waiter: _Waiter, deadline: float) -> None:
        """Wait for a reply, receiving whatever comes if nobody else does."""
        while not self._ends(waiter) and time.monotonic() < deadline:
            if self._room and self._role.acquire(blocking=False):
                try:
                    self._receive_for(waiter, deadline)
                finally:
                    self._role.release()
                    self._tell()
            else:
                self._wait_for(
                    lambda: self._ends(waiter) or (self._room and not self._role.locked()),
                    deadline,
                )

    def _ends(self, waiter: _Waiter) -> bool:
        """Whether there is nothing left to wait for."""
        return waiter.done or waiter.ended or self.over

    @contextmanager
    def asking_nobody(self) -> Iterator[None]:
        """Let nobody wait for a reply to DMA, and ask for none, while the device is reset."""
        self._asks_nobody = True
        for waiter in tuple(self._waiters.values()):
            waiter.ended = True
        os.eventfd_write(self._interrupt.fileno(), 1)
        self._tell()
        try:
            yield
        finally:
            os.eventfd_read(self._interrupt.fileno())
            self._asks_nobody = False

    def _receive_for(self, waiter: _Waiter, deadline: float) -> None:
        while not self._ends(waiter) and self._room and time.monotonic() < deadline:
            message = self._next(deadline)
            if message is None:
                continue
            if isinstance(message, Request):
                self._enqueue(message)
            else:
                self._hand_over_reply(message)


def _reset() -> OSError:
    return OSError(errno.ECANCELED, "the device is reset")


def _stalled() -> ClientGone:
    return ClientGone(f"it stalled within a message for {STALLED:g} seconds")


def _broken(failure: OSError) -> ClientGone:
    return ClientGone(f"its socket fails: {failure.strerror}")


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
