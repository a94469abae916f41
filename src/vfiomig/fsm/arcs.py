"""The arcs of the device state machine, and everything that is computed from them.

Theory of operation
-------------------
``ARCS`` is the only description of the state machine, after ``enum vfio_device_mig_state`` in
``include/uapi/linux/vfio.h`` and the patch "vfio: Define device migration protocol v2". An arc
is one call into the driver. A request for a state that no single arc reaches is a combination
transition: the core takes several arcs, and the user sees only the last state.

Fewer capabilities. The table is written for a device that has every state.

- Without PRE_COPY the two precopy states are absent, and their arcs with them.
- Without P2P a device in RUNNING_P2P is simply RUNNING, and one in PRE_COPY_P2P is in PRE_COPY:
  the two states of each pair become one. RUNNING_P2P -> STOP is then RUNNING -> STOP, the arcs
  between the two halves of a pair vanish, and PRE_COPY_P2P -> STOP_COPY is
  PRE_COPY -> STOP_COPY. So the six arcs of the seed are seen to be the same arcs.

The path. A combination transition takes the shortest path with one restriction that protects
the data stream: **a request never opens a session that it closes again, and never replaces the
saving session by another one**. So

- between two states of the saving group a path stays inside the group: the session lives on and
  its data_fd stays valid. PRE_COPY -> STOP_COPY goes through PRE_COPY_P2P, although the written
  rule of the header, no saving state on the way, read to the letter sends it through STOP;
- every other path has no saving state in its interior.

From STOP_COPY no arc leads back into the group, hence STOP_COPY -> PRE_COPY and
STOP_COPY -> PRE_COPY_P2P have no path and are refused with EINVAL, as the kernel refuses them;
the user goes through RUNNING in a request of its own. With this restriction no two shortest
paths compete, and every next step equals that of the kernel's table.

ERROR has no arc: a failing arc may leave a device there, and only a reset leads out.

All pairs of a capability set are searched at its first use. After that an answer is one look-up.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass, replace
from typing import Final

from vfiomig.fsm.states import (
    FULLY_RUNNING,
    SAVING_GROUP,
    Capability,
    SessionKind,
    State,
    require_legal,
    required,
    states_of,
)

__all__ = ("ARCS", "Arc", "arcs_of", "matrix", "next_state", "path")


@dataclass(frozen=True, slots=True)
class Arc:
    """One driver call, and what it does to the data transfer session."""

    origin: State
    target: State
    opens: SessionKind | None = None
    closes: SessionKind | None = None

    @property
    def needs(self) -> Capability:
        """The bits that a set must hold for both ends to exist."""
        return required(self.origin) | required(self.target)

    def __str__(self) -> str:
        return f"{self.origin.name} -> {self.target.name}"


_SAVING: Final = SessionKind.SAVING
_RESUMING: Final = SessionKind.RESUMING

ARCS: Final[tuple[Arc, ...]] = (
    Arc(State.RUNNING, State.RUNNING_P2P),
    Arc(State.RUNNING_P2P, State.RUNNING),
    Arc(State.RUNNING_P2P, State.STOP),
    Arc(State.STOP, State.RUNNING_P2P),
    Arc(State.STOP, State.STOP_COPY, opens=_SAVING),
    Arc(State.STOP_COPY, State.STOP, closes=_SAVING),
    Arc(State.STOP, State.RESUMING, opens=_RESUMING),
    Arc(State.RESUMING, State.STOP, closes=_RESUMING),
    Arc(State.RUNNING, State.PRE_COPY, opens=_SAVING),
    Arc(State.PRE_COPY, State.RUNNING, closes=_SAVING),
    Arc(State.RUNNING_P2P, State.PRE_COPY_P2P, opens=_SAVING),
    Arc(State.PRE_COPY_P2P, State.RUNNING_P2P, closes=_SAVING),
    Arc(State.PRE_COPY, State.PRE_COPY_P2P),
    Arc(State.PRE_COPY_P2P, State.PRE_COPY),
    Arc(State.PRE_COPY_P2P, State.STOP_COPY),
)


@functools.cache
def arcs_of(caps: int) -> tuple[Arc, ...]:
    """Return the arcs that a driver with ``caps`` implements, in the order of ``ARCS``."""
    legal = require_legal(caps)
    rows = ARCS if Capability.P2P in legal else tuple(map(_fully_running, ARCS))
    # dict keeps the order and drops arcs that became equal when two states became one.
    return tuple(
        dict.fromkeys(arc for arc in rows if arc.origin != arc.target and arc.needs in legal)
    )


def next_state(caps: int, current: int, requested: int) -> State | None:
    """Return the first step from ``current`` towards ``requested``.

    ``None`` means refused, which the user sees as EINVAL: no path, ERROR at either end, a state
    that the set does not have, or a number that is no state. A device that is there already
    stays. Raises ``SpecError`` for a capability set that means nothing.
    """
    return _steps(caps).get((current, requested))


def path(caps: int, current: int, requested: int) -> tuple[Arc, ...] | None:
    """Return all arcs from ``current`` to ``requested``; none if they are equal.

    ``None`` means refused, as for ``next_state``.
    """
    return _paths(caps).get((current, requested))


def matrix(caps: int) -> dict[State, dict[State, State | None]]:
    """Return the next step for every pair of ERROR and the states of the set."""
    states = (State.ERROR, *states_of(caps))
    return {
        current: {requested: next_state(caps, current, requested) for requested in states}
        for current in states
    }


def _fully_running(arc: Arc) -> Arc:
    """Return ``arc`` as a device without P2P knows it."""
    return replace(
        arc,
        origin=FULLY_RUNNING.get(arc.origin, arc.origin),
        target=FULLY_RUNNING.get(arc.target, arc.target),
    )


@functools.cache
def _steps(caps: int) -> dict[tuple[int, int], State]:
    return {
        (origin, target): arcs[0].target if arcs else State(origin)
        for (origin, target), arcs in _paths(caps).items()
    }


@functools.cache
def _paths(caps: int) -> dict[tuple[int, int], tuple[Arc, ...]]:
    states = states_of(caps)
    found = {
        (origin, target): _search(arcs_of(caps), origin, target)
        for origin in states
        for target in states
    }
    return {pair: arcs for pair, arcs in found.items() if arcs is not None}


def _search(arcs: tuple[Arc, ...], origin: State, target: State) -> tuple[Arc, ...] | None:
    """Search breadth first for the shortest path that treats the saving group as it must."""
    stays_inside = {origin, target} <= SAVING_GROUP
    seen = {origin}
    queue: deque[tuple[State, tuple[Arc, ...]]] = deque([(origin, ())])
    while queue:
        state, taken = queue.popleft()
        if state is target:
            return taken
        for arc in arcs:
            if arc.origin is not state or arc.target in seen:
                continue
            if arc.target is target or (arc.target in SAVING_GROUP) is stays_inside:
                seen.add(arc.target)
                queue.append((arc.target, (*taken, arc)))
    return None
