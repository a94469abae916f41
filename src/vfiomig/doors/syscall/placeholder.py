"""Files that stand in the program's table for a device, an iommufd or a data_fd without poll.

Theory of operation
===================
There is no notification for ``close()``: a descriptor may also go by exec, by dup2 onto it, with
its process, or with a message that nobody reads. What counts is the end of the open file
description behind all copies, and inotify tells it: a close event comes once, when a description
of the watched file goes, whatever held its last copy, mappings included.

So every open gets a memfd of its own, reopened through /proc/self/fd/N (the description that
memfd_create returns gives no event). When the program closes its last copy the event is in the
queue before its ``close()`` returns: whoever drains the queue before looking at a later request
sees both in the program's order. The copy of this process is one copy more until ``Fd.close``;
if the program never got one, closing ours is the last close, and is told like any other.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from vfiomig.descriptors import Fd, create_sealed_memfd, reopen

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Placeholders",)

T = TypeVar("T")

IN_CLOSE = 0x08 | 0x10  # IN_CLOSE_WRITE | IN_CLOSE_NOWRITE
EVENT = struct.Struct("iIII")  # struct inotify_event
QUEUE_READ = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


class Placeholders(Generic[T]):
    """Makes placeholders, each for a token, and tells whose last copy is gone."""

    def __init__(self) -> None:
        number = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if number < 0:
            failure = ctypes.get_errno()
            raise OSError(failure, f"inotify: {os.strerror(failure)}")
        self._inotify = Fd(number)
        self._lock = threading.Lock()
        self._tokens: dict[int, T] = {}

    def fileno(self) -> int:
        """Readable when ``drain`` has something."""
        return self._inotify.fileno()

    def close(self) -> None:
        self._inotify.close()

    def create(self, token: T, name: str, *, size: int = 0, flags: int = os.O_RDWR) -> Fd:
        """Make a file of ``size`` bytes and return it open with ``flags``, for the program.

        Raises:
            OSError: this process has no descriptor, no memory or no inotify watch left.
        """
        with create_sealed_memfd(name, size) as memfd:
            opened = reopen(memfd, flags)
        path = os.fsencode(f"/proc/self/fd/{opened.fileno()}")
        with self._lock:
            watch = _libc.inotify_add_watch(self._inotify.fileno(), path, IN_CLOSE)
            if watch < 0:
                failure = ctypes.get_errno()
                opened.close()
                raise OSError(failure, f"inotify watch: {os.strerror(failure)}")
            self._tokens[watch] = token
        return opened

    def drain(self) -> list[T]:
        """Return the tokens whose last copy has gone since the last call; never waits."""
        try:
            events = os.read(self._inotify.fileno(), QUEUE_READ)
        except BlockingIOError:
            return []
        with self._lock:
            gone = [self._tokens.pop(watch, None) for watch in _watches(events)]
        return [token for token in gone if token is not None]


def _watches(events: bytes) -> Iterator[int]:
    """Watch descriptors of the close events; the file's end (IN_IGNORED) follows each."""
    at = 0
    while at < len(events):
        watch, mask, _, length = EVENT.unpack_from(events, at)
        if mask & IN_CLOSE:
            yield watch
        at += EVENT.size + length
