"""Folders for temporary files that do not outlive their owners for long.

Theory of operation
-------------------
Whoever is killed removes nothing. So each folder has a file that its owner keeps locked, and the
lock ends with the process, whatever ends it (flock(2)). Whoever makes a folder removes those of
its own user whose lock it gets. The file is locked before it has its name, so a folder that has
one and is not locked is nobody's any more; a folder without one is not ours and is left alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vfiomig.descriptors import Fd

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ("ScratchFolder",)

PREFIX: Final = "vfiomig-"
#: The file that is locked as long as the owner lives.
OWNER: Final = ".vfiomig-owner"


class ScratchFolder:
    """A folder with a name of its own, which ``close`` removes with all that is in it."""

    def __init__(self, name: str = "") -> None:
        """Make it where temporary files are; its name begins with vfiomig- and ``name``."""
        above = os.path.realpath(tempfile.gettempdir())
        _sweep(above)
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{name}", dir=above))
        try:
            self._lock = _claim(self.path)
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def close(self) -> None:
        """Remove it; once more is harmless."""
        if not self._lock.closed:
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _claim(folder: Path) -> Fd:
    """Put the locked file into a folder, all at once."""
    unnamed = folder / f"{OWNER}.new"
    lock = Fd(os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(folder / OWNER)
    except BaseException:
        lock.close()
        raise
    return lock


def _sweep(above: str) -> None:
    """Remove what the dead have left."""
    with os.scandir(above) as entries:
        found = [entry.path for entry in entries if entry.name.startswith(PREFIX)]
    for path in found:
        with suppress(OSError):  # it is somebody else's, or gone meanwhile
            _remove_if_dead(path)


def _remove_if_dead(path: str) -> None:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    with Fd(os.open(path, flags | os.O_DIRECTORY)) as folder:
        if os.fstat(folder.fileno()).st_uid != os.geteuid():
            return
        with Fd(os.open(OWNER, flags | os.O_NONBLOCK, dir_fd=folder.fileno())) as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
