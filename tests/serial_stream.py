"""The host's end of a guest's serial line: numbered lines that must come back as they were sent.

Theory of operation
-------------------
Whatever a connection has taken is remembered until it has come back, and must come back next. So
a byte that is lost, doubled, changed or out of order is seen at once, wherever it happened. When
a machine has stopped, its card takes nothing more, but tells all that it had to tell before the
end; what it had taken and not told comes back from the machine that goes on.
"""

from __future__ import annotations

import select
import socket
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType
    from typing import Self

__all__ = ("SerialStream",)

#: Bytes that are on their way at most: a guest has room for them even while it does not read.
_WINDOW: Final = 1024
_CHUNK: Final = 4096
_POLL_MS: Final = 100


class SerialStream:
    """A stream that goes on from one connection to the next until :meth:`finish`."""

    def __init__(self) -> None:
        #: Bytes that have come back.
        self.returned = 0
        self._on_their_way = bytearray()
        self._untold = bytearray()
        self._lines = 0
        self._news = threading.Condition()
        self._next: socket.socket | None = None
        self._failure = ""
        self._finishing = self._over = False
        self._thread = threading.Thread(target=self._run, name="serial stream")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._news:
            self._over = True
            self._news.notify_all()
        self._thread.join()
        if self._next is not None:
            self._next.close()

    def connect(self, path: Path) -> None:
        """Go on at a card that runs and listens at ``path``, when the one before has ended."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        connection.setblocking(False)
        with self._news:
            assert self._next is None
            self._next = connection
            self._news.notify_all()

    def wait(self, count: int, *, timeout: float = 30) -> None:
        """Wait until ``count`` more bytes have come back."""
        wanted = self.returned + count
        self._wait(lambda: self.returned >= wanted, timeout)

    def finish(self, *, timeout: float = 30) -> None:
        """Send nothing more, and wait until all has come back."""
        with self._news:
            self._finishing = True
        self._wait(lambda: not self._on_their_way, timeout)

    def _wait(self, condition: Callable[[], bool], timeout: float) -> None:
        with self._news:
            came = self._news.wait_for(lambda: self._failure or condition(), timeout)
        assert not self._failure, self._failure
        assert came, f"{self.returned} bytes came back, and {bytes(self._on_their_way)!r} did not"

    # The thread.

    def _run(self) -> None:
        while (connection := self._take_next()) is not None:
            with connection:
                self._serve(connection)

    def _take_next(self) -> socket.socket | None:
        with self._news:
            self._news.wait_for(lambda: self._next is not None or self._over)
            connection, self._next = self._next, None
            return None if self._over else connection

    def _serve(self, connection: socket.socket) -> None:
        """Send and receive until the card ends the connection."""
        takes = True
        poll = select.poll()
        poll.register(connection)
        while not self._over and not self._failure:
            room = _WINDOW - len(self._on_their_way)
            sends = takes and room > 0 and not self._finishing
            poll.modify(connection, select.POLLIN | (select.POLLOUT if sends else 0))
            ready = sum(events for _, events in poll.poll(_POLL_MS))
            if sends and ready & select.POLLOUT:
                takes = self._send(connection, room)
            elif ready and not self._receive(connection):
                return

    def _send(self, connection: socket.socket, room: int) -> bool:
        """Send as much as goes; return whether the card takes any."""
        while len(self._untold) < room:
            self._lines += 1
            self._untold += b"%d\n" % self._lines
        try:
            taken = connection.send(self._untold[:room])
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        with self._news:
            self._on_their_way += self._untold[:taken]
        del self._untold[:taken]
        return True

    def _receive(self, connection: socket.socket) -> bool:
        """Take what has come; return whether more can come."""
        try:
            data = connection.recv(_CHUNK)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            self._fail("the card has closed a connection without reading all that it took")
            return False
        if not self._on_their_way.startswith(data):
            wanted = bytes(self._on_their_way[: len(data) + 20])
            self._fail(f"after {self.returned} bytes came {data!r}, not {wanted!r}")
        with self._news:
            del self._on_their_way[: len(data)]
            self.returned += len(data)
            self._news.notify_all()
        return bool(data)

    def _fail(self, why: str) -> None:
        with self._news:
            self._failure = why
            self._news.notify_all()
