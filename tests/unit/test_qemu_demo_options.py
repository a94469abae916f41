"""`vfiomig demo --qemu` before anything runs: what is missing is one line that says what to do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vfiomig.cli.app import main
from vfiomig.cli.qemu_demo import Parts, find_parts
from vfiomig.qemu.installed import GuestFiles

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A QEMU on the PATH, which says its version, and an empty cache."""
    program = tmp_path / "bin/qemu-system-x86_64"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho QEMU emulator version 10.0.2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("VFIOMIG_CACHE", str(tmp_path / "cache"))
    for name in ("kernel", "busybox"):
        (tmp_path / name).touch()
    return tmp_path


def one_line(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["demo", *options]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert output.out == ""
    return line


def test_a_guest_that_was_never_fetched_is_one_line_with_both_ways_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line(capsys, "--qemu")
    assert f"no kernel and busybox for the guest in {folder}/cache: make demo-qemu" in line
    assert "--kernel and --busybox" in line


def test_a_qemu_that_is_not_there_is_one_line_with_both_ways_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    line = one_line(capsys, "--qemu")
    assert "no qemu-system-x86_64 on the PATH, and 10.0 or later" in line
    assert "make demo-qemu" in line


def test_what_was_fetched_is_used(folder: Path) -> None:
    there = folder / "cache/guest-1"
    there.mkdir(parents=True)
    assert find_parts(None, None, None, None) == Parts(
        folder / "bin/qemu-system-x86_64",
        GuestFiles(there / "kernel", there / "busybox", there / "modules"),
    )


def test_what_is_named_is_used(folder: Path) -> None:
    kernel, busybox = folder / "kernel", folder / "busybox"
    own = folder / "bin/qemu-system-x86_64"
    assert find_parts(own, kernel, busybox, None) == Parts(own, GuestFiles(kernel, busybox, None))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kernel", "{}/kernel"], "go with --qemu"),
        (["--qemu-path", "/bin/true"], "go with --qemu"),
        (["--qemu", "--dialect", "v6"], "--dialect v6: QEMU speaks the landed dialect only"),
        (["--qemu", "--kernel", "{}/kernel"], "--kernel and --busybox go together"),
        (["--qemu", "--busybox", "{}/busybox"], "--kernel and --busybox go together"),
        (["--qemu", "--modules", "/lib"], "and --modules with them"),
        (["--qemu", "--kernel", "/absent", "--busybox", "{}/busybox"], "--kernel /absent: there"),
        (["--qemu", "--kernel", "{}/kernel", "--busybox", "/absent"], "--busybox /absent: there"),
        (["--qemu", "--qemu-path", "/bin/true"], "does not say that it is a QEMU"),
        (["--qemu", "--size", "much"], "--size: 'much' is no whole number"),
        (["--qemu", "--size", "0"], "the device has at least one byte"),
        (["--qemu", "--dirty", "-1"], "--dirty: -1 is no size"),
    ],
)
def test_what_will_not_do_is_one_line_and_exit_code_2(
    options: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in one_line(capsys, *(option.format(folder) for option in options))


def test_a_folder_too_deep_for_a_socket_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = folder / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setattr("tempfile.tempdir", None)
    kernel, busybox = (str(folder / name) for name in ("kernel", "busybox"))
    line = one_line(capsys, "--qemu", "--kernel", kernel, "--busybox", busybox)
    assert "too long for the address of a socket: name a shorter folder" in line
    assert list(deep.iterdir()) == []
