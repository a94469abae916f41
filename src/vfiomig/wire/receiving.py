"""The receiving half, up to messages: bytes and descriptors in, where they belong.

Theory of operation
-------------------
``buffer`` is where the next bytes go. It is short on purpose: most messages have less than 100
bytes, many of them fit, and of a message of a megabyte, whose data the receiver takes by itself,
no more than that is copied. It grows only for a message that must be there as a whole, to exactly
its size, and is given up after it. What is handed out are views of the buffer; they hold until
``buffer`` is called, which moves the beginning of an incomplete message to the front.

A message with data may be handed out before all of them are there; ``missing`` bytes are still to
come. Whoever wants them receives them where they belong and tells ``took``; what nobody takes is
dropped as it arrives.

Descriptors
-----------
The kernel hands descriptors over with bytes that were sent in one call, and never puts bytes of
a later call behind them; bytes of earlier calls may stand before. So of what one receive call
returns, the last byte is certain to have been sent with the descriptors, and they belong to the
message that this byte is part of. For every peer that makes one call per message, as they all do,
this is exact, however the message is cut and with whichever of its bytes they were sent.

A descriptor is in exactly one place: waiting here, in the ``fds`` of a message that was handed
out, or returned by ``received`` or ``close`` because it belongs to nothing. Nothing here closes
any; whoever does the I/O closes what is left in a message and what is returned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

READ_AHEAD = 4096
NO_FDS: Sequence[int] = ()
#: Descriptors that may wait for the rest of their messages: no peer may send as many with one,
#: and one that sends some with each byte shall not fill the table of this process.
MOST_FDS = 1024


class _Mark(NamedTuple):
    """Descriptors, and the index of the last byte that came with them."""

    at: int
    fds: Sequence[int]
    lost: bool


class ReceiveBuffer:
    """Bytes that arrived and were not handed out, and the descriptors among them."""

    def __init__(self) -> None:
        self._small = memoryview(bytearray(READ_AHEAD))
        self._view = self._small
        self._start = self._end = 0
        #: The size of the message at ``_start``, if it is known and more must come.
        self._need = 0
        self._marks: list[_Mark] = []
        #: How many bytes of the data that were handed out last have not arrived yet.
        self.missing = 0
        #: How many bytes still to come belong to a message of which nothing more is wanted.
        self._unwanted = 0

    def buffer(self) -> memoryview:
        """Return where to receive the next bytes. Views that were handed out end here."""
        if self._start == self._end:
            self._start = self._end = 0
            self._view = self._small
            return self._small
        self._make_room()
        return self._view[self._end :]

    def _make_room(self) -> None:
        held = self._end - self._start
        rest = self._view[self._start : self._end]
        if self._need > len(self._view):
            self._view = memoryview(bytearray(self._need))
        self._view[:held] = rest
        if self._marks:
            self._marks = [mark._replace(at=mark.at - self._start) for mark in self._marks]
        self._start, self._end = 0, held

    def received(
        self, count: int, fds: Sequence[int] = NO_FDS, *, lost: bool = False
    ) -> Sequence[int]:
        """Note that ``count`` bytes are in the buffer now; return descriptors to be closed.

        ``lost`` says that the kernel could not hand over all of the descriptors (MSG_CTRUNC):
        the message that they belong to is refused.
        """
        self._end += count
        if self.missing or self._unwanted:
            self._drop(count)
        if not fds and not lost:
            return NO_FDS
        if self._start == self._end or not count:
            return fds
        if fds and sum(len(mark.fds) for mark in self._marks) + len(fds) > MOST_FDS:
            self._mark_lost()
            return fds
        self._marks.append(_Mark(self._end - 1, fds, lost))
        return NO_FDS

    def _mark_lost(self) -> None:
        """Note that descriptors which came with the last byte were not kept."""
        mark, marks = _Mark(self._end - 1, NO_FDS, lost=True), self._marks
        if len(marks) > 1 and not marks[-1].fds and not marks[-2].fds:
            marks[-1] = mark  # one for the message that is incomplete, one for the newest
        else:
            marks.append(mark)

    def _drop(self, count: int) -> None:
        """Step over those of ``count`` new bytes that nobody took or wants."""
        dropped = min(self.missing or self._unwanted, count)
        self._start += dropped
        if self.missing:
            self.missing -= dropped
        else:
            self._unwanted -= dropped

    def took(self, count: int) -> None:
        """Note that ``count`` of the missing bytes were received elsewhere."""
        if not 0 <= count <= self.missing:
            raise ValueError(f"{self.missing} bytes are missing, and not {count}")
        self.missing -= count

    @property
    def between_messages(self) -> bool:
        """Whether a peer that leaves now leaves no message half sent."""
        return self._start == self._end and not self.missing and not self._unwanted

    def close(self) -> list[int]:
        """End; return the descriptors that wait for the rest of their message."""
        fds = [fd for mark in self._marks for fd in mark.fds]
        self._marks.clear()
        return fds

    def _claim(self, stop: int) -> tuple[list[int], bool]:
        """Take the descriptors of the message that ends at ``stop``; tell if some were lost."""
        marks = [mark for mark in self._marks if mark.at < stop]
        del self._marks[: len(marks)]
        return [fd for mark in marks for fd in mark.fds], any(mark.lost for mark in marks)
