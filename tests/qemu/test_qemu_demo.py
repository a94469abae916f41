"""`vfiomig demo --qemu` as a user meets it: the verdict, what it rests on, and every other end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from on_a_terminal import Terminal, nobody_is_left_in
from readme_blocks import blocks, same_for_everybody
from vfiomig.cli import qemu_demo
from vfiomig.cli.app import main
from vfiomig.cli.qemu_demo_account import DESTINATION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guest_parts import GuestParts

LOSING = Path(__file__).parents[1] / "devices/losing.py"
PATIENCE_S = 120
STATES = {
    "source": ["PRE_COPY", "PRE_COPY_P2P", "STOP_COPY", "STOP"],
    "destination": ["RESUMING", "RUNNING_P2P", "RUNNING"],
}
STAGES = [
    "two QEMUs start",
    "the guest boots",
    "the guest works",
    "pre-copy",
    "the guest works on",
    "everything is checked",
]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demo puts its temporary files, of which none may be left; a short path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        there = Path(made)
        monkeypatch.setenv("TMPDIR", str(there))
        monkeypatch.setattr("tempfile.tempdir", None)
        yield there
        assert list(there.iterdir()) == []


def command(parts: GuestParts, *options: str) -> list[str]:
    qemu = ("--qemu", "--qemu-path", str(parts.qemu))
    return [sys.executable, "-m", "vfiomig", "demo", *qemu, *options]


def test_a_guest_is_migrated_and_everything_is_verified(parts: GuestParts) -> None:
    process = subprocess.Popen(
        command(parts, "--json"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert nobody_is_left_in(process.pid)
    assert err.splitlines() == [f"vfiomig: {stage}" for stage in STAGES]
    told = json.loads(out)
    found = re.fullmatch(
        r"verified: state identical, (\d+) serial bytes, (\d+) blocks", told["verdict"]
    )
    assert found is not None
    assert [int(number) for number in found.groups()] == [told["serial_bytes"], told["blocks"]]
    assert (told["verified"], told["lost"], told["wrong_blocks"]) == (True, [], [])
    assert told["serial_bytes"] >= 2 * qemu_demo.WORK_BYTES
    assert told["blocks"] >= told["blocks_before"] + qemu_demo.WORK_BLOCKS
    for name, device in told["devices"].items():
        for side, states in STATES.items():
            assert device[side]["states"] == states, name
        assert device["source"]["sha256"] == device["destination"]["sha256"]
    assert {arc["errno"] for arc in told["arcs"]} == {0}
    pattern = told["devices"]["pattern"]
    assert pattern["moved_bytes"] > 16 << 20
    assert 0 < pattern["moved_bytes_running"] <= pattern["moved_bytes"]
    assert 0 < told["downtime_seconds"] < told["seconds"]
    assert 0 < told["downtime_seconds_of_qemu"] < told["seconds"]
    assert all(seconds > 0 for seconds in told["downtime_parts"].values())


def test_whatever_is_lost_on_the_way_is_the_verdict(
    parts: GuestParts, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    honest = qemu_demo.specs_of
    losing = {"mtty": "LeakyCard", "virtio_blk": "ForgetfulDisk", "pattern": "Scratched"}

    def specs(side: str, port: Path, size: int, dirty: int) -> list[str]:
        made = honest(side, port, size, dirty)
        if side != DESTINATION:
            return made
        parted = (spec.partition(",") for spec in made)
        return [f"{LOSING}:{losing[name]},{keys}" for name, _, keys in parted]

    monkeypatch.setattr(qemu_demo, "specs_of", specs)
    assert main(["demo", "--qemu", "--qemu-path", str(parts.qemu), "--size", "4M"]) == 1
    out = capfd.readouterr().out
    last = out.splitlines()[-1]
    assert last.startswith("LOST: the state of mtty, sha256 ")
    for loss in (
        "; the state of virtio_blk, sha256 ",
        "; the state of pattern, sha256 ",
        "; the serial stream, after byte ",
        " acknowledged blocks, block 2 for one",
    ):
        assert loss in last
    assert re.search(r"^destination +RUNNING_P2P( +\d+\.\d\d ms){3}$", out, re.MULTILINE)
    assert "\x1b" not in out
    # Whose numbers and the order of whose rows differ from run to run.
    (shown,) = (b.content for b in blocks() if "QEMU asked for" in b.content)
    shape = [sorted(same_for_everybody(text).splitlines()[:-1]) for text in (out, shown)]
    assert shape[0] == shape[1], "as the README shows it, but for the last line"


@pytest.fixture
def terminal(parts: GuestParts) -> Iterator[Terminal]:
    opened = Terminal(command(parts))
    yield opened
    opened.close()


def processes_of(folder: Path) -> dict[int, list[bytes]]:
    """The processes that are about files in a folder, with their words."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if any(bytes(folder) in word for word in words):
                    found[int(entry.name)] = words
    return found


def assert_gone(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes_of(folder) == {}


def test_ctrl_c_ends_it_with_130_and_leaves_nothing_behind(
    terminal: Terminal, folder: Path
) -> None:
    terminal.read_until("the guest boots")
    assert len(processes_of(folder)) == 4
    terminal.type(b"\x03")
    assert terminal.end() == 128 + signal.SIGINT, terminal.text
    assert "Traceback" not in terminal.text
    assert "verified" not in terminal.text
    assert_gone(folder)


def test_a_signal_ends_it_and_its_guests(terminal: Terminal, folder: Path) -> None:
    terminal.read_until("the guest boots")
    os.kill(terminal.process.pid, signal.SIGTERM)
    assert terminal.end() == -signal.SIGTERM, terminal.text
    assert "Traceback" not in terminal.text
    assert_gone(folder)


def test_what_a_killed_demo_leaves_is_gone_with_the_next_start_of_anything(
    terminal: Terminal, folder: Path
) -> None:
    terminal.read_until("the guest boots")
    os.kill(terminal.process.pid, signal.SIGKILL)
    assert terminal.end() == -signal.SIGKILL
    assert_gone(folder)
    assert len(list(folder.glob("vfiomig-*"))) > 1, "its own, and one for each machine"
    command = [sys.executable, "-m", "vfiomig", "run", "--device", "counter", "--"]
    subprocess.run([*command, "ls", "/dev/vfio"], check=True, timeout=100)
    assert list(folder.glob("vfiomig-*")) == []


def test_a_qemu_that_is_killed_is_named(terminal: Terminal, folder: Path) -> None:
    terminal.read_until("the guest boots")
    qemus = {
        b"defer" in words: pid
        for pid, words in processes_of(folder).items()
        if sys.executable.encode() not in words
    }
    os.kill(qemus[False], signal.SIGKILL)
    assert terminal.end() == 1, terminal.text
    assert (
        "vfiomig: the guest boots: the source's QEMU ended (SIGKILL), nothing was verified"
        in terminal.text
    )
    assert "Traceback" not in terminal.text
    assert_gone(folder)
