"""The kernel's sample driver mtty, built from a distribution's packages: a real VFIO device.

Theory of operation
-------------------
No distribution ships the module. Its source is in the package of the kernel's sources, and what
builds a module for a distribution's kernel is in the packages of its headers. The kernel is one
of the releases that let go of a change from STOP_COPY to PRE_COPY; the programs that build are
those of the machine's own release, because newer ones want a newer C library. The compiler is the
machine's.

There are two flavours of modules, because a distribution's kernel has the group and the container
and neither the character device nor iommufd:

``group``  VFIO as the distribution built it, with mtty beside it
``cdev``   VFIO, iommufd and mtty built from the same sources with these options on

The sources are removed when the modules are there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vfiomig.qemu.installed import GuestFiles
from vmtest import fetch, vmlinux
from vmtest.errors import FetchError
from vmtest.packages import unpack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ("FLAVOURS", "MODULES", "Flavour", "fetch_mtty", "kernel_packages", "kernel_sources")

_SET: Final = "mtty-1"
#: Debian 13 has a 6.12 that lets go of the blocked pairs.
_SUITES: Final = ("trixie", "trixie-backports")
_BUILD_DEADLINE_S: Final = 900

#: What is loaded, beside what these need; and what lets a guest see files of the host.
MODULES: Final = ("9p", "9pnet_virtio", "irqbypass", "vfio_iommu_type1", "mdev", "mtty")
_STOCK: Final = ("netfs", "9pnet", "9pnet_virtio", "9p", "irqbypass", "mdev")
_STOCK_VFIO: Final = ("vfio", "vfio_iommu_type1")

_SAMPLE: Final = "samples/vfio-mdev/mtty.c"
_SPANS: Final = "lib/interval_tree.c"
_SOURCES: Final = re.compile(
    rf"drivers/vfio/[^/]+\.[ch]|drivers/iommu/iommufd/[^/]+\.[ch]|drivers/iommu/iommu-priv\.h"
    rf"|{re.escape(_SPANS)}|{re.escape(_SAMPLE)}"
)

_OPTIONS: Final = (
    *("CONFIG_IOMMUFD", "CONFIG_VFIO_DEVICE_CDEV", "CONFIG_VFIO_DEBUGFS"),
    "CONFIG_INTERVAL_TREE_SPAN_ITER",
)
_VFIO: Final = "vfio_main group container iommufd device_cdev virqfd debugfs"
_IOMMUFD: Final = "device fault hw_pagetable io_pagetable ioas main pages vfio_compat spans"


@dataclass(frozen=True, slots=True)
class Flavour:
    """A flavour of modules, and how they are built: the text of each Kbuild file, by folder."""

    name: str
    stock: Sequence[str]
    builds: Mapping[str, str]


def _objects(names: str) -> str:
    return " ".join(f"{name}.o" for name in names.split())


FLAVOURS: Final = (
    Flavour(
        "group",
        (*_STOCK, *_STOCK_VFIO),
        {".": "obj-m := samples/vfio-mdev/", "samples/vfio-mdev": "obj-m := mtty.o"},
    ),
    Flavour(
        "cdev",
        _STOCK,
        {
            ".": f"subdir-ccflags-y := {' '.join(f'-D{option}=1' for option in _OPTIONS)}\n"
            "obj-m := drivers/vfio/ drivers/iommu/iommufd/ samples/vfio-mdev/",
            "drivers/vfio": f"obj-m := vfio.o vfio_iommu_type1.o\nvfio-y := {_objects(_VFIO)}",
            "drivers/iommu/iommufd": f"obj-m := iommufd.o\niommufd-y := {_objects(_IOMMUFD)}",
            "samples/vfio-mdev": "obj-m := mtty.o",
        },
    ),
)


def fetch_mtty(cache: Path) -> dict[str, GuestFiles]:
    """Return what a guest with mtty is made of, by flavour; fetch and build it if need be."""
    busybox = fetch.fetch_guest_files(cache).busybox

    def look(cache: Path) -> dict[str, GuestFiles] | None:
        folder = cache / _SET
        if not folder.exists():
            return None
        return {
            flavour.name: GuestFiles(folder / "kernel", busybox, folder / flavour.name)
            for flavour in FLAVOURS
        }

    return fetch._fetched(cache, look, _build)


def kernel_packages(plan: Sequence[str]) -> list[str]:
    """Return what a plan has of the kernel itself: image, headers of both kinds, and sources."""
    own = re.compile(r"linux-(?:image|headers)-(\d+\.\d+)\S*?=(\S+)")
    found = [match for selected in plan if (match := own.fullmatch(selected))]
    if len(found) != 3:
        raise FetchError(f"not one image and two packages of headers: {' '.join(plan)}")
    series, version = found[0].groups()
    return [*(match[0] for match in found), f"linux-source-{series}={version}"]


def kernel_sources(archive: Path, into: Path) -> None:
    """Take what is built here out of the archive of a kernel's sources."""
    with tarfile.open(archive, "r|xz") as members:
        for member in members:
            name = member.name.partition("/")[2]
            if not _SOURCES.fullmatch(name):
                continue
            file = members.extractfile(member)
            assert file is not None
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read())
            if name == _SAMPLE:
                # The last one; what follows in the archive is of no interest.
                break
        else:
            raise FetchError(f"{archive.name} has no {_SAMPLE}")
    spans = into / _SPANS
    text = spans.read_text(encoding="utf-8")
    (into / "drivers/iommu/iommufd/spans.c").write_text(_half_of(text), encoding="utf-8")


def _half_of(text: str) -> str:
    """Return the half of lib/interval_tree.c that iommufd needs and the kernel was built without."""
    includes = re.findall(r"^#include .*$", text, re.MULTILINE)
    half = re.search(
        r"^#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER$.*?^#endif$", text, re.MULTILINE | re.DOTALL
    )
    if half is None:
        raise FetchError(f"{_SPANS} has no iteration over spans: these sources are too old")
    return "\n".join([*includes, half[0], ""])


def _build(cache: Path) -> None:
    for program in ("gcc", "make"):
        if shutil.which(program) is None:
            raise FetchError(
                f"{program} is not installed, and mtty is built: apt install {program}"
            )
    own = fetch._repository(cache)
    plan = own.closure("linux-headers-amd64")
    tools = [name for name in plan if re.match(r"linux-kbuild-|libelf1", name)]
    archives = fetch._download(own, "the kernel's build programs", tools)
    trixie = fetch._repository(cache, _SUITES)
    plan = trixie.closure("linux-image-amd64", "linux-headers-amd64", suite=_SUITES[0])
    archives += fetch._download(trixie, "a kernel and its sources", kernel_packages(plan))
    with fetch._under_construction(cache / _SET, archives) as new:
        root = new / "root"
        unpack(archives, root)
        (compressed,) = root.glob("boot/vmlinuz-*")
        image = compressed.read_bytes()
        (new / "kernel").write_bytes(vmlinux.extract(image) or image)
        (sources,) = root.glob("usr/src/linux-source-*.tar.xz")
        kernel_sources(sources, root / "sources")
        headers = _prepare_headers(root)
        for flavour in FLAVOURS:
            _build_flavour(flavour, root, headers, new / flavour.name)
        shutil.rmtree(root)


def _prepare_headers(root: Path) -> Path:
    """Let the headers find each other and the build programs where they were unpacked."""
    (headers,) = root.glob("usr/src/linux-headers-*-amd64")
    makefile = headers / "Makefile"
    text = makefile.read_text(encoding="utf-8")
    makefile.write_text(text.replace(" /usr/src/", f" {root}/usr/src/"), encoding="utf-8")
    (programs,) = root.glob("usr/lib/linux-kbuild-*")
    programs.rename(programs.with_name(os.readlink(headers / "scripts").split("/")[-2]))
    return headers


def _build_flavour(flavour: Flavour, root: Path, headers: Path, into: Path) -> None:
    """Put the stock modules of a flavour and those that are built into a folder."""
    folder = root / f"build-{flavour.name}"
    shutil.copytree(root / "sources", folder)
    for place, text in flavour.builds.items():
        (folder / place / "Kbuild").write_text(f"{text}\n", encoding="utf-8")
    fetch.say(f"building the modules of the flavour {flavour.name}")
    _make(headers, folder, root)
    into.mkdir()
    for module in folder.rglob("*.ko"):
        module.rename(into / module.name)
    (modules,) = [*root.glob("usr/lib/modules/*"), *root.glob("lib/modules/*")]
    shutil.copyfile(modules / "modules.builtin", into / "modules.builtin")
    for name in flavour.stock:
        (module,) = modules.rglob(f"{name}.ko*")
        shutil.copyfile(module, into / module.name)


def _make(headers: Path, folder: Path, root: Path) -> None:
    libraries = f"{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu"
    done = subprocess.run(
        [
            *("make", "-C", headers, f"M={folder}", "CC=gcc"),
            # Needs pahole; is for people who debug; and is not known to every gcc.
            *("CONFIG_DEBUG_INFO_BTF_MODULES=", "CONFIG_DEBUG_INFO="),
            *("CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT=", "modules"),
        ],
        # Nothing of the make that this may run under.
        env={
            "PATH": os.environ["PATH"],
            "LC_ALL": "C",
            "LD_LIBRARY_PATH": libraries,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_BUILD_DEADLINE_S,
        check=False,
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise FetchError(f"the modules in {folder} cannot be built:\n{last}")
