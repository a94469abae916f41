"""vfiomig.qemu.initrd: an archive that a kernel unpacks, and modules in an order that can be loaded."""

from __future__ import annotations

import lzma
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from vfiomig.errors import PrerequisiteError
from vfiomig.qemu.initrd import Entry, build_initrd, load_order, write_newc
from vfiomig.qemu.installed import GuestFiles


@dataclass(frozen=True)
class Unpacked:
    mode: int
    data: bytes
    device: tuple[int, int]


def unpack(archive: bytes) -> dict[str, Unpacked]:
    """As the format's description in the kernel's documentation has it."""
    found: dict[str, Unpacked] = {}
    offset = 0
    while True:
        header = archive[offset : offset + 110].decode("ascii")
        assert header[:6] == "070701"
        fields = [int(header[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
        _, mode, _, _, _, _, size, _, _, major, minor, name_size, check = fields
        assert check == 0
        name = archive[offset + 110 : offset + 110 + name_size]
        assert name.endswith(b"\0")
        start = -(-(offset + 110 + name_size) // 4) * 4
        if name == b"TRAILER!!!\0":
            return found
        found[name[:-1].decode()] = Unpacked(mode, archive[start : start + size], (major, minor))
        offset = -(-(start + size) // 4) * 4


@pytest.mark.parametrize("length", range(9))
def test_names_and_contents_of_any_length_come_out_as_they_went_in(length: int) -> None:
    entries = [
        Entry("a" * (length + 1), stat.S_IFREG | 0o644, bytes(range(length))),
        Entry("next", stat.S_IFREG | 0o755, b"after it"),
    ]
    unpacked = unpack(write_newc(entries))
    assert unpacked["a" * (length + 1)] == Unpacked(0o100644, bytes(range(length)), (0, 0))
    assert unpacked["next"] == Unpacked(0o100755, b"after it", (0, 0))


def test_folders_and_devices_have_their_types_and_numbers() -> None:
    unpacked = unpack(
        write_newc(
            [
                Entry("dev", stat.S_IFDIR | 0o755),
                Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
            ]
        )
    )
    assert unpacked == {
        "dev": Unpacked(0o040755, b"", (0, 0)),
        "dev/console": Unpacked(0o020600, b"", (5, 1)),
    }


class Modules:
    """A folder of modules, each with its ``.modinfo`` strings as a linker leaves them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "modules.builtin").write_text("kernel/drivers/char/built-in.ko\n")

    def add(self, name: str, *needs: str, compressed: bool = False) -> None:
        line = ",".join(needs).encode()
        module = b"\x7fELF\0license=GPL\0depends=%s\0name=x\0rest" % line
        path = self.folder / f"kernel/{name}.ko{'.xz' if compressed else ''}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lzma.compress(module) if compressed else module)

    def order(self, *wanted: str) -> list[str]:
        return [path.name for path in load_order(self.folder, wanted)]


@pytest.fixture
def modules(tmp_path: Path) -> Modules:
    return Modules(tmp_path / "modules")


def test_a_module_comes_after_all_that_it_needs(modules: Modules) -> None:
    modules.add("9p", "9pnet", "netfs", compressed=True)
    modules.add("9pnet", compressed=True)
    modules.add("netfs")
    modules.add("9pnet_virtio", "9pnet")
    assert modules.order("9p", "9pnet_virtio") == [
        "9pnet.ko.xz",
        "netfs.ko",
        "9p.ko.xz",
        "9pnet_virtio.ko",
    ]


def test_hyphens_and_underscores_are_the_same_in_a_modules_name(modules: Modules) -> None:
    modules.add("vfio-pci", "vfio-pci-core")
    modules.add("vfio-pci-core")
    assert modules.order("vfio_pci") == ["vfio-pci-core.ko", "vfio-pci.ko"]
    assert modules.order("vfio-pci") == ["vfio-pci-core.ko", "vfio-pci.ko"]


def test_what_is_built_into_the_kernel_is_not_loaded(modules: Modules) -> None:
    modules.add("card", "built_in")
    assert modules.order("built-in", "card") == ["card.ko"]


def test_a_module_that_is_not_there_is_named(modules: Modules) -> None:
    modules.add("card", "absent")
    with pytest.raises(PrerequisiteError, match="no module absent"):
        modules.order("card")


def test_the_archive_has_what_the_first_process_needs(tmp_path: Path, modules: Modules) -> None:
    modules.add("vfio-pci", "vfio-pci-core", compressed=True)
    modules.add("vfio-pci-core")
    (tmp_path / "busybox").write_bytes(b"\x7fELF busybox")
    files = GuestFiles(tmp_path / "kernel", tmp_path / "busybox", modules.folder)
    unpacked = unpack(build_initrd(files, ["vfio-pci"], {"bin/mine": b"#!/bin/sh\n"}))
    order = unpacked["modules/order"].data.decode().split()
    assert order == ["vfio-pci-core.ko", "vfio-pci.ko"]
    # busybox cannot decompress modules
    assert all(unpacked[f"modules/{name}"].data.startswith(b"\x7fELF") for name in order)
    assert unpacked["bin/busybox"] == Unpacked(0o100755, b"\x7fELF busybox", (0, 0))
    assert unpacked["bin/mine"] == Unpacked(0o100755, b"#!/bin/sh\n", (0, 0))
    assert unpacked["init"].mode == 0o100755
    for folder in ("proc", "sys", "dev", "tmp"):
        assert stat.S_ISDIR(unpacked[folder].mode)


def test_without_modules_there_is_nothing_to_load(tmp_path: Path) -> None:
    (tmp_path / "busybox").write_bytes(b"\x7fELF")
    unpacked = unpack(build_initrd(GuestFiles(tmp_path, tmp_path / "busybox", None)))
    assert unpacked["modules/order"].data == b""


def test_the_guests_first_process_is_a_script_that_parses() -> None:
    script = Path(__file__).parents[2] / "src/vfiomig/qemu/guest-init.sh"
    subprocess.run(["sh", "-n", script], check=True, timeout=100)
