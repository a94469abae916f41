"""SPECs: what they name, and what is said about those that name nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from vfiomig import Device, SpecError
from vfiomig.models import COMMON, KNOWN, describe, make, parse_size

if TYPE_CHECKING:
    from pathlib import Path

FILE = '''
{future}
import dataclasses
from vfiomig import Capability, Device

@dataclasses.dataclass
class Options:
    text: str = ""

class Mine(Device):
    """One of my own."""
    def __init__(self, text="", count: int = 1, share: float = 0.5, on: bool = False, *, name: str = "x"):
        self.keys = (text, count, share, on, name)

class Needs(Device):
    def __init__(self, where: str, whence: str):
        pass

class Open(Device):
    def __init__(self, **keys):
        self.keys = keys

class Bare(Device):
    pass

class Picky(Device):
    def __init__(self, level: int = 1):
        self.level = 10 / level

class Illegal(Device):
    def __init__(self):
        self.capabilities = Capability.P2P

class Hasty(Device):
    def __init__(self):
        self.capabilities = Capability.STOP_COPY | Capability.PRE_COPY

class Stranger:
    pass
'''


@pytest.fixture(params=["", "from __future__ import annotations"], ids=["types", "strings"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(future=request.param))
    return path


def problem(spec: str) -> str:
    with pytest.raises(SpecError) as caught:
        make(spec)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("0x10", 16), ("3K", 3072), ("256M", 1 << 28), ("2g", 2 << 30)],
)
def test_a_size_is_a_number_with_or_without_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "1.5G", "1T", "-1", "1 M M", "K1", "0x"])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(SpecError):
        parse_size(text)


def test_every_ready_device_is_made_by_its_name_alone() -> None:
    for name, cls in KNOWN.items():
        assert type(make(name)) is cls


@pytest.mark.parametrize("name", KNOWN)
def test_an_unknown_key_is_refused_with_all_that_are_known(name: str) -> None:
    said = problem(f"{name},colour=red")
    for key in (*describe(name).keys, *COMMON.keys):
        assert key in said
    assert f"vfiomig devices {name}" in said


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    said = problem("patern,size=1M")
    assert "'patern'" in said
    for name in KNOWN:
        assert name in said
    assert "path.py:Class" in said


@pytest.mark.parametrize("spec", ["pattern,size", "pattern,", "pattern,=5"])
def test_a_key_without_name_or_value_is_refused(spec: str) -> None:
    assert "its keys are size, seed" in problem(spec)


def test_a_key_that_is_given_twice_is_refused() -> None:
    assert "'size' is given twice" in problem("pattern,size=1M,size=2M")


def test_a_users_class_gets_its_keys_by_annotation(file: Path) -> None:
    device = make(f"{file}:Mine,text=7,count=2K,share=.25,on=yes,name=a=b:c")
    assert type(device).__name__ == "Mine"
    assert vars(device)["keys"] == ("7", 2048, 0.25, True, "a=b:c")


def test_a_class_that_takes_any_key_gets_strings(file: Path) -> None:
    assert vars(make(f"{file}:Open,a=1,b="))["keys"] == {"a": "1", "b": ""}


def test_two_devices_of_a_file_are_of_one_class(file: Path) -> None:
    assert type(make(f"{file}:Bare")) is type(make(f"{file}:Bare"))


def test_a_relative_path_is_a_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert isinstance(make("mine.py:Bare"), Device)


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (":Mine,size=1", ["'size'", "its keys are text, count, share, on, name"]),
        (":Bare,size=1", ["'size'", "its keys are delay, fail"]),
        (":Mine,count=some", ["count=some", "whole number"]),
        (":Mine,share=some", ["share=some", "no number"]),
        (":Mine,on=perhaps", ["on=perhaps", "yes nor no"]),
        (":Needs,where=here", ["whence", "give a value"]),
        (":Missing", ["'Missing' is not there", "Mine, Needs, Open, Bare"]),
        (":Stranger", ["'Stranger' is no subclass of vfiomig.Device", "Mine"]),
        (":Options", ["'Options' is no subclass"]),
        (":Device", ["'Device'"]),
        (":", ["Mine"]),
        (":Picky,level=0", ["mine.py, line", "ZeroDivisionError"]),
        (":Illegal", ["p2p", "stop-copy+p2p"]),
        (":Hasty", ["PRE_COPY", "precopy()"]),
    ],
)
def test_what_is_wrong_with_a_users_class_is_told(file: Path, rest: str, words: list[str]) -> None:
    said = problem(f"{file}{rest}")
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("memory = vfiomig.Region(size=4096)", "a region's name is one of bar0"),
        ("bar0 = vfiomig.Region(size=1000)", "a power of two"),
        ("save = list", "save() but no load()"),
    ],
)
def test_a_mistake_that_vfiomig_finds_is_told_with_the_line_of_its_author(
    line: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "mistaken.py"
    path.write_text(f"import vfiomig\n\nclass Mistaken(vfiomig.Device):\n    {line}\n")
    said = problem(f"{path}:Mistaken")
    assert says in said
    assert re.search(rf"{path}, line [34]: ", said)


def test_a_file_that_is_not_there_is_named() -> None:
    assert "no file 'nowhere/my.py'" in problem("nowhere/my.py:Mine")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nimport nothing_like_that\n", ["line 2", "ModuleNotFoundError"]),
        ("x = 1\n\ndef broken(:\n", ["line 3", "syntax"]),
        ("raise RuntimeError('on purpose')", ["line 1", "RuntimeError: on purpose"]),
        ("def f():\n    return 1 / 0\nf()\n", ["line 2", "ZeroDivisionError"]),
    ],
)
def test_an_error_in_a_users_file_is_told_with_its_line(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    for _ in range(2):  # a half imported module does not stay
        said = problem(f"{path}:Mine")
        assert str(path) in said
        for word in words:
            assert word in said


def test_a_file_that_is_no_python_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "device.txt"
    path.write_text("class Mine: pass")
    assert ".py" in problem(f"{path}:Mine")


def test_a_file_without_a_class_is_refused_with_those_that_it_has(file: Path) -> None:
    said = problem(f"{file}")
    assert "name a class" in said
    assert "Mine" in said


def test_values_may_hold_equals_signs_and_colons(file: Path) -> None:
    device = make(f"{file}:Open,a=b=c:d,e=:=")
    assert vars(device)["keys"] == {"a": "b=c:d", "e": ":="}
