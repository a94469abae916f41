"""vmtest.fetch: nobody sees half of a set, and nothing is fetched that is there."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from vfiomig.qemu.installed import VFIO_USER_QEMU
from vmtest import fetch
from vmtest.errors import FetchError

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig.qemu.installed import QemuSet


@pytest.mark.parametrize(
    ("os_release", "suites"),
    [
        ("ID=debian\nVERSION_CODENAME=bookworm\n", ("bookworm", "bookworm-backports")),
        ('ID="debian"\nVERSION_CODENAME="trixie"\n', ("trixie",)),
    ],
)
def test_backports_are_used_where_the_release_is_too_old(
    os_release: str, suites: tuple[str, ...]
) -> None:
    assert fetch._suites(fetch._release(os_release)) == suites


@pytest.mark.parametrize("os_release", ["ID=fedora\nVERSION_CODENAME=x\n", "ID=debian\n", ""])
def test_another_distribution_is_told_to_bring_its_own(os_release: str) -> None:
    with pytest.raises(FetchError, match=r"put a QEMU 11\.0 or later on the PATH"):
        fetch._release(os_release)


def test_what_is_there_needs_neither_apt_nor_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sets = ["guest-1", "lspci-1", "qemu-1", "qemu-vfio-user-1"]
    for name in sets:
        (tmp_path / name).mkdir()
    assert fetch.fetch_qemu(tmp_path) == tmp_path / "qemu-1/qemu-system-x86_64"
    newer = fetch.fetch_qemu(tmp_path, VFIO_USER_QEMU)
    assert newer == tmp_path / "qemu-vfio-user-1/qemu-system-x86_64"
    files = fetch.fetch_guest_files(tmp_path)
    assert files.kernel == tmp_path / "guest-1/kernel"
    assert fetch.fetch_lspci(tmp_path) == tmp_path / "lspci-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == sets


def test_a_guest_gets_lspci_with_everything_that_it_loads_and_nothing_else(tmp_path: Path) -> None:
    for name in ("ld-linux-x86-64.so.2", "libpci.so.3", "lspci.program", "packages"):
        (tmp_path / name).write_bytes(name.encode())
    files = fetch.lspci_files(tmp_path)
    assert sorted(files) == [
        "bin/ld-linux-x86-64.so.2",
        "bin/libpci.so.3",
        "bin/lspci",
        "bin/lspci.program",
    ]
    assert files["bin/libpci.so.3"] == b"libpci.so.3"
    assert files["bin/lspci"].startswith(b"#!/bin/sh\nexec /bin/ld-linux-x86-64.so.2 ")


def test_a_set_that_fails_half_way_is_not_there_and_keeps_its_downloads(tmp_path: Path) -> None:
    archive = tmp_path / "a.deb"
    archive.write_bytes(b"downloaded")
    folder = tmp_path / "set-1"

    def build(*, fails: bool) -> None:
        with fetch._under_construction(folder, [archive]) as new:
            assert list(new.iterdir()) == []
            (new / "file").touch()
            if fails:
                raise FetchError("disk full")

    with pytest.raises(FetchError, match="disk full"):
        build(fails=True)
    assert not folder.exists()
    assert archive.exists()
    build(fails=False)
    assert (folder / "packages").read_text() == "a.deb\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set-1"]


def test_one_builds_and_the_other_finds_it_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building = threading.Event()
    built: list[str] = []

    def build(cache: Path, which: QemuSet) -> None:
        building.set()
        waiting.wait(timeout=10)
        (cache / which.folder).mkdir()
        built.append(threading.current_thread().name)

    waiting = threading.Event()
    monkeypatch.setattr(fetch, "_build_qemu", build)
    monkeypatch.setattr(fetch, "say", lambda line: waiting.set() if "waiting" in line else None)
    first = threading.Thread(target=fetch.fetch_qemu, args=(tmp_path,), name="first")
    second = threading.Thread(target=fetch.fetch_qemu, args=(tmp_path,), name="second")
    first.start()
    assert building.wait(timeout=10)
    second.start()
    first.join(timeout=10)
    second.join(timeout=10)
    # The first went on only because the second said that it waits.
    assert waiting.is_set()
    assert built == ["first"]


def test_a_lock_that_nobody_gives_back_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_LOCK_DEADLINE_S", 0.3)
    with (
        fetch._locked(tmp_path),
        pytest.raises(FetchError, match="who holds it"),
        fetch._locked(tmp_path),
    ):
        pass
