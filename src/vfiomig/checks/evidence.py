"""What a check did, what it expected and what it saw, and what follows from that.

Theory of operation
-------------------
A check states what it expects beside what it got, and never judges by itself. ``Evidence`` notes
both sides in words, raises ``Broken`` where they differ, and goes on after a difference that is a
known habit of drivers, which makes the verdict "deviates". A step is noted before it is made, so
what a check hangs in is its last one.
"""

from __future__ import annotations

import enum
import errno
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from vfiomig.abi import vfio
from vfiomig.fsm import State

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from typing import NoReturn

__all__ = (
    "END_IN_TIME",
    "Broken",
    "Evidence",
    "Gone",
    "Inapplicable",
    "Stuck",
    "Unrun",
    "Verdict",
    "errno_text",
    "state_text",
    "transfer_text",
)

T = TypeVar("T")

#: What a check is at before its first step.
BEFORE = "bringing the device to RUNNING"
#: What is expected of everything that a check waits for.
END_IN_TIME = "an end in time"
#: Steps and comparisons beyond these are told by their number.
MOST_STEPS = 40
MOST_COMPARISONS = 16


class Verdict(enum.StrEnum):
    """What came of a check."""

    PASS = "pass"
    #: It breaks a rule that everybody has to keep.
    FAIL = "fail"
    #: It does what some drivers are known to do, or leaves what it need not do.
    DEVIATES = "deviates"
    NOT_APPLICABLE = "not_applicable"
    NOT_RUN = "not_run"


class Broken(Exception):
    """The device does not do what a rule says; the evidence tells both."""


class Inapplicable(Exception):
    """This device, or this way to it, has nothing that the rule is about."""


class Unrun(Exception):
    """What has to happen before did not work, and is the subject of another check."""


class Gone(Exception):
    """No request reaches the device any more; the message says why."""


class Stuck(Exception):
    """The device is there, and nothing brings it to where a check can begin."""


def errno_text(number: int) -> str:
    """Name a result: an errno, or 0."""
    if number == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # ENOTSUP has the same number, and no kernel uses the name
    return errno.errorcode.get(number, f"errno {number}") if number else "success"


def transfer_text(count: int) -> str:
    """Name what a read or write returned: bytes, or a negative errno."""
    return errno_text(-count) if count < 0 else "1 byte" if count == 1 else f"{count} bytes"


def state_text(number: int) -> str:
    """Name a state, or what is none."""
    return State(number).name if 0 <= number < vfio.VFIO_DEVICE_STATE_NR else hex(number)


class Evidence:
    """The account of one check."""

    def __init__(self) -> None:
        self._steps: list[str] = []
        self._left_out = 0
        self._expected: list[str] = []
        self._saw: list[str] = []
        self._seen_alike: set[tuple[str, str, str]] = set()
        #: Known habits that were met: what was expected instead, and what was seen, with the rule.
        self.deviations: list[tuple[str, str]] = []

    # What it does.

    def step(self, what: str) -> int:
        """Note what is about to be done; the number is for ``outcome``."""
        if len(self._steps) < MOST_STEPS:
            self._steps.append(what)
            return len(self._steps) - 1
        self._left_out += 1
        self._steps[-1] = what  # the last one always shows
        return MOST_STEPS - 1

    def outcome(self, step: int, what: str) -> None:
        self._steps[step] += f" -> {what}"

    # What it compares.

    def expect(
        self,
        what: str,
        got: T,
        wanted: T,
        *others: T,
        known: Mapping[T, str] | None = None,
        show: Callable[[T], str] = str,
    ) -> None:
        """Compare; ``others`` are as good as ``wanted``, ``known`` leads from habits to rules."""
        wish = " or ".join(dict.fromkeys(map(show, (wanted, *others))))
        self._note(what, wish, show(got))
        if got in (wanted, *others):
            return
        if known is None or got not in known:
            raise Broken
        self._deviate(what, wish, show(got), known[got])

    def expect_errno(
        self, what: str, got: int, wanted: int, *others: int, known: Mapping[int, str] | None = None
    ) -> None:
        self.expect(what, got, wanted, *others, known=known, show=errno_text)

    def expect_transfer(self, what: str, got: int, wanted: int) -> None:
        """Compare what a read or write returned with an errno, or 0 for the end of the state."""
        self.expect(what, got, -wanted, show=transfer_text)

    def expect_state(
        self, what: str, got: int, wanted: int, *others: int, known: Mapping[int, str] | None = None
    ) -> None:
        self.expect(what, got, wanted, *others, known=known, show=state_text)

    def expect_that(self, what: str, holds: object, wanted: str, saw: str) -> None:
        """Note a comparison that is more than equality."""
        self._note(what, wanted, saw)
        if not holds:
            raise Broken

    def still_under_way(self, what: str) -> NoReturn:
        """Note what has had no end in time."""
        self._note(what, END_IN_TIME, "still under way")
        raise Broken

    def prefer(self, what: str, holds: object, wanted: str, saw: str, rule: str) -> None:
        """Note what a device may leave out: if it does, it deviates."""
        self._note(what, wanted, saw)
        if not holds:
            self._deviate(what, wanted, saw, rule)

    def _deviate(self, what: str, wanted: str, saw: str, rule: str) -> None:
        met = (f"{what}: {wanted}", f"{what}: {saw} ({rule})")
        if met not in self.deviations:
            self.deviations.append(met)

    def _note(self, what: str, wanted: str, saw: str) -> None:
        if (what, wanted, saw) in self._seen_alike:
            return
        self._seen_alike.add((what, wanted, saw))
        self._expected.append(f"{what}: {wanted}")
        self._saw.append(f"{what}: {saw}")

    # What it tells.

    @property
    def last_step(self) -> str:
        return self._steps[-1] if self._steps else BEFORE

    @property
    def did(self) -> str:
        steps = list(self._steps)
        if self._left_out:
            steps.insert(-1, f"... {self._left_out} more ...")
        runs = ((step, len(list(alike))) for step, alike in groupby(steps))
        return "; ".join(f"{step} ({count} times)" if count > 1 else step for step, count in runs)

    @property
    def expected(self) -> str:
        return _listed(self._expected)

    @property
    def saw(self) -> str:
        return _listed(self._saw)

    @property
    def first_difference(self) -> tuple[str, str]:
        """The comparison that broke, after ``Broken``."""
        return self._expected[-1], self._saw[-1]


def _listed(sentences: Collection[str]) -> str:
    shown = list(sentences)[:MOST_COMPARISONS]
    left = len(sentences) - len(shown)
    return "; ".join(shown) + (f"; ... {left} more alike" if left else "")
