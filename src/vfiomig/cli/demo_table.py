"""How ``vfiomig demo`` looks: a bar while it runs, and a table or a JSON document at the end."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from typing import Self

    from vfiomig.abi.ioctls import Dialect
    from vfiomig.cli.demo_account import Account

__all__ = ("Bar", "as_data", "show")

#: As much of the bar as there is before the client has said that it succeeded.
NEARLY = 0.99
#: What a part of the downtime is, by its name in the account.
PARTS = {
    "stop": "the source stops",
    "rest": "the last {rest} are read and written",
    "load": "the destination accepts the state",
    "start": "the destination starts",
}


class Bar:
    """A bar on stderr; nothing where that is no terminal. It never runs backwards."""

    def __init__(self, size: int = 0) -> None:
        """``size`` is what a device is taken to have left that does not tell."""
        self.fraction = 0.0
        self._size = size
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[moved]:>10}"),
            console=Console(file=sys.stderr),
            # It is drawn when there is something new, by the thread that has heard of it.
            auto_refresh=False,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("starting", total=1.0, moved="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._progress.stop()

    def advance(self, phase: str, moved: int, left: int | None) -> None:
        """Show how far it is: what a running device rewrites adds to ``left`` again."""
        if left is None:
            left = max(0, self._size - moved)
        self.reach(min(moved / max(moved + left, 1), NEARLY), phase, bytes_text(moved))

    def reach(self, fraction: float, phase: str, moved: str = "") -> None:
        """Show ``phase``, and the bar as far as it has ever been."""
        self.fraction = max(self.fraction, fraction)
        self._progress.update(
            self._task, completed=self.fraction, description=phase, moved=moved, refresh=True
        )

    def finish(self) -> None:
        self.fraction = 1.0
        self._progress.update(self._task, completed=1.0, description="done", refresh=True)


def show(account: Account, rounds: int) -> None:
    """Print the table and what follows from it."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("device")
    table.add_column("arc")
    table.add_column("time", justify="right")
    table.add_column("session so far", justify="right")
    for taken in account.arcs:
        moved = "" if taken.nbytes is None else bytes_text(taken.nbytes)
        table.add_row(taken.device, str(taken), time_text(taken.seconds), moved)
    Console(highlight=False).print(table)
    rounds_text = f"{rounds} round{'s' * (rounds > 1)} of pre-copy and the rest"
    how = rounds_text if rounds else "all of it while both were stopped"
    print()
    print(f"moved       {bytes_text(account.moved)}, {how}")
    print(f"throughput  {bytes_text(account.throughput)}/s")
    print(f"total       {time_text(account.seconds)}, without the time for the digests")
    print(f"downtime    {time_text(sum(account.downtime.values()))}:")
    rest = bytes_text(account.moved_stopped)
    for name, seconds in account.downtime.items():
        print(f"{time_text(seconds):>20}  {PARTS[name].format(rest=rest)}")


def as_data(account: Account, dialect: Dialect, rounds: int) -> dict[str, Any]:
    """Everything in the account, for machines: seconds and bytes."""
    return {
        "verdict": account.verdict,
        "identical": account.identical,
        "sha256": account.digests,
        "dialect": str(dialect),
        "device_bytes": account.nbytes,
        "precopy_rounds": rounds,
        "arcs": [
            {
                "device": taken.device,
                "from": taken.arc.origin.name,
                "to": taken.arc.target.name,
                "seconds": taken.seconds,
                "session_bytes": taken.nbytes,
                "errno": taken.failure,
            }
            for taken in account.arcs
        ],
        "moved_bytes": account.moved,
        "moved_bytes_stopped": account.moved_stopped,
        "bytes_per_second": account.throughput,
        "downtime_seconds": sum(account.downtime.values()),
        "downtime_parts": account.downtime,
        "seconds": account.seconds,
    }


def bytes_text(size: float) -> str:
    """A number of bytes in at most 10 characters."""
    if size < 1 << 10:
        return f"{size:.0f} B"
    if size < 1 << 20:
        return f"{size / (1 << 10):.1f} KiB"
    return f"{size / (1 << 20):.1f} MiB" if size < 1 << 30 else f"{size / (1 << 30):.1f} GiB"


def time_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
