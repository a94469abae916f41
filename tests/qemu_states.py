"""What QEMU 10 asks migrating devices for, by capability set, in the order of the migration."""

from __future__ import annotations

from typing import Final

from vfiomig.fsm import Capability, parse_capabilities

__all__ = (
    "CAPS",
    "SOURCE_STATES",
    "TARGET_STATES",
    "has_p2p",
    "has_pre_copy",
    "machine_starts",
    "machine_stops",
)

SOURCE_STATES: Final = {
    "stop-copy": ["STOP", "STOP_COPY", "STOP"],
    "stop-copy+p2p": ["RUNNING_P2P", "STOP", "STOP_COPY", "STOP"],
    "stop-copy+pre-copy": ["PRE_COPY", "STOP_COPY", "STOP"],
    "all": ["PRE_COPY", "PRE_COPY_P2P", "STOP_COPY", "STOP"],
}
TARGET_STATES: Final = {
    "stop-copy": ["RESUMING", "RUNNING"],
    "stop-copy+p2p": ["RESUMING", "RUNNING_P2P", "RUNNING"],
    "stop-copy+pre-copy": ["RESUMING", "RUNNING"],
    "all": ["RESUMING", "RUNNING_P2P", "RUNNING"],
}
#: The capability sets, as a SPEC names them.
CAPS: Final = tuple(SOURCE_STATES)


def has_p2p(caps: str) -> bool:
    return Capability.P2P in parse_capabilities(caps)


def has_pre_copy(caps: str) -> bool:
    return Capability.PRE_COPY in parse_capabilities(caps)


def machine_starts(caps: str) -> list[str]:
    """What QEMU asks for when a machine that is not incoming starts."""
    return ["RUNNING_P2P", "RUNNING"] if has_p2p(caps) else []


def machine_stops(caps: str) -> list[str]:
    """What QEMU asks for when it quits and the machine runs."""
    return ["RUNNING_P2P", "STOP"] if has_p2p(caps) else ["STOP"]
