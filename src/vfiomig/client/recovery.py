"""What to do with a device after a failure, step by step, each step told.

Theory of operation
-------------------
The order never changes: learn the state, try the ways back that fit the situation, reset the
device, give it up; the first that works ends it (docs/protocol.md, RECOVER-1 to RECOVER-3). Which
ways back fit is a row of ``client.situations``. Guards stand before every row: a device in ERROR
can only be reset; one in RESUMING is never asked for another state, because that would ask for
its verdict on an incomplete stream; nor is one whose state nobody knows, for it may be there.

A device that was reset is blank. A destination that needed it reports a failed migration, however
well the device works now (RECOVER-12).
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vfiomig.client.situations import (
    ABANDONED,
    DESCRIPTOR_LOST,
    IN_ERROR,
    LOAD_REFUSED,
    READ_FAILED,
    SOURCE_FAILED,
    WRITE_FAILED,
    Situation,
    situation_of,
)
from vfiomig.errors import RequestError
from vfiomig.fsm import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.client.face import DeviceClient
    from vfiomig.client.session import Session

__all__ = (
    "ABANDONED",
    "DESCRIPTOR_LOST",
    "IN_ERROR",
    "LOAD_REFUSED",
    "READ_FAILED",
    "SOURCE_FAILED",
    "WRITE_FAILED",
    "Action",
    "Outcome",
    "Recovery",
    "Situation",
    "Step",
    "fall_back_to",
    "recover",
)


class Action(enum.Enum):
    """What a step does."""

    READ_STATE = "read the state"
    ASK = "ask for"
    RESET = "reset"
    STOP_LOGGING = "stop the DMA log"
    GIVE_UP = "give the device up"


class Outcome(enum.Enum):
    """Where it ended."""

    #: The device is in the state that the way back led to; its own state is intact.
    SETTLED = "settled"
    #: The device was reset: it is blank, and what it held is lost.
    RESET = "reset"
    #: Nothing worked. Nobody uses the device.
    GIVEN_UP = "given up"


@dataclass(frozen=True, slots=True)
class Step:
    """One step and what came of it."""

    action: Action
    target: State | None = None  # what was asked for
    state: State | None = None  # where the device was afterwards, if that is known
    failure: RequestError | None = None

    def __str__(self) -> str:
        words = [self.action.value]
        if self.target is not None:
            words.append(self.target.name)
        if self.failure is not None:
            number = self.failure.errno or 0
            words.append(f"failed with {errno.errorcode.get(number, number)}")
        if self.state is not None:
            words.append(f"-> {self.state.name}")
        return " ".join(words)


@dataclass(slots=True)
class Recovery:
    """What was done, and what came of it.

    ``session`` is open again where the way back was to leave a state and enter it anew.
    """

    situation: Situation | None = None
    steps: list[Step] = field(default_factory=list)
    state: State | None = None
    outcome: Outcome = Outcome.GIVEN_UP
    session: Session | None = None

    def __str__(self) -> str:
        what = f"{self.situation.what} ({self.situation.clause}): " if self.situation else ""
        return f"{what}{', '.join(map(str, self.steps))}: {self.outcome.value}"


def fall_back_to(*states: State) -> Situation:
    """Make a situation of one's own: ask for these states in turn, else reset."""
    names = ", then ".join(state.name for state in states)
    advice = f"ask for {names}, else reset it" if states else "reset it"
    return Situation("RECOVER-3", "a request failed", advice, (states,) if states else ())


def recover(
    client: DeviceClient,
    trouble: RequestError | Situation,
    tell: Callable[[Step], None] | None = None,
) -> Recovery:
    """Bring a device back after ``trouble``: a failed request, or a situation that is known.

    A ``SetStateError`` or ``SessionError`` is looked up in the table. Its default for a source is
    that the guest goes on; pass ``fall_back_to(State.STOP)`` if it shall not. ``tell`` hears of
    each step when it is done. Nothing that the device answers is raised.
    """
    work = _Work(client, tell)
    report = work.report
    state = work.read_state()
    if isinstance(trouble, Situation):
        report.situation = IN_ERROR if state is State.ERROR else trouble
    else:
        report.situation = situation_of(trouble, state, client.dialect)
    if any(work.walk(route) for route in report.situation.routes):
        report.outcome = Outcome.SETTLED
        report.session = client.session
    elif work.reset():
        report.outcome = Outcome.RESET
    else:
        work.note(Step(Action.GIVE_UP, state=report.state))
    return report


class _Work:
    """One recovery under way."""

    def __init__(self, client: DeviceClient, tell: Callable[[Step], None] | None) -> None:
        self._client = client
        self._tell = tell
        self.report = Recovery()

    def note(self, step: Step) -> None:
        self.report.state = step.state
        self.report.steps.append(step)
        if self._tell is not None:
            self._tell(step)

    def read_state(self) -> State | None:
        try:
            state = self._client.state
        except RequestError as failure:
            self.note(Step(Action.READ_STATE, failure=failure))
            return None
        self.note(Step(Action.READ_STATE, state=state))
        return state

    def walk(self, route: tuple[State, ...]) -> bool:
        """Ask for the states of a route in turn; ``False`` as soon as one does not come."""
        for target in route:
            if self.report.state in {None, State.ERROR, State.RESUMING}:
                return False
            try:
                self._client.set_state(target)
            except RequestError as failure:
                state = getattr(failure, "device_state", None)
                self.note(Step(Action.ASK, target, state, failure))
                return False
            self.note(Step(Action.ASK, target, target))
        return True

    def reset(self) -> bool:
        try:
            self._client.reset()
        except RequestError as failure:
            self.note(Step(Action.RESET, state=self.report.state, failure=failure))
            return False
        self.note(Step(Action.RESET))
        # One query may still show the state before a reset that another thread carries out.
        if self.read_state() is not State.RUNNING:
            self.read_state()
        if self.report.state in {None, State.ERROR}:
            return False
        self._stop_logging()
        return True

    def _stop_logging(self) -> None:
        """End a log that went through the failure: what it would tell is worth nothing."""
        if not self._client.dma_logging:
            return
        state = self.report.state
        try:
            self._client.stop_dma_logging()
        except RequestError as failure:
            self.note(Step(Action.STOP_LOGGING, state=state, failure=failure))
        else:
            self.note(Step(Action.STOP_LOGGING, state=state))
