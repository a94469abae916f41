"""One device in this process and one behind a socket: whatever is done, they do the same."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vfiomig
from suite_devices import END, MAGIC, RECORD, Card
from vfiomig import Session
from vfiomig.client import open_device
from vfiomig.doors.vfio_user import Server
from vfiomig.errors import RequestError
from vfiomig.fsm import LEGAL_SETS, Capability, capability_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfiomig import DeviceClient

TARGETS = (*range(9), 0xFFFFFFFF)
PIECES = (MAGIC, b"MTTY", RECORD.pack(0, 4) + b"abcd", RECORD.pack(4095, 2), END, b"")


class User:
    """A client that keeps every session it ever had, and tells what came of each step."""

    def __init__(self, dev: DeviceClient) -> None:
        self.dev = dev
        self.sessions: list[Session] = []

    def do(self, step: Callable[[User], object]) -> object:
        try:
            return step(self)
        except RequestError as failure:
            return type(failure), failure.errno, getattr(failure, "device_state", None)

    def pick(self, at: int) -> Session | None:
        return self.sessions[at % len(self.sessions)] if self.sessions else None


Step = tuple[str, int, int]


def set_state(user: User, target: int, force: int) -> object:
    session = user.dev.set_state(target, force=bool(force % 2))
    if session is not None and session not in user.sessions:
        user.sessions.append(session)
    return None if session is None else user.sessions.index(session)


def read(user: User, at: int, size: int) -> object:
    """Read until there are so many bytes, or an end: where one read ends means nothing."""
    session, found = user.pick(at), bytearray()
    if session is None:
        return None
    while len(found) < size:
        buffer = bytearray(size - len(found))
        try:
            count = session.readinto(buffer)
        except RequestError as failure:
            return bytes(found), failure.errno
        if not count:
            return bytes(found), count
        found += buffer[:count]
    return bytes(found)


def write(user: User, at: int, piece: int) -> object:
    session = user.pick(at)
    return None if session is None else session.write(PIECES[piece % len(PIECES)])


def close(user: User, at: int, _: int) -> object:
    session = user.pick(at)
    if session is not None:
        session.close()
    return None


def info(user: User, at: int, _: int) -> object:
    session = user.pick(at)
    return None if session is None else session.precopy_info()


STEPS: dict[str, Callable[[User, int, int], object]] = {
    "set_state": set_state,
    "read": read,
    "write": write,
    "close": close,
    "precopy_info": info,
    "precopy_v2": lambda user, _a, _b: user.dev.precopy_v2(),
    "state": lambda user, _a, _b: user.dev.state,
    "reset": lambda user, _a, _b: user.dev.reset(),
    "data_size": lambda user, _a, _b: user.dev.data_size(),
    "read_region": lambda user, at, size: user.dev.read_region(0, at * 400, size),
    "write_region": lambda user, at, size: user.dev.write_region(0, at * 400, bytes(size)),
}

states = st.tuples(st.just("set_state"), st.sampled_from(TARGETS), st.integers(0, 3))
others = st.tuples(
    st.sampled_from([name for name in STEPS if name != "set_state"]),
    st.integers(0, 11),
    st.sampled_from([1, 4, 7, 100, 5000]),
)


@pytest.fixture(params=LEGAL_SETS, ids=capability_name)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[DeviceClient, DeviceClient]]:
    capabilities: Capability = request.param
    name = capability_name(capabilities)
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "device.sock")
        stack.enter_context(Server(Card(caps=name), path))
        here = stack.enter_context(open_device(Card(caps=name)))
        there = stack.enter_context(vfiomig.open(f"vfio-user:{path}", timeout=20))
        yield here, there


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=st.lists(st.one_of(states, others), min_size=5, max_size=40))
def test_they_cannot_be_told_apart(
    pair: tuple[DeviceClient, DeviceClient], steps: list[Step]
) -> None:
    users = [User(dev) for dev in pair]
    for user in users:
        user.dev.reset()
    for name, first, second in steps:
        here, there = (
            user.do(lambda user: STEPS[name](user, first, second))  # noqa: B023 - called at once
            for user in users
        )
        assert here == there, (name, first, second)
    for user in users:
        for session in user.sessions:
            with suppress(RequestError):
                session.close()
