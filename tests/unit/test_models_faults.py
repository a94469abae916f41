"""``delay`` and ``fail``: keys by which every device is slow, or fails, on command."""

from __future__ import annotations

import errno
import gc
import time
import weakref
from typing import TYPE_CHECKING

import pytest

import vfiomig
from vfiomig import SessionError, SetStateError, SpecError, State
from vfiomig.models import make

if TYPE_CHECKING:
    from pathlib import Path

FILE = """
import vfiomig

class Mine(vfiomig.Device):
    def __init__(self, fail: str = "mine"):
        self.said = fail

class Whole(vfiomig.Device):
    def migration_set_state(self, requested):
        return vfiomig.State(requested), 0, None
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def read_all(session: vfiomig.Session | None) -> bytes:
    assert session is not None
    return b"".join(map(bytes, session))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pattern,delay=stop-moon:5ms", ["delay=stop-moon:5ms", "'stop-moon'", "stop-stop_copy"]),
        ("pattern,delay=save:5ms", ["'save'", "stop-stop_copy"]),
        ("pattern,delay=stop-stop_copy:5", ["'5'", "70ms"]),
        ("pattern,delay=stop-stop_copy", ["''", "70ms"]),
        ("pattern,caps=stop-copy,delay=running-pre_copy:1s", ["'running-pre_copy'"]),
        ("pattern,caps=none,delay=stop-stop_copy:1s", ["cannot migrate"]),
        ("pattern,fail=stop-moon:EIO", ["fail=stop-moon:EIO", "'stop-moon'", "load"]),
        ("pattern,fail=save", ["''", "running_p2p-stop:EIO"]),
        ("pattern,fail=save:5", ["'5'"]),
        ("pattern,fail=save:EIEIO", ["'EIEIO'"]),
        ("pattern,fail=save:EIO:later", ["'EIO:later'", ":fatal"]),
        ("counter,fail=running-pre_copy:EIO", ["'running-pre_copy'"]),
    ],
)
def test_a_value_that_means_nothing_is_refused_with_its_form(spec: str, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        make(spec)
    for word in words:
        assert word in str(caught.value)


def test_a_device_that_changes_its_state_itself_takes_neither(file: Path) -> None:
    for key in ("delay=stop-running:1s", "fail=save:EIO"):
        with pytest.raises(SpecError, match="migration_set_state"):
            make(f"{file}:Whole,{key}")


def test_a_class_keeps_a_key_that_it_has_itself(file: Path) -> None:
    assert vars(make(f"{file}:Mine,fail=x"))["said"] == "x"


def test_an_arc_with_a_delay_takes_that_long_and_the_others_do_not() -> None:
    device = make("counter,delay=stop-stop_copy:80ms+resuming-stop:500us")
    started = time.monotonic()
    device.step(State.STOP_COPY, State.STOP)
    device.step(State.RESUMING, State.STOP)
    without = time.monotonic() - started
    assert without >= 0.0005
    device.step(State.STOP, State.STOP_COPY)
    assert time.monotonic() - started >= without + 0.08


@pytest.mark.parametrize(("how", "state"), [("", State.RUNNING_P2P), (":fatal", State.ERROR)])
def test_an_arc_that_fails_leaves_the_device_where_it_begins_or_in_error(
    how: str, state: State
) -> None:
    with vfiomig.open(f"model:pattern,size=4K,fail=running_p2p-stop:ENOSPC{how}") as client:
        with pytest.raises(SetStateError) as caught:
            client.set_state(State.STOP_COPY)
        assert (caught.value.errno, caught.value.device_state) == (errno.ENOSPC, state)
        client.reset()
        assert client.state is State.RUNNING


def test_several_places_fail_each_with_its_errno() -> None:
    spec = "model:counter,fail=stop-stop_copy:EBUSY+stop-resuming:ENOMEM"
    with vfiomig.open(spec) as client:
        for target, number in ((State.STOP_COPY, errno.EBUSY), (State.RESUMING, errno.ENOMEM)):
            with pytest.raises(SetStateError) as caught:
                client.set_state(target)
            assert (caught.value.errno, caught.value.device_state) == (number, State.STOP)


@pytest.mark.parametrize("place", ["save", "precopy"])
def test_a_stream_breaks_after_its_first_buffer(place: str) -> None:
    target = State.STOP_COPY if place == "save" else State.PRE_COPY
    with vfiomig.open(f"model:pattern,size=64K,fail={place}:EILSEQ") as client:
        session = client.set_state(target)
        assert session is not None
        with pytest.raises(SessionError) as caught:
            read_all(session)
        assert caught.value.errno == errno.EILSEQ
        assert session.transferred > 0


def test_a_stream_that_breaks_does_not_spoil_the_estimate_of_its_size() -> None:
    with vfiomig.open("model:counter,fail=save:EIO") as client:
        assert client.data_size() == 16


@pytest.mark.parametrize(("how", "state"), [("", State.RESUMING), (":fatal", State.ERROR)])
def test_a_load_that_fails_refuses_the_first_bytes(how: str, state: State) -> None:
    with (
        vfiomig.open("model:counter") as source,
        vfiomig.open(f"model:counter,fail=load:ENODATA{how}") as destination,
    ):
        data = read_all(source.set_state(State.STOP_COPY))
        loading = destination.set_state(State.RESUMING)
        assert loading is not None
        with pytest.raises(SessionError) as caught:
            loading.write_all(data)
        assert (caught.value.errno, destination.state) == (errno.ENODATA, state)


def test_a_device_without_the_keys_is_of_its_own_class() -> None:
    device = make("counter")
    assert type(device).__name__ == type(make("counter,fail=save:EIO")).__name__ == "Counter"
    assert type(device).step is vfiomig.Device.step


def test_a_device_with_the_keys_goes_when_its_last_user_does() -> None:
    gc.disable()
    try:
        device = make("pattern,size=4K,fail=save:EIO+load:EIO,delay=stop-stop_copy:1ms")
        alive = weakref.ref(device)
        del device
        assert alive() is None
    finally:
        gc.enable()
