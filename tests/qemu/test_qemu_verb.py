"""`vfiomig qemu` as a user meets it: a machine that boots from its device, on the terminal."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from boot_sector import boot_sector
from on_a_terminal import Terminal
from readme_blocks import blocks
from vfiomig.qemu.migration import configure, start_outgoing, wait_settled
from vfiomig.qemu.qmp import Qmp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guest_parts import GuestParts

PATIENCE_S = 60
SAYS = b"read by DMA from a disk in Python\r\n"
#: isa-debug-exit makes of 21 that it was written twice and one more.
STATUS, CODE = 21, 43
EXIT_DEVICE = ("-device", "isa-debug-exit,iobase=0xf4,iosize=4")


@pytest.fixture
def disk(tmp_path: Path) -> str:
    """A SPEC of a disk that says something when a machine boots from it."""
    path = tmp_path / "disk"
    path.write_bytes(boot_sector(SAYS, STATUS).ljust(1 << 20, b"\0"))
    return f"virtio_blk,path={path}"


def vfiomig_qemu(parts: GuestParts, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "vfiomig", "qemu", "--qemu", str(parts.qemu), *arguments]


def run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )


#: QEMU's refusal of a KVM that is not there is the business of test_qemu_kvm.
HAS_KVM = os.access("/dev/kvm", os.R_OK | os.W_OK)


@pytest.mark.parametrize(
    ("accel", "machine"), [("tcg", "q35"), ("tcg", "pc"), *[("kvm", "q35")] * HAS_KVM]
)
def test_a_machine_boots_from_its_device_and_its_end_is_the_exit_code(
    parts: GuestParts, disk: str, accel: str, machine: str
) -> None:
    devices = ("--device", disk, "--device", "mtty")
    command = vfiomig_qemu(parts, "--machine", machine, "--accel", accel, *devices)
    done = run([*command, "--", *EXIT_DEVICE])
    assert done.returncode == CODE, done.stderr
    assert SAYS in done.stdout
    assert done.stderr == b""


def test_what_is_printed_does_the_same(parts: GuestParts, disk: str) -> None:
    printed = run(vfiomig_qemu(parts, "--device", disk, "--print", "--", *EXIT_DEVICE))
    assert (printed.returncode, printed.stderr) == (0, b"")
    first, *rest = shlex.split(printed.stdout.decode())
    assert first == "vfiomig"
    done = run([sys.executable, "-m", "vfiomig", *rest])
    assert (done.returncode, done.stderr) == (CODE, b"")
    assert SAYS in done.stdout


SHOWN = [
    line for block in blocks() for line in block.content.splitlines() if "vfiomig qemu -" in line
]


@pytest.mark.parametrize("shown", SHOWN)
def test_the_commands_of_the_readme_are_commands(
    parts: GuestParts, tmp_path: Path, shown: str
) -> None:
    for name in ("disk.img", "vmlinuz", "initrd"):
        (tmp_path / name).write_bytes(bytes(512))
    program, verb, *options = shown.split()
    assert (program, verb) == ("vfiomig", "qemu")
    printed = run([*vfiomig_qemu(parts, "--print"), *options], cwd=tmp_path)
    assert (printed.returncode, printed.stderr) == (0, b"")


def test_the_readme_shows_commands() -> None:
    assert len(SHOWN) == 2


def test_the_requests_of_qemu_can_be_traced(parts: GuestParts, disk: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    command = vfiomig_qemu(parts, "--device", disk, "--trace", str(trace), "--", *EXIT_DEVICE)
    assert run(command).returncode == CODE
    assert "vfio0 fd" in trace.read_text()
    assert "IOMMU_IOAS_MAP() = 0" in trace.read_text()


@contextmanager
def machine_with_monitor(
    parts: GuestParts, folder: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[bytes], Qmp]]:
    """A `vfiomig qemu` whose monitor is a socket, by arguments of the user's own."""
    path = folder / f"qmp{len(list(folder.iterdir()))}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE_S)
        words = vfiomig_qemu(parts, "--device", "pattern,size=1M", "--memory", "64M", *options)
        with (
            subprocess.Popen(
                [*words, "--", "-qmp", f"unix:{path}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            ) as process,
            closing(Qmp(listener.accept()[0])) as qmp,
        ):
            try:
                qmp.greet()
                yield process, qmp
            finally:
                process.terminate()


def test_a_second_one_takes_the_machine_of_the_first(parts: GuestParts, tmp_path: Path) -> None:
    link = f"unix:{tmp_path}/link"
    with (
        machine_with_monitor(parts, tmp_path) as (source, leaving),
        machine_with_monitor(parts, tmp_path, "--incoming", link) as (target, arriving),
    ):
        configure(leaving, parameters={"avail-switchover-bandwidth": 1 << 30})
        start_outgoing(leaving, link)
        assert wait_settled(leaving, timeout=PATIENCE_S) == "completed"
        arriving.wait_event("RESUME")
        assert arriving.execute("query-status")["status"] == "running"
        for process, qmp in ((source, leaving), (target, arriving)):
            qmp.execute("quit")
            assert process.wait(PATIENCE_S) == 0


def test_arguments_that_qemu_refuses_are_its_own_words_and_code(
    parts: GuestParts, disk: str
) -> None:
    done = run(vfiomig_qemu(parts, "--device", disk, "--", "-device", "nonsense"))
    assert done.returncode == 1
    assert b"'nonsense' is not a valid device model name" in done.stderr
    assert b"vfiomig" not in done.stderr


@pytest.fixture
def terminal(parts: GuestParts) -> Iterator[Terminal]:
    opened = Terminal(vfiomig_qemu(parts, "--device", "mtty"))
    yield opened
    opened.close()


def test_the_terminal_is_the_console_and_has_the_monitor_behind_it(terminal: Terminal) -> None:
    terminal.read_until("SeaBIOS")
    terminal.type(b"\x01c")
    terminal.read_until(r"\(qemu\)")
    terminal.type(b"info pci\r")
    terminal.read_until("4348:3253")
    terminal.type(b"quit\r")
    assert terminal.end() == 0


def test_ctrl_a_x_ends_it_and_ctrl_c_does_not(terminal: Terminal) -> None:
    terminal.read_until("No bootable device")
    terminal.type(b"\x03")
    terminal.type(b"\x01c")
    terminal.read_until(r"\(qemu\)")
    assert terminal.process.poll() is None
    terminal.type(b"\x01x")
    assert terminal.end() == 0


def test_a_kernel_has_its_console_on_the_terminal(parts: GuestParts) -> None:
    kernel = ("--kernel", str(parts.kernel), "--append", "printk.time=0")
    terminal = Terminal(vfiomig_qemu(parts, "--device", "mtty", *kernel))
    try:
        terminal.read_until(r"Command line: console=ttyS0 printk.time=0")
        terminal.type(b"\x01x")
        assert terminal.end() == 0
    finally:
        terminal.close()
