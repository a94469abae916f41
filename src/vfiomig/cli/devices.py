"""``vfiomig devices``: what a SPEC can name, and the keys that it can have."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from vfiomig.models import COMMON, KNOWN, describe

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ("devices",)


def devices(
    device: str = "",
    /,
    *,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """List the ready devices and their keys.

    A SPEC is NAME[,key=value...], or path.py:Class[,key=value...] for a class of your own, and
    is what --device, serve and model: take. Behind each key is its default.

    Parameters
    ----------
    device:
        Tell about this one only: a name, or path.py:Class.
    json:
        Print one JSON document.
    """
    names = (device,) if device else tuple(KNOWN)
    found = {name: describe(name) for name in names}
    if json:
        document = {
            "devices": {name: asdict(said) for name, said in found.items()},
            "keys of every device": dict(COMMON.keys),
        }
        print(json_format.dumps(document, indent=2))
        return
    console = Console(highlight=False, markup=False)
    for name, said in found.items():
        about = " ".join(said.about.split())
        console.print(f"{name}: {about}" if about else name)
        _show(console, said.keys)
    console.print(f"{COMMON.about}:")
    _show(console, COMMON.keys)


def _show(console: Console, keys: Mapping[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for key, meaning in keys.items():
        table.add_row(key, meaning)
    if keys:
        console.print(Padding(table, (0, 0, 0, 2)))
    console.print()
