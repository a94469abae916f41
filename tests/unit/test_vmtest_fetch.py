"""vmtest.fetch: nobody sees half of a set, and nothing is fetched that is there."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from vmtest import fetch
from vmtest.errors import FetchError

if TYPE_CHECKING:
    from pathlib import Path


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
    assert fetch._suites(os_release) == suites


@pytest.mark.parametrize("os_release", ["ID=fedora\nVERSION_CODENAME=x\n", "ID=debian\n", ""])
def test_another_distribution_is_told_to_bring_its_own(os_release: str) -> None:
    with pytest.raises(FetchError, match=r"put a QEMU 10\.0 or later on the PATH"):
        fetch._suites(os_release)


def test_what_is_there_needs_neither_apt_nor_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("qemu-1", "guest-1"):
        (tmp_path / name).mkdir()
    assert fetch.fetch_qemu(tmp_path) == tmp_path / "qemu-1/qemu-system-x86_64"
    files = fetch.fetch_guest_files(tmp_path)
    assert files.kernel == tmp_path / "guest-1/kernel"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guest-1", "qemu-1"]


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

    def build(cache: Path) -> None:
        building.set()
        waiting.wait(timeout=10)
        (cache / "qemu-1").mkdir()
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
