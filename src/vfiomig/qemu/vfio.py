"""The words that give a QEMU devices, and those in front of it that serve them.

Each device is a descriptor that QEMU inherits, and one iommufd serves all, so QEMU looks nothing
up in sysfs. The numbers are put in by ``vfiomig run``, where the words say ``{dev0}`` and
``{iommu}``.

Or each device is the socket of a vfio-user server, to which QEMU 11.0 and later connect.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ("run_words", "vfio_user_device", "vfio_user_words", "vfio_words")


def vfio_words(count: int, options: str = "") -> list[str]:
    """Return QEMU's words for ``count`` devices; ``options`` go to each, a comma in front."""
    words = ["-object", "iommufd,id=iommufd0,fd={iommu}"]
    for number in range(count):
        own = f"id=v{number},fd={{dev{number}}},iommufd=iommufd0"
        words += ["-device", f"vfio-pci,{own}{options}"]
    return words


def vfio_user_device(path: Path, name: str, **options: Any) -> dict[str, Any]:
    """Return the device behind the socket ``path`` as device_add takes it.

    An underscore in an option's name stands for a hyphen.
    """
    return {
        "driver": "vfio-user-pci",
        "id": name,
        "socket": {"type": "unix", "path": str(path)},
        **{option.replace("_", "-"): value for option, value in options.items()},
    }


def vfio_user_words(sockets: Sequence[Path], **options: Any) -> list[str]:
    """Return QEMU's words for the devices behind ``sockets``; ``options`` go to each."""
    words = []
    for number, path in enumerate(sockets):
        # On the command line QEMU takes a socket's address in JSON only.
        words += ["-device", json.dumps(vfio_user_device(path, f"v{number}", **options))]
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
