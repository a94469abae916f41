"""The README and docs/devices.md do what they say: commands run and print what is shown.

Theory of operation
-------------------
The fenced blocks are the test. ``sh`` and ``python`` blocks run in a folder that looks like a
checkout after ``make setup``: everything is there by link, and .venv is this Python with the marks
of what is installed, so that make has nothing left to install. A ``text`` block right behind one
that ran is its output, compared with numbers, digests and units made equal.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from readme_blocks import FENCE, TEXT, Block, blocks, same_for_everybody
from vfiomig.models import document

ROOT = Path(__file__).parents[2]
LINKED = ("Makefile", "pyproject.toml", "requirements", "tools", "src", "examples", "docs")

#: What the README calls ./your-program: it opens the device that it was told to find.
YOUR_PROGRAM = """#!/usr/bin/env python
import os
os.close(os.open("/dev/vfio/devices/vfio0", os.O_RDWR))
print("found it")
"""


COMMANDS = [block for block in blocks() if block.language in {"sh", "python"}]
DEVICES = (ROOT / "docs/devices.md").read_text()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    binaries = folder / ".venv/bin"
    binaries.mkdir(parents=True)
    for name in ("python", "python3"):
        write_program(binaries / name, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    write_program(binaries / "vfiomig", launcher())
    for lock in ("run", "test", "build", "dev"):
        (folder / ".venv" / f".installed-{lock}").touch()
    write_program(folder / "your-program", YOUR_PROGRAM)
    return folder


def launcher() -> str:
    """The command that tools/environment.sh puts into .venv/bin."""
    script = (ROOT / "tools/environment.sh").read_text()
    match = re.search(r"<<'LAUNCHER'\n(.*?)^LAUNCHER$", script, re.MULTILINE | re.DOTALL)
    assert match is not None
    return match[1]


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def run(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-eu", "-c"] if block.language == "sh" else [sys.executable, "-c"]
    environment = os.environ | {
        "PATH": f"{folder / '.venv/bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
    }
    return subprocess.run(
        [*command, block.content],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_there_are_commands_in_the_readme() -> None:
    assert len(COMMANDS) >= 7
    assert {block.language for block in blocks()} == {"sh", "python", "text", ""}
    shown = "".join(block.content for block in COMMANDS)
    for verb in ("make demo", "make setup", "vfiomig run", "vfiomig draw", "--trace", "--dialect"):
        assert verb in shown


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: f"line {block.line}")
def test_a_block_runs_and_prints_what_is_shown(block: Block, checkout: Path) -> None:
    done = run(block, checkout)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    if block.output:
        assert same_for_everybody(done.stdout) == same_for_everybody(block.output)
    assert done.stdout.count("found it") == block.content.count("./your-program")


@pytest.mark.timeout(180)
def test_the_page_about_devices_does_what_it_says(checkout: Path, tmp_path: Path) -> None:
    for entry in checkout.iterdir():
        if entry.is_symlink() or entry.name == ".venv":
            (tmp_path / entry.name).symlink_to(entry)
    commands = [block for block in blocks(DEVICES) if block.language in {"sh", "python"}]
    assert len(commands) >= 6
    for block in commands:  # one after the other: they use what earlier ones have left
        done = run(block, tmp_path)
        line = f"line {block.line}"
        assert (line, done.returncode, done.stderr) == (line, 0, ""), done.stdout
        assert (line, same_for_everybody(done.stdout)) == (line, same_for_everybody(block.output))


def test_the_tables_of_devices_are_what_the_verb_lists() -> None:
    assert f"\n{document.tables()}\n" in DEVICES, "run make docs"


LIMITS = """
import ctypes, errno, os, stat
import vfiomig

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_ssize_t
assert libc.syscall(425, 8, None) == -1 and ctypes.get_errno() == errno.ENOSYS  # io_uring_setup
fd = os.open("/dev/vfio/devices/vfio0", os.O_RDWR)
assert libc.mmap(None, 4096, 1, 1, fd, 0) == -1 and ctypes.get_errno() == errno.EINVAL
os.close(fd)
assert os.listdir("/dev/vfio/devices") == ["vfio0"]
assert ("vfio" in os.listdir("/dev")) == HAS_VFIO
with vfiomig.open("/dev/vfio/devices/vfio0") as device:
    with device.set_state(vfiomig.State.STOP_COPY) as session:
        assert stat.S_ISFIFO(os.fstat(session.fileno()).st_mode)
os.chdir("/dev/vfio")
"""


def test_the_limits_are_as_the_readme_says(checkout: Path) -> None:
    program = LIMITS.replace("HAS_VFIO", str(Path("/dev/vfio").exists()))
    command = f"vfiomig run --device counter -- python -c '{program}'"
    done = run(Block("sh", command, 0), checkout)
    if Path("/dev/vfio").exists():
        assert done.returncode == 0, done.stderr
    else:
        last = done.stderr.splitlines()[-1]
        assert last == "FileNotFoundError: [Errno 2] No such file or directory: '/dev/vfio'"


def test_the_excerpt_of_the_demo_is_what_the_demo_prints(checkout: Path) -> None:
    (excerpt,) = (
        b.content for b in blocks() if b.language == "text" and "identical: " in b.content
    )
    done = run(Block("sh", "vfiomig demo", 0), checkout)
    assert same_for_everybody(done.stdout) == same_for_everybody(excerpt)


def test_the_device_that_is_shown_is_the_minimal_example() -> None:
    (shown,) = (b.content for b in COMMANDS if "class Note" in b.content)
    example = (ROOT / "examples/minimal.py").read_text()
    assert shown.partition("class Note")[2].strip() in example


def test_the_first_screen_has_both_commands_and_the_picture() -> None:
    screen = "\n".join(TEXT.splitlines()[:28])
    assert "make demo" in screen
    assert "vfiomig run --device pattern -- ./your-program" in screen
    assert "◄───────►" in screen


@pytest.mark.parametrize("text", [TEXT, DEVICES], ids=["README", "devices"])
def test_lines_are_sentences(text: str) -> None:
    prose = FENCE.sub("", text)
    for line in prose.splitlines():
        if line.startswith(("#", "|")):
            continue
        assert not re.search(r"[a-z)][.!?] [A-Z]", line), f"two sentences: {line}"
