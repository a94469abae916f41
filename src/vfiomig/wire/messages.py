"""What comes in: requests and replies, as the header tells them.

``body`` is the payload, or, of commands whose head is followed by data, the head alone. ``data`` is
what is there of the data, and ``data_size`` how many there are; the connection's ``missing`` is
the difference. Body and data are views of the receive buffer.

``fds`` are the receiver's to keep or to close.

They are made for every message, so they are plain, and the class holds what is the same for most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiomig.wire.receiving import NO_FDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.errors import WireError

NOTHING = memoryview(b"")


class Message:
    """What a request and a reply have in common."""

    data: memoryview = NOTHING
    data_size: int = 0
    fds: Sequence[int] = NO_FDS
    #: Why it cannot be used; of a request, with the errno for its reply.
    refusal: WireError | None = None

    def __init__(self, msg_id: int, command: int, flags: int, body: memoryview = NOTHING) -> None:
        self.msg_id = msg_id
        self.command = command
        self.flags = flags
        self.body = body


class Request(Message):
    """Something that the peer asks for."""


class Reply(Message):
    """The answer to a request."""

    #: What the peer says went wrong; 0 for nothing.
    errno: int = 0
