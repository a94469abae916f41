"""``vfiomig info``: what a device is and can do, on one screen."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Table

from vfiomig.abi.ioctls import Dialect  # noqa: TC001 - cyclopts reads the annotation at run time
from vfiomig.cli.demo_table import bytes_text
from vfiomig.cli.targets import named
from vfiomig.client import open_target
from vfiomig.client.description import Description, Identity, describe

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ("info",)


def info(
    target: Annotated[str, Parameter(show_default=False)] = "",
    /,
    *,
    fd: int | None = None,
    dialect: Dialect | None = None,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Show what a device is and can do.

    The device is opened and closed again, and not changed in between; one that another program
    has open is busy.

    Parameters
    ----------
    target:
        /dev/vfio/devices/vfioN, /dev/vfio/GROUP[:NAME], a PCI address, an mdev uuid, fd:N,
        vfio-user:PATH, or model:SPEC for a device of this program's own.
    fd:
        A descriptor of the device that this program was started with, instead of TARGET.
    dialect:
        Which form of the protocol a model is served in; other targets have their own.
    json:
        Print one JSON document.
    """
    target = named("info", target, fd)
    with open_target(target, dialect) as client:
        found = describe(client)
    if json:
        print(json_format.dumps(as_data(target, found), indent=2))
    else:
        show(target, found)


def as_data(target: str, found: Description) -> dict[str, Any]:
    """Everything that was found, for machines; sizes in bytes."""
    return {"target": target, **asdict(found)}


def show(target: str, found: Description) -> None:
    """Print one screen."""
    console = Console(highlight=False)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(target, found):
        facts.add_row(name, value)
    console.print(facts)
    if found.regions:
        table = _table(console, ("region", "size", "access", "may be mapped"))
        for region in found.regions:
            areas = [f"{offset:#x} +{bytes_text(size)}" for offset, size in region.mappable]
            whole = region.mappable == [(0, region.size)]
            mapped = "all of it" if whole else ", ".join(areas)
            access = " ".join(flag for flag in region.flags if flag != "mmap")
            table.add_row(region.name, bytes_text(region.size), access, mapped)
        console.print(table)
    if found.interrupts:
        table = _table(console, ("interrupt", "count", "flags"))
        for irq in found.interrupts:
            table.add_row(irq.name, str(irq.count), " ".join(irq.flags))
        console.print(table)


def _facts(target: str, found: Description) -> Iterable[tuple[str, str]]:
    """Yield the rows above the tables; what is not known says why."""

    def known(what: str, value: str | None) -> str:
        return value if value is not None else f"not told: {found.unknown.get(what, 'unknown')}"

    about = [str(found.about.get("by", "")), f"dialect {found.dialect}"]
    about += [f"{key} {value}" for key, value in found.about.items() if key != "by"]
    yield "target", target
    yield "reached by", ", ".join(about)
    identity = None if found.identity is None else _identity(found.identity)
    yield "identity", known("identity", identity)
    if found.identity and found.identity.capabilities:
        yield "PCI capabilities", ", ".join(found.identity.capabilities)
    why = "" if found.no_migration is None else f": {found.no_migration}"
    yield "migration", known("capabilities", found.capabilities) + why
    if found.capabilities != "none":
        yield "state", known("state", found.state)
        size = None if found.data_size is None else bytes_text(found.data_size)
        yield "data size", known("data size", size)
    yield "features", ", ".join(found.features) or "none"
    for what in ("regions", "interrupts"):
        if what in found.unknown:
            yield what, known(what, None)


def _identity(identity: Identity) -> str:
    subsystem = f"{identity.subsystem_vendor:04x}:{identity.subsystem:04x}"
    return (
        f"{identity.vendor:04x}:{identity.device:04x}, subsystem {subsystem}, "
        f"class {identity.class_code:06x}, revision {identity.revision:#04x}"
    )


def _table(console: Console, columns: tuple[str, ...]) -> Table:
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in {"size", "count"} else "left")
    return table
