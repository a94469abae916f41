"""A guest's memory arrives as it was when its processor stopped."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vfiomig.qemu.guest import Guest
from vfiomig.qemu.machine import Machine
from vfiomig.qemu.migration import configure, start_incoming, start_outgoing, wait_settled
from vfiomig.qemu.vfio import run_words, vfio_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_parts import GuestParts

HERE = Path(__file__).parent
MEMORY_MIB = 64
END = MEMORY_MIB << 20
#: Its state is more than QEMU sends in 0.3 s, so QEMU looks at the memory again and again.
DEVICE = "pattern,size=64M,caps=stop-copy"


@pytest.fixture(scope="module")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("firmware")
    parts = ("gcc", "-m32", f"-DEND={END}", "-c", "-o", folder / "busy.o", HERE / "c" / "busy.S")
    subprocess.run(parts, check=True, timeout=100)
    binary = ("objcopy", "-O", "binary", "-j", ".text", folder / "busy.o", folder / "busy")
    subprocess.run(binary, check=True, timeout=100)
    return folder / "busy"


def start(parts: GuestParts, firmware: Path, *words: str, incoming: bool = False) -> Guest:
    extra = ("-bios", str(firmware), *vfio_words(1), *words)
    machine = Machine(memory_mib=MEMORY_MIB, extra=extra, incoming=incoming)
    return Guest(parts.qemu, machine, launcher=run_words([DEVICE]))


def ask(guest: Guest, command: str) -> str:
    """Ask what QEMU tells people only."""
    said: str = guest.qmp.execute("human-monitor-command", command_line=command)
    return said


def counted(guest: Guest) -> int:
    found = re.search(r"EBX=([0-9a-f]+)", ask(guest, "info registers"))
    assert found is not None
    return int(found[1], 16)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_write_is_not_lost_however_often_qemu_looks_at_the_memory(
    parts: GuestParts, firmware: Path, tmp_path: Path
) -> None:
    with (
        start(parts, firmware) as source,
        start(parts, firmware, "-S", incoming=True) as target,
    ):
        wait_until(lambda: counted(source) > 1000)  # its memory is filled
        for guest in (source, target):
            configure(guest.qmp, {"return-path": True})
        start_incoming(target.qmp, f"unix:{tmp_path}/link")
        start_outgoing(source.qmp, f"unix:{tmp_path}/link")

        def whole_memory_was_sent() -> bool:
            ram = source.qmp.execute("query-migrate").get("ram", {})
            return bool(ram.get("transferred", 0) > END - (2 << 20) and ram["remaining"] < 1 << 16)

        wait_until(whole_memory_was_sent)
        then = counted(source)
        wait_until(lambda: counted(source) > then + 1000)
        # Now the device's state is no reason to go on any more.
        source.qmp.execute("migrate-set-parameters", avail_switchover_bandwidth=1 << 40)
        assert wait_settled(source.qmp, timeout=100) == "completed"
        assert wait_settled(target.qmp, timeout=100) == "completed"
        written = int(ask(target, f"xp /1wx {END - 4096:#x}").split()[-1], 16)
        assert counted(target) - written in {0, 1}  # between counting and writing
