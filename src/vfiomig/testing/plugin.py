"""``pytest --vfiomig-target TARGET``: every check is a test.

The tests are added behind those that were collected. They share one open of the target, which is
nobody else's meanwhile: they cannot be spread over processes. What is not applicable or was not
run is skipped, with the reason; a deviation passes, and its report has a section that tells it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import pytest

from vfiomig.checks import DEADLINE, Suite, Verdict, choose
from vfiomig.checks.stream import STATE_LIMIT
from vfiomig.client import target_maker
from vfiomig.errors import SpecError, VfioMigError
from vfiomig.models import parse_size
from vfiomig.testing import evidence_of

if TYPE_CHECKING:
    from os import PathLike

    from vfiomig.checks import Check, Result

__all__ = ("Checks",)


class CheckFailed(Exception):
    """A check failed; the message is its evidence."""


class Checks:
    """The plugin while a target is checked."""

    def __init__(self, config: pytest.Config) -> None:
        if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
            raise pytest.UsageError("--vfiomig-target: one process has the target; leave -n out")
        self.target: str = config.getoption("vfiomig_target")
        self._dangerous: bool = config.getoption("vfiomig_dangerous")
        self._deadline: float = config.getoption("vfiomig_deadline") or DEADLINE
        limit: str | None = config.getoption("vfiomig_state_limit")
        self._suite: Suite | None = None
        self._trouble = ""
        try:
            self._state_limit = parse_size(limit) if limit else STATE_LIMIT
            self._checks = choose(
                config.getoption("vfiomig_only"), config.getoption("vfiomig_skip")
            )
            self._maker = target_maker(self.target)
        except SpecError as problem:
            raise pytest.UsageError(str(problem)) from None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, items: list[pytest.Item]
    ) -> None:
        items.extend(
            CheckItem.from_parent(
                session,
                name=check.id,
                nodeid=f"vfiomig[{self.target}]::{check.id}",
                check=check,
                checks=self,
            )
            for check in self._checks
        )

    def pytest_sessionfinish(self) -> None:
        if self._suite is not None:
            self._suite.leave_running()  # which an interrupted check did not
            self._suite.close()
            self._suite = None

    def run(self, check: Check) -> Result:
        """Run a check; the first one opens the target."""
        if self._suite is None:
            if self._trouble:
                raise CheckFailed(self._trouble)
            try:
                self._suite = Suite(
                    self._maker,
                    self.target,
                    dangerous=self._dangerous,
                    deadline=self._deadline,
                    state_limit=self._state_limit,
                )
            except VfioMigError as problem:
                self._trouble = str(problem)
                raise CheckFailed(self._trouble) from None
        was_there = not self._suite.lost
        result = self._suite.run_check(check)
        if self._suite.interrupted:
            raise KeyboardInterrupt
        if self._suite.lost and was_there and result.verdict is Verdict.NOT_RUN:
            raise CheckFailed(f"{self.target} was lost: {self._suite.lost}")
        return result


class CheckItem(pytest.Item):
    """One check as a test."""

    def __init__(self, *, check: Check, checks: Checks, **node: object) -> None:
        super().__init__(**node)  # type: ignore[arg-type]  # as from_parent gives them
        self._check = check
        self._checks = checks

    def runtest(self) -> None:
        result = self._checks.run(self._check)
        self.user_properties.append(("verdict", str(result.verdict)))
        match result.verdict:
            case Verdict.FAIL:
                raise CheckFailed(evidence_of(result))
            case Verdict.NOT_APPLICABLE | Verdict.NOT_RUN:
                skip(f"{result.verdict}: {result.saw}")
            case Verdict.DEVIATES:
                self.add_report_section("call", "vfiomig", evidence_of(result))

    def repr_failure(  # type: ignore[override]  # one failure has no traceback that helps
        self, excinfo: pytest.ExceptionInfo[BaseException]
    ) -> object:
        if isinstance(excinfo.value, CheckFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[PathLike[str] | str, int | None, str]:
        return self.path, None, self.nodeid  # as it is: pytest makes :: of the dots of a name


def skip(reason: str) -> NoReturn:
    pytest.skip(reason)
