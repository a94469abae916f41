"""Which session is open on a wire that has no descriptors for them.

A socket carries one stream of device state at a time, and its messages do not say which session
they mean. What a kernel keeps in a data_fd is kept here: every session has a number, and the
device's state says which one is open. A change inside the saving group keeps the session, any
other change ends it, and a state of the saving group or RESUMING has a new one (docs/protocol.md,
chapter "sessions"). After a request that failed the state is unknown until the device tells it.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from vfiomig.client.dialects import known
from vfiomig.errors import RequestError
from vfiomig.fsm import SessionKind, State, session_kind

__all__ = ("DataFd", "Sessions")


class DataFd(NamedTuple):
    """What a data_fd's number stands for."""

    kind: SessionKind
    session: int


class Sessions:
    """The sessions of one device. The transport's lock guards it."""

    def __init__(self) -> None:
        #: Where the device is; ``None`` if only it knows.
        self.state: State | None = None
        #: What the session that is open is for; ``None`` if none is.
        self.kind: SessionKind | None = None
        self._session = 0
        self._lost = -1

    def settle(self, number: int) -> bool:
        """Note where the device is; tell whether a session is open that was not before."""
        self.state = known(number)
        kind = session_kind(self.state) if self.state is not None else None
        if kind is not None and kind is self.kind:
            return False
        self.end()
        self.kind = kind
        return kind is not None

    def end(self) -> None:
        """Note that what was open is over."""
        self._session += 1
        self.kind = None

    def lose(self, data_fd: DataFd) -> None:
        """Note that bytes of a session have gone astray: nobody may take the rest for all."""
        self._lost = data_fd.session

    def open(self) -> DataFd:
        """Return what stands for the session that is open."""
        assert self.kind is not None
        return DataFd(self.kind, self._session)

    def require(self, data_fd: DataFd, kind: SessionKind) -> None:
        """Refuse a read or write of a session that is over, or of the other kind."""
        if data_fd.kind is not kind:
            raise OSError(errno.EBADF, f"a descriptor for {data_fd.kind.value}")
        if data_fd.session == self._lost:
            raise RequestError(
                errno.EIO, "a transfer was interrupted, and nobody knows which bytes it moved"
            )
        if not self.is_open(data_fd):
            raise OSError(errno.ENODEV, "the session is over")

    def is_open(self, data_fd: DataFd) -> bool:
        return data_fd.session == self._session
