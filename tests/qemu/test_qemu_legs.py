"""A guest that was booted once migrates back and forth while it talks and writes.

Theory of operation
-------------------
In the guest runs c/workload.c, which checks the disk, its own memory and a looped port by itself;
at the other port's socket is a ``SerialStream``. Each leg has a fresh QEMU for its target, whose
devices have another capability set, or another way to tell of their DMA. The next leg begins
when all the work has gone on in the new machine.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from serial_stream import SerialStream
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.initrd import build_initrd
from vfiomig.qemu.machine import Machine
from vfiomig.qemu.migration import migrate
from vfiomig.qemu.vfio import run_words, vfio_words

if TYPE_CHECKING:
    from guest_parts import GuestParts

HERE = Path(__file__).parent
LEGS = 20
TIMEOUT_S = 800
PATIENCE_S = 60
#: The work in the guest; two share the disk, so that more than one request can be under way.
WORK = {
    "low": "disk /dev/vda 0 192",
    "high": "disk /dev/vda 192 192",
    "loop": "loop /dev/ttyS5",
    "echo": "echo /dev/ttyS4",
}
LAST_LINES = "; ".join(f"tail -n 1 {name}" for name in WORK)
#: Bytes that have to come back from a new machine before the next leg.
STREAMED = 200
#: Slow enough that QEMU looks several times which memory has changed, as on a loaded machine.
SLOW = {"max-bandwidth": 24 << 20}
CAPS = ("all", "stop-copy+p2p")
#: Who tells which memory the devices have written: they themselves, or the IOMMU.
TRACKERS = ("", ",x-device-dirty-page-tracking=off")


class Machines:
    """One QEMU after the other."""

    def __init__(self, parts: GuestParts, initrd: Path, folder: Path) -> None:
        self._parts = parts
        self._initrd = initrd
        self._folder = folder

    def port(self, leg: int) -> Path:
        """Where the card of a machine listens."""
        return self._folder / f"port{leg}"

    def start(self, leg: int) -> Guest:
        """Start the machine that is the target of a leg; 0 is the first source."""
        caps = CAPS[leg % 2]
        specs = (
            f"virtio_blk,size=6M,caps={caps}",
            f"mtty,port0=socket:{self.port(leg)},caps={caps}",
        )
        machine = Machine(
            kernel=self._parts.kernel,
            initrd=self._initrd,
            memory_mib=96,
            extra=tuple(vfio_words(len(specs), TRACKERS[leg // 2 % 2])),
            incoming=leg > 0,
        )
        return Guest(self._parts.qemu, machine, launcher=run_words(specs))


@pytest.fixture
def machines(parts: GuestParts, tmp_path: Path) -> Machines:
    workload = tmp_path / "workload"
    subprocess.run(
        [
            *("gcc", "-std=gnu11", "-O2", "-static", "-Wall", "-Wextra", "-Werror"),
            *("-o", workload, HERE / "c" / "workload.c"),
        ],
        check=True,
        timeout=60,
    )
    initrd = tmp_path / "initrd"
    initrd.write_bytes(build_initrd(parts.files, extra={"bin/workload": workload.read_bytes()}))
    return Machines(parts, initrd, tmp_path)


@pytest.mark.timeout(TIMEOUT_S)
def test_twenty_migrations_lose_no_byte_and_no_block(machines: Machines, tmp_path: Path) -> None:
    with ExitStack() as stack:
        guest = stack.enter_context(machines.start(0))
        guest.wait_ready()
        begin_work(guest)
        stream = stack.enter_context(SerialStream())
        stream.connect(machines.port(0))
        stream.wait(STREAMED)
        before = progress(guest, dict.fromkeys(WORK, 0))
        for leg in range(1, LEGS + 1):
            target = stack.enter_context(machines.start(leg))
            migrate(
                guest.qmp,
                target.qmp,
                f"unix:{tmp_path}/link",
                capabilities={"return-path": True},
                parameters=SLOW,
            )
            guest.kill()
            guest.close()
            guest = target
            stream.connect(machines.port(leg))
            stream.wait(STREAMED)
            here = progress(guest, before)
            before = progress(guest, here)
        stream.finish()
        ends = end_work(guest)
        assert all(ends[name] >= before[name] for name in WORK)
        assert ends["echo"] == stream.returned
        assert guest.power_off(3) == 3
        assert "vfiomig" not in guest.said


def begin_work(guest: Guest) -> None:
    for name, words in WORK.items():
        guest.check(f"workload {words} >{name} 2>&1 &")
    # Until the port is open it does not hear anything.
    guest.check("until [ -s echo ]; do sleep 0.1; done")


def progress(guest: Guest, before: dict[str, int]) -> dict[str, int]:
    """Wait until each part of the work has gone on, and return how far; none has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        told = guest.check(LAST_LINES).splitlines()
        assert all(line.isdecimal() for line in told), told
        if len(told) == len(WORK):  # one that has told nothing yet has no last line
            now = dict(zip(WORK, map(int, told), strict=True))
            if all(now[name] > before[name] for name in WORK):
                return now
        assert time.monotonic() < deadline, (before, told)


def end_work(guest: Guest) -> dict[str, int]:
    """End the work, and return how far each part of it has come; all must have gone well."""
    guest.check("killall -TERM workload")
    ended = "; ".join(
        f"until tail -n 1 {name} | grep -q '[a-z]'; do sleep 0.1; done" for name in WORK
    )
    told = guest.check(f"{ended}; {LAST_LINES}", timeout=60).splitlines()
    assert all(line.startswith("done ") for line in told), told
    return {name: int(line.split()[1]) for name, line in zip(WORK, told, strict=True)}
