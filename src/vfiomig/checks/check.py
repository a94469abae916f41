"""A check as a row: its id, one sentence, the rules it rests on, and what it takes to run it.

A chapter is a module of functions, each of which is a check::

    CHAPTER = Chapter("saving", "What a saving session delivers, and how it ends.")

    @CHAPTER.check("SAVE-1")
    def the_end_is_zero(subject: Subject) -> None:
        \"\"\"A read at the end of the state returns 0, and goes on doing so.\"\"\"

The id is the chapter and the name of the function, ``saving.the-end-is-zero``, the sentence the
first line of its docstring; what follows there is shown by ``--explain``.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, TypedDict, Unpack

from vfiomig.abi.ioctls import Dialect
from vfiomig.checks.facts import Shows
from vfiomig.fsm import Capability, capability_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vfiomig.checks.dangers import Danger
    from vfiomig.checks.facts import Facts
    from vfiomig.checks.subject import Subject

__all__ = ("BOTH", "LANDED", "V6", "Body", "Chapter", "Check", "Levers")

BOTH: Final = frozenset(Dialect)
LANDED: Final = frozenset({Dialect.LANDED})
V6: Final = frozenset({Dialect.V6})

NOTHING_NEEDED: Final = Capability(0)
NOTHING_SHOWN: Final = Shows(0)

#: Where the rules stand.
PAGE: Final = "docs/protocol.md"
HEADER: Final = "include/uapi/linux/vfio.h"
SEED: Final = 'the patch "vfio: Define device migration protocol v2"'

Body: TypeAlias = "Callable[[Subject], None]"

SHOWN: Final = {
    Shows.DESCRIPTORS: "a data_fd is no descriptor of the system here",
    Shows.FAULTS: "the memory of a request cannot fault here",
    Shows.EXHAUSTION: "there is no limit on descriptors here",
    Shows.MEANING: "what a descriptor means is decided on this side of the socket",
    Shows.ALL_REQUESTS: "vfio-user without its extension has no message for this, and one errno "
    "for whatever a server lacks",
    Shows.REOPENING: "the device was handed over: it is not closed as long as its giver has it",
}

#: What a check that sees something is only for.
FOR: Final = {
    Shows.DESCRIPTORS: "data_fds that are descriptors of the system",
    Shows.FAULTS: "requests that are calls, not messages",
    Shows.EXHAUSTION: "requests that are calls, not messages",
    Shows.MEANING: "requests that are calls, not messages",
    Shows.ALL_REQUESTS: "targets other than vfio-user without mig_stream",
    Shows.REOPENING: "devices that were not handed over",
}


class Levers(NamedTuple):
    """What only its author can make a device do; without one, some checks do not run."""

    #: Bring the device to ERROR.
    enter_error: Callable[[Subject], None] | None = None
    #: Have the device write bytes to an IOVA by DMA; done when it returns.
    write_by_dma: Callable[[Subject, int, bytes], None] | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One row."""

    id: str
    chapter: str
    sentence: str
    #: Rules of docs/protocol.md.
    rules: tuple[str, ...]
    body: Body
    #: More about it, in sentences.
    explanation: str = ""
    #: The section of the kernel's header that says the same.
    section: str = ""
    needs: Capability = NOTHING_NEEDED
    dialects: frozenset[Dialect] = BOTH
    shows: Shows = NOTHING_SHOWN
    #: Index of a feature that the device must have.
    feature: int | None = None
    danger: Danger | None = None
    lever: str = ""
    #: Whether it makes sense on a device that cannot migrate.
    without_migration: bool = False
    #: Whether it looks at the device as it is, and not in RUNNING as new.
    as_it_is: bool = False
    #: The pair of states that it is about.
    pair: tuple[int, int] | None = None

    @property
    def clause(self) -> str:
        """What it rests on, to be cited."""
        rules = f"{PAGE}, {', '.join(self.rules)}"
        source = SEED if self.dialects == V6 else HEADER
        return f"{rules}; {source}, {self.section}" if self.section else rules

    @property
    def conditions(self) -> list[str]:
        """What it is only for, in a few words each."""
        only = [f"the dialect {dialect}" for dialect in self.dialects if self.dialects != BOTH]
        if optional := _bits(self.needs & ~Capability.STOP_COPY):
            only.append(f"devices with {' and '.join(optional)}")
        if self.feature is not None:
            only.append(f"devices with feature {self.feature}")
        only += [words for shown, words in FOR.items() if shown & self.shows]
        if self.lever:
            only.append(f"devices with the lever {self.lever}")
        return list(dict.fromkeys(only))

    def why_inapplicable(self, facts: Facts) -> str:
        """Return why there is nothing to check on this target, nothing if there is."""
        if facts.dialect not in self.dialects:
            return f"the device speaks the dialect {facts.dialect}"
        if not facts.capabilities and not self.without_migration:
            has = f"the capability set {facts.flags:#x}, which means nothing" if facts.flags else ""
            return f"the device has {has or 'no migration'}"
        if self.needs & ~facts.capabilities:
            return f"the device has {capability_name(facts.capabilities)} only"
        if self.feature is not None and self.feature not in facts.features:
            return f"the device does not have feature {self.feature}"
        return next(
            (reason for shown, reason in SHOWN.items() if shown & self.shows & ~facts.shows), ""
        )


def _bits(needs: Capability) -> list[str]:
    return [bit.name or "" for bit in Capability if bit in needs]


class Columns(TypedDict, total=False):
    """The columns of ``Check`` that a chapter may set."""

    section: str
    needs: Capability
    dialects: frozenset[Dialect]
    shows: Shows
    feature: int
    danger: Danger
    lever: str
    without_migration: bool
    as_it_is: bool
    pair: tuple[int, int]


@dataclass(slots=True)
class Chapter:
    """Checks that belong together, in their order."""

    name: str
    summary: str
    #: Columns of its checks, unless they say otherwise; ``section`` is of the kernel's header.
    columns: Columns = field(default_factory=Columns)
    checks: list[Check] = field(default_factory=list)

    def check(self, *rules: str, name: str = "", **row: Unpack[Columns]) -> Callable[[Body], Body]:
        """Make a check of a function; keywords are the columns of ``Check``."""

        def declare(body: Body) -> Body:
            text = inspect.getdoc(body) or ""
            sentence, _, explanation = text.partition("\n")
            self.add(name or body.__name__, sentence, rules, body, explanation.strip(), **row)
            return body

        return declare

    def add(
        self,
        name: str,
        sentence: str,
        rules: Iterable[str],
        body: Body,
        explanation: str = "",
        **row: Unpack[Columns],
    ) -> None:
        full = f"{self.name}.{name.replace('_', '-')}"
        columns: Columns = {**self.columns, **row}
        made = Check(full, self.name, sentence, tuple(rules), body, explanation, **columns)
        self.checks.append(made)
