"""`vfiomig demo` as a user meets it: table, last line, JSON, bar, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from on_a_terminal import Terminal, nobody_is_left_in
from vfiomig.cli import demo as demo_module
from vfiomig.cli.app import main
from vfiomig.cli.demo_client import NOTE
from vfiomig.errors import StateRejected
from vfiomig.models.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig.device import StateReader

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "vfiomig", "demo"]
SIZE = 8 << 20
BAR0 = 4096
IDENTICAL = re.compile(rf"identical: {SIZE + BAR0} bytes, sha256 ([0-9a-f]{{64}})")
PATIENCE = 100.0

#: By dialect and device: the arcs that docs/protocol.md has between the requests that are made.
ARCS = {
    ("landed", "source"): [
        "RUNNING -> PRE_COPY",
        "PRE_COPY -> PRE_COPY_P2P",
        "PRE_COPY_P2P -> STOP_COPY",
        "STOP_COPY -> STOP",
    ],
    ("landed", "destination"): [
        "RUNNING -> RUNNING_P2P",
        "RUNNING_P2P -> STOP",
        "STOP -> RESUMING",
        "RESUMING -> STOP",
        "STOP -> RUNNING_P2P",
        "RUNNING_P2P -> RUNNING",
    ],
    ("v6", "source"): ["RUNNING -> STOP", "STOP -> STOP_COPY", "STOP_COPY -> STOP"],
    ("v6", "destination"): [
        "RUNNING -> STOP",
        "STOP -> RESUMING",
        "RESUMING -> STOP",
        "STOP -> RUNNING",
    ],
}


@pytest.fixture(autouse=True)
def _find_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client processes import from this checkout, and see no terminal of the tester's."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def run_demo(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--size", "8M", *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("dialect", ["landed", "v6"])
def test_the_table_has_every_arc_and_the_last_line_says_identical(dialect: str) -> None:
    done = run_demo("--dialect", dialect)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    *lines, last = done.stdout.splitlines()
    assert IDENTICAL.fullmatch(last)
    rows = [re.split(r"  +", line.strip()) for line in lines if " -> " in line]
    for device in ("source", "destination"):
        assert [row[1] for row in rows if row[0] == device] == ARCS[dialect, device]
    assert all(re.fullmatch(r"\d+\.\d\d (ms|s)", row[2]) for row in rows)
    text = "\n".join(lines)
    for label in ("moved", "throughput", "total", "downtime", "the destination starts"):
        assert label in text
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("dialect", ["landed", "v6"])
def test_the_json_document_accounts_for_every_byte_and_every_moment(
    dialect: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--size", "8M", "--dirty", "1M", "--dialect", dialect, "--json"]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    told = json.loads(output.out)
    assert IDENTICAL.fullmatch(told["verdict"])
    assert told["identical"] is True
    assert told["sha256"]["source"] == told["sha256"]["destination"]
    assert (told["dialect"], told["device_bytes"]) == (dialect, SIZE + BAR0)
    moved = {arc["session_bytes"] for arc in told["arcs"] if arc["to"] == "STOP"} - {None}
    assert moved == {told["moved_bytes"]}, "what one session gave, the other one took"
    assert told["moved_bytes"] > SIZE
    assert told["downtime_seconds"] == pytest.approx(sum(told["downtime_parts"].values()))
    assert 0 < told["downtime_seconds"] < told["seconds"]
    assert all(seconds > 0 for seconds in told["downtime_parts"].values())
    assert {arc["errno"] for arc in told["arcs"]} == {0}
    precopied = told["moved_bytes"] - told["moved_bytes_stopped"]
    assert (precopied > SIZE) == (told["precopy_rounds"] > 0) == (dialect == "landed")


@pytest.mark.parametrize("dialect", ["landed", "v6"])
def test_what_arrives_is_what_the_source_was_made_of(
    dialect: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source, destination = Pattern(size=SIZE, seed=1), Pattern(size=SIZE, seed=2)
    source.bar0[: len(NOTE)] = NOTE
    assert source.digest() != destination.digest()
    assert main(["demo", "--size", "8M", "--dirty", "0", "--dialect", dialect]) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert last == f"identical: {SIZE + BAR0} bytes, sha256 {source.digest()}"


class Damaging(Pattern):
    """Accepts a state and changes one bit of it."""

    def load(self, state: StateReader) -> None:
        super().load(state)
        self.bar0[17] ^= 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_one_wrong_bit_is_different_and_exit_code_1(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_module, "Pattern", Damaging)
    assert main(["demo", "--size", "8M", *options]) == 1
    out = capfd.readouterr().out
    last = json.loads(out)["verdict"] if options else out.splitlines()[-1]
    assert last.startswith(f"DIFFERENT: of {SIZE + BAR0} bytes, source sha256 ")
    first, second = re.findall(r"[0-9a-f]{64}", last)
    assert first != second


class Refusing(Pattern):
    """Accepts no state."""

    def load(self, state: StateReader) -> None:
        while state.read(1 << 20):
            pass
        raise StateRejected("not today")


def test_a_client_that_fails_is_reported_with_its_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_module, "Pattern", Refusing)
    assert main(["demo", "--size", "8M"]) == 1
    output = capfd.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("vfiomig: nothing was migrated: vfio1: the request for STOP failed")
    assert "EINVAL" in line


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import os; os.kill(os.getpid(), 9)", "the client was ended by SIGKILL"),
        ("raise SystemExit(3)", "the client ended with exit code 3"),
        ("pass", "the client ended with exit code 0"),
    ],
)
def test_a_client_that_ends_without_a_word_is_reported_by_its_end(
    program: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo_module, "_client_command", lambda _: [sys.executable, "-c", program])
    assert main(["demo", "--size", "8M"]) == 1
    output = capfd.readouterr()
    assert output.out == ""
    assert says in output.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "much"], "--size: 'much' is no whole number"),
        (["--size", "0"], "the device has at least one byte"),
        (["--size", "40000G"], "need 80000.0 GiB of memory, and"),
        (["--dirty", "-1"], "--dirty: -1 is no size"),
        (["--dialect", "v5"], "v5"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(
    options: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *options]) == 2
    output = capfd.readouterr()
    assert says in output.err
    assert len(output.err.splitlines()) == 1
    assert output.out == ""


# A terminal.


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def percentages(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"(\d+)%", text)]


#: The demo of devices whose pre-copy has eight rounds however fast anybody is.
IN_ROUNDS = f"""
import sys
sys.path.append({str(ROOT / "tests/devices")!r})
from portioned import Portioned
from vfiomig.cli import app, demo
demo.Pattern = Portioned
sys.exit(app.main(["demo", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (
            # Eighths, and a little less, as there is always the end of the state left.
            [sys.executable, "-c", IN_ROUNDS, "--dirty", "0"],
            [0, 12, 25, 37, 50, 62, 75, 87, 99, 100],
        ),
        ([*COMMAND, "--dialect", "v6"], [0, 100]),
    ],
    ids=["landed", "v6"],
)
def test_on_a_terminal_a_bar_runs_forward_to_the_end(
    command: list[str], told: list[int], terminals: list[Terminal]
) -> None:
    terminal = Terminal([*command, "--size", "64M"])
    terminals.append(terminal)
    assert terminal.end() == 0, terminal.text
    shown = percentages(terminal.text)
    assert set(shown) >= set(told), "each round is told of, and between them what there is time for"
    assert shown == sorted(shown)
    assert (shown[0], shown[-1]) == (0, 100)
    last = terminal.text.rstrip().splitlines()[-1]
    assert re.fullmatch(r"identical: \d+ bytes, sha256 [0-9a-f]{64}", last)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.text)
    rows = [line for line in re.split(r"[\r\n]+", plain) if line != last]
    assert max(map(len, rows)) <= 80


def test_the_bar_goes_to_stderr_and_the_result_to_stdout(
    terminals: list[Terminal], tmp_path: Path
) -> None:
    with (tmp_path / "out").open("w+") as out:
        terminal = Terminal([*COMMAND, "--size", "8M"], stdout=out.fileno())
        terminals.append(terminal)
        assert terminal.end() == 0, terminal.text
        out.seek(0)
        result = out.read()
    assert percentages(terminal.text)[-1] == 100
    assert "->" not in terminal.text
    assert "%" not in result
    assert "\x1b" not in result
    assert IDENTICAL.fullmatch(result.splitlines()[-1])


#: Rewritten faster than it can be read: all ten rounds of pre-copy are made.
SLOW = [*COMMAND, "--size", "256M", "--dirty", "100G"]


def test_ctrl_c_ends_it_with_130_and_leaves_nothing_behind(terminals: list[Terminal]) -> None:
    terminal = Terminal(SLOW)
    terminals.append(terminal)
    terminal.read_until(r"[1-9]%")
    terminal.type(b"\x03")
    assert terminal.end() == 130, terminal.text
    assert "Traceback" not in terminal.text
    assert "identical" not in terminal.text
    assert nobody_is_left_in(terminal.process.pid)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)],
)
def test_a_signal_to_it_alone_ends_the_client_too(
    number: signal.Signals, code: int, terminals: list[Terminal]
) -> None:
    terminal = Terminal(SLOW)
    terminals.append(terminal)
    terminal.read_until(r"[1-9]%")
    os.kill(terminal.process.pid, number)
    assert terminal.end() == code, terminal.text
    assert "Traceback" not in terminal.text
    assert nobody_is_left_in(terminal.process.pid)
