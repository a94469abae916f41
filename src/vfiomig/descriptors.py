"""File descriptors that have exactly one owner.

A bare ``int`` does not say who closes it. An :class:`Fd` does: whoever holds it closes it, or
gives it up with :meth:`Fd.move`, after which the number belongs to the receiver. A forgotten
one is a ``ResourceWarning``. Every descriptor is close-on-exec: what a program shall inherit is
named when it is launched.
"""

from __future__ import annotations

import array
import errno
import fcntl
import math
import os
import select
import socket
import time
import warnings
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType
    from typing import Self

__all__ = (
    "RIGHTS_ROOM",
    "Fd",
    "HasFileno",
    "create_sealed_memfd",
    "passed_descriptors",
    "poll_until",
    "reopen",
    "rights",
)

#: Room for as many descriptors as the kernel passes with one message (SCM_MAX_FD).
RIGHTS_ROOM = socket.CMSG_SPACE(253 * array.array("i").itemsize)


class HasFileno(Protocol):
    """Anything that stands for a descriptor."""

    def fileno(self) -> int: ...


class Fd:
    """An open descriptor and the duty to close it."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        """Take ``number`` over; EBADF if it is not open, so that no stranger is closed later."""
        self._number = -1
        os.set_inheritable(number, False)
        self._number = number

    def fileno(self) -> int:
        """Return the number to use it, not to keep it; EBADF after :meth:`close` or `move`."""
        if self._number < 0:
            raise OSError(errno.EBADF, "this descriptor was closed or given away before")
        return self._number

    @property
    def closed(self) -> bool:
        """Whether there is nothing left to close."""
        return self._number < 0

    def move(self) -> int:
        """Give the descriptor up: from here on the receiver of the number closes it."""
        number = self.fileno()
        self._number = -1
        return number

    def close(self) -> None:
        """Close it; once more is harmless."""
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<Fd closed>" if self.closed else f"<Fd {self._number}>"

    def __del__(self) -> None:
        if self._number >= 0:
            warnings.warn(
                f"unclosed descriptor {self!r}", ResourceWarning, stacklevel=2, source=self
            )
            self.close()


def poll_until(fd: HasFileno | int, events: int, deadline: float | None) -> int:
    """Wait for ``events``; return those that came, 0 if ``deadline`` (monotonic) came first.

    POLLERR, POLLHUP and POLLNVAL are reported unasked, as by ``poll(2)``.
    """
    poller = select.poll()
    poller.register(fd, events)
    while True:
        if deadline is None:
            ready = poller.poll()
        else:
            left = max(0.0, deadline - time.monotonic())
            ready = poller.poll(min(math.ceil(left * 1000), 0x7FFFFFFF))
        if ready:
            return ready[0][1]
        if deadline is not None and time.monotonic() >= deadline:
            return 0


def create_sealed_memfd(name: str, size: int) -> Fd:
    """Create a memfd of ``size`` bytes that nobody can resize.

    Whoever shares it could otherwise truncate it, and the next touch of a mapping of it would
    kill this process with SIGBUS. F_SEAL_SEAL keeps the write seal away as well.
    """
    memfd = Fd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.truncate(memfd.fileno(), size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(memfd.fileno(), fcntl.F_ADD_SEALS, seals)
    except OSError:
        memfd.close()
        raise
    return memfd


def reopen(fd: HasFileno | int, flags: int) -> Fd:
    """Open the file behind ``fd`` anew: another description with offset and flags of its own."""
    number = fd if isinstance(fd, int) else fd.fileno()
    return Fd(os.open(f"/proc/self/fd/{number}", flags | os.O_CLOEXEC))


def rights(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    """Make what ``sendmsg`` needs to pass descriptors along; they stay the sender's too."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def passed_descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors that ``recvmsg`` brought, which are the receiver's to close."""
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            # What was cut off in the middle of a number was never passed.
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return numbers.tolist()
