"""The table of situations: every row is one of the protocol's, and is found for its failure."""

from __future__ import annotations

import errno
from itertools import pairwise
from pathlib import Path

import pytest

from vfiomig import SessionError, SetStateError, State
from vfiomig.abi.ioctls import Dialect
from vfiomig.client import situations
from vfiomig.client.situations import Situation, situation_of
from vfiomig.fsm import LEGAL_SETS, path

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"
ROWS = [
    *(row for row in vars(situations).values() if isinstance(row, Situation)),
    *situations.DESCRIPTOR_LOST.values(),
]
LANDED, V6 = Dialect


def row_of_change(number: int, requested: State, state: State | None, dialect: Dialect) -> str:
    return situation_of(SetStateError(number, requested, state), state, dialect).clause


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_every_row_is_a_clause_of_the_protocol(row: Situation) -> None:
    assert f"[{row.clause}]" in PROTOCOL.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "route", [(row.what, route) for row in ROWS for route in row.routes], ids=str
)
def test_no_way_back_leads_through_a_load(route: tuple[str, tuple[State, ...]]) -> None:
    _, states = route
    assert State.RESUMING not in states
    assert State.ERROR not in states
    pairs = pairwise(states)
    assert all(path(LEGAL_SETS[-1], origin, target) for origin, target in pairs)


@pytest.mark.parametrize(
    ("number", "requested", "state", "dialect", "clause"),
    [
        (errno.EIO, State.STOP_COPY, State.STOP, LANDED, "RECOVER-4"),
        (errno.EIO, State.STOP_COPY, None, LANDED, "RECOVER-4"),
        (errno.EMFILE, State.STOP_COPY, State.STOP_COPY, LANDED, "RECOVER-6"),
        (errno.ENFILE, State.PRE_COPY, State.PRE_COPY, LANDED, "RECOVER-6"),
        (errno.EFAULT, State.RESUMING, State.RESUMING, LANDED, "RECOVER-6"),
        (errno.ENOMEM, State.STOP_COPY, State.STOP_COPY, V6, "RECOVER-6"),
        (errno.ENOMEM, State.STOP_COPY, State.STOP_COPY, LANDED, "RECOVER-4"),
        (errno.EMFILE, State.STOP_COPY, State.STOP, LANDED, "RECOVER-4"),
        (errno.EMFILE, State.RUNNING, State.RUNNING, LANDED, "RECOVER-4"),
        (errno.EINVAL, State.STOP, State.RESUMING, LANDED, "RECOVER-8"),
        (errno.EINVAL, State.RUNNING, State.RESUMING, V6, "RECOVER-8"),
        (errno.EIO, State.RESUMING, State.STOP, LANDED, "RECOVER-9"),
        (errno.EIO, State.STOP, State.ERROR, LANDED, "RECOVER-10"),
    ],
)
def test_a_failed_change_finds_its_row(
    number: int, requested: State, state: State | None, dialect: Dialect, clause: str
) -> None:
    assert row_of_change(number, requested, state, dialect) == clause


@pytest.mark.parametrize(
    ("state", "clause"),
    [
        (State.STOP_COPY, "RECOVER-5"),
        (State.PRE_COPY, "RECOVER-4"),
        (State.RUNNING, "RECOVER-4"),
        (State.RESUMING, "RECOVER-7"),
        (State.ERROR, "RECOVER-10"),
    ],
)
def test_a_failed_transfer_is_judged_by_where_the_device_is(state: State, clause: str) -> None:
    assert situation_of(SessionError(errno.ENODEV), state, LANDED).clause == clause
