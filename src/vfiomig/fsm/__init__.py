"""What the protocol says: states, capability sets, arcs, and what is computed from them.

Pure: no clock, no descriptor, no logger. ``states`` names what there is, ``arcs`` holds the only
table and answers from it, ``draw`` shows it.
"""

from __future__ import annotations

from vfiomig.fsm.arcs import ARCS, Arc, arcs_of, matrix, next_state, path
from vfiomig.fsm.draw import FORMATS, draw
from vfiomig.fsm.states import (
    FULLY_RUNNING,
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

__all__ = (
    "ARCS",
    "FORMATS",
    "FULLY_RUNNING",
    "LEGAL_SETS",
    "PRE_COPY_GROUP",
    "SAVING_GROUP",
    "Arc",
    "Capability",
    "SessionKind",
    "State",
    "arcs_of",
    "capability_name",
    "draw",
    "matrix",
    "next_state",
    "parse_capabilities",
    "path",
    "require_legal",
    "required",
    "session_kind",
    "states_of",
)
