"""The guest's first file system: busybox, kernel modules, files and the first process.

It is an uncompressed archive in the "newc" format (Documentation/driver-api/early-userspace/
buffer-format.rst), which every kernel unpacks and no program is needed to write. Modules are
uncompressed here, because busybox cannot, and listed in the order in which they must be loaded;
each of them names those that it needs in its ``.modinfo`` section.
"""

from __future__ import annotations

import lzma
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vfiomig.errors import PrerequisiteError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vfiomig.qemu.installed import GuestFiles

__all__ = ("DEFAULT_MODULES", "Entry", "build_initrd", "load_order", "write_newc")

#: Drivers that a guest of ours needs and a distribution's kernel has as modules.
DEFAULT_MODULES: Final = ("virtio_blk",)

_INIT: Final = Path(__file__).with_name("guest-init.sh")
_SUFFIXES: Final = (".ko", ".ko.xz")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the archive; ``mode`` has its type, ``device`` its numbers if it is a device."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def build_initrd(
    files: GuestFiles,
    modules: Sequence[str] = DEFAULT_MODULES,
    extra: Mapping[str, bytes] | None = None,
) -> bytes:
    """Return the archive: everything of ``files`` that a guest needs, and ``extra`` by path.

    Without a folder of modules there are none; their drivers are then the kernel's own or absent.
    """
    ordered = load_order(files.modules, modules) if files.modules else []
    order = "".join(f"{path.name.partition('.')[0]}.ko\n" for path in ordered)
    executable, plain = stat.S_IFREG | 0o755, stat.S_IFREG | 0o644
    entries = [
        *(Entry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "proc", "sys", "modules")),
        Entry("tmp", stat.S_IFDIR | 0o1777),
        # The first process writes here before it can mount anything.
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("bin/busybox", executable, files.busybox.read_bytes()),
        Entry("init", executable, _INIT.read_bytes()),
        Entry("modules/order", plain, order.encode()),
        *(
            Entry(f"modules/{path.name.partition('.')[0]}.ko", plain, _read_module(path))
            for path in ordered
        ),
        *(Entry(name, executable, data) for name, data in (extra or {}).items()),
    ]
    return write_newc(entries)


def write_newc(entries: Iterable[Entry]) -> bytes:
    """Return ``entries`` and the end mark as an archive."""
    archive = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], 1):
        name = entry.name.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device)
        header = "070701" + "".join(f"{field:08X}" for field in (*fields, len(name), 0))
        archive += header.encode() + name
        _align(archive)
        archive += entry.data
        _align(archive)
    return bytes(archive)


def load_order(folder: Path, wanted: Sequence[str]) -> list[Path]:
    """Return the modules ``wanted`` and those that they need, each after what it needs.

    What is built into the kernel needs no loading.
    """
    there = {
        _module_name(path): path for path in folder.rglob("*") if path.name.endswith(_SUFFIXES)
    }
    listing = (folder / "modules.builtin").read_text().splitlines()
    builtin = {_module_name(Path(line)) for line in listing}
    ordered: dict[str, Path] = {}

    def add(name: str) -> None:
        if name in ordered or name in builtin:
            return
        if name not in there:
            raise PrerequisiteError(f"the kernel has no module {name}: see {folder}")
        for needed in _needs(_read_module(there[name])):
            add(needed)
        ordered[name] = there[name]

    for name in wanted:
        add(name.replace("-", "_"))
    return list(ordered.values())


def _needs(module: bytes) -> list[str]:
    """Return what the ``depends=`` line of a module's ``.modinfo`` names."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    names = found[1].decode() if found else ""
    return [name.replace("-", "_") for name in names.split(",") if name]


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _align(archive: bytearray) -> None:
    archive += bytes(-len(archive) % 4)
