"""Every mutant there is: the modules beside this one fill the table."""

from __future__ import annotations

from mutants import features, logs, resets, sessions, states, streams
from mutants.bench import MUTANTS, Bench, Mutant

__all__ = (
    "MUTANTS",
    "Bench",
    "Mutant",
    "features",
    "logs",
    "resets",
    "sessions",
    "states",
    "streams",
)
