"""The rules of ARCHITECTURE.md that a program can check: who imports whom, sizes, public names."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/vfiomig"

#: The rooms, from the ground up. Those of one row stand side by side and do not know each other.
ROOMS = (
    ("version", "errors"),
    ("abi",),
    ("fsm",),
    ("wire",),
    ("descriptors", "memory", "process"),
    ("eventfd", "scratch"),
    ("iommu",),
    ("device",),
    ("core",),
    ("models",),
    ("doors",),
    ("client",),
    ("checks",),
    ("report", "testing"),
    ("qemu",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}

#: SetStateError carries a State, for types only: everything else stands on the tree of errors.
EXCEPTIONS = {("errors", "fsm")}

PURE = {"abi", "fsm", "wire"}
IMPURE_MODULES = {
    "asyncio", "fcntl", "io", "logging", "mmap", "multiprocessing", "os", "pathlib", "random",
    "select", "selectors", "signal", "socket", "subprocess", "sys", "tempfile", "threading", "time",
}  # fmt: skip
THIRD_PARTIES = {"cli": {"cyclopts", "rich"}, "report": {"jinja2"}, "testing": {"pytest"}}
#: Modules that cannot be imported without them.
NOT_BARE = {"vfiomig.report.html", "vfiomig.testing.plugin"}

MODULES = sorted(PACKAGE.rglob("*.py"))
#: The package's own face and the way into the command line stand above all rooms.
FACES = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    """The room of a module of ours, nothing for the package itself."""
    return name.partition(".")[2].partition(".")[0]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is named in an import, anywhere in the file, for types included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            assert node.module is not None
            if node.module == "vfiomig":  # from vfiomig import core
                yield from (f"vfiomig.{alias.name}" for alias in node.names)
            else:
                yield node.module


def violations(room: str, names: Iterator[str]) -> list[str]:
    """Imports that the order of the rooms forbids to a module in ``room``."""
    found = []
    for name in names:
        if not name.startswith("vfiomig."):
            continue
        target = room_of(name)
        if target == room or (room, target) in EXCEPTIONS:
            continue
        if FLOOR[target] >= FLOOR[room]:
            found.append(name)
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if p not in FACES], ids=module_name)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    assert violations(room_of(module_name(path)), imports(tree_of(path))) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("fsm", "from vfiomig.core.migration import Migration"),
        ("abi", "import vfiomig.fsm"),
        ("memory", "from vfiomig.descriptors import Fd"),
        ("device", "if TYPE_CHECKING:\n    from vfiomig import core"),
        ("doors", "def late():\n    from vfiomig.client import open_target"),
    ],
)
def test_an_import_against_the_order_is_found_wherever_it_hides(room: str, source: str) -> None:
    assert len(violations(room, imports(ast.parse(source)))) == 1


def test_every_room_that_there_is_has_a_place_in_the_order() -> None:
    there = {room_of(module_name(path)) for path in MODULES if path not in FACES}
    assert there == FLOOR.keys()


@pytest.mark.parametrize(
    "path", [p for p in MODULES if room_of(module_name(p)) in PURE], ids=module_name
)
def test_pure_rooms_have_no_clock_no_descriptor_and_no_logger(path: Path) -> None:
    assert {name.partition(".")[0] for name in imports(tree_of(path))} & IMPURE_MODULES == set()


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_third_parties_are_used_only_where_they_may_be(path: Path) -> None:
    tops = {name.partition(".")[0] for name in imports(tree_of(path))}
    # _typeshed is no package: type checkers know it, and nothing imports it at run time.
    foreign = tops - sys.stdlib_module_names - {"vfiomig", "_typeshed"}
    if path.name == "__main__.py":
        foreign -= {"vfiomig_command"}  # its own, beside the package
    assert foreign <= THIRD_PARTIES.get(room_of(module_name(path)), set())


def test_the_core_needs_no_third_party_at_run_time() -> None:
    names = [
        module_name(path)
        for path in MODULES
        if path.name != "__main__.py" and room_of(module_name(path)) != "cli"
    ]
    names = [name for name in names if name not in NOT_BARE]
    program = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],  # -S: there is no site-packages
        env={"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_no_module_is_longer_than_600_lines_and_the_median_is_about_200() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in MODULES}
    assert [module_name(path) for path, length in lengths.items() if length > 600] == []
    assert statistics.median(lengths.values()) <= 220


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_says_what_it_is_before_anything_else(path: Path) -> None:
    tree = tree_of(path)
    docstring = ast.get_docstring(tree)
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ":", "?"))
    for following in tree.body[1:2]:
        assert isinstance(following, ast.ImportFrom)
        assert following.module == "__future__"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "__main__.py"], ids=module_name)
def test_every_public_name_is_there(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    public = getattr(module, "__all__", ())
    assert [name for name in public if not hasattr(module, name)] == []
    assert len(set(public)) == len(public)


def test_architecture_md_describes_the_rooms_that_there_are_in_their_order() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `(\w+)/?`", text, re.MULTILINE)
    described = [room for room in rows if room in FLOOR]
    assert sorted(described, key=FLOOR.__getitem__) == described
    assert set(described) == FLOOR.keys()


@pytest.mark.parametrize(
    "page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]
)
def test_what_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / target).exists(), f"{page} links to {target}"
    for path in re.findall(r"`((?:src|tests|docs|examples|bench|tools|\.ci)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{page} names {path}"


def test_rules_that_architecture_md_cites_are_in_the_protocol() -> None:
    rules = set(re.findall(r"\[([A-Z][A-Z0-9-]*-\d+)\]", (ROOT / "docs/protocol.md").read_text()))
    assert len(rules) > 100
    cited = re.findall(
        r"\b([A-Z][A-Z0-9]*(?:-[A-Z][A-Z0-9]*)*-\d+)\b", (ROOT / "ARCHITECTURE.md").read_text()
    )
    assert cited
    assert set(cited) <= rules
