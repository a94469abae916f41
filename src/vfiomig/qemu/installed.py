"""Which QEMU there is, and which kernel and busybox for its guest.

Theory of operation
-------------------
A QEMU is taken from where the user says, from the PATH, or from the cache folder, into which
``python -m vmtest fetch`` unpacks one. The one that the user names is never replaced by another;
one on the PATH that is too old is passed over. What is older than 10.0 lacks what a vfio-pci
device on a passed descriptor needs to migrate; what is older than 11.0 is no vfio-user client,
or an early one.

A set in the cache folder appears complete or not at all, so that it is there is all that is
asked. The number in its name is that of its layout: what an older program built is not taken for
what this one wants.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vfiomig.errors import PrerequisiteError

__all__ = (
    "GUEST_SET",
    "MIGRATING_QEMU",
    "PROGRAM",
    "VFIO_USER_QEMU",
    "GuestFiles",
    "QemuSet",
    "cache_folder",
    "cached_guest_files",
    "cached_qemu",
    "find_qemu",
    "version_of",
)

PROGRAM: Final = "qemu-system-x86_64"
_ANSWER_S: Final = 60


@dataclass(frozen=True, slots=True)
class QemuSet:
    """A QEMU with its libraries and firmware: its folder in the cache, and what is as good."""

    folder: str
    oldest: tuple[int, int]


_LAYOUT: Final = 1
MIGRATING_QEMU: Final = QemuSet(f"qemu-{_LAYOUT}", oldest=(10, 0))
VFIO_USER_QEMU: Final = QemuSet(f"qemu-vfio-user-{_LAYOUT}", oldest=(11, 0))
#: The folder in the cache with what runs in the guest.
GUEST_SET: Final = f"guest-{_LAYOUT}"


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """What runs in the guest."""

    kernel: Path
    busybox: Path
    #: A folder with ``modules.builtin`` and the modules, compressed or not; None has none.
    modules: Path | None


def cache_folder() -> Path:
    """Return the folder for what is fetched, which need not exist yet."""
    if chosen := os.environ.get("VFIOMIG_CACHE"):
        return Path(chosen).absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "vfiomig"
    return Path.home() / ".cache/vfiomig"


def cached_qemu(cache: Path, which: QemuSet = MIGRATING_QEMU) -> Path | None:
    """Return the program that starts the cache's QEMU, if there is one."""
    folder = cache / which.folder
    return folder / PROGRAM if folder.exists() else None


def cached_guest_files(cache: Path) -> GuestFiles | None:
    """Return the cache's kernel, modules and busybox, if they are there."""
    folder = cache / GUEST_SET
    if not folder.exists():
        return None
    return GuestFiles(folder / "kernel", folder / "busybox", folder / "modules")


def find_qemu(given: Path | None, cache: Path, which: QemuSet = MIGRATING_QEMU) -> Path:
    """Return the QEMU to use: ``given``, or one on the PATH that is new enough, or the cache's.

    Raises:
        PrerequisiteError: there is none, or the given one is none or too old.
    """
    if given is not None:
        version = version_of(given)
        if version < which.oldest:
            raise PrerequisiteError(_lacking(_too_old(given, version), cache, which))
        return given
    problem = f"there is no {PROGRAM} on the PATH"
    if found := shutil.which(PROGRAM):
        version = version_of(Path(found))
        if version >= which.oldest:
            return Path(found)
        problem = _too_old(found, version)
    if cached := cached_qemu(cache, which):
        return cached
    raise PrerequisiteError(_lacking(problem, cache, which))


def _too_old(program: Path | str, version: tuple[int, int]) -> str:
    return f"{program} is QEMU {version[0]}.{version[1]}"


def _lacking(problem: str, cache: Path, which: QemuSet) -> str:
    major, minor = which.oldest
    return (
        f"{problem}, and {major}.{minor} or later is needed: put one on the PATH, or let python -m "
        f"vmtest fetch, or make demo-qemu, in a checkout of vfiomig unpack one into {cache}"
    )


def version_of(qemu: Path) -> tuple[int, int]:
    """Return the major and minor version that ``qemu`` says it has.

    Raises:
        PrerequisiteError: it cannot be started, or is no QEMU.
    """
    try:
        done = subprocess.run(
            [qemu, "-version"], capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except OSError as error:
        raise PrerequisiteError(f"{qemu} cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise PrerequisiteError(f"{qemu} says nothing of its version for {_ANSWER_S} s") from None
    found = re.search(r"^QEMU emulator version (\d+)\.(\d+)", done.stdout)
    if found is None:
        said = (done.stdout + done.stderr).strip()
        raise PrerequisiteError(f"{qemu} does not say that it is a QEMU, but: {said[:200]}")
    return int(found[1]), int(found[2])
