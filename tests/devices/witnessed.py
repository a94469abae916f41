"""A pattern device that leaves word of its state, for tests that cannot ask it from outside."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

from vfiomig import DeviceError, State
from vfiomig.models.pattern import Pattern

if TYPE_CHECKING:
    from vfiomig import StateReader

__all__ = ("Witnessed",)


class Witnessed(Pattern):
    """Appends a line to ``notes`` whenever it has stopped, was loaded or was reset.

    The line is the word, and for a device that holds still its digest. Whenever the arc ``fails``
    (``stop-stop_copy`` for instance) is taken, it fails with errno ``number``.
    """

    def __init__(
        self,
        notes: str,
        size: int = 4 << 20,
        seed: int = 0,
        caps: str = "all",
        dirty: int = 0,
        precopy: float = 1.0,
        fails: str = "",
        number: int = errno.EIO,
    ) -> None:
        super().__init__(size=size, seed=seed, caps=caps, dirty=dirty, precopy=precopy)
        self._notes = Path(notes)
        self._fails = fails
        self._number = number

    def step(self, origin: State, target: State) -> None:
        if self._fails == f"{origin.name}-{target.name}".lower():
            raise DeviceError(self._number, "told to fail")
        super().step(origin, target)

    def stop(self) -> None:
        super().stop()
        self._note("stopped", self.digest())

    def load(self, state: StateReader) -> None:
        super().load(state)
        self._note("loaded", self.digest())

    def reset(self) -> None:
        super().reset()
        self._note("reset")

    def _note(self, *words: str) -> None:
        with self._notes.open("a", encoding="utf-8") as notes:
            notes.write(" ".join(words) + "\n")
