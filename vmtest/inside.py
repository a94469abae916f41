"""The host's files in a guest, so that the host's own programs run there against its kernel.

The guest mounts the host's root over 9p, read-only, and enters it; the devices, processes and
settings there are the guest's own, and /run is memory. One folder of the host is mounted a second
time, at /run/work, and there the guest can write. Nobody has to be root: QEMU reads and writes
files as the user who starts it.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vfiomig.qemu.guest import Guest

__all__ = ("WORK", "enter", "inside", "shared")

#: Where the guest sees the folder in which it can write.
WORK: Final = Path("/run/work")

_ROOT: Final = "/host"
_MOUNT: Final = "mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000"


def shared(work: Path) -> tuple[str, ...]:
    """Return the words for a QEMU whose guest sees the host's files, and writes to ``work``."""
    return (*_share("host", Path("/"), "readonly=on"), *_share("work", work, "readonly=off"))


def _share(name: str, folder: Path, access: str) -> tuple[str, ...]:
    path = str(folder).replace(",", ",,")
    share = f"local,id={name},path={path},security_model=none,multidevs=remap,{access}"
    return ("-fsdev", share, "-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}")


def enter(guest: Guest) -> None:
    """Mount what ``shared`` offers; once for each guest."""
    commands = [
        f"mkdir {_ROOT}",
        f"{_MOUNT},ro,cache=loose host {_ROOT}",
        *(f"mount --bind /{folder} {_ROOT}/{folder}" for folder in ("dev", "proc", "sys")),
        f"mount -t tmpfs run {_ROOT}/run",
        f"mkdir {_ROOT}{WORK}",
        f"{_MOUNT} work {_ROOT}{WORK}",
    ]
    guest.check(" && ".join(commands), timeout=60)


def inside(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """Return the guest's command that runs a program of the host in a folder of the host."""
    settings = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/run",
        "TMPDIR": "/run",
        # Nothing but /run can be written.
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    assignments = [f"{name}={value}" for name, value in settings.items()]
    program = shlex.join(["env", "-i", *assignments, *words])
    return shlex.join(
        ["chroot", _ROOT, "/bin/sh", "-c", f"cd {shlex.quote(str(folder))} && exec {program}"]
    )
