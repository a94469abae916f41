"""vfiomig.qemu.machine: the words that a QEMU is started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfiomig.qemu.machine import Machine, arguments, for_people

#: 512 MiB and no multiple of 64 pages; see machine.py.
ODD = f"{512 * 1024 + 8}K"


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
    assert ("-object", f"memory-backend-memfd,id=ram,size={ODD},share=on") in given
    assert ("-machine", "q35,memory-backend=ram") in given
    assert ("-m", ODD) in given


def test_real_processors_get_exactly_the_memory_that_was_asked_for() -> None:
    given = options(words_for(Machine(memory_mib=512, accel="kvm")))
    assert ("-object", "memory-backend-memfd,id=ram,size=512M,share=on") in given
    assert ("-m", "512M") in given


def test_memory_may_be_out_of_reach_for_another_process() -> None:
    given = options(words_for(Machine(memory_mib=512, shared_memory=False)))
    assert [value for word, value in given if word == "-object"] == [
        f"memory-backend-ram,id=ram,size={ODD}"
    ]
    assert ("-machine", "q35,memory-backend=ram") in given


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
    words = words_for(Machine(extra=("-device", "vfio-pci,id=v0,fd=9"), incoming=True))
    assert ("-incoming", "defer") in options(words)
    assert words[-2:] == ["-device", "vfio-pci,id=v0,fd=9"]


@pytest.mark.parametrize(
    ("accel", "cpu"), [("tcg,thread=multi", "max"), ("kvm", "max,-arch-capabilities")]
)
def test_the_processor_has_what_its_accelerator_does_not_fail_at(accel: str, cpu: str) -> None:
    assert ("-cpu", cpu) in options(words_for(Machine(accel=accel)))
    assert ("-cpu", "qemu64") in options(words_for(Machine(accel=accel, cpu="qemu64")))


def test_a_machine_for_people_has_its_console_and_monitor_on_the_terminal() -> None:
    words = for_people(Machine(kernel=Path("k"), append="quiet", extra=("-name", "x")))
    given = options(words)
    assert ("-serial", "mon:stdio") in given
    assert ("-machine", "graphics=off") in given
    assert ("-append", "console=ttyS0 quiet") in given
    assert words[-2:] == ["-name", "x"]
