"""An IO address space against a plain model of what may be mapped, where, and by whom it is used."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from iommu_requests import Nothing
from vfiomig.errors import RequestError
from vfiomig.iommu import IoSpace, Mapping
from vfiomig.iommu.limits import ALIGNMENT, Limit

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = ALIGNMENT
#: The model knows the first pages only, one by one.
PAGES = 24
#: All the others are reserved from the start.
BEYOND = Limit(((PAGES * PAGE, (1 << 64) - 1),), PAGE)

runs = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 6)).map(
    lambda run: range(run[0], min(PAGES, run[0] + run[1]))
)


def mapping(run: range) -> Mapping:
    return Mapping(run.start * PAGE, len(run) * PAGE, Nothing(), 0, readable=True, writable=True)


def bounds(run: range) -> tuple[int, int]:
    return run.start * PAGE, run.stop * PAGE - 1


def errno_of(call: Callable[[], None]) -> int:
    try:
        call()
    except RequestError as failure:
        return failure.errno or -1
    return 0


class Space(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.space = IoSpace(limits=[BEYOND])
        self.mapped: set[int] = set()
        self.promised: list[range] = []
        self.limits: dict[int, range] = {}
        self.owners = 0

    @property
    def reserved(self) -> set[int]:
        return {page for limit in self.limits.values() for page in limit}

    @property
    def kept(self) -> set[int]:
        return {page for promise in self.promised for page in promise}

    @rule(run=runs)
    def map(self, run: range) -> None:
        taken = errno.EEXIST if self.mapped & set(run) else 0
        wrong = errno.EINVAL if self.reserved & set(run) else taken
        assert errno_of(lambda: self.space.map(mapping(run))) == wrong
        self.mapped |= set() if wrong else set(run)

    @rule(run=runs)
    def unmap(self, run: range) -> None:
        if self.space.mapped_length(run.start * PAGE, PAGE):
            whole = self.space.find_locked(run.start * PAGE, PAGE)
            assert whole is not None
            assert self.space.unmap(whole.iova, whole.length) == whole.length
            self.mapped -= set(range(whole.iova // PAGE, whole.end // PAGE))

    @rule(run=runs)
    def limit(self, run: range) -> None:
        wrong = errno.EADDRINUSE if (self.mapped | self.kept) & set(run) else 0
        owner = self.owners = self.owners + 1
        assert errno_of(lambda: self.space.limit(owner, Limit((bounds(run),)))) == wrong
        if not wrong:
            self.limits[owner] = run

    @precondition(lambda self: self.limits)
    @rule(data=st.data())
    def unlimit(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.limits)))
        self.space.unlimit(owner)
        del self.limits[owner]

    @rule(one=runs, other=runs)
    def allow(self, one: range, other: range) -> None:
        promised = [one] if set(one) & set(other) else [one, other]
        wrong = (
            errno.EADDRINUSE if self.reserved & {page for run in promised for page in run} else 0
        )
        assert errno_of(lambda: self.space.allow([bounds(run) for run in promised])) == wrong
        self.promised = self.promised if wrong else promised

    @rule()
    def allow_everything(self) -> None:
        self.space.allow([])
        self.promised = []

    @rule(length=st.integers(1, 6))
    def place(self, length: int) -> None:
        """At the lowest multiple of its size that is free, and never at 0."""
        step = 1 << (length - 1).bit_length()
        free = set(range(PAGES)) - self.reserved - self.mapped
        fits = [
            start
            for start in range(step, PAGES, step)
            if free.issuperset(range(start, start + length))
            and (not self.promised or self.kept.issuperset(range(start, start + length)))
        ]
        placed: list[int] = []
        wrong = errno_of(
            lambda: placed.append(self.space.map_anywhere(mapping(range(length))) // PAGE)
        )
        assert (wrong, placed) == ((0, fits[:1]) if fits else (errno.ENOSPC, []))
        self.mapped |= {start + page for start in placed for page in range(length)}

    @invariant()
    def nothing_is_mapped_reserved_and_promised_at_once(self) -> None:
        usable = [range(first // PAGE, (last + 1) // PAGE) for first, last in self.space.usable()]
        assert {page for run in usable for page in run} == set(range(PAGES)) - self.reserved
        assert not self.reserved & (self.mapped | self.kept)


TestSpace = Space.TestCase
TestSpace.settings = settings(stateful_step_count=30)
