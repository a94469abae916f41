"""A second thread of a check: a call that runs beside it, and is over when the check is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.checks.subject import Subject

__all__ = ("Beside",)

R = TypeVar("R")

#: A thread that is seen asleep so often in a row, so far apart, is not only waiting for its turn.
ASLEEP = 25
LOOK_SECONDS = 0.002


class Beside(Generic[R]):
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], R], subject: Subject) -> None:
        self._subject = subject
        self._result: list[R] = []
        self._problem: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(call,), name="vfiomig-check-beside", daemon=True
        )
        self._thread.start()

    def _run(self, call: Callable[[], R]) -> None:
        try:
            self._result.append(call())
        except BaseException as problem:  # noqa: BLE001 - raised again by result()
            self._problem = problem

    def under_way(self, began: threading.Event) -> None:
        """Wait until ``began`` is set, or the thread sleeps in what it calls."""
        looks_alike = 0
        while looks_alike < ASLEEP and self._thread.is_alive() and not began.wait(LOOK_SECONDS):
            self._subject.check_deadline()
            looks_alike = looks_alike + 1 if self._sleeps() else 0

    def _sleeps(self) -> bool:
        try:
            stat = Path(f"/proc/self/task/{self._thread.native_id}/stat").read_bytes()
        except OSError:
            return False
        return stat.rpartition(b")")[2].split()[0] in {b"S", b"D"}

    def wait(self, share: float = 1.0, *, at_least: float = 0.0) -> bool:
        """Wait for its end, for a share of the time that is left; tell whether it came."""
        self._thread.join(max(at_least, self._subject.left * share))
        return not self._thread.is_alive()

    def result(self, what: str) -> R:
        """Return what the call returned; ``Broken`` if it does not end in time."""
        if not self.wait():
            self._subject.evidence.still_under_way(what)
        if self._problem is not None:
            raise self._problem
        return self._result[0]
