"""The eventfd that unmasks INTx: a program signals it instead of making a request."""

from __future__ import annotations

import errno
import os
import select
import threading
from typing import TYPE_CHECKING

from vfiomig.descriptors import Fd

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.eventfd import EventFd

__all__ = ("UnmaskWatcher",)


class UnmaskWatcher:
    """Calls ``unmask`` whenever ``eventfd`` is signalled, which it takes over, until ``close``.

    A signal from before it was given counts. The thread is there only as long as the eventfd is.
    """

    def __init__(self, eventfd: EventFd, unmask: Callable[[], None]) -> None:
        self._eventfd = eventfd
        self._unmask = unmask
        self._over = Fd(os.eventfd(0, os.EFD_CLOEXEC))
        self._thread = threading.Thread(target=self._watch, name="vfiomig-unmask", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as no_thread:
            self._close_descriptors()
            raise OSError(errno.EAGAIN, "no thread can be started") from no_thread

    @property
    def is_given_up(self) -> bool:
        """Whether the program has closed the eventfd, so that nobody can signal it any more."""
        return self._eventfd.is_given_up()

    def close(self) -> None:
        """End it. ``unmask`` is not under way when this returns."""
        os.eventfd_write(self._over.fileno(), 1)
        self._thread.join()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._eventfd.close()
        self._over.close()

    def _watch(self) -> None:
        poller = select.poll()
        poller.register(self._eventfd, select.POLLIN)
        poller.register(self._over, select.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._over.fileno() in ready:
                return
            if self._eventfd.take():
                self._unmask()
