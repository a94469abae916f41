"""A small table of descriptors: numbers as a process has them, of things that are no files."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Numbers",)

T = TypeVar("T")

#: Lowest number that is given out: programs have something else below.
FIRST = 3


class Numbers(Generic[T]):
    """Things by number. Safe for concurrent use."""

    def __init__(self, nofile: int) -> None:
        #: What RLIMIT_NOFILE is for a process; no number reaches it.
        self.nofile = nofile
        self._lock = threading.Lock()
        self._table: dict[int, T] = {}

    def install(self, thing: T) -> int:
        """Give ``thing`` the lowest free number; EMFILE when there is none."""
        return self.install_new(lambda: thing)

    def install_new(self, make: Callable[[], T]) -> int:
        """Give what ``make`` returns the lowest free number; without one it is not called."""
        with self._lock:
            for number in range(FIRST, self.nofile):
                if number not in self._table:
                    self._table[number] = make()
                    return number
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def find(self, number: int) -> T:
        thing = self._table.get(number)
        if thing is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return thing

    def remove(self, number: int) -> T:
        with self._lock:
            thing = self._table.pop(number, None)
        if thing is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return thing
