"""One end of a vfio-user connection, without the socket: messages out of bytes, and back.

Theory of operation
-------------------
The receiving half turns what `ReceiveBuffer` holds into `Request` and `Reply`, one by one; the
sending half makes the buffers of a message, for one ``sendmsg``. Either end asks and answers, so
both kinds come in at both ends. Requests are numbered, and a reply finds its request by the
number; any number of requests may be on their way.

What a foreign message may do:

- Its framing is wrong: a size below that of a header or above what was agreed on, a type that is
  neither request nor reply, a reply that nobody asked for or to another command. Where the next
  message begins, or what it answers, is then anybody's guess: ``next`` raises `WireError` now and
  ever after, ``farewell`` is what the peer is still told, and the connection is over.
- Its content is wrong. It is handed out with the `WireError` in ``refusal``, so that it is answered
  in its turn; nothing of it is kept, and the connection goes on.

Before the version is agreed on the one request is VERSION, and anything wrong is of the first
kind. `vfiomig.wire.requests` and `vfiomig.wire.replies` look into the payloads.

The halves share nothing but the table of outstanding requests, in which one adds and the other
removes: one thread may receive while another sends, each half being used by one at a time.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar, NamedTuple, NoReturn, TypeAlias

from vfiomig.abi import vfio_user
from vfiomig.errors import WireError
from vfiomig.wire import commands, version
from vfiomig.wire.commands import Role, command_name
from vfiomig.wire.layouts import HEADER, REGION_READ_REPLY
from vfiomig.wire.messages import Reply, Request
from vfiomig.wire.receiving import NO_FDS, READ_AHEAD, ReceiveBuffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.wire.commands import Command
    from vfiomig.wire.version import Capabilities, Limits

__all__ = (
    "Buffer",
    "Buffers",
    "ClientConnection",
    "Connection",
    "Outgoing",
    "ServerConnection",
    "rest",
)

Buffer: TypeAlias = bytes | bytearray | memoryview
#: What one ``sendmsg`` sends; nothing where nothing is to be sent.
Buffers: TypeAlias = tuple[Buffer, ...]

HEADER_SIZE = 16
#: A message may be longer than its data by a header and the largest head, that of a bitmap.
HEAD_ROOM = 64
#: Bytes of a message that is made in one piece.
FEW = 1024
TYPE = vfio_user.VFIO_USER_TYPE
REQUEST, REPLY = vfio_user.VFIO_USER_REQUEST, vfio_user.VFIO_USER_REPLY
NO_REPLY, ERROR = vfio_user.VFIO_USER_NO_REPLY, vfio_user.VFIO_USER_ERROR
ERRNO_MAX = 4095
IDS = 1 << 16

_unpack_header = HEADER.unpack_from
_pack_header = HEADER.pack
_pack_region_read = REGION_READ_REPLY.pack
REGION_READ_SIZE = REGION_READ_REPLY.size


class Outgoing(NamedTuple):
    """A request to be sent, and the number by which its reply is known.

    The descriptors go with the first byte, in a ``sendmsg`` of the request's own.
    """

    msg_id: int
    buffers: Buffers
    fds: Sequence[int]


class Connection(ReceiveBuffer):
    """One end; see `ServerConnection` and `ClientConnection`."""

    role: ClassVar[Role]

    def __init__(self, ours: Capabilities, *, head_room: int = HEAD_ROOM) -> None:
        """``head_room`` is how much longer than its data a message may be that comes in."""
        super().__init__()
        self.ours = ours
        self._head_room = head_room
        #: What was agreed on; nothing before.
        self.limits: Limits | None = None
        #: After a `WireError`: what to send before closing.
        self.farewell: Buffers = ()
        self._limit = version.PAYLOAD_LIMIT + HEADER_SIZE
        self._requests: dict[int, Command] = {}
        self._outstanding: dict[int, Command] = {}
        self._last_id = 0

    def _agree(self, limits: Limits) -> None:
        self.limits = limits
        self._limit = limits.data_in + self._head_room
        self._requests = commands.requests_to(self.role, extension=limits.mig_stream)

    # Receiving.

    def next(self) -> Request | Reply | None:
        """Return the next message, or nothing if more bytes are needed.

        What was not taken of the message before is dropped.

        Raises:
            WireError: the connection is over; ``farewell`` is to be sent.
        """
        start = self._start
        held = self._end - start
        if held < HEADER_SIZE:
            return None
        header = _unpack_header(self._view, start)
        msg_id, command, size, flags, _ = header
        if not HEADER_SIZE <= size <= self._limit:
            self._break(header, f"a message of {size} bytes, where {self._limit} are the most")
        if flags & TYPE != REQUEST:
            if flags & TYPE != REPLY:
                self._break(header, f"a message of type {flags & TYPE}")
            return self._next_reply(header, held)
        row = self._requests.get(command)
        if row is None or size - HEADER_SIZE < row.request_size:
            return self._refused(header, held)
        if row.request_data or size > held:
            return self._next_long_request(header, held, row)
        self._start = stop = start + size
        self._need = 0
        request = Request(msg_id, command, flags, self._view[start + HEADER_SIZE : stop])
        if self._marks:
            self._take_fds(request, stop, row)
        return request

    def _next_long_request(
        self, header: tuple[int, ...], held: int, row: Command
    ) -> Request | None:
        """Hand out a request that has data, or is not there as a whole."""
        msg_id, command, size, flags, _ = header
        head = HEADER_SIZE + row.request_size
        if row.request_data and self.limits is not None and size - head > self.limits.data_in:
            return self._refused(header, held)
        if size > held and not (row.request_data and size > READ_AHEAD and held >= head):
            self._need = size
            return None
        start = self._start
        stop = self._hand_out(size, held, wanted=True)
        request = Request(msg_id, command, flags, self._view[start + HEADER_SIZE : start + head])
        request.data = self._view[start + head : stop]
        request.data_size = size - head
        if self._marks:
            self._take_fds(request, stop, row)
        return request

    def _next_reply(self, header: tuple[int, ...], held: int) -> Reply | None:
        msg_id, command, size, flags, error_no = header
        row = self._outstanding.get(msg_id)
        if row is None or row.number != command:
            what = "that nobody asked for" if row is None else f"to a {row.name}"
            self._break(header, f"a reply {what}: {command_name(command)}, number {msg_id}")
        head = HEADER_SIZE + row.reply_size
        failed = flags & ERROR
        if size > held and not (failed or (row.reply_data and size > READ_AHEAD and held >= head)):
            self._need = size
            return None
        del self._outstanding[msg_id]
        start = self._start
        stop = self._hand_out(size, held, wanted=not failed)
        reply = Reply(msg_id, command, flags)
        if failed:
            # A payload, which libvfio-user sends if it had made one already, says nothing more.
            reply.errno = error_no if 0 < error_no <= ERRNO_MAX else errno.EINVAL
        elif row.reply_data and size >= head:
            reply.body = self._view[start + HEADER_SIZE : start + head]
            reply.data = self._view[start + head : stop]
            reply.data_size = size - head
        else:
            reply.body = self._view[start + HEADER_SIZE : stop]
        if self._marks:
            reply.fds, lost = self._claim(stop)
            if lost:
                reply.refusal = _lost_fds(row)
        return reply

    def _hand_out(self, size: int, held: int, *, wanted: bool) -> int:
        """Step over the message at ``_start``; return where what is there of it ends."""
        there = min(size, held)
        self._start += there
        self._need = 0
        if wanted:
            self.missing = size - there
        else:
            self._unwanted = size - there
        return self._start

    def _take_fds(self, request: Request, stop: int, row: Command) -> None:
        """Give the request its descriptors, and refuse it if it must not have them."""
        request.fds, lost = self._claim(stop)
        limits = self.limits
        if lost:
            request.refusal = _lost_fds(row)
        elif request.fds and not row.request_fds:
            request.refusal = WireError(errno.EINVAL, f"{row.name} takes no descriptors")
        elif limits is not None and len(request.fds) > limits.fds_in:
            request.refusal = WireError(
                errno.EINVAL,
                f"{row.name} came with {len(request.fds)} descriptors, where at most"
                f" {limits.fds_in} were agreed on",
            )

    def _refused(self, header: tuple[int, ...], held: int) -> Request:
        """Hand out a request whose header says enough; its payload is dropped as it arrives."""
        msg_id, command, size, flags, _ = header
        row = self._requests.get(command)
        if row is None:
            what = f"{command_name(command)} is no request to a {self.role}"
            what += " here" if self.limits else " that has not agreed on a version"
        elif size < HEADER_SIZE + row.request_size:
            what = f"{row.name} of {size} bytes, at least {HEADER_SIZE + row.request_size}"
            what += " are needed"
        else:
            what = f"{row.name} of {size} bytes, which is more than was agreed on"
        if self.limits is None:
            self._break(header, what)
        request = Request(msg_id, command, flags)
        request.refusal = WireError(errno.EINVAL, what)
        stop = self._hand_out(size, held, wanted=False)
        if self._marks:
            request.fds, _ = self._claim(stop)
        return request

    def _break(self, header: tuple[int, ...], what: str) -> NoReturn:
        """End the connection; a request is answered first."""
        msg_id, command, _, flags, _ = header
        if flags & TYPE != REPLY and not flags & NO_REPLY:
            self.farewell = (_error(msg_id, command, errno.EINVAL),)
        raise WireError(errno.EINVAL, f"the peer broke the protocol: {what}")

    # Sending.

    def reply(
        self, request: Request, head: Buffer = b"", data: Buffer = b"", *more: Buffer
    ) -> Buffers:
        """Make the reply to ``request``, or nothing if it wants none.

        ``data`` and ``more`` are made of bytes. Unless they are few they are sent from where
        they are.
        """
        if request.flags & NO_REPLY:
            return ()
        size = HEADER_SIZE + len(head) + len(data)
        if more:
            size += sum(map(len, more))
        header = _pack_header(request.msg_id, request.command, size, REPLY, 0)
        if size <= FEW:  # copying them costs less than one more buffer to send
            return (b"".join((header, head, data, *more)),)
        return (header + head, data, *more)

    def error(self, request: Request, number: int, payload: bytes = b"") -> Buffers:
        """Make the reply that says that ``request`` failed, or nothing if it wants none.

        There is a ``payload`` in the manner of libvfio-user only.
        """
        if request.flags & NO_REPLY:
            return ()
        return (_error(request.msg_id, request.command, number, payload),)

    def request(
        self,
        command: int,
        head: Buffer = b"",
        data: Buffer = b"",
        *more: Buffer,
        fds: Sequence[int] = NO_FDS,
        no_reply: bool = False,
    ) -> Outgoing:
        """Make a request, which is outstanding from now on unless it wants no reply.

        Raises:
            ValueError: the peer would refuse it, for its size or its descriptors.
        """
        row = commands.BY_NUMBER[command]
        length = len(data) + sum(map(len, more))
        self._require_sendable(row, length, len(fds))
        msg_id = self._new_id()
        if not no_reply:
            self._outstanding[msg_id] = row
        size = HEADER_SIZE + len(head) + length
        header = _pack_header(msg_id, command, size, NO_REPLY if no_reply else REQUEST, 0)
        return Outgoing(msg_id, (header + head, data, *more), fds)

    def _require_sendable(self, row: Command, length: int, fds: int) -> None:
        limits = self.limits
        if row.asks is not self.role:
            raise ValueError(f"a {self.role} does not ask for {row.name}")
        if limits is None:
            if row is not commands.VERSION:
                raise ValueError(f"VERSION comes before {row.name}")
            return
        if length > limits.data_out or fds > limits.fds_out:
            raise ValueError(
                f"{row.name} with {length} bytes and {fds} descriptors: the peer takes"
                f" {limits.data_out} and {limits.fds_out}, so send several"
            )
        if row.extension and not limits.mig_stream:
            raise ValueError(f"the peer has no {row.name}")

    def _new_id(self) -> int:
        """Return a number that no outstanding request has."""
        if len(self._outstanding) == IDS:
            raise ValueError("65536 requests are outstanding: wait for replies")
        number = (self._last_id + 1) % IDS
        while number in self._outstanding:
            number = (number + 1) % IDS
        self._last_id = number
        return number


class ServerConnection(Connection):
    """The end of a device: it is asked, and asks for the client's memory."""

    role = Role.SERVER

    def __init__(self, ours: Capabilities, *, head_room: int = HEAD_ROOM) -> None:
        super().__init__(ours, head_room=head_room)
        self._requests = {commands.VERSION.number: commands.VERSION}

    def answer_version(self, request: Request) -> Buffers:
        """Agree on what the client proposes; return the reply.

        Raises:
            WireError: nothing was agreed on, and the connection is over.
        """
        try:
            if request.refusal is not None:
                raise request.refusal
            payload, limits = version.answer_untrusted(request.body, self.ours)
        except WireError as error:
            self.farewell = self.error(request, error.errno or errno.EINVAL)
            raise
        self._agree(limits)
        return self.reply(request, payload)

    def reply_region_read(self, request: Request, offset: int, region: int, data: bytes) -> Buffers:
        """Make the reply to REGION_READ: ``reply`` in one step, for the commonest of all."""
        if request.flags & NO_REPLY:
            return ()
        count = len(data)
        head = _pack_region_read(
            request.msg_id,
            request.command,
            REGION_READ_SIZE + count,
            REPLY,
            0,
            offset,
            region,
            count,
        )
        return (head + data,) if count <= FEW else (head, data)


class ClientConnection(Connection):
    """The end of a program that uses a device."""

    role = Role.CLIENT

    def propose_version(self) -> Outgoing:
        """Make the first request."""
        return self.request(vfio_user.VFIO_USER_VERSION, version.proposal(self.ours))

    def accept_version(self, reply: Reply) -> Limits:
        """Agree on what the server answered.

        Raises:
            WireError: the server refused, or its answer will not do; the connection is over.
        """
        if reply.refusal is not None:
            raise reply.refusal
        if reply.errno:
            raise WireError(reply.errno, "the server refused to agree on a version")
        limits = version.accept_untrusted(reply.body, self.ours)
        self._agree(limits)
        return limits


def _error(msg_id: int, command: int, number: int, payload: bytes = b"") -> bytes:
    size = HEADER_SIZE + len(payload)
    return _pack_header(msg_id, command, size, REPLY | ERROR, number) + payload


def _lost_fds(row: Command) -> WireError:
    return WireError(errno.EMFILE, f"{row.name} came with descriptors that found no room here")


def rest(buffers: Buffers, sent: int) -> Buffers:
    """Return what is left of ``buffers`` when ``sent`` bytes of them are gone."""
    for number, buffer in enumerate(buffers):
        if sent < len(buffer):
            return (memoryview(buffer)[sent:], *buffers[number + 1 :])
        sent -= len(buffer)
    return ()
