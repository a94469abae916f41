"""States, capability sets and their names."""

from __future__ import annotations

import pytest

from vfiomig.errors import SpecError
from vfiomig.fsm import (
    LEGAL_SETS,
    PRE_COPY_GROUP,
    SAVING_GROUP,
    Capability,
    SessionKind,
    State,
    capability_name,
    parse_capabilities,
    require_legal,
    required,
    session_kind,
    states_of,
)

NAMES = {
    1: "stop-copy",
    3: "stop-copy+p2p",
    5: "stop-copy+pre-copy",
    7: "stop-copy+p2p+pre-copy",
}


def test_numbers_are_those_of_the_uapi_header() -> None:
    assert {state.name: int(state) for state in State} == {
        "ERROR": 0,
        "STOP": 1,
        "RUNNING": 2,
        "STOP_COPY": 3,
        "RESUMING": 4,
        "RUNNING_P2P": 5,
        "PRE_COPY": 6,
        "PRE_COPY_P2P": 7,
    }
    assert {bit.name: int(bit) for bit in Capability} == {"STOP_COPY": 1, "P2P": 2, "PRE_COPY": 4}


def test_exactly_four_sets_are_legal() -> None:
    assert list(map(int, LEGAL_SETS)) == [1, 3, 5, 7]
    for caps in LEGAL_SETS:
        assert require_legal(int(caps)) is caps


@pytest.mark.parametrize("caps", [0, 2, 4, 6, 8, 9, 15, -1, 1 << 63])
def test_an_illegal_set_is_refused_with_the_legal_ones_named(caps: int) -> None:
    with pytest.raises(SpecError) as caught:
        require_legal(caps)
    for name in NAMES.values():
        assert name in str(caught.value)
    with pytest.raises(SpecError):
        states_of(caps)


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_a_name_is_read_back_as_its_set(caps: Capability) -> None:
    assert capability_name(caps) == NAMES[caps]
    assert parse_capabilities(NAMES[caps]) is caps
    assert parse_capabilities("+".join(reversed(NAMES[caps].split("+")))) is caps


def test_all_is_the_largest_set() -> None:
    assert int(parse_capabilities("all")) == 7


@pytest.mark.parametrize(
    "text", ["", "p2p", "pre-copy", "p2p+pre-copy", "stop-copy+", "stop_copy", "7", "stop-copy+all"]
)
def test_a_text_that_is_no_legal_set_is_refused_with_the_legal_ones_named(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_capabilities(text)
    for name in NAMES.values():
        assert name in str(caught.value)


def test_unknown_bits_show_in_a_name() -> None:
    assert capability_name(9) == "stop-copy+0x8"
    assert capability_name(0) == "none"


def test_each_set_has_its_states_in_number_order() -> None:
    assert {int(caps): [int(state) for state in states_of(caps)] for caps in LEGAL_SETS} == {
        1: [1, 2, 3, 4],
        3: [1, 2, 3, 4, 5],
        5: [1, 2, 3, 4, 6],
        7: [1, 2, 3, 4, 5, 6, 7],
    }


def test_no_legal_set_has_error() -> None:
    assert required(State.ERROR) == 0xFFFF_FFFF
    assert not any(required(State.ERROR) in caps for caps in LEGAL_SETS)


def test_sessions_are_open_in_the_saving_group_and_in_resuming() -> None:
    assert {State.PRE_COPY, State.PRE_COPY_P2P} == PRE_COPY_GROUP
    assert {State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY} == SAVING_GROUP
    assert {state: session_kind(state) for state in State} == {
        State.ERROR: None,
        State.STOP: None,
        State.RUNNING: None,
        State.STOP_COPY: SessionKind.SAVING,
        State.RESUMING: SessionKind.RESUMING,
        State.RUNNING_P2P: None,
        State.PRE_COPY: SessionKind.SAVING,
        State.PRE_COPY_P2P: SessionKind.SAVING,
    }


def test_a_state_is_printed_by_its_name_and_counts_as_its_number() -> None:
    state = State.PRE_COPY_P2P
    assert (str(state), f"{state}", format(state)) == ("PRE_COPY_P2P",) * 3
    assert (f"{state:#x}", f"{state:d}", state + 0) == ("0x7", "7", 7)
