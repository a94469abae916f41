"""A device's own state, saved once, for all checks that load one.

It is the only thing that a checker knows to be right: bytes of a stream are nobody's business but
the device's. It is kept in memory, so there is a limit to its size.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ("CHUNK", "STATE_LIMIT", "StateTooLong", "Stream", "first_difference", "flaw")

#: Bytes of one read or write.
CHUNK: Final = 1 << 20
#: Largest state that is kept.
STATE_LIMIT: Final = 256 << 20


class StateTooLong(Exception):
    """The device delivers more than the limit; the message names it."""


class Stream:
    """Bytes that came in one piece after the other, without a copy of what came before."""

    def __init__(self, limit: int = STATE_LIMIT, *, kept: bool = True) -> None:
        """``kept``: whether anybody will look at them, or only at how many they were."""
        # Pages come when they are written.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, (max(limit, 1) if kept else 0) + CHUNK, flags=flags)
        with suppress(OSError):  # a kernel without them
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # of 64 MiB a quarter of the time
        self._limit = limit
        self._kept = kept
        self.size = 0

    def take(self, read: Callable[[memoryview], int]) -> int:
        """Let ``read`` fill in what comes next; return what it returned.

        Raises:
            StateTooLong: there is no room for more.
        """
        start = self.size if self._kept else 0
        with memoryview(self._memory) as whole, whole[start : start + CHUNK] as room:
            count = read(room)
        if count > 0:
            self.size += count
            if self.size > self._limit:
                raise StateTooLong(f"its state is longer than {self._limit} bytes")
        return count

    def view(self) -> memoryview:
        """Everything that came."""
        assert self._kept, "nobody wanted to look at it"
        return memoryview(self._memory)[: self.size].toreadonly()


def flaw(state: memoryview, pieces: Iterable[bytes]) -> str:
    """Say what is wrong with what reads brought, one after the other, from the start of a state.

    Nothing is if each of them brought what comes next, or there was nothing left.
    """
    done = 0
    for piece in pieces:
        if not piece and done < len(state):
            return f"nothing behind the first {done} bytes"
        difference = first_difference(piece, state[done : done + len(piece)])
        if difference is not None:
            return f"other bytes from {done + difference} on"
        done += len(piece)
    return ""


def first_difference(one: bytes | memoryview, other: bytes | memoryview) -> int | None:
    """Return the offset of the first byte that differs, or is missing; ``None`` if none is."""
    for at in range(0, max(len(one), len(other)), CHUNK):
        left, right = bytes(one[at : at + CHUNK]), bytes(other[at : at + CHUNK])
        if left != right:
            pairs = enumerate(zip(left, right, strict=False))
            return at + next((n for n, (a, b) in pairs if a != b), min(len(left), len(right)))
    return None
