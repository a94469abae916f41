"""``vfiomig draw``: the state machine of a capability set, as a picture or as data."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from cyclopts import Parameter

from vfiomig.errors import SpecError
from vfiomig.fsm import LEGAL_SETS, capability_name, parse_capabilities
from vfiomig.fsm import draw as drawing_of

__all__ = ("draw",)

_EVERYTHING: Final = capability_name(LEGAL_SETS[-1])


def draw(
    *,
    caps: str = _EVERYTHING,
    form: Annotated[
        Literal["text", "mermaid", "dot", "json"] | None, Parameter(name="--format")
    ] = None,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Draw the state machine of a capability set.

    Parameters
    ----------
    caps
        The capabilities that the device has: stop-copy, stop-copy+p2p, stop-copy+pre-copy
        or stop-copy+p2p+pre-copy.
    form
        A table to read (text, the default), a diagram for Markdown (mermaid) or for
        Graphviz (dot), or the next step for every pair of states (json).
    json
        The same as --format json.
    """
    if json and form not in {None, "json"}:
        raise SpecError(f"--json and --format {form} contradict each other; give one of them")
    print(drawing_of(parse_capabilities(caps), "json" if json else form or "text"))
