"""vmtest.mtty and vmtest.inside: which packages, what is taken out of them, and how a guest enters."""

from __future__ import annotations

import io
import shlex
import tarfile
from pathlib import Path

import pytest

from vmtest import mtty
from vmtest.errors import FetchError
from vmtest.inside import inside, shared

PLAN = [
    "linux-base=4.12.1",
    "linux-image-6.12.117+deb13-amd64=6.12.117-1",
    "linux-image-amd64=6.12.117-1",
    "gcc-14=14.2.0-19",
    "linux-headers-6.12.117+deb13-common=6.12.117-1",
    "linux-kbuild-6.12.117+deb13=6.12.117-1",
    "linux-headers-6.12.117+deb13-amd64=6.12.117-1",
    "linux-headers-amd64=6.12.117-1",
]
SPANS = """\
#include <linux/a.h>
int before;
#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER
int half;
#endif
int after;
"""
SOURCES = {
    "drivers/iommu/iommu-priv.h": "private",
    "drivers/iommu/iommufd/main.c": "iommufd",
    "drivers/iommu/other/main.c": "another driver",
    "drivers/vfio/vfio_main.c": "vfio",
    "drivers/vfio/pci/vfio_pci.c": "not built",
    "lib/interval_tree.c": SPANS,
    "samples/vfio-mdev/mtty.c": "the sample",
    "samples/vfio-mdev/zzz.c": "behind it",
}


def archive(folder: Path, sources: dict[str, str]) -> Path:
    path = folder / "linux-source-6.12.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for name, text in sources.items():
            member = tarfile.TarInfo(f"linux-source-6.12/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def test_the_sources_are_of_the_same_version_as_the_image_and_its_headers() -> None:
    assert mtty.kernel_packages(PLAN) == [PLAN[1], PLAN[4], PLAN[6], "linux-source-6.12=6.12.117-1"]


def test_a_plan_without_headers_is_an_error() -> None:
    with pytest.raises(FetchError, match="two packages of headers"):
        mtty.kernel_packages(PLAN[:4])


def test_only_what_is_built_is_taken_out_of_the_sources(tmp_path: Path) -> None:
    into = tmp_path / "sources"
    mtty.kernel_sources(archive(tmp_path, SOURCES), into)
    found = {str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()}
    assert found == {
        "drivers/iommu/iommu-priv.h",
        "drivers/iommu/iommufd/main.c",
        "drivers/iommu/iommufd/spans.c",
        "drivers/vfio/vfio_main.c",
        "lib/interval_tree.c",
        "samples/vfio-mdev/mtty.c",
    }
    spans = (into / "drivers/iommu/iommufd/spans.c").read_text()
    assert "#include <linux/a.h>" in spans
    assert "int half;" in spans
    assert "before" not in spans
    assert "after" not in spans


def test_sources_without_the_sample_are_an_error(tmp_path: Path) -> None:
    others = {name: text for name, text in SOURCES.items() if not name.startswith("samples")}
    with pytest.raises(FetchError, match=r"has no samples/vfio-mdev/mtty\.c"):
        mtty.kernel_sources(archive(tmp_path, others), tmp_path / "sources")


def test_sources_from_before_iommufd_are_an_error(tmp_path: Path) -> None:
    old = SOURCES | {"lib/interval_tree.c": "int before;\n"}
    with pytest.raises(FetchError, match="too old"):
        mtty.kernel_sources(archive(tmp_path, old), tmp_path / "sources")


def test_both_flavours_are_there_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "guest-1").mkdir()
    with pytest.raises(FetchError, match="apt install gcc"):
        mtty.fetch_mtty(tmp_path)
    (tmp_path / "mtty-1").mkdir()
    files = mtty.fetch_mtty(tmp_path)
    assert list(files) == ["group", "cdev"]
    assert files["cdev"].modules == tmp_path / "mtty-1/cdev"
    assert {guest.kernel for guest in files.values()} == {tmp_path / "mtty-1/kernel"}


def test_headers_find_each_other_and_the_programs_that_build(tmp_path: Path) -> None:
    headers = tmp_path / "usr/src/linux-headers-6.12.117+deb13-amd64"
    headers.mkdir(parents=True)
    makefile = headers / "Makefile"
    makefile.write_text("include /usr/src/linux-headers-6.12.117+deb13-common/Makefile\n")
    programs = tmp_path / "usr/lib/linux-kbuild-6.12.95+deb12/scripts"
    programs.mkdir(parents=True)
    (headers / "scripts").symlink_to("../../lib/linux-kbuild-6.12.117+deb13/scripts")
    assert mtty._prepare_headers(tmp_path) == headers
    assert (headers / "scripts").is_dir()
    common = f"{tmp_path}/usr/src/linux-headers-6.12.117+deb13-common"
    assert makefile.read_text() == f"include {common}/Makefile\n"


def test_what_make_says_last_is_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("modules:\n\t@echo no such thing >&2; false\n")
    with pytest.raises(FetchError, match="no such thing"):
        mtty._make(tmp_path, tmp_path, tmp_path)


def test_a_program_of_the_host_keeps_its_words_in_the_guest(tmp_path: Path) -> None:
    folder = tmp_path / "a folder, with 'marks'"
    outer = shlex.split(inside(["echo", "two words", "$HOME"], folder, {"A": "b c"}))
    assert outer[:4] == ["chroot", "/host", "/bin/sh", "-c"]
    words = shlex.split(outer[4])
    assert words[:2] == ["cd", str(folder)]
    assert words[-3:] == ["echo", "two words", "$HOME"]
    assert "A=b c" in words


def test_the_host_cannot_be_written_and_the_shared_folder_can() -> None:
    host, _, work = [
        word for word in shared(Path("/a,b")) if word.startswith(("local", "virtio-9p"))
    ][:3]
    assert host.startswith("local,id=host,path=/,")
    assert host.endswith("readonly=on")
    assert ",path=/a,,b," in work
    assert work.endswith("readonly=off")
