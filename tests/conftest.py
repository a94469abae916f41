"""Two rules for every test: it leaves nothing behind, and in CI it is not skipped."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from leftovers import left_behind, take_snapshot

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fail a test after which a descriptor, a thread or a child process is still there.

    Fixtures of a module or the session are set up before and torn down after, so what they
    hold is not counted.
    """
    before = take_snapshot()
    yield
    if sentences := left_behind(before):
        pytest.fail("left behind by the test:\n  " + "\n  ".join(sentences), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not hasattr(report, "wasxfail"):
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure where CI=true: what isn't run there is run nowhere."""
    if report.skipped and os.environ.get("CI") == "true":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, which CI=true forbids. {reason}"
