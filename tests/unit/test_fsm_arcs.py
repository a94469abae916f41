"""The computed state machine against the two tables of the kernel, typed in here.

The tables and the look-up beside them are the golden model: nothing of them is computed from
the package under test.
"""

from __future__ import annotations

import itertools

import pytest

from vfiomig.errors import SpecError
from vfiomig.fsm import (
    ARCS,
    LEGAL_SETS,
    SAVING_GROUP,
    Arc,
    Capability,
    State,
    arcs_of,
    matrix,
    next_state,
    path,
    session_kind,
    states_of,
)

(
    ERROR,
    STOP,
    RUNNING,
    STOP_COPY,
    RESUMING,
    RUNNING_P2P,
    PRE_COPY,
    PRE_COPY_P2P,
) = range(8)

# The patch "vfio: Define device migration protocol v2": rows are the current state.
SEED = (
    (ERROR, ERROR, ERROR, ERROR, ERROR),
    (ERROR, STOP, RUNNING, STOP_COPY, RESUMING),
    (ERROR, STOP, RUNNING, STOP, STOP),
    (ERROR, STOP, STOP, STOP_COPY, STOP),
    (ERROR, STOP, STOP, STOP, RESUMING),
)

# What landed. Columns: ERROR STOP RUNNING STOP_COPY RESUMING RUNNING_P2P PRE_COPY PRE_COPY_P2P.
LANDED = (
    (0, 0, 0, 0, 0, 0, 0, 0),
    (0, STOP, RUNNING_P2P, STOP_COPY, RESUMING, RUNNING_P2P, RUNNING_P2P, RUNNING_P2P),
    (0, RUNNING_P2P, RUNNING, RUNNING_P2P, RUNNING_P2P, RUNNING_P2P, PRE_COPY, RUNNING_P2P),
    (0, STOP, STOP, STOP_COPY, STOP, STOP, 0, 0),
    (0, STOP, STOP, STOP, RESUMING, STOP, STOP, STOP),
    (0, STOP, RUNNING, STOP, STOP, RUNNING_P2P, RUNNING, PRE_COPY_P2P),
    (0, RUNNING, RUNNING, PRE_COPY_P2P, RUNNING, RUNNING, PRE_COPY, PRE_COPY_P2P),
    (0, RUNNING_P2P, RUNNING_P2P, STOP_COPY, RUNNING_P2P, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P),
)

# The bits that each state asks of the set, by number.
ASKED = (0xFFFF_FFFF, 1, 1, 1, 1, 3, 5, 7)

NUMBERS = (*range(10), 255, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**70, -1, -8, -(2**63))

ARC_NAMES = {
    1: {
        "RUNNING -> STOP",
        "STOP -> RUNNING",
        "STOP -> STOP_COPY",
        "STOP_COPY -> STOP",
        "STOP -> RESUMING",
        "RESUMING -> STOP",
    },
    3: {
        "RUNNING -> RUNNING_P2P",
        "RUNNING_P2P -> RUNNING",
        "RUNNING_P2P -> STOP",
        "STOP -> RUNNING_P2P",
        "STOP -> STOP_COPY",
        "STOP_COPY -> STOP",
        "STOP -> RESUMING",
        "RESUMING -> STOP",
    },
}
ARC_NAMES[5] = ARC_NAMES[1] | {
    "RUNNING -> PRE_COPY",
    "PRE_COPY -> RUNNING",
    "PRE_COPY -> STOP_COPY",
}
ARC_NAMES[7] = ARC_NAMES[3] | {
    "RUNNING -> PRE_COPY",
    "PRE_COPY -> RUNNING",
    "PRE_COPY -> PRE_COPY_P2P",
    "PRE_COPY_P2P -> PRE_COPY",
    "RUNNING_P2P -> PRE_COPY_P2P",
    "PRE_COPY_P2P -> RUNNING_P2P",
    "PRE_COPY_P2P -> STOP_COPY",
}


def seed_answer(current: int, requested: int) -> int | None:
    """Answer as the seed's core: bounds, then the table, where ERROR means refused."""
    if not (0 <= current < 5 and 0 <= requested < 5):
        return None
    return SEED[current][requested] or None


def landed_answer(caps: int, current: int, requested: int) -> int | None:
    """Answer as the landed core: both ends legal, then the table, skipping absent states."""
    for number in (current, requested):
        if not 0 <= number < 8 or ASKED[number] & caps != ASKED[number]:
            return None
    step = LANDED[current][requested]
    while step != ERROR and ASKED[step] & caps != ASKED[step]:
        step = LANDED[step][requested]
    return step or None


def legal_pairs(caps: Capability) -> list[tuple[State, State]]:
    pairs = itertools.product(states_of(caps), repeat=2)
    return [(a, b) for a, b in pairs if landed_answer(caps, a, b) is not None]


def test_with_stop_copy_alone_every_answer_is_that_of_the_seed() -> None:
    for current, requested in itertools.product(NUMBERS, repeat=2):
        step = next_state(Capability.STOP_COPY, current, requested)
        assert step == seed_answer(current, requested), (current, requested)


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_every_answer_is_that_of_the_landed_table(caps: Capability) -> None:
    for current, requested in itertools.product(NUMBERS, repeat=2):
        step = next_state(caps, current, requested)
        assert step == landed_answer(caps, current, requested), (current, requested)
        assert step is None or isinstance(step, State)
        assert step is not State.ERROR


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_the_matrix_is_the_landed_table_over_error_and_the_states_of_the_set(
    caps: Capability,
) -> None:
    states = [State.ERROR, *states_of(caps)]
    assert matrix(caps) == {
        current: {requested: landed_answer(caps, current, requested) for requested in states}
        for current in states
    }
    assert list(matrix(caps)) == states
    assert all(list(row) == states for row in matrix(caps).values())


def test_a_matrix_belongs_to_its_caller() -> None:
    matrix(7)[State.STOP][State.RUNNING] = None
    assert matrix(7)[State.STOP][State.RUNNING] is State.RUNNING_P2P


def test_the_table_has_the_fifteen_arcs_of_the_largest_set() -> None:
    assert len(ARCS) == 15
    assert arcs_of(7) == ARCS


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_the_arcs_of_a_set_are_those_of_its_drivers(caps: Capability) -> None:
    assert len(arcs_of(caps)) == {1: 6, 3: 8, 5: 9, 7: 15}[caps]
    assert {str(arc) for arc in arcs_of(caps)} == ARC_NAMES[caps]


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_walking_every_legal_pair_takes_exactly_the_arcs_of_the_set(caps: Capability) -> None:
    walked = set()
    for current, requested in legal_pairs(caps):
        here: int = current
        while here != requested:
            step = landed_answer(caps, here, requested)
            assert step is not None
            walked.add((here, step))
            here = step
    assert walked == {(arc.origin, arc.target) for arc in arcs_of(caps)}


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_a_path_is_the_walk_of_next_steps(caps: Capability) -> None:
    for current, requested in legal_pairs(caps):
        arcs = path(caps, current, requested)
        assert arcs is not None
        assert set(arcs) <= set(arcs_of(caps))
        here: State = current
        for arc in arcs:
            assert arc.origin is here
            assert next_state(caps, here, requested) is arc.target
            here = arc.target
        assert here is requested


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_a_path_is_refused_exactly_where_the_next_step_is(caps: Capability) -> None:
    for current, requested in itertools.product(NUMBERS, repeat=2):
        refused = landed_answer(caps, current, requested) is None
        assert (path(caps, current, requested) is None) is refused, (current, requested)


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_staying_takes_no_arc(caps: Capability) -> None:
    for state in states_of(caps):
        assert path(caps, state, state) == ()
        assert next_state(caps, state, state) is state
    assert path(caps, State.ERROR, State.ERROR) is None
    assert next_state(caps, State.ERROR, State.ERROR) is None


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_an_arc_opens_and_closes_what_its_ends_say(caps: Capability) -> None:
    for arc in arcs_of(caps):
        before, after = session_kind(arc.origin), session_kind(arc.target)
        changes = before is not after
        assert arc.opens is (after if changes else None), arc
        assert arc.closes is (before if changes else None), arc


def shortest(caps: Capability, current: State, requested: State) -> list[tuple[State, ...]]:
    """Return every shortest route that leaves the saving group alone, found by trying all.

    Written apart from the search of the package: it enumerates states, not arcs, and states the
    rule as a filter over finished routes.
    """
    edges = {(arc.origin, arc.target) for arc in arcs_of(caps)}
    others = [state for state in states_of(caps) if state not in {current, requested}]
    for count in range(len(others) + 1):
        routes = [
            (current, *between, requested)
            for between in itertools.permutations(others, count)
            if {current, requested} <= SAVING_GROUP or not SAVING_GROUP & set(between)
        ]
        found = [route for route in routes if set(itertools.pairwise(route)) <= edges]
        if found:
            return found
    return []


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_no_two_shortest_paths_compete(caps: Capability) -> None:
    for current, requested in legal_pairs(caps):
        if current is requested:
            continue
        arcs = path(caps, current, requested)
        assert arcs is not None
        route = (current, *(arc.target for arc in arcs))
        assert shortest(caps, current, requested) == [route], (current, requested)


def test_precopy_reaches_stop_copy_in_one_session() -> None:
    arcs = path(7, State.PRE_COPY, State.STOP_COPY)
    assert arcs is not None
    assert [str(arc) for arc in arcs] == ["PRE_COPY -> PRE_COPY_P2P", "PRE_COPY_P2P -> STOP_COPY"]
    assert not any(arc.opens or arc.closes for arc in arcs)


@pytest.mark.parametrize("caps", [5, 7])
@pytest.mark.parametrize("requested", [State.PRE_COPY, State.PRE_COPY_P2P])
def test_stop_copy_to_precopy_is_refused(caps: int, requested: State) -> None:
    assert next_state(caps, State.STOP_COPY, requested) is None
    assert path(caps, State.STOP_COPY, requested) is None


@pytest.mark.parametrize("caps", [0, 2, 4, 6, 8, 15, -1])
def test_an_illegal_set_is_a_spec_error_everywhere(caps: int) -> None:
    with pytest.raises(SpecError, match="choose one of stop-copy, stop-copy"):
        next_state(caps, State.STOP, State.RUNNING)
    with pytest.raises(SpecError):
        path(caps, State.STOP, State.RUNNING)
    with pytest.raises(SpecError):
        matrix(caps)
    with pytest.raises(SpecError):
        arcs_of(caps)


def test_what_an_arc_needs_is_what_its_ends_need() -> None:
    assert int(Arc(State.RUNNING, State.PRE_COPY).needs) == 5
    assert int(Arc(State.RUNNING, State.RUNNING_P2P).needs) == 3
    assert int(Arc(State.PRE_COPY_P2P, State.STOP_COPY).needs) == 7
