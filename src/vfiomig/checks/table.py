"""Every check there is, in the order in which they run, and which of them a user means."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from vfiomig.checks import (
    combinations,
    discovery,
    dma,
    exhaustion,
    precopy,
    reopening,
    resets,
    resuming,
    saving,
    sessions,
    sizes,
    states,
    threads,
    v6,
)
from vfiomig.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfiomig.checks.check import Check

__all__ = ("CHAPTERS", "CHECKS", "choose", "find")

CHAPTERS: Final = (
    discovery.CHAPTER,
    states.CHAPTER,
    combinations.CHAPTER,
    sessions.CHAPTER,
    saving.CHAPTER,
    resuming.CHAPTER,
    precopy.CHAPTER,
    resets.CHAPTER,
    sizes.CHAPTER,
    dma.CHAPTER,
    exhaustion.CHAPTER,
    reopening.CHAPTER,
    threads.CHAPTER,
    v6.CHAPTER,
)
CHECKS: Final[tuple[Check, ...]] = tuple(check for part in CHAPTERS for check in part.checks)


def choose(only: Iterable[str] = (), skip: Iterable[str] = ()) -> list[Check]:
    """Return the checks that ``only`` names, all without it, but for those that ``skip`` names.

    Raises:
        SpecError: a name means no check.
    """
    wanted = {check.id for pattern in only for check in _meant(pattern)}
    unwanted = {check.id for pattern in skip for check in _meant(pattern)}
    return [
        check for check in CHECKS if (not only or check.id in wanted) and check.id not in unwanted
    ]


def find(name: str) -> Check:
    """Return the check of that id; ``SpecError`` if there is none."""
    found = [check for check in CHECKS if check.id == name]
    if not found:
        raise _unknown(name)
    return found[0]


def _meant(pattern: str) -> list[Check]:
    """The checks that an id, a chapter, or a pattern with * and ? means."""
    meant = [
        check for check in CHECKS if check.chapter == pattern or fnmatchcase(check.id, pattern)
    ]
    if not meant:
        raise _unknown(pattern)
    return meant


def _unknown(name: str) -> SpecError:
    chapters = ", ".join(chapter.name for chapter in CHAPTERS)
    return SpecError(
        f"no check is called {name!r}: give an id, a chapter ({chapters}), or a pattern such as "
        "'resuming.cut*'; --list shows all"
    )
