"""``vfiomig run``: a program and the devices that it finds."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path  # noqa: TC003 - cyclopts reads the annotation at run time
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from vfiomig.abi.ioctls import Dialect
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.doors.syscall.launch import LaunchError
from vfiomig.doors.syscall.run import run as run_program
from vfiomig.doors.syscall.trace import Trace
from vfiomig.doors.tracing import open_trace
from vfiomig.errors import DoorError, PrerequisiteError, SpecError
from vfiomig.models import make

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.doors.syscall.run import FilterName

__all__ = ("run", "serve")


def run(
    *program: Annotated[str, Parameter(allow_leading_hyphen=True)],
    device: Annotated[list[str], Parameter(negative=())],
    dialect: Dialect = Dialect.LANDED,
    filter: Literal["exact", "fast"] = "exact",  # noqa: A002 - the option's name
    trace: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,
    trace_format: Literal["text", "json"] = "text",
) -> int:
    """Run a program that uses VFIO devices written in Python.

    The program finds /dev/vfio/devices/vfio0, vfio1, ... and /dev/iommu, the groups /dev/vfio/0,
    1, ... and the container /dev/vfio/vfio, and in /sys/bus/pci/devices the functions
    0000:01:00.0, 0000:02:00.0, ... It gets descriptors where its arguments contain {dev0},
    {dev1}, ... or {iommu}. Its output is left alone.

    Parameters
    ----------
    program:
        The program and its arguments, after ``--``.
    device:
        A device: NAME[,key=value...] or path.py:Class[,key=value...]; give it once for each.
        ``vfiomig devices`` lists names and keys.
    dialect:
        Which form of the migration protocol the devices speak.
    filter:
        exact: every descriptor is followed wherever it goes. fast: reads and writes of other
        files are not slowed down; data descriptors have high numbers, and a dup of one at a low
        number is not seen.
    trace:
        Write a line for every request to this file; - is stderr.
    trace_format:
        Lines for people, or JSON lines.
    """
    if not program:
        raise SpecError("name a program after the options: vfiomig run --device pattern -- ls")
    return serve(device, program, dialect, filter, trace, as_json=trace_format == "json")


def serve(
    specs: Sequence[str],
    program: Sequence[str],
    dialect: Dialect,
    filter_name: FilterName,
    trace: Path | None,
    *,
    as_json: bool,
) -> int:
    """Run ``program`` with a device for each of ``specs`` and return the exit code."""
    devices = [
        VfioDevice(make(spec), f"vfio{number}", dialect) for number, spec in enumerate(specs)
    ]
    with ExitStack() as stack:
        tracer = None
        if trace is not None:
            to_stderr = str(trace) == "-"
            out = sys.stderr if to_stderr else stack.enter_context(open_trace(trace))
            tracer = Trace(out, devices, as_json=as_json)
        try:
            return run_program(devices, program, filter_name=filter_name, trace=tracer)
        except (DoorError, PrerequisiteError, OSError) as problem:
            # OSError: no descriptor is left here, or a device refuses to start.
            print(f"vfiomig: {problem}", file=sys.stderr)
            return problem.exit_code if isinstance(problem, LaunchError) else 125
