"""Reports: the JSON document, JUnit for build servers, the page, and what a terminal shows."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from devices.drilled import LEVERS, Drilled
from vfiomig import State, StateRejected
from vfiomig.abi.ioctls import Dialect
from vfiomig.checks import CHECKS, Report, Result, Suite, Verdict, choose, find
from vfiomig.cli.check_table import show
from vfiomig.client import device_maker
from vfiomig.report import as_data, as_junit, matrix
from vfiomig.report.html import as_html

if TYPE_CHECKING:
    from vfiomig import StateReader

#: What a device could bring into a report: markup, and what XML cannot hold.
NASTY = "<b>&\"'\0\x1b]]>{{ 7 * 7 }}"


class Flawed(Drilled):
    """Fails one check, deviates in another, and hangs in none."""

    def load(self, state: StateReader) -> None:
        if state.read(1) == b"":
            return  # an empty state is as good as any
        raise StateRejected("none is good")


@pytest.fixture(scope="module")
def report() -> Report:
    only = ["states", "saving", "resuming", "dma", "v6"]
    with Suite(device_maker(Flawed()), "model:flawed") as suite:
        found = suite.run(choose(only))
    odd = find("sessions.a-reader-wakes-when-its-session-ends")
    results = [*found.results, Result(odd, Verdict.FAIL, NASTY, NASTY, NASTY)]
    return found._replace(results=results, target=f"model:{NASTY}")


def test_the_report_of_these_tests_has_every_verdict(report: Report) -> None:
    assert all(report.summary.values())
    assert sum(report.summary.values()) == len(report.results)


def test_the_document_has_what_machines_want_and_nothing_else(report: Report) -> None:
    data = json.loads(json.dumps(as_data(report)))
    assert list(data) == ["target", "summary", "checks"]
    assert list(data["summary"]) == ["pass", "fail", "deviates", "not_applicable", "not_run"]
    assert data["summary"] == Counter(check["verdict"] for check in data["checks"])
    for check, result in zip(data["checks"], report.results, strict=True):
        assert list(check) == ["id", "verdict", "clause", "did", "expected", "saw"]
        assert check["id"] == result.check.id
        assert check["clause"].startswith("docs/protocol.md, ")
        assert check["saw"]
        if check["verdict"] in {"pass", "fail", "deviates"}:
            assert check["did"]
            assert check["expected"]


def test_junit_counts_what_failed_and_what_was_skipped(report: Report) -> None:
    root = ET.fromstring(as_junit(report))
    (suite,) = root
    summary = report.summary
    assert suite.get("tests") == str(len(report.results))
    assert suite.get("failures") == str(summary[Verdict.FAIL])
    skipped = summary[Verdict.NOT_APPLICABLE] + summary[Verdict.NOT_RUN]
    assert suite.get("skipped") == str(skipped)
    cases = {case.get("name"): case for case in suite}
    assert len(cases) == len(report.results)
    for result in report.results:
        tags = [child.tag for child in cases[result.check.id]]
        wanted = {
            Verdict.PASS: [],
            Verdict.FAIL: ["failure"],
            Verdict.DEVIATES: ["system-out"],
        }
        assert tags == wanted.get(result.verdict, ["skipped"])
    failure = cases["sessions.a-reader-wakes-when-its-session-ends"].find("failure")
    assert failure is not None
    assert failure.get("message") == NASTY.replace("\0", "\ufffd").replace("\x1b", "\ufffd")


def test_a_lost_device_is_an_error_to_build_servers(report: Report) -> None:
    unrun = [result for result in report.results if result.verdict is Verdict.NOT_RUN]
    lost = [unrun[0], *(replace(result, saw="it is gone") for result in unrun[1:])]
    (suite,) = ET.fromstring(as_junit(report._replace(results=lost, lost="it is gone")))
    assert suite.get("skipped") == "1"
    assert suite.get("errors") == str(len(suite) - 1)
    assert [child.tag for case in suite for child in case] == [
        "skipped",
        *["error"] * len(unrun[1:]),
    ]


class Page(HTMLParser):
    """Which tags a page has, what they refer to, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        named = dict(attrs)
        self.ids += [value for value in [named.get("id")] if value]
        self.references += [named[key] or "" for key in ("href", "src", "data") if key in named]
        if tag not in {"meta", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_and_refers_to_nothing_outside(report: Report) -> None:
    text = as_html(report)
    page = Page(text)
    assert page.open == []
    assert page.tags["script"] == 0
    icon, *anchors = page.references
    assert icon == "data:,"
    found = [r.check.id for r in report.results if r.verdict in {Verdict.FAIL, Verdict.DEVIATES}]
    assert sorted(anchors) == sorted(f"#{name}" for name in found)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert page.tags["rect"] == 8 * 9
    assert {result.check.id for result in report.results} <= set(page.ids)
    assert page.tags["details"] == len(report.results)


def test_what_a_device_says_is_text_on_the_page(report: Report) -> None:
    page = Page(as_html(report))
    assert "b" not in page.tags
    assert any("{{ 7 * 7 }}" in word for word in page.words)


def test_the_matrix_has_a_row_for_each_state_and_a_column_for_what_is_none(report: Report) -> None:
    rows = matrix(report)
    assert [row.origin for row in rows] == [state.name for state in State]
    assert {len(row.cells) for row in rows} == {9}
    assert rows[State.STOP].cells[State.STOP_COPY].text == "ok +r"
    assert rows[State.STOP_COPY].cells[8].text == "EINVAL ="
    assert rows[State.ERROR].cells[0].text == "\N{EN DASH}"


def test_without_checks_of_pairs_there_is_no_matrix() -> None:
    with Suite(device_maker(Drilled(), Dialect.V6), levers=LEVERS) as suite:
        report = suite.run(choose(["size", "v6"]))
    assert matrix(report) == []
    assert "<svg" not in as_html(report)


def test_a_terminal_shows_the_matrix_the_chapters_and_what_was_found(
    report: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    show(report._replace(target="model:flawed"))
    output = capsys.readouterr().out
    assert output.startswith("model:flawed: calls in this process, dialect landed, migration ")
    assert re.search(r"^STOP +EINVAL +ok +ok +ok \+r +", output, re.MULTILINE)
    assert re.search(r"^resuming +\d+ +\d+ +\d+ +\d+ +", output, re.MULTILINE)
    failed = output.index("\nfail saving.what-was-saved-can-be-loaded\n")
    deviates = output.index("\ndeviates resuming.an-empty-state-is-refused\n")
    assert failed < deviates
    assert "saw       a load of nothing: it was taken (FAULT-12, FAULT-16)" in output
    assert "FAULT rules tell what drivers are known to do" in output
    assert [line for line in output.splitlines() if len(line) > 110] == []
    summary = output.splitlines()[-1]
    assert re.fullmatch(
        r"\d+ pass, \d+ fail, \d+ deviates, \d+ not applicable, \d+ not run, in \d+\.\d s", summary
    )


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (
            100,
            r"^STOP_COPY +EINVAL = ok x ok x +ok = +ok \+w x +ok x +EINVAL = EINVAL = EINVAL = *$",
        ),
        (80, r"^STOP_COPY +EINVAL= okx +okx +ok= +ok\+wx +okx +EINVAL= EINVAL= EINVAL= *$"),
        (60, r"^from STOP_COPY to ERROR EINVAL =, STOP ok x, RUNNING ok x, *$"),
    ],
)
def test_the_matrix_fits_the_terminal(
    columns: int,
    row: str,
    report: Report,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    pairs = [result for result in report.results if result.check.pair is not None]
    show(report._replace(target="model:flawed", results=pairs))
    output = capsys.readouterr().out
    assert re.search(row, output, re.MULTILINE), output


def test_many_checks_that_were_not_run_are_told_by_their_chapters(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [Result(check, Verdict.NOT_RUN, "", "", "it is lost") for check in CHECKS]
    lost = report._replace(target="model:flawed", results=results, lost="it is lost")
    show(lost._replace(interrupted=True))
    output = " ".join(capsys.readouterr().out.split())
    assert f"not run: {len(CHECKS)} checks: " in output
    assert "72 of states, " in output
    assert output.endswith("in 0.0 s, interrupted")
    page = as_html(lost._replace(interrupted=True))
    assert "<dt>lost</dt><dd>it is lost</dd>" in page
    assert "<dt>interrupted</dt>" in page


def test_every_check_can_be_told_in_all_forms() -> None:
    with Suite(device_maker(Drilled()), levers=LEVERS) as suite:
        facts = suite.facts
    for verdict in Verdict:
        results = [Result(check, verdict, "did", "wanted", "saw") for check in CHECKS]
        report = Report("all", facts, results)
        ET.fromstring(as_junit(report))
        Page(as_html(report))
        assert len(as_data(report)["checks"]) == len(CHECKS)
