"""A device goes with its last user: its memory may be gigabytes."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest

from vfiomig import State
from vfiomig.client import open_device
from vfiomig.models import make

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_a_device_that_was_used_is_gone_without_the_garbage_collector() -> None:
    device = make("pattern,size=1M")
    gone = weakref.ref(device)
    with open_device(device) as client:
        with client.set_state(State.PRE_COPY) as session:
            while session.readinto(bytearray(1 << 20)):
                pass
        client.set_state(State.RUNNING)
    del client, session, device
    assert gone() is None


def test_a_device_that_failed_is_gone_too() -> None:
    device = make("pattern,size=1M")
    gone = weakref.ref(device)
    with open_device(device) as client:
        with client.set_state(State.RESUMING) as session:
            session.write(b"nonsense" * 4)
        client.reset()
    del client, session, device
    assert gone() is None
