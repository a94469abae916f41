"""What a failure means for its user, and what may be tried: one table.

The rows are those of docs/protocol.md, chapter "obligations", section "recovery". A row's
``routes`` are ways back, each a row of states to ask for one after the other; when none works, or
none is there, only a reset is left. The error messages and ``recovery`` both read the table.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vfiomig.abi.ioctls import Dialect
from vfiomig.errors import SetStateError
from vfiomig.fsm import State

if TYPE_CHECKING:
    from vfiomig.errors import RequestError

__all__ = (
    "ABANDONED",
    "DESCRIPTOR_LOST",
    "IN_ERROR",
    "LOAD_REFUSED",
    "READ_FAILED",
    "SOURCE_FAILED",
    "WRITE_FAILED",
    "Situation",
    "failed_change",
    "situation_of",
)


@dataclass(frozen=True, slots=True)
class Situation:
    """A row: its clause, what happened, what to do in a sentence, and the ways back."""

    clause: str
    what: str
    advice: str
    routes: tuple[tuple[State, ...], ...] = ()


SOURCE_FAILED: Final = Situation(
    "RECOVER-4",
    "stopping or saving failed on the source",
    "ask for RUNNING to go on without a migration, and reset it if that fails too",
    ((State.RUNNING,),),
)
READ_FAILED: Final = Situation(
    "RECOVER-5",
    "reading failed in STOP_COPY",
    "the stream is worthless: ask for STOP, then for RUNNING",
    ((State.STOP, State.RUNNING),),
)
WRITE_FAILED: Final = Situation(
    "RECOVER-7",
    "a write failed in RESUMING",
    "reset it; it must not run with what it got",
)
LOAD_REFUSED: Final = Situation(
    "RECOVER-8",
    "the device did not accept the state",
    "reset it; the source goes on if it still can",
)
ABANDONED: Final = Situation(
    "RECOVER-9",
    "a load is abandoned, or could not begin",
    "reset it; asking for another state would ask for a verdict",
)
IN_ERROR: Final = Situation(
    "RECOVER-10",
    "the device is in ERROR",
    "reset it; nothing else leads out, and its DMA log tells nothing from here on",
)


def _lost(target: State, leave: State) -> Situation:
    return Situation(
        "RECOVER-6",
        f"{target.name} was reached, but its session has no descriptor",
        f"see that a descriptor is free, ask for {leave.name}, then for {target.name} again",
        ((leave, target), (State.RUNNING,)),
    )


#: The state was reached and the data_fd was not: leave, and enter again.
DESCRIPTOR_LOST: Final[dict[State, Situation]] = {
    State.STOP_COPY: _lost(State.STOP_COPY, State.STOP),
    State.PRE_COPY: _lost(State.PRE_COPY, State.RUNNING),
    State.PRE_COPY_P2P: _lost(State.PRE_COPY_P2P, State.RUNNING_P2P),
    State.RESUMING: Situation(
        "RECOVER-6",
        "RESUMING was reached, but its session has no descriptor",
        "reset it: leaving RESUMING would ask for a verdict on an empty stream",
    ),
}

#: Errnos of giving out a descriptor, after the change of state.
NO_DESCRIPTOR = {
    Dialect.LANDED: frozenset({errno.EMFILE, errno.ENFILE, errno.EFAULT}),
    Dialect.V6: frozenset({errno.EMFILE, errno.ENFILE, errno.EFAULT, errno.ENOMEM}),
}


def situation_of(failure: RequestError, state: State | None, dialect: Dialect) -> Situation:
    """Find the row for a failed change of state, read or write; ``state`` is where it is now."""
    if state is State.ERROR:
        return IN_ERROR
    if isinstance(failure, SetStateError):
        return failed_change(failure.errno or 0, failure.requested, state, dialect)
    if state is State.RESUMING:
        return WRITE_FAILED
    return READ_FAILED if state is State.STOP_COPY else SOURCE_FAILED


def failed_change(number: int, requested: int, state: State | None, dialect: Dialect) -> Situation:
    """Find the row for a change of state that failed with errno ``number``."""
    if state is State.ERROR:
        return IN_ERROR
    if state == requested and number in NO_DESCRIPTOR[dialect] and state in DESCRIPTOR_LOST:
        return DESCRIPTOR_LOST[state]
    if state is State.RESUMING:
        return LOAD_REFUSED
    return ABANDONED if requested == State.RESUMING else SOURCE_FAILED
