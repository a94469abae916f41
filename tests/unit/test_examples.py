"""The examples do what they say, as programs and as devices."""

from __future__ import annotations

import errno
import inspect
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vfiomig
from pattern_streams import load, state_of
from vfiomig import Device, SetStateError, State, StateRejected
from vfiomig.models import make

if TYPE_CHECKING:
    from vfiomig.client import DeviceClient

ROOT = Path(__file__).parents[2]
MINIMAL, TEMPLATE = ROOT / "examples/minimal.py", ROOT / "examples/template.py"
PAGE = 4096


@pytest.mark.parametrize(
    ("program", "output"),
    [
        (MINIMAL, "it moved\n"),
        (
            TEMPLATE,
            "65664 bytes before the stop, 4128 after it\narrived: 'changed meanwhile', 5 rings\n",
        ),
    ],
)
def test_an_example_runs_as_a_program(program: Path, output: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", program],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == (output, "", 0)


def test_the_minimal_example_stays_under_forty_lines() -> None:
    assert len(MINIMAL.read_text().splitlines()) < 40


@pytest.mark.parametrize("spec", [f"{MINIMAL}:Note", f"{TEMPLATE}:Template"])
def test_an_example_refuses_a_state_that_is_cut_or_too_long(spec: str) -> None:
    stream = state_of(make(spec))
    for wrong in (b"", stream[:-1], stream[: len(stream) // 2], stream + b"x"):
        with pytest.raises(StateRejected):
            load(make(spec), wrong)
    load(make(spec), stream)


def test_the_template_shows_every_hook_and_attribute() -> None:
    template, stubborn = type(make(f"{TEMPLATE}:Template")), type(make(f"{TEMPLATE}:Stubborn"))
    # What a device uses and never overrides.
    offered = {"check_capabilities", "configuration", "data_ready", "interrupts", "regions"}
    shown = vars(template).keys() | vars(stubborn).keys()
    hooks = {name for name in vars(Device) if not name.startswith("_")} - offered
    assert hooks >= {"save", "load", "poll", "migration_set_state"}
    assert hooks <= shown
    source = inspect.getsource(template)
    assert "self.data_ready()" in source
    assert "self.dma." in source
    assert "self.interrupts." in source


def ring(client: DeviceClient, iova: int) -> int:
    client.write_region(0, 8, iova.to_bytes(8, "little"))
    return rings(client)


def rings(client: DeviceClient) -> int:
    return int.from_bytes(client.read_region(0, 0, 8), "little")


def test_the_templates_doorbell_does_dma_and_is_held_back_where_it_must_be() -> None:
    with (
        mmap.mmap(-1, PAGE) as memory,
        vfiomig.open(f"model:{TEMPLATE}:Template") as client,
    ):
        client.map(0x10000, memory)
        client.set_bus_master(True)
        client.write_region(2, 0, b"page one")
        assert ring(client, 0x10000) == 1
        assert memory[:8] == b"page one"
        client.write_region(2, 0, b"PAGE")
        client.set_state(State.RUNNING_P2P)
        assert ring(client, 0x10000) == 1
        assert memory[:8] == b"page one"
        client.set_state(State.RUNNING)
        assert rings(client) == 2
        assert memory[:8] == b"PAGE one"
        assert ring(client, 0x999000) == 2, "no mapping: nobody is told, and nothing is counted"
        client.close()


def test_the_template_tells_what_is_left() -> None:
    with vfiomig.open(f"model:{TEMPLATE}:Template") as client:
        whole = client.data_size()
        session = client.set_state(State.PRE_COPY)
        assert session is not None
        assert session.precopy_info()[:2] == (16 * (PAGE + 8), 0)
        early = sum(map(len, session))
        assert session.precopy_info()[:2] == (0, 0)
        client.write_region(2, 5 * PAGE, b"x")
        assert session.precopy_info()[:2] == (0, PAGE + 8)
        assert client.data_size() == whole - early + PAGE + 8
        client.set_state(State.RUNNING)
        assert client.data_size() == whole


def test_the_template_with_whole_control_refuses_what_it_likes() -> None:
    with vfiomig.open(f"model:{TEMPLATE}:Stubborn") as client:
        client.set_state(State.STOP)
        with pytest.raises(SetStateError) as caught:
            client.set_state(State.STOP_COPY)
        assert (caught.value.errno, caught.value.device_state) == (errno.EINVAL, State.STOP)
        client.reset()
        assert client.state is State.RUNNING
