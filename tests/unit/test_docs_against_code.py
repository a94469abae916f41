"""What the pages for people name is there: verbs, options, make's verbs, links, modules."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from readme_blocks import FENCE
from vfiomig.cli.app import VERBS, application

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
}
CODE = re.compile(r"`([^`\n]+)`")
MAKEFILE = (ROOT / "Makefile").read_text()


def pieces_of_code(text: str) -> Iterator[str]:
    """Everything that is set as code: lines of blocks, joined where they go on, and words."""
    for match in FENCE.finditer(text):
        yield from match[2].replace("\\\n", " ").splitlines()
    yield from CODE.findall(FENCE.sub("", text))


def commands(text: str) -> Iterator[list[str]]:
    """The words behind ``vfiomig``, up to where another program's begin."""
    for piece in pieces_of_code(text):
        match = re.search(r"(?:^|[\s/])vfiomig ([a-z-].*)", piece)
        if match:
            yield re.split(r" -- | [|>2&#]", match[1] + " ")[0].split()


def options(verb: str) -> set[str]:
    found = {"--help"}
    for argument in application()[verb].assemble_argument_collection():
        found |= set(argument.names)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_and_option_that_a_page_names_exists(page: str) -> None:
    verbs = {verb.name for verb in VERBS}
    for verb, *rest in commands(PAGES[page]):
        if verb.startswith("--"):
            assert verb in {"--help", "--version", "--install-completion"}
        elif verb not in {"VERB", "import"}:
            assert verb in verbs
            given = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert given <= options(verb)


def test_every_verb_is_in_the_readme() -> None:
    named = {words[0] for words in commands(PAGES["README.md"])}
    assert {verb.name for verb in VERBS} <= named


def test_every_exit_code_of_the_program_runner_is_in_the_readme() -> None:
    (run,) = (verb for verb in VERBS if verb.name == "run")
    for line in run.exits:
        code, _, meaning = line.partition(": ")
        assert f"| {code} | {meaning} |" in PAGES["README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_of_make_that_a_page_names_exists(page: str) -> None:
    known = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for piece in pieces_of_code(PAGES[page]):
        words = shlex.split(piece, comments=True) if re.match(r"make\b", piece) else []
        assert {word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)} <= known, piece


def test_every_verb_of_make_is_explained_to_those_who_work_on_it() -> None:
    listed = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE)) - {"help", "setup-dev"}
    assert listed <= set(re.findall(r"`make ([a-z-]+)", PAGES["CONTRIBUTING.md"]))


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", PAGES[page])):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_the_package_is_there(page: str) -> None:
    for name in re.findall(r"`(vfiomig(?:\.\w+)+)", PAGES[page]):
        parts = name.split(".")
        found: object = importlib.import_module("vfiomig")
        for at, part in enumerate(parts[1:], 2):
            try:
                found = importlib.import_module(".".join(parts[:at]))
            except ModuleNotFoundError:
                assert hasattr(found, part), name
                found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    # "QEMU's `docs/...`" is not ours.
    for piece in re.findall(r"(?<!'s )`([^`\n]+)`", FENCE.sub("", PAGES[page])):
        if re.fullmatch(r"(src|docs|tests|examples|tools|bench|vmtest)/[\w./-]+", piece):
            assert (ROOT / piece).exists(), piece


def test_every_variable_that_is_heard_is_in_the_readme() -> None:
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("vmtest/*.py")]
    heard = {name for path in sources for name in re.findall(r"VFIOMIG_[A-Z]+", path.read_text())}
    assert heard
    for name in heard:
        assert f"`{name}" in PAGES["README.md"]
