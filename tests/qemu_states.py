"""What QEMU 10 asks migrating devices for, by capability set, in the order of the migration."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from vfiomig.fsm import Arc, Capability, State, parse_capabilities, path

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = (
    "CAPS",
    "SOURCE_STATES",
    "TARGET_STATES",
    "follow",
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


_SET: Final = re.compile(r"VFIO_DEVICE_FEATURE\(SET MIG_DEVICE_STATE (\w+)\)")


def follow(rows: Iterable[dict[str, Any]], caps: str, *, fatal: bool = False) -> State:
    """Follow a device through its part of a trace, and return the state that it is left in.

    Every arc that the device's core took is compared with what the protocol says: from the state
    that the device was in, towards the one that it was asked for, no further than a failure.
    With ``fatal`` the failure of an arc leads to ERROR, and nothing else does.
    """
    at = State.RUNNING
    for row in rows:
        if row["request"] == "VFIO_DEVICE_RESET()":
            assert row["errno"] is None, row
            at = State.RUNNING
        elif asked := _SET.fullmatch(row["request"]):
            at = _take(at, path(parse_capabilities(caps), at, State[asked[1]]), row, fatal=fatal)
            assert row["errno"] or at is State[asked[1]], row
    return at


def _take(at: State, arcs: tuple[Arc, ...] | None, row: dict[str, Any], *, fatal: bool) -> State:
    if arcs is None:
        assert (row["errno"], row["arcs"]) == ("EINVAL", []), row
        return at
    for arc, taken in zip(arcs, row["arcs"], strict=not row["errno"]):
        words, _, failure = taken.partition(" failed with ")
        assert words == str(arc), row
        if failure:
            assert (row["errno"], row["arcs"][-1]) == (failure, taken), row
            return State.ERROR if fatal else at
        at = arc.target
    assert row["errno"] is None, row
    return at
