"""On the host: each test's reports come from the guest. In the guest: where they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kernel_guest import REPORTS, Run, flavour_inside, run_folder
from vmtest.inside import WORK
from vmtest.mtty import FLAVOURS

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
INSIDE = flavour_inside() is not None
#: On the host, for whichever test comes first and has to wait for all of them.
TIMEOUT_S = 900


@pytest.fixture(autouse=True)
def kernel(flavour: str) -> str:
    """Every test is run once with each flavour of modules."""
    return flavour


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.definition.iter_markers("parametrize")
    if not any("flavour" in mark.args[0] for mark in chosen):
        metafunc.parametrize("flavour", [flavour.name for flavour in FLAVOURS])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and not INSIDE:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


if INSIDE:
    #: Hooks about reports are not told which run they belong to.
    CONFIGS: list[pytest.Config] = []

    def pytest_configure(config: pytest.Config) -> None:
        CONFIGS.append(config)

    def pytest_runtest_logreport(report: pytest.TestReport) -> None:
        (config,) = CONFIGS
        data = config.hook.pytest_report_to_serializable(config=config, report=report)
        with (WORK / REPORTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(data) + "\n")

else:

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
        if HERE not in item.path.parents:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in _reports_of(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True


def _flavour_of(item: pytest.Item) -> str:
    assert isinstance(item, pytest.Function)
    return str(item.callspec.params["flavour"])


def _reports_of(item: pytest.Item) -> Sequence[pytest.TestReport]:
    flavour = _flavour_of(item)
    run = Run(flavour, run_folder(item.config, flavour))
    together = [
        other.nodeid
        for other in item.session.items
        if HERE in other.path.parents and _flavour_of(other) == flavour
    ]
    found = run.reports(together).get(item.nodeid)
    if found:
        restore = item.config.hook.pytest_report_from_serializable
        return [restore(config=item.config, data=data) for data in found]
    return [
        pytest.TestReport(
            item.nodeid, item.location, {}, "failed", run.why_missing(), "call", duration=0.0
        )
    ]
