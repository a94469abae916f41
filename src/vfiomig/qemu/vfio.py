"""The words that give a QEMU devices, and those in front of it that serve them.

Each device is a descriptor that QEMU inherits, and one iommufd serves all, so QEMU looks nothing
up in sysfs. The numbers are put in by ``vfiomig run``, where the words say ``{dev0}`` and
``{iommu}``.

Or each device is the socket of a vfio-user server, to which QEMU 11.0 and later connect.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ("run_words", "vfio_user_words", "vfio_words")


def vfio_words(count: int, options: str = "") -> list[str]:
    """Return QEMU's words for ``count`` devices; ``options`` go to each, a comma in front."""
    words = ["-object", "iommufd,id=iommufd0,fd={iommu}"]
    for number in range(count):
        own = f"id=v{number},fd={{dev{number}}},iommufd=iommufd0"
        words += ["-device", f"vfio-pci,{own}{options}"]
    return words


def vfio_user_words(sockets: Sequence[Path], **options: object) -> list[str]:
    """Return QEMU's words for the devices behind ``sockets``; ``options`` go to each.

    An underscore in an option's name stands for a hyphen. QEMU takes a socket's address only in
    JSON.
    """
    words = []
    for number, path in enumerate(sockets):
        device = {
            "driver": "vfio-user-pci",
            "id": f"v{number}",
            "socket": {"type": "unix", "path": str(path)},
            **{name.replace("_", "-"): value for name, value in options.items()},
        }
        words += ["-device", json.dumps(device)]
    return words


def run_words(specs: Sequence[str], *options: str, filter_name: str = "fast") -> list[str]:
    """Return the words in front of QEMU that give it the devices ``specs``.

    ``vfiomig run`` is started by this Python, which finds the package in the same way. The fast
    filter is the default, because QEMU reads and writes a lot that is not ours.
    """
    safe_path = ["-P"] if sys.flags.safe_path else []
    devices = [word for spec in specs for word in ("--device", spec)]
    program = [sys.executable, *safe_path, "-m", "vfiomig", "run"]
    return [*program, "--filter", filter_name, *devices, *options, "--"]
