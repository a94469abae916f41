"""Drawings of the state machine, read back and compared with what they show."""

from __future__ import annotations

import json
import re

import pytest

from vfiomig.errors import SpecError
from vfiomig.fsm import LEGAL_SETS, Capability, State, arcs_of, draw, matrix, states_of
from vfiomig.fsm.draw import FORMATS


def session_words(caps: Capability) -> dict[tuple[str, str], str]:
    """Return for each arc what a drawing says of its session, empty for nothing."""
    words = {}
    for arc in arcs_of(caps):
        word = f"opens {arc.opens.value} session" if arc.opens else ""
        word = f"closes {arc.closes.value} session" if arc.closes else word
        words[arc.origin.name, arc.target.name] = word
    return words


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_json_is_the_matrix(caps: Capability) -> None:
    drawn = json.loads(draw(caps, "json"))
    assert drawn == {
        current.name: {
            requested.name: None if step is None else step.name for requested, step in row.items()
        }
        for current, row in matrix(caps).items()
    }
    assert list(drawn) == ["ERROR", *(state.name for state in states_of(caps))]
    assert all(list(row) == list(drawn) for row in drawn.values())


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_json_is_null_in_row_and_column_error_and_itself_on_the_diagonal(caps: Capability) -> None:
    drawn = json.loads(draw(caps, "json"))
    assert set(drawn["ERROR"].values()) == {None}
    assert {row["ERROR"] for row in drawn.values()} == {None}
    for state in states_of(caps):
        assert drawn[state.name][state.name] == state.name


def test_json_of_the_smallest_set_in_full() -> None:
    assert json.loads(draw(1, "json")) == {
        "ERROR": dict.fromkeys(("ERROR", "STOP", "RUNNING", "STOP_COPY", "RESUMING")),
        "STOP": {
            "ERROR": None,
            "STOP": "STOP",
            "RUNNING": "RUNNING",
            "STOP_COPY": "STOP_COPY",
            "RESUMING": "RESUMING",
        },
        "RUNNING": {
            "ERROR": None,
            "STOP": "STOP",
            "RUNNING": "RUNNING",
            "STOP_COPY": "STOP",
            "RESUMING": "STOP",
        },
        "STOP_COPY": {
            "ERROR": None,
            "STOP": "STOP",
            "RUNNING": "STOP",
            "STOP_COPY": "STOP_COPY",
            "RESUMING": "STOP",
        },
        "RESUMING": {
            "ERROR": None,
            "STOP": "STOP",
            "RUNNING": "STOP",
            "STOP_COPY": "STOP",
            "RESUMING": "RESUMING",
        },
    }


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_mermaid_has_one_marked_arrow_per_arc_and_no_other(caps: Capability) -> None:
    drawn = draw(caps, "mermaid")
    assert drawn.splitlines()[0] == "stateDiagram-v2"
    arrows = re.findall(r"^ +(\w+) --> (\w+)(?: : (.+))?$", drawn, re.MULTILINE)
    assert len(arrows) == drawn.count("-->") == len(arcs_of(caps))
    assert {(origin, target): mark for origin, target, mark in arrows} == session_words(caps)


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_dot_has_every_state_and_one_marked_edge_per_arc(caps: Capability) -> None:
    drawn = draw(caps, "dot")
    assert re.fullmatch(r"digraph \w+ \{\n.*\n\}", drawn, re.DOTALL)
    nodes = re.findall(r'^ +(\w+) \[label="(\w+)', drawn, re.MULTILINE)
    assert nodes == [(state.name, state.name) for state in states_of(caps)]
    edges = re.findall(r'^ +(\w+) -> (\w+)(?: \[label="([^"]+)"\])?$', drawn, re.MULTILINE)
    assert len(edges) == drawn.count("->") == len(arcs_of(caps))
    assert {(origin, target): mark for origin, target, mark in edges} == session_words(caps)


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_text_is_an_aligned_table_that_reads_back_as_the_matrix(caps: Capability) -> None:
    lines = draw(caps, "text").splitlines()
    top = next(number for number, line in enumerate(lines) if line.startswith("from \\ to"))
    columns = lines[top].removeprefix("from \\ to").split()
    starts = [re.search(rf"\b{name}\b", lines[top]) for name in columns]
    for row in lines[top + 1 : top + 1 + len(columns)]:
        name, *cells = row.split()
        for start, column, cell in zip(starts, columns, cells, strict=True):
            assert start is not None
            assert row[start.start() :].split()[0] == cell
            step = matrix(caps)[State[name]][State[column]]
            assert cell == ("-" if step is None else step.name)
    assert columns == ["ERROR", *(state.name for state in states_of(caps))]


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_text_lists_every_arc_with_its_session(caps: Capability) -> None:
    arcs = re.findall(r"^(\w+) -> (\w+)(?: +(.+))?$", draw(caps, "text"), re.MULTILINE)
    assert len(arcs) == len(arcs_of(caps))
    assert {(origin, target): mark for origin, target, mark in arcs} == session_words(caps)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_a_drawing_has_no_trailing_space(caps: Capability, form: str) -> None:
    drawn = draw(caps, form)
    assert drawn == drawn.strip()
    assert all(line == line.rstrip() for line in drawn.splitlines())


def test_an_unknown_format_names_the_known_ones() -> None:
    assert FORMATS == ("text", "mermaid", "dot", "json")
    with pytest.raises(SpecError, match="'svg'; choose one of text, mermaid, dot, json"):
        draw(7, "svg")


def test_an_illegal_set_is_not_drawn() -> None:
    with pytest.raises(SpecError, match="choose one of stop-copy"):
        draw(6, "text")
