"""QEMU's downtime with a large device state that pre-copy has carried, against a small one.

Two QEMUs, each behind ``vfiomig run``, and firmware alone in the machine: what differs is the
device's state. The switch waits until the devices have next to nothing left.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

from guests import guest_parts
from harness import Measurement

from vfiomig.qemu.guest import Guest
from vfiomig.qemu.machine import Machine
from vfiomig.qemu.migration import migrate
from vfiomig.qemu.vfio import run_words, vfio_words

if TYPE_CHECKING:
    from guests import Parts

__all__ = ("measure",)

#: The rest for which QEMU stops the machine: 1 MiB/s for 0.3 s.
PARAMETERS = {"avail-switchover-bandwidth": 1 << 20, "downtime-limit": 300}
TIMEOUT = 60


def measure(size: str = "64M", rounds: int = 5) -> list[Measurement]:
    taken: dict[str, list[int]] = {size: [], "1M": []}
    with guest_parts() as parts:
        for number in range(rounds):
            for one, downtimes in taken.items():
                downtimes.append(downtime(parts, one, f"{one}-{number}"))
    large, small = (statistics.median(downtimes) for downtimes in taken.values())
    return [
        Measurement(
            f"QEMU's downtime with {size} of state against 1M",
            large / small,
            at_most=1.5,
            details={"ms": taken},
        )
    ]


def downtime(parts: Parts, size: str, name: str) -> int:
    """Migrate a machine with one device; return QEMU's milliseconds."""
    specs = (f"pattern,size={size},caps=all",)
    machine = Machine(memory_mib=64, extra=tuple(vfio_words(len(specs))))
    uri = f"unix:{parts.folder}/{name}"
    with (
        Guest(parts.qemu, machine, launcher=run_words(specs)) as source,
        Guest(parts.qemu, replace(machine, incoming=True), launcher=run_words(specs)) as target,
    ):
        account = migrate(source.qmp, target.qmp, uri, parameters=PARAMETERS, timeout=TIMEOUT)
        milliseconds: int = account["downtime"]
        return milliseconds
