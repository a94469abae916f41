"""Requests that a driver may not survive, and on which targets they are safe all the same.

A check that sends one runs where it is known to be safe, or when its user says so. A device of
this process, or behind a socket, can only hang or end with its own program; a driver can take
the machine along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vfiomig.fsm import Capability

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.checks.facts import Facts

__all__ = ("BLOCKED_PAIR", "CLOSE_IN_RESUMING", "DANGERS", "STALE_WRITE", "Danger")

MTTY: Final = (0x4348, 0x3253)
#: Vendor, and the device numbers that virtio has of those that are its vendor's.
VIRTIO: Final = (0x1AF4, range(0x1000, 0x1080))
#: The release that lets go of the blocked pairs, by series.
FIXED: Final[dict[tuple[int, ...], tuple[int, ...]]] = {(6, 12): (6, 12, 117)}
#: Every series from here on does.
FIXED_SINCE: Final = (7, 3)


@dataclass(frozen=True, slots=True)
class Danger:
    """What can happen, the rule that tells of it, and whether it can happen here."""

    what: str
    rule: str
    threatens: Callable[[Facts], bool]


def _loops_in_blocked_pairs(facts: Facts) -> bool:
    """Tell whether PRE_COPY is there to loop for, and the kernel not known to let go of it.

    A release does not tell that a kernel has no PRE_COPY yet: distributors port it to older ones.
    """
    release = facts.kernel
    if not release or Capability.PRE_COPY not in facts.capabilities or release >= FIXED_SINCE:
        return False
    return release[:2] not in FIXED or release < FIXED[release[:2]]


def _is_virtio(vendor: int, device: int) -> bool:
    return vendor == VIRTIO[0] and device in VIRTIO[1]


BLOCKED_PAIR: Final = Danger(
    "kernels from 6.2 to the middle of 2026 loop for ever on this request, unkillable",
    "FAULT-1",
    _loops_in_blocked_pairs,
)
CLOSE_IN_RESUMING: Final = Danger(
    "the kernel's mtty keeps RESUMING over the close, and crashes when it is left",
    "FAULT-29",
    lambda facts: bool(facts.kernel) and facts.identity in {MTTY, None},
)
STALE_WRITE: Final = Danger(
    "the kernel's virtio driver may crash on a write after RESUMING was left",
    "FAULT-19",
    lambda facts: bool(facts.kernel) and (facts.identity is None or _is_virtio(*facts.identity)),
)
DANGERS: Final = (BLOCKED_PAIR, CLOSE_IN_RESUMING, STALE_WRITE)
