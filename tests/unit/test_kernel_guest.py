"""kernel_guest: a test in a guest that gives no report is a failure that tells why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import kernel_guest
from kernel_guest import CHECK, MATRIX, REPORTS, Run
from vfiomig.errors import GuestTimeout

if TYPE_CHECKING:
    from pathlib import Path

TEST = "tests/guest/test_x.py::test_x[cdev]"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_guest, "ROOT", tmp_path / "root")
    (tmp_path / "root").mkdir()


def test_a_guest_that_hangs_leaves_its_console_and_what_pytest_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boot(run: Run) -> str:
        (tmp_path / "run/output").write_text("test_x is still running\n")
        (tmp_path / "run" / REPORTS).write_text(json.dumps({"nodeid": "another"}) + "\n")
        raise GuestTimeout("it took too long; the console: Oops")

    monkeypatch.setattr(Run, "_boot_and_run", boot)
    run = Run("cdev", tmp_path / "run")
    assert list(run.reports([TEST])) == ["another"]
    assert (tmp_path / "run/tests").read_text() == f"{TEST}\n"
    reason = run.why_missing()
    assert "the console: Oops" in reason
    assert "test_x is still running" in reason


def test_a_guest_is_booted_once_for_all_who_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    booted: list[Run] = []

    def boot(run: Run) -> str:
        booted.append(run)
        return ""

    monkeypatch.setattr(Run, "_boot_and_run", boot)
    for _ in range(2):
        assert Run("cdev", tmp_path / "run").reports([TEST]) == {}
    assert len(booted) == 1


@pytest.mark.parametrize(
    ("name", "kept"), [(MATRIX, "mtty-matrix.json"), (CHECK, "mtty-check.json")]
)
def test_what_both_guests_saw_is_in_one_document(
    name: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boot(run: Run) -> str:
        (run._folder / name).write_text(json.dumps({"cells": run._flavour}))
        return ""

    monkeypatch.setattr(Run, "_boot_and_run", boot)
    for flavour in ("group", "cdev", "group"):
        Run(flavour, tmp_path / f"{flavour}").reports([TEST])
    document = json.loads((tmp_path / "root/build" / kept).read_text())
    assert document == {"group": {"cells": "group"}, "cdev": {"cells": "cdev"}}
