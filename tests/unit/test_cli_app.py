"""The command line as a user meets it: verbs by table, exit codes, one line for each failure."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vfiomig.cli.app import VERBS, Verb, application, main
from vfiomig.errors import (
    DoorError,
    PrerequisiteError,
    SessionError,
    SpecError,
    TargetError,
)
from vfiomig.fsm import LEGAL_SETS, capability_name, draw
from vfiomig.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
COMMAND = [sys.executable, "-m", "vfiomig"]

FAILING_VERB = """
import signal
import vfiomig.errors
def fail():
    raise RAISED
def code():
    return 42
def interrupted():
    signal.raise_signal(signal.SIGINT)
"""


def vfiomig(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def python(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that begins without anything of vfiomig."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Verb, ...]]:
    """Return verbs whose functions come from a module of the test's own."""
    (tmp_path / "failing_verbs.py").write_text(FAILING_VERB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("VFIOMIG_DEBUG", raising=False)
    yield tuple(Verb(n, f"failing_verbs:{n}", "", ()) for n in ("fail", "code", "interrupted"))
    sys.modules.pop("failing_verbs", None)


def run_failing(error: BaseException, verbs: tuple[Verb, ...]) -> int:
    vars(importlib.import_module("failing_verbs"))["RAISED"] = error
    return main(["fail"], verbs)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (SpecError("no model 'x'; known: pattern"), 2, "no model 'x'; known: pattern"),
        (PrerequisiteError("this kernel is 4.19"), 2, "this kernel is 4.19"),
        (TargetError(19, "nobody serves it"), 2, "nobody serves it (ENODEV)"),
        (TargetError(19, "x cannot be opened: ENODEV; y"), 2, "x cannot be opened: ENODEV; y"),
        (DoorError("the program is gone"), 1, "the program is gone"),
        (SessionError(19), 1, "No such device (ENODEV)"),
        (FileNotFoundError(2, "No such file", "a.json"), 2, "a.json: No such file (ENOENT)"),
        (SpecError("two\nlines"), 2, "two lines"),
    ],
)
def test_a_failure_is_one_line_and_its_kind_is_the_exit_code(
    error: Exception,
    code: int,
    line: str,
    verbs: tuple[Verb, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_failing(error, verbs) == code
    output = capsys.readouterr()
    assert output.err == f"vfiomig: {line}\n"
    assert not output.out


def test_a_bug_says_that_it_is_one_and_shows_no_traceback(
    verbs: tuple[Verb, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_failing(KeyError("lost"), verbs) == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vfiomig: this is a bug: KeyError: 'lost' (VFIOMIG_DEBUG=1 shows where")


def test_with_the_debug_variable_the_traceback_comes_through(
    verbs: tuple[Verb, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VFIOMIG_DEBUG", "1")
    with pytest.raises(SpecError):
        run_failing(SpecError("no model"), verbs)


def test_a_verb_chooses_its_own_exit_code(verbs: tuple[Verb, ...]) -> None:
    assert main(["code"], verbs) == 42


def test_interrupting_a_verb_is_130(verbs: tuple[Verb, ...]) -> None:
    assert main(["interrupted"], verbs) == 130


def test_interrupting_the_process_leaves_no_traceback(tmp_path: Path) -> None:
    program = (
        "import sys, time, types\n"
        "from vfiomig.cli.app import Verb, main\n"
        "slow = types.ModuleType('slow')\n"
        "def wait(): print('waiting', flush=True); time.sleep(30)\n"
        "slow.wait = wait\n"
        "sys.modules['slow'] = slow\n"
        "sys.exit(main(['wait'], [Verb('wait', 'slow:wait', '', ())]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=ENVIRONMENT,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (130, "")


@pytest.mark.parametrize("module", ["vfiomig", "vfiomig.client", "cyclopts", "vfiomig.cli.app"])
def test_interrupting_the_imports_of_the_command_leaves_no_traceback(module: str) -> None:
    program = (
        "import signal, sys, time\n"
        "from vfiomig_command import main\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "            time.sleep(30)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "sys.argv = ['vfiomig', '--version']\n"
        "sys.exit(main())\n"
    )
    done = python(program)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_command_leaves_an_interrupt_that_is_ignored_alone() -> None:
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from vfiomig_command import main\n"
        "sys.argv = ['vfiomig', '--version']\n"
        "main()\n"
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)\n"
    )
    done = python(program)
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.parametrize(
    "arguments", [["draw"], ["check", "--list"], ["info", "model:counter"]], ids=" ".join
)
def test_a_reader_who_goes_away_is_told_by_sigpipes_code_and_not_by_no(
    arguments: list[str],
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb") as stdout:
        done = subprocess.run(
            [*COMMAND, *arguments],
            env=ENVIRONMENT,
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=100,
            check=False,
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_the_null_device_and_no_bug(closed: str) -> None:
    command = f"{sys.executable} -m vfiomig info model:counter {closed}"
    done = subprocess.run(
        ["sh", "-c", command], env=ENVIRONMENT, capture_output=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert bool(done.stdout) == (">&- " not in f"{closed} ".replace("2>&-", ""))


def test_a_stdout_that_knows_ascii_only_is_no_bug() -> None:
    done = vfiomig("check", "model:counter", "--only", "size", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"\d pass", done.stdout), "what came of the checks is told"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], 'Unknown command "nope"'),
        (["draw", "--nope"], "Unknown option"),
        (["draw", "--caps"], "--caps requires an argument"),
        (["run"], "vfiomig: --device is missing (see vfiomig run --help)"),
        (["serve"], "vfiomig: SPEC is missing (see vfiomig serve --help)"),
        (["draw", "--format", "png"], '"mermaid", "dot"'),
        (["draw", "--caps", "fly"], "stop-copy+p2p+pre-copy"),
        (["draw", "--json", "--format", "dot"], "contradict each other"),
        (
            ["draw", "left", "over"],
            "vfiomig: too many arguments: left over (see vfiomig draw --help)",
        ),
    ],
)
def test_a_usage_error_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("vfiomig: ")
    assert says in line
    assert not output.out


def test_help_lists_every_verb() -> None:
    done = vfiomig("--help")
    assert done.returncode == 0
    for verb in VERBS:
        assert f"│ {verb.name} " in done.stdout
        assert verb.summary in done.stdout


def test_help_imports_no_verb() -> None:
    program = (
        "import sys; from vfiomig.cli.app import VERBS, main; main(['--help']); "
        "loaded = [v.name for v in VERBS if v.target.partition(':')[0] in sys.modules]; "
        "print('loaded:', loaded)"
    )
    done = python(program)
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_the_help_of_a_verb_says_what_it_does_and_what_it_ends_with(
    verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, name = verb.target.partition(":")
    about = vars(importlib.import_module(module))[name].__doc__.partition("Parameters\n")[0]
    assert main([verb.name, "--help"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert " ".join(about.replace("``", "").split()) in output
    for code in (*verb.exits, "70: a bug of vfiomig"):
        assert f"• {code}" in output


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_the_help_of_a_verb_shows_its_examples_and_each_can_be_parsed(
    verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb.name, "--help"]) == 0
    output = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert verb.examples
    for example in verb.examples:
        assert f" • {example}" in output
        program, *arguments = example.split()
        assert program == "vfiomig"
        _, _, unused, _ = application().parse_known_args(arguments)
        assert unused == []


def test_version() -> None:
    done = vfiomig("--version")
    assert (done.returncode, done.stdout) == (0, f"{VERSION}\n")


def test_completion_is_installed_for_the_shell_that_is_named(tmp_path: Path) -> None:
    done = vfiomig("--install-completion", "--shell", "bash", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (script,) = (tmp_path / ".local").rglob("vfiomig")
    assert "draw" in script.read_text()


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        [*COMMAND, "draw"],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("caps", LEGAL_SETS, ids=capability_name)
@pytest.mark.parametrize("form", ["text", "mermaid", "dot", "json"])
def test_draw_prints_the_drawing_of_the_set_that_is_asked_for(
    caps: int, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["draw", "--caps", capability_name(caps), "--format", form]) == 0
    assert capsys.readouterr().out == draw(caps, form) + "\n"


def test_draw_shows_everything_as_text_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw"]) == 0
    assert capsys.readouterr().out == draw(7, "text") + "\n"


def test_json_is_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "--json", "--caps", "stop-copy"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["STOP"]["STOP_COPY"] == "STOP_COPY"
    assert not output.err
