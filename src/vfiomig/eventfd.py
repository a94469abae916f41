"""Eventfds that belong to somebody else as well, signalled as a kernel would signal them.

Theory of operation
-------------------
The other owner may do anything with an eventfd, also fill its counter. A write would then wait
until somebody reads, and nothing that a writer can ask for keeps it from that: whether a write
waits is a flag of the file, which is the other owner's too, eventfds know no RWF_NOWAIT for
writes, and a look with poll before the write comes too early. The kernel's own signals never wait
and leave a full counter full (``eventfd_signal`` in fs/eventfd.c). Asynchronous I/O is the one way
to have the kernel give one: the end of a request signals the eventfd that the request names. So
each signal is a request that ends at once, a read for which there is no room.

What has ended is collected when the kernel has no room for another request. Where a machine
allows no asynchronous I/O, a signal is a look and a write.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import threading
from typing import Final

from vfiomig.abi import aio
from vfiomig.abi.syscalls import X86_64
from vfiomig.descriptors import Fd, poll_until

__all__ = ("EventFd",)

#: Requests that have ended and wait to be collected, at most.
REQUESTS: Final = 256
COLLECTED: Final = 1024
#: None of these calls waits, so the interpreter lock is kept: letting go of it would take longer.
_syscall: Final = ctypes.PyDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_SETUP, _GETEVENTS, _SUBMIT = (
    ctypes.c_long(X86_64[name]) for name in ("io_setup", "io_getevents", "io_submit")
)
_ONE: Final = ctypes.c_long(1)
_NOTHING: Final = ctypes.c_long(0)


class _Requests:
    """This process's context for asynchronous I/O, made when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events = ctypes.create_string_buffer(COLLECTED * aio.IoEvent.SIZE)
        self.forget()

    def forget(self) -> None:
        """Begin anew, in a process that was forked: contexts are not inherited."""
        self._context = ctypes.c_ulong()
        self._failed = False

    def submit(self, pointer: ctypes.c_void_p) -> bool:
        """Submit the request behind ``pointer``, which ends at once; ``False``: it cannot be."""
        if not self._context.value and not self._begin():
            return False
        while _syscall(_SUBMIT, self._context, _ONE, pointer) != 1:
            if ctypes.get_errno() != errno.EAGAIN:
                return False
            self._collect()
        return True

    def _begin(self) -> bool:
        with self._lock:
            if not self._context.value and not self._failed:
                made = ctypes.c_ulong()
                self._failed = _syscall(_SETUP, ctypes.c_long(REQUESTS), ctypes.byref(made)) != 0
                self._context = made
            return not self._failed

    def _collect(self) -> None:
        _syscall(_GETEVENTS, self._context, _NOTHING, ctypes.c_long(COLLECTED), self._events, None)


_requests: Final = _Requests()
os.register_at_fork(after_in_child=_requests.forget)


class EventFd(Fd):
    """An eventfd that is shared with somebody who may do anything with it."""

    __slots__ = ("_iocb", "_iocbs", "_owner", "_pointer")

    def __init__(self, number: int, owner: int | None = None) -> None:
        """Take ``number`` over; EINVAL, and it is closed, if it is no eventfd.

        ``owner`` is the process that shares it, where that is another one.
        """
        super().__init__(number)
        self._owner = owner
        if os.readlink(f"/proc/self/fd/{number}") != "anon_inode:[eventfd]":
            self.close()
            raise OSError(errno.EINVAL, "the descriptor is no eventfd")
        self._iocb = aio.Iocb(
            aio_lio_opcode=aio.IOCB_CMD_PREAD,
            aio_fildes=number,
            aio_flags=aio.IOCB_FLAG_RESFD,
            aio_resfd=number,
        )
        self._iocbs = ctypes.c_void_p(ctypes.addressof(self._iocb))
        self._pointer = ctypes.c_void_p(ctypes.addressof(self._iocbs))

    def signal(self) -> None:
        """Add one. A counter at its maximum stays there: this never waits."""
        number = self.fileno()
        if not _requests.submit(self._pointer) and poll_until(number, select.POLLOUT, 0):
            os.eventfd_write(number, 1)

    def take(self) -> bool:
        """Return the counter to zero without waiting; tell whether it was above."""
        try:
            # A read would wait if another reader was faster: the flag is this call's own.
            return os.preadv(self.fileno(), [bytearray(8)], -1, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False

    def is_given_up(self) -> bool:
        """Tell whether its owner has closed it since; no, where there is no owner to look at.

        Only this process keeps it alive then. The kernel, which holds on to no descriptor, sees
        such an eventfd vanish.
        """
        if self._owner is None:
            return False
        return _eventfd_id(f"/proc/self/fdinfo/{self.fileno()}") not in _eventfd_ids(self._owner)


def _eventfd_ids(process: int) -> set[bytes]:
    """The eventfds that a process has open, by what the kernel calls them."""
    folder = f"/proc/{process}/fdinfo"
    try:
        return {_eventfd_id(f"{folder}/{name}") for name in os.listdir(folder)} - {b""}
    except OSError:
        return set()  # it has ended


def _eventfd_id(fdinfo: str) -> bytes:
    try:
        with open(fdinfo, "rb") as lines:
            return next((line for line in lines if line.startswith(b"eventfd-id:")), b"")
    except OSError:
        return b""  # closed meanwhile
