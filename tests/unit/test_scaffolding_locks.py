"""requirements/: every release by hash, all locks alike, and in step with pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TypeAlias

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"), key=lambda path: path.stem)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

Pins: TypeAlias = dict[str, str]

#: What each lock is made from, as in tools/lock.sh.
SOURCES = {
    "build": ["build"],
    "dev": ["cli", "report", "test", "dev"],
    "lock": ["lock"],
    "run": ["cli", "report"],
    "test": ["cli", "report", "test"],
}


def entries(lock: Path) -> list[str]:
    """Return one string for each release: its first line and the hashes after it."""
    return lock.read_text().replace("\\\n", " ").splitlines()


def pins(lock: Path) -> Pins:
    found = {}
    for entry in entries(lock):
        name, version = entry.split()[0].split("==")
        found[name] = version
    return found


def asked_for(source: str) -> list[Requirement]:
    rows = (PROJECT["project"]["optional-dependencies"] | PROJECT["dependency-groups"])[source]
    found = []
    for row in rows:
        found += [Requirement(row)] if isinstance(row, str) else asked_for(row["include-group"])
    return found


def test_every_lock_is_one_that_the_project_knows() -> None:
    assert [lock.stem for lock in LOCKS] == sorted(SOURCES)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_is_nothing_but_releases_with_hashes(lock: Path) -> None:
    release = re.compile(
        r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [a-z_]+ [!=]= '\w+')?( +--hash=sha256:[0-9a-f]{64})+"
    )
    assert [entry for entry in entries(lock) if not release.fullmatch(entry)] == []


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_has_what_pyproject_asks_for(lock: Path) -> None:
    pinned = pins(lock)
    wanted = [row for source in SOURCES[lock.stem] for row in asked_for(source)]
    assert wanted
    for requirement in wanted:
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_locks_agree_so_that_one_environment_can_take_them_all() -> None:
    by_name = {lock.stem: pins(lock) for lock in LOCKS}
    for part in ("build", "run", "test"):
        assert by_name[part].items() <= by_name["dev"].items()
    # The Makefile counts these as installed with test.txt.
    assert by_name["run"].items() <= by_name["test"].items()
    assert by_name["build"].items() <= by_name["test"].items()


def test_running_needs_no_test_tools() -> None:
    assert {"pytest", "hypothesis", "mypy", "ruff", "hatchling"}.isdisjoint(
        pins(ROOT / "requirements/run.txt")
    )
