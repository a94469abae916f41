"""``counter``: what it counts, when, and that the count moves."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from pattern_streams import load, state_of
from vfiomig import SpecError, State, StateRejected
from vfiomig.client import open_device
from vfiomig.errors import RequestError
from vfiomig.models import counter, make
from vfiomig.models.counter import Counter

if TYPE_CHECKING:
    from vfiomig.client import DeviceClient


class Clock:
    """A clock that stands still until it is moved on."""

    seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(counter, "time", clock)
    return clock


def shown(client: DeviceClient) -> int:
    return int.from_bytes(client.read_region(0, 0, 8), "little")


def test_it_counts_while_it_runs_and_while_it_is_p2p_quiescent(clock: Clock) -> None:
    with open_device(Counter(rate=10)) as client:
        assert shown(client) == 0
        clock.seconds += 2
        assert shown(client) == 20
        client.set_state(State.RUNNING_P2P)
        clock.seconds += 1
        assert shown(client) == 30
        client.set_state(State.STOP)
        clock.seconds += 50
        assert shown(client) == 30
        client.set_state(State.RUNNING)
        clock.seconds += 1
        assert shown(client) == 40


def test_the_count_moves_and_goes_on_from_where_it_was(clock: Clock) -> None:
    with open_device(Counter()) as source, open_device(Counter()) as destination:
        clock.seconds += 7
        saving = source.set_state(State.STOP_COPY)
        loading = destination.set_state(State.RESUMING)
        assert saving is not None
        assert loading is not None
        for chunk in saving:
            loading.write_all(chunk)
        destination.set_state(State.RUNNING)
        assert shown(destination) == 7000
        clock.seconds += 1
        assert shown(destination) == 8000
        assert shown(source) == 7000


def test_a_reset_begins_at_zero_and_counts_on(clock: Clock) -> None:
    with open_device(Counter(rate=1)) as client:
        clock.seconds += 5
        client.reset()
        assert shown(client) == 0
        clock.seconds += 5
        assert shown(client) == 5


def test_a_restored_counter_saves_the_same_bytes() -> None:
    source, destination = Counter(), Counter()
    source._clock = (12345, None)
    load(destination, state_of(source))
    assert state_of(destination) == state_of(source)
    assert destination.count == 12345


def test_bar0_is_read_at_any_width_and_cannot_be_written() -> None:
    device = Counter()
    device._clock = (0x1122334455667788, None)
    region = Counter.bar0
    assert region.read(device, 0, 4) == bytes.fromhex("88776655")
    assert region.read(device, 6, 4) == bytes.fromhex("22110000")
    assert region.read(device, 4088, 8) == bytes(8)
    with open_device(Counter()) as client, pytest.raises(RequestError) as caught:
        client.write_region(0, 0, b"x")
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    "stream", [b"", b"counter1", b"counter1" + bytes(9), b"counter2" + bytes(8)]
)
def test_anything_but_a_counters_state_is_refused(stream: bytes) -> None:
    with pytest.raises(StateRejected, match="counter"):
        load(Counter(), stream)


def test_the_rate_is_a_key_and_is_positive() -> None:
    device = make("counter,rate=2K")
    assert isinstance(device, Counter)
    assert device._rate == 2048
    with pytest.raises(SpecError, match="rate=0"):
        make("counter,rate=0")
