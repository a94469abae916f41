"""vmtest.packages: what apt says is understood, and nothing that differs from it is used."""

from __future__ import annotations

import hashlib
import math
import os
from typing import TYPE_CHECKING

import pytest

from vmtest.errors import FetchError
from vmtest.packages import (
    Archive,
    Repository,
    mirror_of,
    parse_archives,
    parse_plan,
    unpack,
)

if TYPE_CHECKING:
    from pathlib import Path

SUITES = ("bookworm", "bookworm-backports")

LISTED = """\
'http://mirror.example/other/dists/bookworm-security/InRelease' mirror.example_a 0
'http://mirror.example/debian/dists/bookworm-updates/InRelease' mirror.example_b 0
'http://mirror.example/debian/dists/bookworm/InRelease' mirror.example_c 0
'http://mirror.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' mirror.example_d 0
"""
SIMULATED = """\
Reading package lists...
The following NEW packages will be installed:
  libfoo1 qemu
Inst gcc-12-base (12.2.0-14+deb12u1 Debian:12.15/oldstable [amd64])
Inst libfoo1 (2:1.0-1 Debian:12.15/oldstable [amd64]) []
Inst qemu (1:10.0.2+ds-2~bpo12+1 Debian Backports:oldstable-backports [amd64])
Conf qemu (1:10.0.2+ds-2~bpo12+1 Debian Backports:oldstable-backports [amd64])
"""

#: A small apt-get: notes its calls, answers from files, and "downloads" into its folder.
APT_GET = """
echo "$*" >>"$CALLS"
case "$*" in
*"update --print-uris"*) cat "$LISTED";;
*"--error-on=any"*) [ -z "$FAIL" ] || { echo "W: hm" >&2; echo "E: $FAIL" >&2; exit 100; };;
*"-s install"*) cat "$SIMULATED";;
*"--print-uris download"*) cat "$ARCHIVES";;
*download*)
    echo "dlstatus:1:25.0000:Retrieving file 1 of 2"
    cp "$SERVED"/* .
    echo "dlstatus:2:100.0000:Retrieving file 2 of 2";;
esac
"""


class Machine:
    """A machine whose apt-get and dpkg-deb are small programs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.served = folder / "served"
        self.calls = folder / "calls"
        self.archives = folder / "archives.txt"
        for made in (self.bin, self.served):
            made.mkdir()
        for file, text in (("listed", LISTED), ("simulated", SIMULATED)):
            (folder / file).write_text(text)
            monkeypatch.setenv(file.upper(), str(folder / file))
        monkeypatch.setenv("CALLS", str(self.calls))
        monkeypatch.setenv("ARCHIVES", str(self.archives))
        monkeypatch.setenv("SERVED", str(self.served))
        monkeypatch.setenv("FAIL", "")
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        self.program("apt-get", APT_GET)
        self.program("dpkg-deb", 'mkdir -p "$3/bin"; cp "$2" "$3/bin/it"; chmod 6755 "$3/bin/it"')

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def serve(self, name: str, content: bytes, promised: bytes | None = None) -> None:
        """Let the mirror have ``content``, where the index promises ``promised``."""
        (self.served / name).write_bytes(content)
        digest = hashlib.sha256(content if promised is None else promised).hexdigest()
        with self.archives.open("a") as listing:
            listing.write(f"'http://mirror.example/{name}' {name} {len(content)} SHA256:{digest}\n")

    def repository(self) -> Repository:
        return Repository(self.folder / "apt", SUITES, SUITES[0])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_the_mirror_is_the_one_that_has_exactly_this_suite() -> None:
    assert mirror_of(LISTED, "bookworm") == "http://mirror.example/debian"
    assert mirror_of(LISTED, "bookworm-security") == "http://mirror.example/other"
    assert mirror_of(LISTED, "book") is None
    assert mirror_of("", "bookworm") is None


def test_a_plan_names_every_package_with_its_version() -> None:
    assert parse_plan(SIMULATED) == [
        "gcc-12-base=12.2.0-14+deb12u1",
        "libfoo1=2:1.0-1",
        "qemu=1:10.0.2+ds-2~bpo12+1",
    ]


def test_an_archive_is_a_file_a_size_and_a_hash() -> None:
    digest = "3d" * 32
    listed = f"'http://m.example/a%2b.deb' a_1%3a1+b_amd64.deb 928188 SHA256:{digest}\nNeed 1\n"
    assert parse_archives(listed) == [Archive("a_1%3a1+b_amd64.deb", 928188, digest)]


def test_an_archive_without_a_sha256_is_none() -> None:
    assert parse_archives("'http://m.example/a' a.deb 5 MD5Sum:0123\n") == []


def test_sources_are_the_machines_mirror_with_these_suites(machine: Machine) -> None:
    repository = machine.repository()
    assert repository.age() == math.inf
    repository.refresh()
    assert repository.age() < 60
    lines = (machine.folder / "apt/sources.list").read_text().splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "http://mirror.example/debian bookworm main",
        "http://mirror.example/debian bookworm-backports main",
    ]


def test_suites_of_another_release_come_from_the_mirror_of_the_machines_own(
    machine: Machine,
) -> None:
    Repository(machine.folder / "apt", ["trixie", "trixie-backports"], "bookworm").refresh()
    lines = (machine.folder / "apt/sources.list").read_text().splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "http://mirror.example/debian trixie main",
        "http://mirror.example/debian trixie-backports main",
    ]


def test_apt_is_told_to_stay_in_its_folder(machine: Machine) -> None:
    machine.repository().closure("qemu")
    (call,) = machine.calls.read_text().splitlines()
    assert call.startswith(f"-c {machine.folder}/apt/apt.conf ")
    assert call.endswith("-t bookworm-backports -s install qemu")
    configuration = (machine.folder / "apt/apt.conf").read_text()
    places = [line.split('"')[1] for line in configuration.splitlines() if line.startswith("Dir::")]
    assert len(places) >= 9
    assert all(place.startswith((f"{machine.folder}/apt/", "/dev/null")) for place in places)
    assert (machine.folder / "apt/status").read_bytes() == b""


def test_a_machine_whose_sources_lack_the_suite_is_told_so(machine: Machine) -> None:
    (machine.folder / "listed").write_text("")
    with pytest.raises(FetchError, match="no source of this machine's apt offers bookworm"):
        machine.repository().refresh()


def test_without_a_network_the_error_is_apts_own(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "Could not resolve 'mirror.example'")
    repository = machine.repository()
    with pytest.raises(FetchError, match=r"is there a network.*Could not resolve") as caught:
        repository.refresh()
    assert "\n" not in str(caught.value)
    assert repository.age() == math.inf


@pytest.mark.parametrize("missing", ["apt-get", "dpkg-deb"])
def test_a_machine_without_apt_is_told_what_to_do(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    (machine.bin / missing).unlink()
    monkeypatch.setenv("PATH", str(machine.bin))
    with pytest.raises(FetchError, match=rf"{missing} is not installed.*pass --qemu"):
        machine.repository()


def test_archives_are_downloaded_once(machine: Machine) -> None:
    machine.serve("a_1.deb", b"first")
    machine.serve("b_2.deb", b"second")
    seen: list[float] = []
    repository = machine.repository()
    paths = repository.download(["a=1", "b=2"], seen.append)
    assert [path.read_bytes() for path in paths] == [b"first", b"second"]
    assert seen == [25.0, 100.0]
    assert repository.download(["a=1", "b=2"], seen.append) == paths
    calls = machine.calls.read_text().splitlines()
    assert sum("Status-Fd" in call for call in calls) == 1


def test_an_archive_that_differs_from_the_index_is_not_used(machine: Machine) -> None:
    machine.serve("a_1.deb", b"forged", promised=b"honest")
    repository = machine.repository()
    with pytest.raises(FetchError, match=r"a_1\.deb differs from what the index says"):
        repository.download(["a=1"], lambda _: None)
    assert not (machine.folder / "apt/archives/a_1.deb").exists()


def test_a_damaged_archive_of_an_earlier_run_is_not_used(machine: Machine) -> None:
    machine.serve("a_1.deb", b"honest")
    repository = machine.repository()
    left = machine.folder / "apt/archives/a_1.deb"
    left.write_bytes(b"hohest")
    (path,) = repository.download(["a=1"], lambda _: None)
    assert path.read_bytes() == b"honest"


def test_the_kernel_of_a_metapackage_is_the_image_that_it_depends_on(machine: Machine) -> None:
    (machine.folder / "simulated").write_text(
        "Inst linux-base (4.9 Debian [all])\n"
        "Inst linux-image-6.12.95-amd64 (6.12.95-1 Debian [amd64])\n"
        "Inst linux-image-amd64 (6.12.95-1 Debian [amd64])\n"
    )
    image = machine.repository().kernel_of("linux-image-amd64")
    assert image == "linux-image-6.12.95-amd64=6.12.95-1"


def test_nothing_that_is_unpacked_is_setuid(machine: Machine) -> None:
    archive = machine.folder / "a_1.deb"
    archive.write_bytes(b"program")
    root = machine.folder / "root"
    unpack([archive], root)
    assert (root / "bin/it").stat().st_mode & 0o7777 == 0o755
    assert root.stat().st_mode & 0o7777 == 0o755


def test_an_archive_that_cannot_be_unpacked_is_named(machine: Machine) -> None:
    machine.program("dpkg-deb", "echo 'not a Debian format archive' >&2; exit 2")
    with pytest.raises(FetchError, match=r"a_1\.deb cannot be unpacked: not a Debian format"):
        unpack([machine.folder / "a_1.deb"], machine.folder / "root")
