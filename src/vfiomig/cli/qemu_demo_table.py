"""How ``vfiomig demo --qemu`` looks: where it is while it runs, and its account at the end."""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from vfiomig.cli.demo_table import Bar, bytes_text, time_text
from vfiomig.cli.qemu_demo_account import DESTINATION, SOURCE, Account, Taken

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("Stages", "as_data", "show")

#: What happens, one after the other, and how far the bar is when it begins.
_STAGES: Final = {
    "two QEMUs start": 0.0,
    "the guest boots": 0.05,
    "the guest works": 0.35,
    "pre-copy": 0.45,
    "the guest works on": 0.7,
    "everything is checked": 0.8,
}
_PRE_COPY_PART: Final = 0.25
_PARTS: Final = {
    "stop": "the source's devices stop",
    "rest": "QEMU moves the rest of state and memory",
    "start": "the destination's devices accept their state and start",
}


class Stages:
    """Tells on stderr where it is: by a bar on a terminal, else by a line for each stage."""

    def __init__(self, bar: Bar) -> None:
        self.now = ""
        self._bar = bar

    def begin(self, stage: str) -> None:
        """Enter a stage of the table above."""
        self.now = stage
        self._bar.reach(_STAGES[stage], stage)
        if not sys.stderr.isatty():
            print(f"vfiomig: {stage}", file=sys.stderr, flush=True)

    def watch(self, migration: dict[str, Any]) -> None:
        """Show QEMU's account of a migration that is under way."""
        ram, state = migration.get("ram", {}), migration.get("vfio", {})
        moved = ram.get("transferred", 0) + state.get("transferred", 0)
        left = ram.get("remaining", 0)
        part = moved / max(moved + left, 1)
        self._bar.reach(_STAGES[self.now] + _PRE_COPY_PART * part, self.now, bytes_text(moved))

    def finish(self) -> None:
        self._bar.finish()


def show(account: Account) -> None:
    """Print the table, what follows from it, and the verdict."""
    console = Console(highlight=False)
    console.print(_table(account))
    print()
    state = sum(map(account.moved, account.names))
    running = sum(map(account.moved_running, account.names))
    ram = account.qemu["ram"]["transferred"]
    print(f"moved       {bytes_text(state)} of device state, {bytes_text(running)} while it ran")
    print(f"            {bytes_text(ram)} of memory")
    print(f"total       {time_text(account.qemu['total-time'] / 1e3)}")
    print(f"downtime    {time_text(account.qemu['downtime'] / 1e3)} as QEMU reports it")
    if parts := account.downtime:
        print(f"            {time_text(sum(parts.values()))} as the devices saw it:")
        for name, seconds in parts.items():
            print(f"{time_text(seconds):>20}  {_PARTS[name]}")
    work = account.work
    print(
        f"serial      {work.serial_bytes} bytes came back as they were sent, "
        f"{work.serial_on_their_way} were on their way"
    )
    print(f"blocks      {work.blocks} acknowledged, {work.blocks_before} before the switch")
    print(account.verdict)


def _table(account: Account) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("side")
    table.add_column("QEMU asked for")
    for name in account.names:
        table.add_column(name, justify="right")
    for side, state, devices in account.requests():
        cells = [_cell(devices.get(name, [])) for name in account.names]
        table.add_row(side, state.name, *cells)
    table.add_row("", "bytes moved", *(bytes_text(account.moved(name)) for name in account.names))
    return table


def _cell(arcs: Sequence[Taken]) -> str:
    """How long the arcs of one request took, or how they failed."""
    for one in arcs:
        if one.failure:
            return errno.errorcode.get(one.failure, str(one.failure))
    return time_text(sum(one.seconds for one in arcs)) if arcs else ""


def as_data(account: Account, qemu: str) -> dict[str, Any]:
    """Everything in the account, for machines: seconds, bytes, moments of CLOCK_MONOTONIC."""
    work = account.work
    return {
        "verdict": account.verdict,
        "verified": not account.lost,
        "lost": account.lost,
        "qemu": qemu,
        "devices": {name: _device_as_data(account, name) for name in account.names},
        "arcs": [
            {
                "side": one.side,
                "device": one.device,
                "requested": one.requested.name,
                "from": one.arc.origin.name,
                "to": one.arc.target.name,
                "ended": one.ended,
                "seconds": one.seconds,
                "session_bytes": one.nbytes,
                "errno": one.failure,
            }
            for one in account.taken
        ],
        "memory_bytes": account.qemu["ram"]["transferred"],
        "seconds": account.qemu["total-time"] / 1e3,
        "downtime_seconds_of_qemu": account.qemu["downtime"] / 1e3,
        "downtime_seconds": sum(account.downtime.values()),
        "downtime_parts": account.downtime,
        "serial_bytes": work.serial_bytes,
        "serial_bytes_on_their_way": work.serial_on_their_way,
        "blocks": work.blocks,
        "blocks_before": work.blocks_before,
        "wrong_blocks": work.wrong_blocks,
    }


def _device_as_data(account: Account, name: str) -> dict[str, Any]:
    return {
        "moved_bytes": account.moved(name),
        "moved_bytes_running": account.moved_running(name),
        **{
            side: {
                "states": [state.name for state in account.states(side, name)],
                "sha256": account.digest(side, name),
            }
            for side in (SOURCE, DESTINATION)
        },
    }
