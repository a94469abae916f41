"""Run a program with devices: filter, door and program put together."""

from __future__ import annotations

import os
import re
import resource
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

from vfiomig.core.info import OFFSET_TAG
from vfiomig.doors.syscall.door import Door
from vfiomig.doors.syscall.filter import exact_filter, fast_filter
from vfiomig.doors.syscall.launch import check_prerequisites, launch
from vfiomig.doors.syscall.program import relaying_signals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vfiomig.core.vfio_device import VfioDevice
    from vfiomig.descriptors import Fd
    from vfiomig.doors.syscall.trace import Trace

__all__ = ("FilterName", "run")

FilterName = Literal["exact", "fast"]

#: With the fast filter data_fds have the numbers from this many below the limit on.
DATA_FDS = 256
_HANDED_OVER = re.compile(r"\{(?:dev(?P<device>0|[1-9][0-9]*)|iommu)\}")
#: Programs do not count so far, and a table up to here costs little.
LAST_DATA_FD = 1 << 16


def run(
    devices: Sequence[VfioDevice],
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    filter_name: FilterName = "exact",
    trace: Trace | None = None,
) -> int:
    """Run ``argv`` until it and its descendants have ended; return its exit code.

    It finds the devices as /dev/vfio/devices/NAME, and gets descriptors of them where its
    arguments contain ``{dev0}`` or ``{iommu}``. Call from the main thread.

    Raises:
        LaunchError: the program could not be started; ``exit_code`` says how shells tell it.
        PrerequisiteError: the kernel cannot stop system calls for this process.
    """
    check_prerequisites()
    first = _first_data_fd() if filter_name == "fast" else None
    code = (
        exact_filter() if first is None else fast_filter(first_data_fd=first, offset_tag=OFFSET_TAG)
    )
    with Door(devices, first_data_fd=first, trace=trace) as door:
        with ExitStack() as ours:
            arguments, kept = _hand_over(argv, door, ours)
            program = launch(
                arguments,
                os.environ if env is None else env,
                code,
                keep_open=[fd.fileno() for fd in kept],
            )
        with program:
            with relaying_signals(program):  # before it can have told anybody that it runs
                door.start(program.listener)
                exit_code = program.wait()
            program.wait_for_descendants()
    door.check()
    return exit_code


def _hand_over(argv: Sequence[str], door: Door, ours: ExitStack) -> tuple[list[str], list[Fd]]:
    """Open what the arguments name, once each, and put the numbers in."""
    opened: dict[str, Fd] = {}

    def number(match: re.Match[str]) -> str:
        name, device = match[0], match["device"]
        if device is not None and int(device) >= len(door.devices):
            return name
        if name not in opened:
            fd = (
                door.open_iommu(os.O_RDWR)
                if device is None
                else door.open_device(int(device), os.O_RDWR)
            )
            opened[name] = ours.enter_context(fd)
        return str(opened[name].fileno())

    arguments = [_HANDED_OVER.sub(number, argument) for argument in argv]
    return arguments, list(opened.values())


def _first_data_fd() -> int:
    """Descriptor numbers that programs hardly reach, below the limit that they inherit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = LAST_DATA_FD if limit == resource.RLIM_INFINITY else min(limit, LAST_DATA_FD)
    return max(limit - DATA_FDS, limit // 2, 3)
