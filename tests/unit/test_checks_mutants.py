"""The checks find what is planted: each mutant by the check that names its rule, and few others.

Each test prints its row of the kill table: ``pytest -rP`` shows them all.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from errno import EINVAL, ENOTTY, EOPNOTSUPP
from typing import TYPE_CHECKING

import pytest

from devices.drilled import LEVERS
from mutants.bench import REPORT
from mutants.table import MUTANTS, Bench, Mutant
from vfiomig.abi.ioctls import Dialect
from vfiomig.checks import CHECKS, Levers, Shows, Suite, Verdict, choose
from vfiomig.checks.suite import BUG

if TYPE_CHECKING:
    from vfiomig.checks import Report

#: These run the whole suite, and so many checks may find them.
WHOLE = {
    "unknown_flags_are_ignored": 2,
    "the_header_is_taken_by_its_word": 8,
    "a_page_of_ranges_is_not_the_limit": 1,
    "flags_are_an_echo_for_ever": 2,
    "a_refusal_tells_the_target_in_v6": 4,
}


def run(mutant: Mutant, chapters: list[str], monkey: pytest.MonkeyPatch) -> Report:
    bench = Bench(monkey, mutant.caps, mutant.dialect)
    mutant.body(bench)
    try:
        with Suite(bench.serve(), mutant.name, levers=LEVERS, deadline=mutant.deadline) as suite:
            report = suite.run(choose(chapters))
    finally:
        mutant.release()
        bench.end()
    assert [result for result in report.results if result.saw.startswith(BUG)] == []
    return report


def found(report: Report) -> list[str]:
    verdicts = (Verdict.FAIL, Verdict.DEVIATES)
    return [result.check.id for result in report.results if result.verdict in verdicts]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "vfiomig")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found_by_the_check_that_names_its_rule(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = MUTANTS[name]
    chapter = mutant.caught_by.partition(".")[0]
    caught = found(run(mutant, [chapter], monkeypatch))
    print(f"{name:<52} {mutant.rule:<14} {', '.join(caught)}")
    assert mutant.caught_by in caught
    assert len(caught) <= 1 + mutant.others, caught


@pytest.mark.parametrize("name", WHOLE)
def test_other_chapters_do_not_mind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    caught = found(run(mutant, [], monkeypatch))
    assert mutant.caught_by in caught
    assert len(caught) <= WHOLE[name], caught


def test_every_rule_of_a_mutant_is_one_that_its_check_cites() -> None:
    cited = {check.id: check.rules for check in CHECKS}
    wrong = [
        (mutant.name, mutant.rule, cited[mutant.caught_by])
        for mutant in MUTANTS.values()
        if mutant.rule not in cited[mutant.caught_by]
    ]
    assert wrong == []
    assert len(MUTANTS) >= 40


def test_every_check_is_tried_by_a_fault() -> None:
    """Pairs of states share a body, and are tried by some; descriptors are, behind a door."""
    tried = {mutant.caught_by for mutant in MUTANTS.values()}
    untried = [
        check.id
        for check in CHECKS
        if check.id not in tried and check.pair is None and Shows.DESCRIPTORS not in check.shows
    ]
    assert untried == []


#: What the kernel's mtty does otherwise, by mutants that do just that, and a log that is a stub.
HABITS_OF_MTTY = (
    "the_temporary_end_is_zero",
    "a_failed_write_is_forgotten",
    "bad_data_is_a_bad_address",
    "a_log_can_be_started_twice",
    "a_state_survives_the_last_close",
)


def test_the_habits_of_a_known_driver_are_deviations(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, "all", Dialect.LANDED)
    for name in HABITS_OF_MTTY:
        MUTANTS[name].body(bench)
    bench.swap(lambda asked: asked == (40, REPORT), {0: EOPNOTSUPP})
    bench.swap(
        lambda asked: asked == (40, REPORT) and bench.served.dirty_log is None,
        {EINVAL: EOPNOTSUPP},
    )
    bench.answer(lambda asked: asked.number == 12, ENOTTY)
    with Suite(bench.serve(), "mtty", levers=Levers()) as suite:
        suite.facts = replace(suite.facts, kernel=(6, 12, 117), identity=(0x4348, 0x3253))
        report = suite.run(choose())
    bench.end()
    results = {result.check.id: result for result in report.results}
    assert [r.check.id for r in report.failed] == []
    assert {name for name, r in results.items() if r.verdict is Verdict.NOT_RUN} == {
        "reopen.from-resuming",
        *(check.id for check in CHECKS if check.lever == "write_by_dma"),
    }
    assert "FAULT-29" in results["reopen.from-resuming"].saw
    rules = {
        "precopy.the-temporary-end-is-enomsg": "FAULT-8",
        "resuming.a-foreign-state-is-refused": "FAULT-13",
        "resuming.a-write-after-a-failed-one-saves-nothing": "FAULT-13",
        "dma.start-is-refused-while-logging": "LOG-11",
        "dma.report-needs-a-log": "mtty",
        "reopen.from-stop": "FAULT-29",
    }
    for name, rule in rules.items():
        assert results[name].verdict is Verdict.DEVIATES
        assert rule in results[name].saw
    chapters = {r.check.chapter for r in results.values() if r.verdict is Verdict.DEVIATES}
    assert chapters == {"precopy", "resuming", "dma", "reopen"}
