"""vmtest.qemu: which QEMU is taken, and the words that it is started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmtest.errors import VmtestError
from vmtest.qemu import Machine, arguments, choose_qemu, version_of


def options(words: list[str]) -> list[tuple[str, str]]:
    """Return the options that have a value, each with it."""
    return [
        (word, value)
        for word, value in zip(words, [*words[1:], "-"], strict=True)
        if word.startswith("-") and not value.startswith("-")
    ]


def words_for(machine: Machine, folder: str = "/tmp/g") -> list[str]:
    return arguments(machine, monitor=7, folder=Path(folder))


def test_a_machine_is_emulated_and_its_memory_can_be_shared() -> None:
    given = options(words_for(Machine(memory_mib=512)))
    assert ("-accel", "tcg,thread=multi") in given
    assert ("-object", "memory-backend-memfd,id=ram,size=512M,share=on") in given
    assert ("-machine", "q35,memory-backend=ram") in given
    assert ("-m", "512M") in given


def test_monitor_console_and_shell_are_where_the_host_expects_them() -> None:
    given = options(words_for(Machine()))
    assert ("-chardev", "socket,id=monitor,fd=7") in given
    assert [value for word, value in given if word == "-serial"] == [
        "chardev:console",
        "chardev:shell",
    ]
    assert ("-chardev", "file,id=console,path=/tmp/g/console") in given
    assert ("-chardev", "file,id=shell,path=/tmp/g/shell,input-path=/tmp/g/commands") in given


def test_a_comma_in_the_folders_name_is_not_the_end_of_an_option() -> None:
    given = options(words_for(Machine(), "/tmp/a,b"))
    assert ("-chardev", "file,id=console,path=/tmp/a,,b/console") in given


def test_a_kernel_is_started_with_the_console_and_what_was_appended() -> None:
    machine = Machine(kernel=Path("k"), initrd=Path("i"), append="quirk=1")
    given = dict(options(words_for(machine)))
    assert (given["-kernel"], given["-initrd"]) == ("k", "i")
    appended = given["-append"].split()
    assert appended[-1] == "quirk=1"
    assert {"console=ttyS0", "panic=-1"} <= set(appended)


def test_without_a_kernel_there_is_none() -> None:
    assert {"-kernel", "-initrd", "-append", "-incoming"}.isdisjoint(words_for(Machine()))


def test_devices_come_last_and_as_they_are() -> None:
    machine = Machine(extra=("-device", "vfio-pci,id=v0,fd=9"), incoming=True)
    assert words_for(machine)[-4:] == ["-incoming", "defer", "-device", "vfio-pci,id=v0,fd=9"]


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
    with pytest.raises(VmtestError, match="but: hello"):
        version_of(program(tmp_path / "q", "hello"))
    with pytest.raises(VmtestError, match="cannot be started: No such file"):
        version_of(tmp_path / "absent")


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
    assert choose_qemu(None, choice.cache) == choice.there


def test_an_old_qemu_on_the_path_is_passed_over_for_the_caches(choice: Choice) -> None:
    program(choice.there, "QEMU emulator version 9.2.4")
    assert choose_qemu(None, choice.cache) == choice.cached


def test_without_a_qemu_on_the_path_it_is_the_caches(choice: Choice) -> None:
    assert choose_qemu(None, choice.cache) == choice.cached


def test_a_qemu_that_was_asked_for_is_taken_or_refused_but_not_replaced(choice: Choice) -> None:
    program(choice.there, "QEMU emulator version 10.0.0")
    new = program(choice.cache / "new", "QEMU emulator version 11.0.0")
    assert choose_qemu(new, choice.cache) == new
    old = program(choice.cache / "old", "QEMU emulator version 8.2.2")
    with pytest.raises(VmtestError, match=r"is QEMU 8\.2: 10\.0 or later is needed"):
        choose_qemu(old, choice.cache)
