"""What ``vfiomig devices`` tells, and that it is all there is."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING

import pytest

from vfiomig import SpecError
from vfiomig.cli.app import main
from vfiomig.models import COMMON, KNOWN, describe

if TYPE_CHECKING:
    from pathlib import Path

FILE = '''
import vfiomig

class Told(vfiomig.Device):
    """Is told.

    More about it.

    Keys:
      first    begins here
               and goes on (1)
      second   ends (2)
    """

    def __init__(self, first: int = 1, second: int = 2, third: int = 3): ...

class Silent(vfiomig.Device):
    pass
'''


@pytest.mark.parametrize("name", KNOWN)
def test_every_key_of_a_ready_device_is_explained_with_its_default(name: str) -> None:
    found = describe(name)
    assert found.about
    assert set(found.keys) == set(inspect.signature(KNOWN[name]).parameters)
    for key, meaning in found.keys.items():
        default = inspect.signature(KNOWN[name]).parameters[key].default
        assert meaning, key
        assert default in {"", None} or "(" in meaning, key


def test_a_class_of_ones_own_is_described_by_its_docstring(tmp_path: Path) -> None:
    path = tmp_path / "told.py"
    path.write_text(FILE)
    found = describe(f"{path}:Told")
    assert found.about == "Is told.\n\nMore about it."
    assert found.keys == {
        "first": "begins here and goes on (1)",
        "second": "ends (2)",
        "third": "",
    }
    silent = describe(f"{path}:Silent")
    assert (silent.about, silent.keys) == ("", {})


def test_the_verb_lists_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    output = capsys.readouterr().out
    for name in KNOWN:
        assert f"\n{name}: " in f"\n{output}"
        for key in describe(name).keys:
            assert f"  {key} " in output
    for key in COMMON.keys:
        assert f"  {key} " in output


def test_the_verb_tells_machines_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "pattern", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["devices"]) == ["pattern"]
    assert told["devices"]["pattern"]["keys"] == dict(describe("pattern").keys)
    assert told["keys of every device"] == dict(COMMON.keys)


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match="virtio_blk"):
        describe("patern")
