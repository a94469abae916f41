"""A real directory that stands for paths which are not there.

A listing is read by the program's own readdir, and a folder's descriptor is one that paths begin
at; both need a real directory. So there is one under a temporary name, which has what is served
below the same paths as the program knows it by. It is made when the program first asks for it. A
descriptor of it is recognized by where it leads.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from vfiomig.descriptors import Fd

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("StandIn",)


class StandIn:
    """Stands for ``/``; each of ``fills`` puts something below. Safe for concurrent use."""

    def __init__(self, *fills: Callable[[Path], None]) -> None:
        self._fills = fills
        self._lock = threading.Lock()
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        if self._directory is not None:
            self._directory.cleanup()

    @property
    def is_made(self) -> bool:
        """Whether it is there, so that descriptors could lead to it."""
        return self._directory is not None

    def path(self, path: str) -> str:
        """Return where what the program knows as ``path`` really is."""
        with self._lock:
            if self._directory is None:
                # Links of descriptors name it without links on the way.
                above = os.path.realpath(tempfile.gettempdir())
                directory = tempfile.TemporaryDirectory(prefix="vfiomig-", dir=above)
                for fill in self._fills:
                    fill(Path(directory.name))
                self._directory = directory
            return self._directory.name + path

    def open(self, path: str, flags: int = 0) -> Fd:
        """Open it for reading."""
        return Fd(os.open(self.path(path), os.O_RDONLY | os.O_CLOEXEC | flags))

    def name_of(self, link: str) -> str:
        """Return the path that a path of the real directory stands for, or ``link``."""
        if self._directory is None or not link.startswith(self._directory.name):
            return link
        return link[len(self._directory.name) :] or "/"
