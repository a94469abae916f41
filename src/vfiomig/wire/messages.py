"""What comes in: requests and replies, as the header tells them.

They are made for every message, so they are plain and slotted. ``body`` is the payload, or, of
commands whose head is followed by data, the head alone. ``data`` is what is there of the data, and
``data_size`` how many there are; the connection's ``missing`` is the difference. Body and data are
views of the receive buffer.

``fds`` are the receiver's to keep or to close.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiomig.abi import vfio_user
from vfiomig.wire.receiving import NO_FDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.errors import WireError

NOTHING = memoryview(b"")


class Request:
    """Something that the peer asks for."""

    __slots__ = ("body", "command", "data", "data_size", "fds", "flags", "msg_id", "refusal")

    def __init__(self, msg_id: int, command: int, flags: int) -> None:
        self.msg_id = msg_id
        self.command = command
        self.flags = flags
        self.body = self.data = NOTHING
        self.data_size = 0
        self.fds: Sequence[int] = NO_FDS
        #: Why it must be refused, with the errno for its reply.
        self.refusal: WireError | None = None

    @property
    def wants_reply(self) -> bool:
        return not self.flags & vfio_user.VFIO_USER_NO_REPLY


class Reply:
    """The answer to a request."""

    __slots__ = (
        "body", "command", "data", "data_size", "errno", "fds", "flags", "msg_id", "refusal",
    )  # fmt: skip

    def __init__(self, msg_id: int, command: int, flags: int) -> None:
        self.msg_id = msg_id
        self.command = command
        self.flags = flags
        self.body = self.data = NOTHING
        self.data_size = 0
        self.fds: Sequence[int] = NO_FDS
        #: What the peer says went wrong; 0 for nothing.
        self.errno = 0
        #: Why it cannot be used although the peer succeeded.
        self.refusal: WireError | None = None
