"""One connection to a server, shared by threads: requests, replies, and what the server asks for.

Theory of operation
-------------------
Whoever waits for a reply receives. One thread at a time has the receiver's part: it takes what
comes, gives others the replies that are theirs, answers the server's own requests, and passes the
part on when its reply is there. So a request that nobody else waits beside costs no switch of
threads. While no reply is awaited the attendant receives, a thread that is there as soon as the
server may have something to ask for. It sleeps in an epoll, from which the socket is taken out
while a request is on its way: it is never woken for what is not its own.

A wait may be given up, by Ctrl-C say: the reply is dropped when it comes, and nothing is written
into a buffer whose owner has gone. Wherever in a request Ctrl-C comes, nobody is left waiting for
it. The connection as a whole is given up, once and for ever, when the server breaks the protocol,
does not answer in time or goes away, and when a thread is interrupted just while bytes move, since
nobody knows then where in the stream it is. Every call fails from there on, with the reason.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from vfiomig.descriptors import Fd
from vfiomig.errors import RequestError, WireError
from vfiomig.wire import Reply, Request, command_name, rest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from vfiomig.client.vfio_user.stream import Stream
    from vfiomig.wire import Buffer, Buffers, ClientConnection

__all__ = ("Call", "Channel", "done")

T = TypeVar("T")
#: Makes the answer to a request of the server, whose data it is given.
Answers: TypeAlias = Callable[[Request, memoryview], "Buffers"]

GONE = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError)
#: How often in a row a server may answer EINTR, which is asked again, before that is a fault.
INTERRUPTED = 1000


class Call:
    """A request and its reply, as a context: whoever leaves it by an error gives the reply up."""

    __slots__ = (
        "_channel",
        "abandoned",
        "command",
        "deadline",
        "fds_to",
        "into",
        "msg_id",
        "reply",
    )

    def __init__(
        self, channel: Channel, command: int, into: memoryview | None, fds_to: list[Fd] | None
    ) -> None:
        self._channel = channel
        self.command = command
        self.into = into
        self.fds_to = fds_to
        self.deadline = time.monotonic() + channel.timeout
        self.msg_id = -1
        self.reply: Reply | None = None
        self.abandoned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._channel.abandon(self)


class Filling:
    """Data of a message on their way to where they belong."""

    __slots__ = ("at", "message", "owner", "view")

    def __init__(self, message: Request | Reply, view: memoryview, owner: Call | None) -> None:
        self.message = message
        self.view = view
        self.owner = owner
        self.at = min(len(message.data), len(view))
        view[: self.at] = message.data[: self.at]


class Channel:
    """The connection. Safe for concurrent use."""

    def __init__(
        self, stream: Stream, connection: ClientConnection, name: str, timeout: float
    ) -> None:
        """Take the stream over. ``timeout``: seconds in which a request must be answered."""
        self.name = name
        self.timeout = timeout
        self.connection = connection
        #: Who answers the server's requests; nobody, to begin with.
        self.answer: Answers = lambda request, _data: connection.error(request, errno.ENOTSUP)
        self._stream = stream
        #: Held while a message is sent, from its making to its last byte.
        self._sending = threading.Lock()
        #: Guards everything below. No condition, because Ctrl-C inside of its code leaves it held.
        self._lock = threading.Lock()
        #: The thread that receives, 0 for none.
        self._receiver = 0
        #: What those wait for who are not.
        self._turns: list[threading.Lock] = []
        self._calls: dict[int, Call] = {}
        self._failure: RequestError | None = None
        self._attendant: Attendant | None = None
        # The receiver's own.
        self._filling: Filling | None = None
        self._interrupted = 0

    @property
    def lost(self) -> str:
        """Why the connection was given up; nothing if it was not."""
        failure = self._failure
        return (failure.strerror or "") if failure is not None else ""

    # Requests.

    def call(
        self,
        parse: Callable[[Reply], T],
        command: int,
        head: Buffer = b"",
        *data: Buffer,
        fds: Sequence[int] = (),
        into: memoryview | None = None,
        fds_to: list[Fd] | None = None,
    ) -> T:
        """Make a request and return what ``parse`` finds in the reply; see the three below."""
        with self.prepare(command, into, fds_to) as call:
            self.send(call, head, *data, fds=fds)
            return self.finish(call, parse)

    def prepare(
        self, command: int, into: memoryview | None = None, fds_to: list[Fd] | None = None
    ) -> Call:
        """Begin a request. Data of its reply go ``into`` a buffer; what does not fit is dropped.

        Descriptors of its reply go to ``fds_to``, if that is given, for the caller to close.
        """
        return Call(self, command, into, fds_to)

    def send(self, call: Call, head: Buffer = b"", *data: Buffer, fds: Sequence[int] = ()) -> None:
        """Send a request, in whose context this happens.

        Raises:
            RequestError: the connection was given up.
        """
        with self._sending:
            self._require_open()
            outgoing = self.connection.request(call.command, head, *data, fds=fds)
            call.msg_id = outgoing.msg_id
            with self._lock:
                self._calls[outgoing.msg_id] = call
                self._watch()
            self._send(outgoing.buffers, outgoing.fds, call.deadline)

    def finish(self, call: Call, parse: Callable[[Reply], T]) -> T:
        """Wait for the reply to a request that was sent; return what ``parse`` finds in it.

        Raises:
            OSError: the errno that the server answered.
            RequestError: EPROTO, ETIMEDOUT or ENODEV; the connection is given up.
        """
        self._wait(call)
        reply = call.reply
        assert reply is not None
        if reply.errno:
            self._count_interruptions(reply)
            raise OSError(reply.errno, os.strerror(reply.errno))
        self._interrupted = 0
        try:
            return parse(reply)
        except WireError as error:
            if error.errno != errno.EPROTO:
                raise OSError(error.errno, error.strerror) from None
            raise self.give_up(
                errno.EPROTO, f"sends what means nothing: {error.strerror}"
            ) from None

    def abandon(self, call: Call) -> None:
        """Drop what comes for a call from now on."""
        with self._lock:
            call.abandoned = True
            self._calls.pop(call.msg_id, None)
            self._pass_on_locked()

    def _count_interruptions(self, reply: Reply) -> None:
        self._interrupted = self._interrupted + 1 if reply.errno == errno.EINTR else 0
        if self._interrupted == INTERRUPTED:
            raise self.give_up(errno.EPROTO, "answers EINTR whatever it is asked")

    # Waiting and receiving.

    def _wait(self, call: Call) -> None:
        me = threading.get_ident()
        try:
            while call.reply is None:
                if self._take_part(call, me):
                    while call.reply is None:
                        self._step(call)
        finally:
            if self._receiver == me:
                self._receiver = 0  # at once; if Ctrl-C comes now, leaving the call passes it on
                self._pass_on()

    def _take_part(self, call: Call, me: int) -> bool:
        """Become the receiver, or return when the reply is there or the part is free again."""
        with self._lock:
            if call.reply is not None:
                return False
            self._require_open()
            if not self._receiver:
                self._receiver = me
                return True
            turn = self._turn_locked()
        if not _comes(turn, call.deadline) and call.reply is None:
            raise self._late(call.command)
        return False

    def _turn_locked(self) -> threading.Lock:
        """Return a lock that is held until something changes for whoever waits."""
        turn = threading.Lock()
        turn.acquire()
        self._turns.append(turn)
        return turn

    def _pass_on(self) -> None:
        with self._lock:
            self._pass_on_locked()

    def _pass_on_locked(self) -> None:
        """Let others see who receives now, and what is awaited."""
        self._watch()
        while self._turns:
            turn = self._turns[-1]  # until it is released: Ctrl-C may come in between
            if turn.locked():
                turn.release()
            self._turns.pop()

    def _watch(self) -> None:
        """Let the attendant look at the socket if nobody else does. ``_lock`` is held."""
        if self._attendant is not None:
            alone = not self._calls and not self._receiver and self._failure is None
            self._attendant.watch(alone)

    def _step(self, call: Call) -> None:
        """Wait for something to come, and receive it."""
        try:
            self._stream.wait_readable(call.deadline)
        except TimeoutError:
            raise self._late(call.command) from None
        self._receive()

    def _receive(self) -> None:
        """Receive what is there, whoever it is for. The receiver's part is this thread's."""
        try:
            if self._filling is not None:
                self._fill(self._filling)
            elif self._stream.receive(self.connection):
                self._hand_out()
            else:
                raise self._left()
        except RequestError:
            raise
        except WireError as error:
            self._say_farewell()
            raise self.give_up(
                errno.EPROTO, f"sends what means nothing: {error.strerror}"
            ) from None
        except GONE:
            raise self._left() from None
        except BaseException:
            self.give_up(errno.EIO, "was being listened to when this program was interrupted")
            raise

    def _hand_out(self) -> None:
        """Take every message that is there."""
        while self._filling is None and (message := self.connection.next()) is not None:
            self._take_fds(message)
            if isinstance(message, Request):
                self._take_request(message)
            else:
                self._take_reply(message)

    def _take_fds(self, message: Request | Reply) -> None:
        """Give descriptors to who waits for some; close those that nobody wants."""
        if not message.fds:
            return
        call = self._calls.get(message.msg_id) if isinstance(message, Reply) else None
        with self._lock:  # its owner does not go meanwhile
            if call is not None and call.fds_to is not None and not call.abandoned:
                call.fds_to += map(Fd, message.fds)
                return
        for fd in message.fds:
            os.close(fd)

    def _take_request(self, request: Request) -> None:
        # The data of a request are answered as a whole, once they are all here.
        if self.connection.missing and request.refusal is None:
            self._filling = Filling(request, memoryview(bytearray(request.data_size)), None)
        else:
            self._answer(request, request.data)

    def _answer(self, request: Request, data: memoryview) -> None:
        buffers = self.answer(request, data)
        if buffers:
            with self._sending:
                self._send(buffers, (), time.monotonic() + self.timeout)

    def _take_reply(self, reply: Reply) -> None:
        reply.body = memoryview(bytes(reply.body))  # the receive buffer is used again
        call = self._calls.get(reply.msg_id)
        if call is None:
            return  # nobody waits for it any more
        if call.into is not None and reply.data_size:
            view = call.into[: reply.data_size]
            with self._lock:
                if call.abandoned:
                    return
                filling = Filling(reply, view, call)
            if self.connection.missing and filling.at < len(view):
                self._filling = filling
                return
        self._finish_call(call, reply)

    def _finish_call(self, call: Call, reply: Reply) -> None:
        with self._lock:
            self._calls.pop(reply.msg_id, None)
            call.reply = reply
            self._pass_on_locked()

    def _fill(self, filling: Filling) -> None:
        """Receive more of the data of one message."""
        owner = filling.owner
        with self._lock:  # its owner does not go while bytes are put into its buffer
            if owner is not None and owner.abandoned:
                self._filling = None
                return
            room = filling.view[filling.at : filling.at + self.connection.missing]
            try:
                count = self._stream.receive_into(room)
            except BlockingIOError:
                return
            self.connection.took(count)
            filling.at += count
        if not count:
            raise self._left()
        if filling.at < len(filling.view):
            return
        self._filling = None
        if isinstance(filling.message, Request):
            self._answer(filling.message, filling.view)
        elif owner is not None:
            self._finish_call(owner, filling.message)

    # Sending.

    def _send(self, buffers: Buffers, fds: Sequence[int], deadline: float) -> None:
        """Send a message. ``_sending`` is held."""
        begun = False
        try:
            while buffers:
                sent = self._stream.send(buffers, fds)
                if sent:
                    begun, fds = True, ()
                    buffers = rest(buffers, sent)
                else:
                    self._stream.wait_writable(deadline)
        except TimeoutError:
            raise self.give_up(
                errno.ETIMEDOUT, f"did not take a message within {self.timeout:g} s"
            ) from None
        except GONE:
            raise self._left() from None
        except BaseException:
            if begun:
                self.give_up(errno.EIO, "was being spoken to when this program was interrupted")
            raise

    def _say_farewell(self) -> None:
        """Tell the server what it did wrong, if that is possible at once."""
        farewell = self.connection.farewell
        if farewell and self._sending.acquire(blocking=False):
            try:
                self._stream.send(farewell, ())
            except OSError:
                pass
            finally:
                self._sending.release()

    # The end.

    def give_up(self, number: int, what: str) -> RequestError:
        """Give the connection up; return the error to raise. The first reason stays."""
        with self._lock:
            if self._failure is None:
                self._failure = RequestError(number, f"the server at {self.name} {what}")
            failure = self._failure
            self._pass_on_locked()
        self._stream.shut_down()
        return RequestError(failure.errno or number, failure.strerror or "")

    def _left(self) -> RequestError:
        return self.give_up(errno.ENODEV, "ended the connection; start it again, and open it again")

    def _late(self, command: int) -> RequestError:
        return self.give_up(
            errno.ETIMEDOUT, f"did not answer {command_name(command)} within {self.timeout:g} s"
        )

    def _require_open(self) -> None:
        failure = self._failure
        if failure is not None:
            raise RequestError(failure.errno or errno.EIO, failure.strerror or "")

    def attend(self) -> None:
        """From now on answer the server also while nobody waits for a reply."""
        with self._lock:
            if self._attendant is None and self._failure is None:
                self._attendant = Attendant(self._stream, self._attend)
                self._watch()
                self._attendant.start()

    def _attend(self) -> bool:
        """Receive once, unless somebody else does; ``False`` at the end."""
        with self._lock:
            if self._failure is not None:
                return False
            if self._receiver:
                return True
            self._receiver = threading.get_ident()
            self._watch()
        try:
            self._receive()
        except RequestError:
            return False  # whoever calls next is told
        finally:
            self._receiver = 0
            self._pass_on()
        return True

    def close(self) -> None:
        """Leave. Whoever waits fails with ENODEV."""
        self.give_up(errno.ENODEV, "was left: its client is closed")
        attendant = self._attendant
        if attendant is not None:
            attendant.stop()
        deadline = time.monotonic() + self.timeout
        while (turn := self._turn_after_receiver()) is not None and _comes(turn, deadline):
            pass
        with self._sending:
            for fd in self.connection.close():
                os.close(fd)
            self._stream.close()

    def _turn_after_receiver(self) -> threading.Lock | None:
        with self._lock:
            return self._turn_locked() if self._receiver else None


class Attendant:
    """The thread that receives while nobody waits for a reply."""

    def __init__(self, stream: Stream, attend: Callable[[], bool]) -> None:
        self._socket = stream.fileno()
        self._attend = attend
        self._idle = select.epoll()
        try:
            self._end = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._idle.close()
            raise
        self._idle.register(self._end, select.EPOLLIN)
        self._watching = False
        self._thread = threading.Thread(target=self._run, name="vfiomig-attendant", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def watch(self, on: bool) -> None:
        """Look at the socket, or look away."""
        if on is not self._watching:
            self._watching = on
            if on:
                self._idle.register(self._socket, select.EPOLLIN)
            else:
                self._idle.unregister(self._socket)

    def _run(self) -> None:
        while True:
            ready = self._idle.poll()
            if any(number == self._end for number, _ in ready) or not self._attend():
                return

    def stop(self) -> None:
        os.eventfd_write(self._end, 1)
        self._thread.join()
        self._idle.close()
        os.close(self._end)


def _comes(turn: threading.Lock, deadline: float) -> bool:
    """Wait for a turn."""
    return turn.acquire(timeout=max(0.0, deadline - time.monotonic()))


def done(reply: Reply) -> None:
    """Parse the reply of a request that asks for nothing but success."""
