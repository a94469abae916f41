"""The moment at which a program has closed the last copy of a descriptor.

Theory of operation
===================
There is no notification for ``close()``, and a descriptor may also go by exec, by the end of a
process, by dup2 onto it, or with a message that nobody reads. What counts is the open file
description behind all its copies. The kernel tells its end in one place: inotify reports a close
of the file when a description of it goes, once, whatever held the last copy, mappings included.

So each open gets a description of its own: the memfd reopened through /proc/self/fd/N. All opens
of one memfd are one file to inotify, which does not say which of them went, and merges equal
events. A mark tells them apart: each description holds a record lock on one byte that is its own,
far beyond any content. Such a lock (F_OFD_SETLK) belongs to the description, is shared by all its
copies and vanishes with it; the memfd's first description, which stays here, can ask for it.

An event thus means "look at the marks of this file". The kernel reports a moment before it drops
the locks. To the thread whose ``close()`` has returned both have happened; another one may see
the event too early. :meth:`LastClose.drain` therefore waits a little for a mark to go, and looks
again at its next call.

The copy of this process is a copy like any other: close it once the program has its own. If the
program never got one, that was the last close, and is reported.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import struct
import termios
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from vfiomig.descriptors import Fd, reopen
from vfiomig.errors import PrerequisiteError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ("LastClose",)

_Token = TypeVar("_Token")

IN_CLOSE_WRITE = 0x08
IN_CLOSE_NOWRITE = 0x10
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000

_EVENT = struct.Struct("iIII")  # struct inotify_event: wd, mask, cookie, len of a name
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid
_MARKS = 1 << 62
_SETTLE_TIME = 0.002
_NO_BYTES = bytes(4)
# These speak of the path, which has been resolved, or of a content that a device does not have.
_PATH_FLAGS = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOFOLLOW

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class _Open(Generic[_Token]):
    token: _Token
    memfd: Fd
    mark: int


class LastClose(Generic[_Token]):
    """Opens memfds for a program and tells which of the opens are over."""

    def __init__(self) -> None:
        number = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if number < 0:
            raise _no_inotify(ctypes.get_errno())
        self._inotify = Fd(number)
        self._lock = threading.Lock()
        self._marks = itertools.count(_MARKS)
        self._watches: dict[Fd, int] = {}
        self._opens: dict[int, list[_Open[_Token]]] = {}  # by watch
        self._look_again: set[int] = set()

    def fileno(self) -> int:
        """Return a descriptor that is readable when :meth:`drain` should be called."""
        return self._inotify.fileno()

    def close(self) -> None:
        """Stop watching; the memfds stay their owners'."""
        self._inotify.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def open(self, memfd: Fd, flags: int, token: _Token) -> Fd:
        """Open ``memfd`` anew for a program; when the last copy is closed, drain tells ``token``.

        ``memfd`` is borrowed: it must be open for reading and writing, and stay so until
        :meth:`forget` or the end of its last open.
        """
        path = f"/proc/self/fd/{memfd.fileno()}".encode()
        with self._lock:
            watch = _libc.inotify_add_watch(
                self._inotify.fileno(), path, IN_CLOSE_WRITE | IN_CLOSE_NOWRITE
            )
            if watch < 0:
                raise _no_inotify(ctypes.get_errno())
            opened = reopen(memfd, flags & ~_PATH_FLAGS)
            mark = next(self._marks)
            try:
                _set_mark(opened, flags, mark)
            except OSError:
                opened.close()
                raise
            self._watches[memfd] = watch
            self._opens.setdefault(watch, []).append(_Open(token, memfd, mark))
        return opened

    def forget(self, memfd: Fd) -> None:
        """Report no more of ``memfd``, which is about to be closed here."""
        with self._lock:
            watch = self._watches.pop(memfd, None)
            if watch is not None:
                del self._opens[watch]
                _libc.inotify_rm_watch(self._inotify.fileno(), watch)

    @property
    def settled(self) -> bool:
        """Whether the last :meth:`drain` saw no event; if not, one more call is due soon.

        Who drains because :meth:`fileno` is readable comes back after some milliseconds; who
        drains before each request of a program need not care.
        """
        return not self._look_again

    def drain(self) -> list[_Token]:
        """Return the tokens of all opens that are over and were not returned before."""
        # Called for every request: usually there is nothing, and asking costs one system call.
        if not self._look_again and not self._has_events():
            return []
        with self._lock:
            seen = self._read_events()
            look_at = (seen | self._look_again) & self._opens.keys()
            ended = self._take_ended(look_at)
            deadline = time.monotonic() + _SETTLE_TIME
            while not ended and seen and time.monotonic() < deadline:
                time.sleep(0)
                ended = self._take_ended(look_at)
            self._look_again = seen & self._opens.keys()
        return [one.token for one in ended]

    def _has_events(self) -> bool:
        return fcntl.ioctl(self._inotify.fileno(), termios.FIONREAD, _NO_BYTES) != _NO_BYTES

    def _read_events(self) -> set[int]:
        """Read all that is queued; return the watches to look at."""
        watches: set[int] = set()
        while self._has_events():
            events = os.read(self._inotify.fileno(), 4096)
            # A watch on a file, not a folder, gives no names: all events have one length.
            for watch, mask, _, _ in _EVENT.iter_unpack(events):
                if mask & IN_Q_OVERFLOW:
                    watches.update(self._opens)
                elif not mask & IN_IGNORED:
                    watches.add(watch)
        return watches

    def _take_ended(self, watches: set[int]) -> list[_Open[_Token]]:
        """Remove the opens whose mark is gone, and return them in the order of opening."""
        ended = []
        for watch in watches:
            for one in list(self._opens[watch]):
                if not _has_mark(one):
                    self._opens[watch].remove(one)
                    ended.append(one)
        return sorted(ended, key=lambda one: one.mark)


def _set_mark(opened: Fd, flags: int, mark: int) -> None:
    """Lock the byte, for which a lock for reading needs read permission and so on."""
    kind = fcntl.F_RDLCK if flags & os.O_ACCMODE == os.O_RDONLY else fcntl.F_WRLCK
    request = _FLOCK.pack(kind, os.SEEK_SET, mark, 1, 0)
    fcntl.fcntl(opened.fileno(), fcntl.F_OFD_SETLK, request)


def _has_mark(one: _Open[_Token]) -> bool:
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, one.mark, 1, 0)
    answer = fcntl.fcntl(one.memfd.fileno(), fcntl.F_OFD_GETLK, question)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _no_inotify(number: int) -> OSError | PrerequisiteError:
    if number in {errno.EMFILE, errno.ENOSPC}:
        return PrerequisiteError(
            "no inotify watch is left for this user; raise fs.inotify.max_user_instances and "
            "fs.inotify.max_user_watches, or end programs that hold many"
        )
    return OSError(number, f"inotify: {os.strerror(number)}")
