"""What must not be in the tree: addresses of package registries and paths of one machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from vfiomig.version import VERSION

ROOT = Path(__file__).parents[2]

# What a machine's own configuration names; a checkout works with any index.
REGISTRIES = re.compile(
    r"\b(pypi\.org|pythonhosted\.org|npmjs\.(org|com)|crates\.io|proxy\.golang\.org"
    r"|(deb|security|snapshot|archive|ftp(\.\w+)?)\.(debian|ubuntu)\.(org|com))\b"
    r"|--(extra-)?index-url|--find-(links)"
)
MACHINE_PATHS = re.compile(r"(?<![\w.$}*-])/(work|root|opt|home/\w+|mnt/\w+)/\w")


def tracked_files() -> list[Path]:
    """Return the project's own files: those of git, or of an unpacked source package."""
    if shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z", ":/"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return [path for name in done.stdout.split("\0") if (path := ROOT / name).is_file()]
    inside = [path for name in ("src", "tests", "docs") for path in (ROOT / name).rglob("*")]
    return [path for path in [*ROOT.iterdir(), *inside] if path.is_file()]


def text_of(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


@pytest.mark.parametrize("pattern", [REGISTRIES, MACHINE_PATHS], ids=["registries", "paths"])
def test_no_file_names_a_registry_or_a_path_of_one_machine(pattern: re.Pattern[str]) -> None:
    files = tracked_files()
    assert len(files) > 20
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("https://files.python" + "hosted.org/packages/x", REGISTRIES),
        ("--index" + "-url https://mirror.example/simple", REGISTRIES),
        ("open('/wo" + "rk/main/x')", MACHINE_PATHS),
        ("PYTHON=/ro" + "ot/.pyenv/bin", MACHINE_PATHS),
    ],
)
def test_the_patterns_find_what_they_are_for(line: str, pattern: re.Pattern[str]) -> None:
    assert pattern.search(line.replace("/.", "/"))


def test_scripts_are_posix_sh_or_bash_that_parses() -> None:
    scripts = [*(ROOT / "tools").glob("*.sh"), ROOT / ".ci/run"]
    assert len(scripts) >= 4
    for script in scripts:
        shell = text_of(script).splitlines()[0].removeprefix("#!").split()[-1].rpartition("/")[2]
        assert shell in {"sh", "bash"}
        subprocess.run([shell, "-n", script], check=True)


def test_the_version_is_said_twice_and_is_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_the_makefile_lists_each_of_its_verbs() -> None:
    listed = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    verbs = set(re.findall(r"make ([a-z-]+)", listed))
    assert {"setup", "demo", "test", "check", "bench", "test-all"} <= verbs
    for verb in verbs:
        subprocess.run(["make", "-n", verb], cwd=ROOT, capture_output=True, check=True)
