"""``vfiomig check`` as a user meets it: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from c_style_server import CStyleServer
from vfiomig import State
from vfiomig.checks import CHAPTERS, CHECKS
from vfiomig.cli.app import main

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]

#: A reset of it fails.
BAD = """
from vfiomig import Device

class Bad(Device):
    def load(self, state):
        pass
    def save(self):
        return [b"state"]
    def reset(self):
        raise ValueError("it has a bug")
"""


@pytest.fixture
def bad(tmp_path: Path) -> str:
    file = tmp_path / "bad.py"
    file.write_text(BAD)
    return f"model:{file}:Bad"


def check(*arguments: str | Path) -> int:
    return main(["check", *map(str, arguments)])


def test_a_good_device_is_0_and_its_evidence_is_on_stdout_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check("model:counter", "--only", "states", "--only", "size") == 0
    output = capsys.readouterr()
    assert output.out.startswith("model:counter: calls in this process")
    assert output.err == ""


def test_a_check_that_fails_is_1(
    bad: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert check(bad, "--only", "reset.from-stop") == 1
    assert "fail reset.from-stop" in capsys.readouterr().out
    assert "reset() raised" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "name a device: vfiomig check /dev/vfio/devices/vfio0, or model:counter"),
        (("model:counter", "--fd", "3"), "model:counter and --fd 3 are two devices: leave one out"),
        (("--fd", "-3"), "--fd -3: give the number of an open descriptor"),
        (
            ("--fd", "77"),
            "descriptor 77 cannot be opened: EBADF; hand it over when this program is started",
        ),
        (("--fd", "77", "--dialect", "v6"), "the dialect of fd:77 is its own"),
        (("model:nothing",), "no device is called 'nothing'"),
        (("/dev/vfio/devices/vfio77",), "vfio77 cannot be opened: ENOENT"),
        (("model:counter", "--only", "nothing"), "no check is called 'nothing'"),
        (("model:counter", "--skip", "nothing"), "no check is called 'nothing'"),
        (("--explain", "states"), "no check is called 'states'"),
        (("model:counter", "--state-limit", "much"), "--state-limit: 'much' is no whole number"),
        (("model:counter", "--deadline", "0"), "a deadline of 0 s: give seconds, more than 0"),
        (("model:counter", "--deadline", "nan"), "a deadline of nan s: give seconds"),
        (("model:counter", "--deadline", "inf"), "a deadline of inf s: give seconds"),
        (("model:counter", "--html", "/nowhere/x.html"), "--html /nowhere/x.html: give the path"),
        (("model:counter", "--junit", "/"), "--junit /: give the path of a file"),
        (("model:counter", "--junit", "/proc/x.xml"), "/proc/x.xml: "),
    ],
)
def test_usage_and_targets_that_are_not_there_are_2_in_one_line(
    arguments: Sequence[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert sentence in line


def test_a_device_that_cannot_migrate_is_told_why_and_shown_no_empty_matrix(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check("model:pattern,size=4K,caps=none", "--only", "states") == 0
    output = capsys.readouterr().out
    assert "migration none: whoever serves it gives it no capability to" in output.splitlines()[0]
    assert output.endswith("72 not applicable, in 0.0 s\n")
    assert "from \\ to" not in output


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("model:counter", "--only", "sessions", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["target"] == "model:counter"
    assert data["summary"]["fail"] == 0
    assert {check["id"].partition(".")[0] for check in data["checks"]} == {"sessions"}


def test_reports_are_written_beside_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junit, html = tmp_path / "junit.xml", tmp_path / "page.html"
    assert check("model:counter", "--only", "size", "--junit", junit, "--html", html) == 0
    assert capsys.readouterr().out
    (suite,) = ET.parse(junit).getroot()
    assert suite.get("tests") == "5"
    assert "model:counter" in html.read_text()


def test_without_its_extra_the_page_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def bare(name: str, *rest: Any) -> Any:
        if name == "vfiomig.report.html":
            raise ModuleNotFoundError("no jinja2", name="jinja2")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", bare)
    assert check("model:counter", "--html", tmp_path / "page.html") == 2
    output = capsys.readouterr()
    assert output.err == "vfiomig: --html needs jinja2: pip install 'vfiomig[report]'\n"
    assert not (tmp_path / "page.html").exists()


def test_the_list_has_every_check_and_opens_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {row.id for row in CHECKS} <= {line.strip() for line in lines}
    assert {chapter.name for chapter in CHAPTERS} <= {line.partition(":")[0] for line in lines}
    assert check("--list", "--only", "size") == 0
    assert "states" not in capsys.readouterr().out


@pytest.mark.parametrize("options", [("--list",), ("--explain", "size.it-is-no-errno")])
def test_checks_are_told_to_machines_too(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert check("--json", "--only", "size", *options) == 0
    told = json.loads(capsys.readouterr().out)["checks"]
    (one,) = (row for row in told if row["id"] == "size.it-is-no-errno")
    assert (one["chapter"], one["danger"]) == ("size", None)
    assert one["rule"].startswith("The length is below 2^63")
    assert "docs/protocol.md, SIZE-1, FAULT-20" in one["clause"]
    assert "devices with feature 9" in one["only_for"]
    assert len(told) == (5 if "--list" in options else 1)


def test_a_check_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--explain", "states.stop-copy-to-pre-copy") == 0
    text = capsys.readouterr().out
    for part in (
        "states.stop-copy-to-pre-copy",
        "refused with EINVAL",
        "docs/protocol.md, PATH-4",
        "include/uapi/linux/vfio.h, enum vfio_device_mig_state",
        "FAULT-1",
    ):
        assert part in text


def test_a_rule_that_a_report_cites_is_told_without_a_checkout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check("--explain", "resuming.an-empty-state-is-refused") == 0
    assert "LOAD-3: Leaving RESUMING says that" in capsys.readouterr().out
    assert check("--explain", "FAULT-16") == 0
    assert capsys.readouterr().out.startswith("FAULT-16: pds fills a short stream with zeros; the")
    assert check("--explain", "LOG-5", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"id": "LOG-5", "rule": "`num_ranges` is not 0; otherwise: EINVAL"}


def test_what_the_client_mends_is_told_by_the_report_and_not_over_and_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with CStyleServer(tmp_path / "c.sock", b"state") as server:
        server.migration = State.STOP  # a former client has left it there
        target = f"vfio-user:{tmp_path / 'c.sock'}"
        assert check(target, "--only", "discovery", "--only", "reset", "--json") == 0
    checks = {row["id"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    for name, saw in (
        ("discovery.an-untouched-device-is-in-running", "an earlier client left the device in"),
        ("reset.from-stop", "no reset is possible in"),
    ):
        assert checks[name]["verdict"] == "deviates"
        assert checks[name]["saw"] == f"what the client mended: {saw} STOP (FAULT-7)"
    assert caplog.text.count("it is brought to RUNNING") == 1


def test_v6_is_checked_where_a_model_is_served_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("model:counter", "--dialect", "v6", "--only", "v6", "--json") == 0
    assert json.loads(capsys.readouterr().out)["summary"]["pass"] == 12


#: Tells its file when it is in the middle of a check, and stays there for a while.
LONG = """
import time
from pathlib import Path
from vfiomig import Device, State

class Long(Device):
    def save(self):
        return [b"state"]
    def load(self, state):
        state.read(6)
    def step(self, origin, target):
        if target is State.STOP_COPY:
            Path(__file__).with_suffix(".reached").touch()
            time.sleep(0.5)
"""


@pytest.mark.parametrize(("form", "number"), [("--json", signal.SIGINT), ("", signal.SIGTERM)])
def test_what_was_found_before_a_signal_ended_the_run_is_printed_and_written(
    form: str, number: int, tmp_path: Path
) -> None:
    file, junit, html = (tmp_path / name for name in ("long.py", "junit.xml", "page.html"))
    file.write_text(LONG)
    words = [f"model:{file}:Long", "--only", "states", f"--junit={junit}", f"--html={html}"]
    with subprocess.Popen(
        [sys.executable, "-m", "vfiomig", "check", *words, *form.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 30
        while not file.with_suffix(".reached").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        output, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    assert errors == ""
    assert len(ET.parse(junit).getroot()[0]) == 72
    assert "interrupted" in html.read_text()
    if form:
        counts = json.loads(output)["summary"]
        assert sum(counts.values()) == 72
        assert counts["not_run"] > 40
    else:
        assert output.splitlines()[-1].endswith(", interrupted")


def test_a_terminal_sees_how_far_it_is() -> None:
    """The bar is on stderr, which is a terminal here, and is gone at the end."""
    terminal, other = os.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "vfiomig", "check", "model:counter", "--only", "states", "--json"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=other,
        timeout=100,
        check=True,
    )
    os.close(other)
    seen = os.read(terminal, 1 << 16)
    os.close(terminal)
    assert json.loads(done.stdout)["target"] == "model:counter"
    assert b"/72" in seen
