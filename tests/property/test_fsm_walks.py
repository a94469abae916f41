"""Walks through the state machine keep their promises for any numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vfiomig.fsm import (
    LEGAL_SETS,
    SAVING_GROUP,
    State,
    next_state,
    path,
    session_kind,
    states_of,
)

sets = st.sampled_from(LEGAL_SETS)
# Mostly near the states, now and then anything.
numbers = st.one_of(st.integers(-1, 9), st.integers(), st.sampled_from(State))


@given(sets, numbers, numbers)
def test_a_walk_reaches_its_target_within_seven_steps_or_is_refused_at_once(
    caps: int, current: int, requested: int
) -> None:
    here: int = current
    for taken in range(8):
        step = next_state(caps, here, requested)
        if step is None:
            assert taken == 0
            return
        assert step in states_of(caps)
        if here == requested:
            assert step == requested
            return
        here = step
    raise AssertionError(f"{current} to {requested} with {caps} has no end")


@given(sets, numbers, numbers)
def test_what_is_refused_has_an_end_that_the_set_lacks_or_would_replace_the_saving_session(
    caps: int, current: int, requested: int
) -> None:
    states = states_of(caps)
    refused = next_state(caps, current, requested) is None
    lacking = current not in states or requested not in states
    replacing = current == State.STOP_COPY and requested in SAVING_GROUP - {State.STOP_COPY}
    assert refused is (lacking or replacing)


@given(sets, numbers, numbers)
def test_only_the_last_arc_of_a_path_opens_a_session_and_only_the_first_closes_one(
    caps: int, current: int, requested: int
) -> None:
    arcs = path(caps, current, requested) or ()
    assert not any(arc.opens for arc in arcs[:-1])
    assert not any(arc.closes for arc in arcs[1:])


@given(sets, numbers, numbers)
def test_the_session_after_a_path_is_that_of_the_target(
    caps: int, current: int, requested: int
) -> None:
    arcs = path(caps, current, requested)
    if arcs is None:
        return
    session = session_kind(State(current))
    for arc in arcs:
        if arc.closes:
            assert arc.closes is session
            session = None
        if arc.opens:
            assert session is None
            session = arc.opens
    assert session is session_kind(State(requested))


@given(sets, sets, numbers, numbers)
def test_whether_a_request_is_refused_does_not_depend_on_options_that_it_does_not_use(
    caps: int, other: int, current: int, requested: int
) -> None:
    common = set(states_of(caps)) & set(states_of(other))
    if current in common and requested in common:
        answers = {next_state(each, current, requested) is None for each in (caps, other)}
        assert len(answers) == 1
