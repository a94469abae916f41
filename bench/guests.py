"""A QEMU, a kernel and an initrd for measurements with guests; fetched when they are missing."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import harness

from vfiomig.qemu.initrd import build_initrd
from vfiomig.qemu.installed import cache_folder
from vfiomig.qemu.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Parts", "guest_parts")

ROOT = Path(harness.__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Parts:
    """What guests are made of, and a folder for their files."""

    qemu: Path
    kernel: Path
    initrd: Path
    folder: Path

    def machine(self, *extra: str, incoming: bool = False) -> Machine:
        return Machine(kernel=self.kernel, initrd=self.initrd, extra=extra, incoming=incoming)


@contextmanager
def guest_parts() -> Iterator[Parts]:
    """Find or fetch them. What QEMU's launcher starts finds the package of this checkout."""
    from vmtest.fetch import choose_qemu, fetch_guest_files

    os.environ["PYTHONPATH"] = str(ROOT / "src")
    cache = cache_folder()
    files = fetch_guest_files(cache)
    with tempfile.TemporaryDirectory(prefix="vfiomig-bench-") as folder:
        initrd = Path(folder) / "initrd"
        initrd.write_bytes(build_initrd(files))
        yield Parts(choose_qemu(None, cache), files.kernel, initrd, Path(folder))
