"""A real directory that stands for paths which are not there.

A listing is read by the program's own readdir, and a folder's descriptor is one that paths begin
at; both need a real directory. So there is one under a temporary name, which has what is served
below the same paths as the program knows it by. It is made when the program first asks for it. A
descriptor of it is recognized by where it leads.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from vfiomig.descriptors import Fd
from vfiomig.scratch import ScratchFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ("StandIn",)


class StandIn:
    """Stands for ``/``; each of ``fills`` puts something below. Safe for concurrent use."""

    def __init__(self, *fills: Callable[[Path], None]) -> None:
        self._fills = fills
        self._lock = threading.Lock()
        self._folder: ScratchFolder | None = None

    def close(self) -> None:
        if self._folder is not None:
            self._folder.close()

    @property
    def is_made(self) -> bool:
        """Whether it is there, so that descriptors could lead to it."""
        return self._folder is not None

    def path(self, path: str) -> str:
        """Return where what the program knows as ``path`` really is."""
        with self._lock:
            if self._folder is None:
                folder = ScratchFolder()
                try:
                    for fill in self._fills:
                        fill(folder.path)
                except BaseException:
                    folder.close()
                    raise
                self._folder = folder
            return f"{self._folder.path}{path}"

    def open(self, path: str, flags: int = 0) -> Fd:
        """Open it for reading."""
        return Fd(os.open(self.path(path), os.O_RDONLY | os.O_CLOEXEC | flags))

    def name_of(self, link: str) -> str:
        """Return the path that a path of the real directory stands for, or ``link``."""
        if self._folder is None or not link.startswith(str(self._folder.path)):
            return link
        return link[len(str(self._folder.path)) :] or "/"
