"""The kernel's mtty, every state and every request for another: cell by cell what must come."""

from __future__ import annotations

import errno
import json
import os
import platform
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

import vfiomig
from kernel_guest import MATRIX, PAIR
from state_pairs import Row, expected
from vfiomig import DeviceClient, Session, SetStateError, State
from vfiomig.abi.ioctls import Dialect
from vfiomig.checks.dangers import BLOCKED_PAIR
from vfiomig.checks.facts import look
from vfiomig.fsm import SessionKind
from vmtest.inside import WORK

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 96

#: Cells from a RESUMING whose session has got nothing: it can only be asked for again.
EMPTY = "RESUMING, nothing loaded"


def rows() -> list[tuple[str, Row]]:
    """Every cell: how the row is called, and what must come of the request."""
    found = []
    for row in expected(7, Dialect.LANDED):
        if row.origin is State.ERROR:
            # The driver never gets there.
            continue
        found.append((row.origin.name, row))
        if row.origin is State.RESUMING:
            found.append((EMPTY, _nothing_loaded(row)))
    return found


def _nothing_loaded(row: Row) -> Row:
    if row.requested == State.RESUMING:
        return row
    return row._replace(errno=errno.EINVAL, final=State.RESUMING, descriptor=False, old_lives=True)


@pytest.fixture(scope="module")
def dev() -> Iterator[DeviceClient]:
    with vfiomig.open(PAIR[0]) as client:
        # This kernel is known to let go of what others hang in.
        assert not BLOCKED_PAIR.threatens(look(client)), platform.release()
        yield client


@pytest.fixture(scope="module")
def state(dev: DeviceClient) -> bytes:
    with dev.set_state(State.STOP_COPY) as session:
        return b"".join(map(bytes, session))


@pytest.fixture(scope="module")
def matrix() -> Iterator[dict[str, dict[str, Any]]]:
    cells: dict[str, dict[str, Any]] = {}
    yield cells
    document = {"kernel": platform.release(), "capabilities": 7, "cells": cells}
    (WORK / MATRIX).write_text(json.dumps(document), encoding="utf-8")


def is_alive(session: Session) -> bool:
    """Tell whether a data_fd still belongs to a session; what that takes from it is no matter."""
    try:
        if session.kind is SessionKind.RESUMING:
            os.write(session.fileno(), b"")
        else:
            os.read(session.fileno(), 1)
    except OSError as refusal:
        if refusal.errno != errno.ENODEV:
            raise
        return False
    return True


def request(dev: DeviceClient, name: str, row: Row, state: bytes) -> Row:
    """Bring the device to where the row begins, make the request, and return what came of it."""
    dev.reset()
    with ExitStack() as opened:
        old = dev.set_state(row.origin)
        if old is not None:
            opened.enter_context(old)
        if row.origin is State.RESUMING and name != EMPTY:
            assert old is not None
            old.write_all(state)
        number, new = 0, None
        try:
            new = dev.set_state(row.requested, force=True)
        except SetStateError as refusal:
            number = refusal.errno or -1
        if new is not None:
            opened.enter_context(new)
        lives = None if old is None else is_alive(old)
        return Row(
            row.origin, row.requested, number, dev.state, new is not None and new is not old, lives
        )


@pytest.mark.parametrize(("name", "row"), rows(), ids=lambda value: str(value).replace(", ", "-"))
def test_a_request_is_answered_as_the_protocol_has_it(
    name: str, row: Row, dev: DeviceClient, state: bytes, matrix: dict[str, dict[str, Any]]
) -> None:
    assert len(state) == SIZE
    seen = request(dev, name, row, state)
    old = {None: None, True: "alive", False: "dead"}[seen.old_lives]
    matrix[f"{name} -> {row.requested}"] = {
        "result": "ok" if not seen.errno else errno.errorcode[seen.errno],
        "state": seen.final.name,
        "new_fd": seen.descriptor,
        "old_fd": old,
    }
    assert seen == row
