"""Receiving the stopped calls of a program, and answering them.

Theory of operation
===================
Every call that the filter stops waits in the kernel until it is received here, by any thread,
and answered, by any thread and at any time. An answer is a result, an errno, "let the kernel do
it", or a new descriptor put into the program's table.

The caller may die while its call is being served: then there is nothing to answer and the
listener says ENOENT. That is no error of the one who answers; :attr:`Listener.gone` counts it,
and the answer tells by ``False`` that whatever the call did must be undone.

A signal for the caller ends a call that was not received yet, and one that was waits for its answer
(SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV). Kernels without "seccomp: Fix a race with
WAIT_KILLABLE_RECV if the tracer replies too fast" (Linux 6.18) drop the answer if it comes after the
signal and before the caller has noticed either; nothing can be done about that from here.

Nothing stops a receiver that waits but the end of the program and all its descendants. A poll
before each receive would make it interruptible, at the price of one system call more for every
call served (an eighth of its time, bench/bare_loop.py), so it is not made. To end a receiver,
end the program. Kernels before 6.11 leave a receiver asleep when the program ends; there the
poll is needed.

With SYNC_WAKE_UP (Linux 6.6) program and receiver take turns on one CPU instead of waking each
other across CPUs, which is five to ten times faster.
"""

from __future__ import annotations

import errno
import os
import re
import select
import struct
import threading
from fcntl import ioctl
from typing import TYPE_CHECKING

from vfiomig.abi.seccomp import (
    SECCOMP_ADDFD_FLAG_SETFD,
    SECCOMP_IOCTL_NOTIF_ADDFD,
    SECCOMP_IOCTL_NOTIF_ID_VALID,
    SECCOMP_IOCTL_NOTIF_RECV,
    SECCOMP_IOCTL_NOTIF_SEND,
    SECCOMP_IOCTL_NOTIF_SET_FLAGS,
    SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP,
    SECCOMP_USER_NOTIF_FLAG_CONTINUE,
    NotifAddfd,
    NotifResp,
    SeccompNotif,
)
from vfiomig.descriptors import poll_until
from vfiomig.errors import VfioMigError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from vfiomig.descriptors import Fd, HasFileno

__all__ = (
    "ERESTARTSYS",
    "CallerGone",
    "Listener",
    "Notification",
    "kernel_version",
    "receive_ends_with_program",
)

#: The kernel's own errno: the call is made again, or becomes EINTR, as the caller's signal
#: handler was installed. Only for a caller with a signal pending; another one would see it.
ERESTARTSYS = 512

_parse = struct.Struct("QIIiIQ6Q").unpack
_ANSWER = struct.Struct("QqiI")
_ADDFD = struct.Struct("QIIII")
_pack_answer = _ANSWER.pack
_NEVER_OPEN = 0x7FFF_FFFF  # a number that no process can have: EBADF
# ioctl() copies a bytes argument, lets the kernel fill the copy and returns it: these zeros,
# which the kernel insists on, are never written to.
_ZEROS = bytes(SeccompNotif.SIZE)
assert _ANSWER.size == NotifResp.SIZE
assert _ADDFD.size == NotifAddfd.SIZE


class CallerGone(VfioMigError, OSError):
    """The caller died before a descriptor could be put into its table: undo what it was for."""

    def __init__(self, id_: int) -> None:
        super().__init__(errno.ENOENT, f"the caller of request {id_:#x} is gone")


class Notification:
    """One stopped call: its arguments are 64-bit words, whatever the call makes of them."""

    __slots__ = ("args", "id", "nr", "tid")

    def __init__(self, words: tuple[int, ...]) -> None:
        self.id, self.tid, _, self.nr, _, _, *_ = words
        self.args = words[6:]

    def __repr__(self) -> str:
        shown = ", ".join(f"{word:#x}" for word in self.args)
        return f"<Notification {self.id:#x}: thread {self.tid} calls {self.nr}({shown})>"


class Listener:
    """The end of a filter at which the stopped calls arrive; any number of threads may use it."""

    def __init__(self, fd: Fd, *, poll_first: bool | None = None) -> None:
        """Take ``fd`` over.

        ``poll_first`` is for tests; by default the kernel's version decides.
        """
        self._fd = fd
        self._number = fd.fileno()
        if poll_first is None:
            poll_first = not receive_ends_with_program(os.uname().release)
        self._poll_first = poll_first
        self._turn = threading.Lock()
        self._counting = threading.Lock()
        #: How many callers died before their answer.
        self.gone = 0
        _enable_sync_wake_up(self._number)

    def fileno(self) -> int:
        return self._fd.fileno()

    @property
    def ended(self) -> bool:
        """Whether no process is left that could make a call, or the listener was closed."""
        return self._fd.closed or bool(poll_until(self._number, 0, 0.0) & select.POLLHUP)

    def close(self) -> None:
        """Give the program up: its pending and later calls that the filter stops get ENOSYS.

        End the program first if receivers still wait: asleep in the kernel they do not notice.
        """
        self._number = _NEVER_OPEN
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def receive(self) -> Notification | None:
        """Wait for the next call; ``None`` when no process is left that could make one.

        ``None`` also when another thread has closed the listener.
        """
        if self._poll_first:
            return self._receive_in_turn()
        while True:
            try:
                return Notification(_parse(ioctl(self._number, SECCOMP_IOCTL_NOTIF_RECV, _ZEROS)))
            except OSError as error:
                if self._is_end(error):
                    return None

    def reply(self, id_: int, value: int) -> bool:
        """Let the call return ``value``; ``False`` if the caller is gone."""
        return self._answer(_pack_answer(id_, value, 0, 0))

    def fail(self, id_: int, number: int) -> bool:
        """Let the call fail with errno ``number``; ``False`` if the caller is gone.

        ERESTARTSYS is for a caller with a pending signal, whose handler decides by SA_RESTART
        whether the call is made again or fails with EINTR.
        """
        return self._answer(_pack_answer(id_, 0, -number, 0))

    def carry_on(self, id_: int) -> bool:
        """Let the kernel do the call as if nobody had looked; ``False`` if the caller is gone."""
        return self._answer(_pack_answer(id_, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE))

    def valid(self, id_: int) -> bool:
        """Whether the caller still waits: what was read by its thread's number was its own."""
        try:
            ioctl(self._number, SECCOMP_IOCTL_NOTIF_ID_VALID, struct.pack("Q", id_))
        except OSError as error:
            if error.errno == errno.ENOENT or self._fd.closed:
                return False
            raise
        return True

    def add_fd(
        self,
        id_: int,
        fd: HasFileno,
        *,
        newfd: int | None = None,
        cloexec: bool = False,
    ) -> int:
        """Put a copy of ``fd`` into the caller's table and return its number there.

        It takes the lowest free number, or ``newfd``, replacing what is there.

        Raises:
            CallerGone: there is no table any more.
            OSError: EMFILE when the table is full, ``newfd`` beyond its limit included.

        """
        flags = 0 if newfd is None else SECCOMP_ADDFD_FLAG_SETFD
        request = bytearray(
            _ADDFD.pack(id_, flags, fd.fileno(), newfd or 0, os.O_CLOEXEC if cloexec else 0)
        )
        while True:
            try:
                # Only with a writable buffer does ioctl() return what the kernel returned.
                number: int = ioctl(self._number, SECCOMP_IOCTL_NOTIF_ADDFD, request)
            except InterruptedError:
                continue
            except FileNotFoundError:
                self._count_gone()
                raise CallerGone(id_) from None
            except OSError as error:
                if newfd is not None and error.errno == errno.EBADF:
                    # Ours is open, so this is about newfd: dup2's word for "over the limit".
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from None
                raise
            return number

    def _answer(self, answer: bytes) -> bool:
        while True:
            try:
                ioctl(self._number, SECCOMP_IOCTL_NOTIF_SEND, answer)
            except InterruptedError:
                continue
            except FileNotFoundError:
                self._count_gone()
                return False
            except OSError:
                if self._fd.closed:
                    return False  # the kernel has answered with ENOSYS
                raise
            return True

    def _receive_in_turn(self) -> Notification | None:
        """Receive without ever sleeping in a receive that an old kernel would not end.

        One thread at a time: with two, both would see the one call that is ready.
        """
        with self._turn:
            while not self._fd.closed:
                if not poll_until(self._number, select.POLLIN, None) & select.POLLIN:
                    return None
                try:
                    return Notification(
                        _parse(ioctl(self._number, SECCOMP_IOCTL_NOTIF_RECV, _ZEROS))
                    )
                except OSError as error:
                    if self._is_end(error):
                        break
        return None

    def _is_end(self, error: OSError) -> bool:
        """Whether a failed receive means that nobody is left; if not, receive again.

        ENOENT is said both for that and for a caller that died just before it was received.
        """
        if error.errno in {errno.ENOENT, errno.EINTR} or self._fd.closed:
            return self.ended
        raise error

    def _count_gone(self) -> None:
        with self._counting:
            self.gone += 1


def _enable_sync_wake_up(number: int) -> None:
    """Have the kernel hand the CPU over directly, where it can."""
    try:
        # The value is the argument itself, not a pointer to it.
        ioctl(number, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTTY}:
            raise  # those are before Linux 6.6: slower, and nothing else


def kernel_version(release: str) -> tuple[int, int]:
    """``uname -r`` as major and minor number; a vendor's suffix does not matter."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def receive_ends_with_program(release: str) -> bool:
    """Whether a sleeping receive wakes when the last process under the filter ends."""
    return kernel_version(release) >= (6, 11)
