"""vfiomig.qemu.installed: where the cache is, and which QEMU is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfiomig.errors import PrerequisiteError
from vfiomig.qemu.installed import (
    VFIO_USER_QEMU,
    GuestFiles,
    cache_folder,
    cached_guest_files,
    find_qemu,
    version_of,
)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"VFIOMIG_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/vfiomig"),
        ({"HOME": "/c"}, "/c/.cache/vfiomig"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("VFIOMIG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def program(path: Path, says: str, code: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright", (10, 0)),
        ("QEMU emulator version 7.2.22", (7, 2)),
        ("QEMU emulator version 11.1.50 (v11.1.0-1-gabc)", (11, 1)),
    ],
)
def test_the_version_is_what_qemu_says(tmp_path: Path, says: str, version: tuple[int, int]) -> None:
    assert version_of(program(tmp_path / "q", says)) == version


def test_a_program_that_is_no_qemu_is_refused_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="but: hello"):
        version_of(program(tmp_path / "q", "hello"))
    with pytest.raises(PrerequisiteError, match="cannot be started: No such file"):
        version_of(tmp_path / "absent")


def test_a_program_that_says_nothing_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "q"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr("vfiomig.qemu.installed._ANSWER_S", 0.1)
    with pytest.raises(PrerequisiteError, match=r"says nothing of its version for 0\.1 s"):
        version_of(silent)


class Choice:
    """A QEMU on the PATH beside one in the cache."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = folder / "cache"
        self.cached = self.cache / "qemu-1/qemu-system-x86_64"
        self.cached.parent.mkdir(parents=True)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.there = self.bin / "qemu-system-x86_64"
        monkeypatch.setenv("PATH", f"{self.bin}:/usr/bin-that-is-not-there")


@pytest.fixture
def choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Choice:
    return Choice(tmp_path, monkeypatch)


def test_a_new_qemu_on_the_path_is_taken(choice: Choice) -> None:
    program(choice.there, "QEMU emulator version 10.0.0")
    assert find_qemu(None, choice.cache) == choice.there


def test_an_old_qemu_on_the_path_is_passed_over_for_the_caches(choice: Choice) -> None:
    program(choice.there, "QEMU emulator version 9.2.4")
    assert find_qemu(None, choice.cache) == choice.cached


def test_without_a_qemu_on_the_path_it_is_the_caches(choice: Choice) -> None:
    assert find_qemu(None, choice.cache) == choice.cached


def test_a_qemu_that_was_asked_for_is_taken_or_refused_but_not_replaced(choice: Choice) -> None:
    program(choice.there, "QEMU emulator version 10.0.0")
    new = program(choice.cache / "new", "QEMU emulator version 11.0.0")
    assert find_qemu(new, choice.cache) == new
    old = program(choice.cache / "old", "QEMU emulator version 8.2.2")
    with pytest.raises(PrerequisiteError, match=r"is QEMU 8\.2, and 10\.0 or later is needed"):
        find_qemu(old, choice.cache)


def test_a_qemu_that_will_do_for_one_thing_is_too_old_for_another(choice: Choice) -> None:
    program(choice.there, "QEMU emulator version 10.2.1")
    newer = choice.cache / VFIO_USER_QEMU.folder / "qemu-system-x86_64"
    with pytest.raises(PrerequisiteError, match=r"is QEMU 10\.2, and 11\.0 or later is needed"):
        find_qemu(None, choice.cache, VFIO_USER_QEMU)
    newer.parent.mkdir()
    assert find_qemu(None, choice.cache, VFIO_USER_QEMU) == newer
    assert find_qemu(None, choice.cache) == choice.there
    program(choice.there, "QEMU emulator version 11.0.0")
    assert find_qemu(None, choice.cache, VFIO_USER_QEMU) == choice.there


def test_without_any_qemu_the_next_step_is_said(choice: Choice) -> None:
    choice.cached.parent.rmdir()
    with pytest.raises(
        PrerequisiteError, match=r"no qemu-system-x86_64 on the PATH, and 10.* fetch"
    ):
        find_qemu(None, choice.cache)
    program(choice.there, "QEMU emulator version 7.2.0")
    with pytest.raises(PrerequisiteError, match=r"is QEMU 7\.2, and 10\.0 or later is needed: put"):
        find_qemu(None, choice.cache)


def test_the_files_of_the_guest_are_there_when_their_set_is(tmp_path: Path) -> None:
    assert cached_guest_files(tmp_path) is None
    there = tmp_path / "guest-1"
    there.mkdir()
    assert cached_guest_files(tmp_path) == GuestFiles(
        there / "kernel", there / "busybox", there / "modules"
    )
