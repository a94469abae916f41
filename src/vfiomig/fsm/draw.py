"""The state machine of a capability set as a picture: text, Mermaid, Graphviz or JSON.

Every drawing is computed from the rows of ``arcs``. Text and JSON show the next step for each
pair of states; Mermaid and Graphviz show the arcs, each arrow one driver call, marked where it
opens or closes a data transfer session.
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from vfiomig.errors import SpecError
from vfiomig.fsm.arcs import arcs_of, matrix
from vfiomig.fsm.states import State, capability_name, require_legal, session_kind, states_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vfiomig.fsm.arcs import Arc
    from vfiomig.fsm.states import Capability

__all__ = ("FORMATS", "draw")

_REFUSED: Final = "-"
_CORNER: Final = "from \\ to"
_INITIAL: Final = "after open and after reset"


def draw(caps: int, form: str, /) -> str:
    """Draw the state machine of ``caps`` in one of ``FORMATS``, without a final newline.

    Raises ``SpecError`` for a set or a format that there is not.
    """
    legal = require_legal(caps)
    drawing = _DRAWINGS.get(form)
    if drawing is None:
        raise SpecError(f"unknown format {form!r}; choose one of {', '.join(FORMATS)}")
    return drawing(legal)


def _text(caps: Capability) -> str:
    rows = [[_CORNER, *(state.name for state in matrix(caps))]]
    for current, steps in matrix(caps).items():
        cells = (_REFUSED if step is None else step.name for step in steps.values())
        rows.append([current.name, *cells])
    arcs = [[str(arc), _session_mark(arc)] for arc in arcs_of(caps)]
    return "\n".join(
        (
            f"capabilities: {capability_name(caps)}",
            "",
            f"the next step towards the requested state, {_REFUSED} where it is refused (EINVAL):",
            "",
            *_aligned(rows),
            "",
            f"{len(arcs)} arcs, each one call into the driver:",
            "",
            *_aligned(arcs),
        )
    )


def _mermaid(caps: Capability) -> str:
    lines = ["stateDiagram-v2"]
    for arc in arcs_of(caps):
        mark = f" : {_session_mark(arc)}" if _session_mark(arc) else ""
        lines.append(f"    {arc.origin.name} --> {arc.target.name}{mark}")
    # A note and not an arrow from [*]: every arrow of the picture is an arc.
    lines.append(f"    note right of {State.RUNNING.name} : {_INITIAL}")
    return "\n".join(lines)


def _dot(caps: Capability) -> str:
    lines = [
        "digraph vfio_device_mig_state {",
        f'    label="enum vfio_device_mig_state, {capability_name(caps)}"',
        "    node [shape=box, style=rounded]",
        *(f'    {state.name} [label="{_dot_label(state)}"]' for state in states_of(caps)),
    ]
    for arc in arcs_of(caps):
        mark = f' [label="{_session_mark(arc)}"]' if _session_mark(arc) else ""
        lines.append(f"    {arc.origin.name} -> {arc.target.name}{mark}")
    return "\n".join((*lines, "}"))


def _dot_label(state: State) -> str:
    """Return a node's text, with the session that is open there on a line of its own."""
    kind = session_kind(state)
    if kind is not None:
        return f"{state.name}\\n{kind.value} session"
    return f"{state.name}\\n{_INITIAL}" if state is State.RUNNING else state.name


def _json(caps: Capability) -> str:
    return json.dumps(
        {
            current.name: {
                requested.name: None if step is None else step.name
                for requested, step in steps.items()
            }
            for current, steps in matrix(caps).items()
        },
        indent=2,
    )


def _session_mark(arc: Arc) -> str:
    """Say what ``arc`` does to the data transfer session; empty if nothing."""
    marks = (("opens", arc.opens), ("closes", arc.closes))
    return ", ".join(f"{verb} {kind.value} session" for verb, kind in marks if kind is not None)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


_DRAWINGS: Final[Mapping[str, Callable[[Capability], str]]] = MappingProxyType(
    {"text": _text, "mermaid": _mermaid, "dot": _dot, "json": _json}
)

#: The formats that ``draw`` knows.
FORMATS: Final = tuple(_DRAWINGS)
