"""A thread that does something so many bytes per second, and yields to everything else."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Rewriter",)

LOWEST_PRIORITY: Final = 19
#: Later than this, the rate is given up rather than made up for in one go.
CATCH_UP_SECONDS: Final = 0.1


class Rewriter:
    """Calls ``rewrite() -> bytes done`` in a thread of its own, between start and stop."""

    def __init__(self, rate: int, rewrite: Callable[[], int]) -> None:
        self._rate = rate
        self._rewrite = rewrite
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Go on, if it does not already."""
        if self._thread is None:
            self._ending.clear()
            self._thread = threading.Thread(target=self._run, name="vfiomig-rewriter", daemon=True)
            self._thread.start()

    def stop(self) -> bool:
        """Return when nothing is rewritten any more; tell whether it was."""
        thread, self._thread = self._thread, None
        if thread is None:
            return False
        self._ending.set()
        thread.join()
        return True

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        due = time.monotonic()
        while not self._ending.is_set():
            due += self._rewrite() / self._rate
            ahead = due - time.monotonic()
            if ahead > 0:
                self._ending.wait(ahead)
            elif ahead < -CATCH_UP_SECONDS:
                due = time.monotonic()
