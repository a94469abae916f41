"""`vfiomig qemu` decides: the command for each machine, and one line for whatever is missing."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest

from vfiomig.cli import qemu as verb
from vfiomig.cli.app import main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A QEMU on the PATH, which only has to say its version here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.setenv("VFIOMIG_CACHE", str(tmp_path / "cache"))
    return install(folder / "qemu-system-x86_64", "10.0.2")


def install(path: Path, version: str) -> Path:
    path.write_text(f"#!/bin/sh\necho 'QEMU emulator version {version}'\n")
    path.chmod(0o755)
    return path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The words of the command that is printed for ``arguments``."""
    assert main(["qemu", "--print", *arguments]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    (line,) = output.out.splitlines()
    return shlex.split(line)


def values_of(words: list[str], option: str) -> list[str]:
    return [words[at + 1] for at, word in enumerate(words) if word == option]


def test_the_command_serves_the_devices_and_names_their_descriptors(
    qemu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = printed(capsys, "--device", "virtio_blk,size=1M", "--device", "mtty")
    end = words.index("--")
    assert words[:end] == [
        *("vfiomig", "run", "--filter", "fast"),
        *("--device", "virtio_blk,size=1M", "--device", "mtty"),
    ]
    assert words[end + 1] == str(qemu)
    assert "iommufd,id=iommufd0,fd={iommu}" in values_of(words, "-object")
    assert values_of(words, "-device") == [
        "vfio-pci,id=v0,fd={dev0},iommufd=iommufd0",
        "vfio-pci,id=v1,fd={dev1},iommufd=iommufd0",
    ]


@pytest.mark.parametrize("machine", ["q35", "pc"])
@pytest.mark.parametrize(
    ("accel", "words", "cpu", "size"),
    [
        ("tcg", "tcg,thread=multi", "max", "1048584K"),
        ("kvm", "kvm", "max,-arch-capabilities", "1024M"),
    ],
)
def test_machine_and_accelerator_are_as_asked_and_memory_can_be_mapped(
    machine: str, accel: str, words: str, cpu: str, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = printed(
        capsys, *("--device", "counter", "--machine", machine, "--accel", accel, "--memory", "1G")
    )
    assert values_of(command, "-machine") == [f"{machine},memory-backend=ram", "graphics=off"]
    assert (values_of(command, "-accel"), values_of(command, "-cpu")) == ([words], [cpu])
    assert values_of(command, "-m") == [size]
    assert f"memory-backend-memfd,id=ram,size={size},share=on" in values_of(command, "-object")
    assert values_of(command, "-serial") == ["mon:stdio"]
    assert {"-kernel", "-append", "-initrd", "-incoming"}.isdisjoint(command)


def test_what_is_said_of_the_machine_is_in_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel, initrd = tmp_path / "a kernel", tmp_path / "initrd"
    kernel.touch()
    initrd.touch()
    command = printed(
        capsys,
        *("--device", "counter", "--cpu", "qemu64", "--cpus", "2", "--filter", "exact"),
        *("--kernel", str(kernel), "--initrd", str(initrd), "--append", "quiet panic=1"),
        *("--incoming", "unix:/tmp/link", "--", "-name", "one two"),
    )
    assert (values_of(command, "-cpu"), values_of(command, "-smp")) == (["qemu64"], ["2"])
    assert values_of(command, "--filter") == ["exact"]
    assert values_of(command, "-kernel") == [str(kernel)]
    assert values_of(command, "-initrd") == [str(initrd)]
    assert values_of(command, "-append") == ["console=ttyS0 quiet panic=1"]
    assert values_of(command, "-incoming") == ["unix:/tmp/link"]
    assert command[-2:] == ["-name", "one two"]


def test_the_qemu_that_is_named_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = install(tmp_path / "own", "11.0.0")
    assert str(own) in printed(capsys, "--device", "counter", "--qemu", str(own))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "nonsense"], "no device is called 'nonsense'; known are"),
        (["--device", "pattern,sise=1"], "unknown key 'sise'"),
        ([], "--device"),
        (["--device", "counter", "--memory", "much"], "--memory: 'much' is no whole number"),
        (["--device", "counter", "--memory", "1K"], "--memory 1K: give a whole number of MiB"),
        (["--device", "counter", "--memory", "0"], "--memory 0: give a whole number of MiB"),
        (["--device", "counter", "--machine", "microvm"], "microvm"),
        (["--device", "counter", "--kernel", "/absent"], "--kernel /absent: there is no such file"),
        (["--device", "counter", "--initrd", __file__], "--initrd is for a kernel"),
        (["--device", "counter", "--append", "quiet"], "--append is for a kernel"),
        (["--device", "counter", "--qemu", "/absent"], "/absent cannot be started: No such file"),
        (["--device", "counter", "--qemu", "/bin/true"], "does not say that it is a QEMU"),
        (["--device", "counter", "--memroy", "1G"], "--memroy"),
    ],
)
@pytest.mark.parametrize("only_print", [True, False])
def test_what_will_not_do_is_one_line_and_exit_code_2(
    options: list[str], says: str, only_print: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["qemu", *options, *["--print"] * only_print]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("vfiomig: ")
    assert says in line
    assert output.out == ""


def test_a_qemu_that_is_too_old_is_one_line_with_the_next_step(
    qemu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(qemu, "7.2.22")
    assert main(["qemu", "--device", "counter"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{qemu} is QEMU 7.2, and 10.0 or later is needed: put one on the PATH" in line
    qemu.unlink()
    assert main(["qemu", "--device", "counter"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no qemu-system-x86_64 on the PATH, and 10.0 or later" in line
    assert "python -m vmtest fetch" in line


def test_a_machine_without_kvm_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verb, "KVM", "/dev/absent")
    assert main(["qemu", "--device", "counter", "--accel", "kvm"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vfiomig: /dev/absent cannot be opened (ENOENT): use --accel tcg")
