"""What every measurement here shares: C programs, doors, and a ratio with its bar.

Machines are noisy, so nothing is told but ratios between two things that were measured in turn,
in the same run; of several rounds the median counts.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from vfiomig.core.vfio_device import VfioDevice
from vfiomig.doors.syscall.run import run
from vfiomig.models import make

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ("Measurement", "compiled", "peak", "reset_peak", "result_of", "serve")

SOURCES = Path(__file__).parent / "c"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One ratio. ``at_least`` or ``at_most`` is its bar."""

    name: str
    ratio: float
    at_least: float | None = None
    at_most: float | None = None
    details: dict[str, object] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        return (self.at_least is None or self.ratio >= self.at_least) and (
            self.at_most is None or self.ratio <= self.at_most
        )


@contextmanager
def compiled(name: str) -> Iterator[Path]:
    """Compile ``c/NAME.c``; the binary lives in a folder of its own, with room for results."""
    with tempfile.TemporaryDirectory(prefix="vfiomig-bench-") as folder:
        binary = Path(folder) / name
        flags = ["-O2", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["gcc", *flags, "-o", binary, SOURCES / f"{name}.c"], check=True)
        yield binary


def serve(specs: Sequence[str], argv: Sequence[str | Path]) -> None:
    """Run a program with devices, behind a door of this process."""
    devices = [VfioDevice(make(spec), f"vfio{at}") for at, spec in enumerate(specs)]
    code = run(devices, [str(word) for word in argv])
    if code:
        raise SystemExit(f"{argv[0]} failed with {code}")


def result_of(
    binary: Path, start: Callable[[list[str | Path]], None], *words: object
) -> list[float]:
    """Start ``binary`` with a result file as its first argument; return the numbers in it."""
    out = binary.parent / "result"
    start([binary, out, *map(str, words)])
    return [float(number) for number in out.read_text().split()]


def _status(field: str) -> int:
    """A size of this process in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


def reset_peak() -> int:
    """Begin to look for the largest size; return the present one, in KiB."""
    gc.collect()  # devices of earlier rounds
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Return the largest size of this process since then, in KiB."""
    return _status("VmHWM")
