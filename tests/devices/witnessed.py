"""A pattern device that leaves word of its state, for tests that cannot ask it from outside."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vfiomig import DeviceError, State
from vfiomig.models.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig import StateReader
    from vfiomig.device import Buffer

__all__ = ("Witnessed",)

HOLD_SECONDS = 20.0


class Witnessed(Pattern):
    """Appends a line to ``notes`` whenever it has stopped, was loaded or was reset.

    The line is the word, and for a device that holds still its digest.

    Whenever the arc ``fails`` (``stop-stop_copy`` for instance) is taken, it fails with errno
    ``number``; where a file ``armed`` is named, only if that is there, which is then removed. With
    ``fatal`` the device goes to ERROR.

    Whenever the arc ``holds`` is taken, that is noted, and it takes until a file ``armed`` is gone.

    It takes ``pause`` seconds for the first transfer after STOP_COPY.

    ``saving`` and ``loading`` stand for the first transfer after STOP_COPY and after RESUMING.
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
        fatal: bool = False,
        holds: str = "",
        armed: str = "",
        pause: float = 0,
    ) -> None:
        super().__init__(size=size, seed=seed, caps=caps, dirty=dirty, precopy=precopy)
        self._notes = Path(notes)
        self._fails = fails
        self._number = number
        self._fatal = fatal
        self._holds = holds
        self._pause = pause
        self._armed = Path(armed) if armed else None

    def step(self, origin: State, target: State) -> None:
        self._do_as_told(f"{origin.name}-{target.name}".lower())
        super().step(origin, target)

    def _do_as_told(self, what: str) -> None:
        if self._fails == what and self._is_armed():
            raise DeviceError(self._number, "told to fail", fatal=self._fatal)
        if self._holds == what and self._armed is not None:
            self._note("holding")
            deadline = time.monotonic() + HOLD_SECONDS
            while self._armed.exists() and time.monotonic() < deadline:
                time.sleep(0.005)

    def _is_armed(self) -> bool:
        if self._armed is None:
            return True
        armed = self._armed.exists()
        self._armed.unlink(missing_ok=True)
        return armed

    def stop(self) -> None:
        super().stop()
        self._note("stopped", self.digest())

    def save(self) -> Iterator[Buffer]:
        self._do_as_told("saving")
        time.sleep(self._pause)
        yield from super().save()

    def load(self, state: StateReader) -> None:
        self._do_as_told("loading")
        super().load(state)
        self._note("loaded", self.digest())

    def reset(self) -> None:
        super().reset()
        self._note("reset")

    def _note(self, *words: str) -> None:
        with self._notes.open("a", encoding="utf-8") as notes:
            notes.write(" ".join(words) + "\n")
