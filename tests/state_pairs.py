"""Every request for a state from every state, and what has to come of it.

``expected(caps, dialect)`` is the table for a device that never fails: what the request answers,
where the device is afterwards, whether a descriptor came, and what became of the one from
before. It is computed from the state machine's arcs; the same table is run in process and
through real ioctls.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from vfiomig.abi.ioctls import Dialect
from vfiomig.fsm import Capability, State, path, session_kind, states_of

#: What is no state of any device; the fifth to seventh are states of some.
NO_STATES = (8, 9, 255, 256, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)


class Row(NamedTuple):
    origin: State
    requested: int
    errno: int
    final: State
    #: A new data_fd came with the answer.
    descriptor: bool
    #: The session that was open in ``origin`` is still alive; ``None`` if there was none.
    old_lives: bool | None

    def __str__(self) -> str:
        return f"{self.origin.name}-to-{self.requested}"


def expected(caps: int, dialect: Dialect) -> list[Row]:
    """Return the rows for a device with ``caps``; V6 shows five states of any.

    A test brings the device from RUNNING to ``origin`` by one request. Rows from ERROR are among
    them: how a device gets there is the test's affair.
    """
    shown = Capability.STOP_COPY if dialect is Dialect.V6 else Capability(caps)
    origins = (State.ERROR, *states_of(shown))
    return [
        _row(shown, origin, requested)
        for origin in origins
        for requested in (*map(int, State), *NO_STATES)
    ]


def _row(caps: Capability, origin: State, requested: int) -> Row:
    arcs = path(caps, origin, requested)
    had_session = session_kind(origin) is not None
    if arcs is None:
        return Row(origin, requested, errno.EINVAL, origin, False, True if had_session else None)
    return Row(
        origin,
        requested,
        0,
        State(requested),
        any(arc.opens for arc in arcs),
        not any(arc.closes for arc in arcs) if had_session else None,
    )
