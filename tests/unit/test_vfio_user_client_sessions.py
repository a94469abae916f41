"""Sessions without descriptors: which one is open, and what a stale or broken one gives."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import pytest

import c_style_server as c_style
import vfiomig
from c_style_server import CStyleServer, Options
from raw_peer import interrupted_when
from vfiomig import SessionError, State
from vfiomig.client.vfio_user.sessions import DataFd, Sessions
from vfiomig.fsm import LEGAL_SETS, Capability, SessionKind, path, session_kind

if TYPE_CHECKING:
    from pathlib import Path

SAVING, RESUMING = SessionKind.SAVING, SessionKind.RESUMING


def errno_of(sessions: Sessions, data_fd: DataFd, kind: SessionKind) -> int:
    try:
        sessions.require(data_fd, kind)
    except OSError as failure:
        return failure.errno or -1
    return 0


@pytest.mark.parametrize("capabilities", LEGAL_SETS)
def test_a_session_is_open_exactly_as_the_arcs_say(capabilities: Capability) -> None:
    """Every pair of states: what the client concludes is what the table of arcs tells."""
    for origin in State:
        for target in State:
            arcs = path(capabilities, origin, target)
            if arcs is None or path(capabilities, State.RUNNING, origin) is None:
                continue
            sessions = Sessions()
            sessions.settle(State.RUNNING)
            sessions.settle(origin)
            before = sessions.open() if session_kind(origin) else None
            opened = sessions.settle(target)
            assert opened is any(arc.opens for arc in arcs)
            assert sessions.state is target
            if before is not None:
                ended = any(arc.closes for arc in arcs)
                assert errno_of(sessions, before, before.kind) == errno.ENODEV * ended
            if opened:
                assert errno_of(sessions, sessions.open(), sessions.open().kind) == 0


def test_a_state_that_nobody_knows_has_no_session() -> None:
    sessions = Sessions()
    sessions.settle(State.STOP_COPY)
    saving = sessions.open()
    assert not sessions.settle(99)
    assert sessions.state is None
    assert errno_of(sessions, saving, SAVING) == errno.ENODEV


def test_the_wrong_direction_comes_before_the_end() -> None:
    sessions = Sessions()
    sessions.settle(State.STOP_COPY)
    saving = sessions.open()
    assert errno_of(sessions, saving, RESUMING) == errno.EBADF
    sessions.end()
    assert errno_of(sessions, saving, RESUMING) == errno.EBADF
    assert errno_of(sessions, saving, SAVING) == errno.ENODEV


def test_bytes_that_went_astray_end_their_session_and_no_other() -> None:
    sessions = Sessions()
    sessions.settle(State.STOP_COPY)
    saving = sessions.open()
    sessions.lose(saving)
    assert errno_of(sessions, saving, SAVING) == errno.EIO
    sessions.settle(State.STOP)
    sessions.settle(State.STOP_COPY)
    assert errno_of(sessions, sessions.open(), SAVING) == 0


# Over a connection.


class Gate:
    """Holds a server back before it answers a command, until it is opened."""

    def __init__(self, command: int) -> None:
        self._command = command
        self._reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, server: CStyleServer, command: int) -> None:
        if command == self._command:
            self._reached.set()
            assert self._opened.wait(10)

    def wait(self) -> None:
        assert self._reached.wait(10)

    def open(self) -> None:
        self._opened.set()


def test_a_read_that_was_interrupted_is_the_last_one_of_its_session(tmp_path: Path) -> None:
    """Its bytes are lost: the next read would skip them, and nobody would know."""
    path = tmp_path / "device.sock"
    gate = Gate(c_style.DATA_READ)
    with (
        CStyleServer(path, b"0123456789", Options(before=gate)),
        vfiomig.open(f"vfio-user:{path}", timeout=10) as dev,
        dev.set_state(State.STOP_COPY) as session,
    ):
        buffer = bytearray(5)
        with interrupted_when(gate.wait):
            session.readinto(buffer)
        gate.open()
        with pytest.raises(SessionError, match="interrupted") as caught:
            session.readinto(buffer)
        assert caught.value.errno == errno.EIO
        assert buffer == bytes(5)
        assert dev.set_state(State.STOP) is None
        with dev.set_state(State.STOP_COPY) as again:
            assert b"".join(again) == b"0123456789"


def test_a_write_that_was_interrupted_is_the_last_one_of_its_session(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    gate = Gate(c_style.DATA_WRITE)
    with (
        CStyleServer(path, options=Options(before=gate)) as server,
        vfiomig.open(f"vfio-user:{path}", timeout=10) as dev,
        dev.set_state(State.RESUMING) as session,
    ):
        with interrupted_when(gate.wait):
            session.write(b"was it taken?")
        gate.open()
        with pytest.raises(SessionError, match="interrupted") as caught:
            session.write(b"more")
        assert caught.value.errno == errno.EIO
        dev.reset()
        assert server.resets == 1
        assert dev.state is State.RUNNING


def test_a_change_that_was_interrupted_has_happened_or_not_and_is_looked_up(
    tmp_path: Path,
) -> None:
    path = tmp_path / "device.sock"
    gate = Gate(c_style.FEATURE)
    options = Options()
    with (
        CStyleServer(path, b"the state", options) as server,
        vfiomig.open(f"vfio-user:{path}", timeout=10) as dev,
        dev.set_state(State.STOP_COPY) as session,
    ):
        options.before = gate
        with interrupted_when(gate.wait):
            dev.set_state(State.STOP, force=True)
        gate.open()
        # The data_fd still means the session that ended, whatever the client was told.
        with pytest.raises(SessionError) as caught:
            session.readinto(bytearray(5))
        assert caught.value.errno == errno.ENODEV
        assert dev.state is State.STOP
        assert server.transitions[-1] == c_style.STOP


def test_a_stale_data_fd_never_reads_from_the_next_session(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with (
        CStyleServer(path, b"the state") as server,
        vfiomig.open(f"vfio-user:{path}", timeout=10) as dev,
        dev.set_state(State.STOP_COPY) as stale,
    ):
        dev.set_state(State.STOP)
        with dev.set_state(State.STOP_COPY) as current:
            server.seen.clear()
            with pytest.raises(SessionError) as caught:
                stale.readinto(bytearray(4))
            assert caught.value.errno == errno.ENODEV
            assert server.seen == [], "the server could not tell which one is meant"
            assert b"".join(current) == b"the state"


def test_a_transfer_waits_for_a_change_of_state_that_is_under_way(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    gate = Gate(c_style.FEATURE)
    options = Options()
    with (
        CStyleServer(path, b"the state", options),
        vfiomig.open(f"vfio-user:{path}", timeout=10) as dev,
        dev.set_state(State.STOP_COPY) as session,
    ):
        options.before = gate
        changing = threading.Thread(
            target=dev.set_state, args=(State.STOP,), kwargs={"force": True}
        )
        changing.start()
        gate.wait()
        caught: list[int | None] = []

        def read() -> None:
            try:
                session.readinto(bytearray(4))
            except SessionError as failure:
                caught.append(failure.errno)

        reading = threading.Thread(target=read)
        reading.start()
        reading.join(0.05)
        assert reading.is_alive()
        gate.open()
        changing.join(10)
        reading.join(10)
        assert caught == [errno.ENODEV]


def test_a_failed_change_leaves_a_session_that_it_did_not_touch(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    options = Options()
    with (
        CStyleServer(path, b"the state", options),
        vfiomig.open(f"vfio-user:{path}", timeout=10) as dev,
        dev.set_state(State.STOP_COPY) as session,
    ):
        options.fails[c_style.STOP] = errno.EIO
        with pytest.raises(vfiomig.SetStateError) as caught:
            dev.set_state(State.STOP)
        assert caught.value.device_state is State.STOP_COPY
        assert b"".join(session) == b"the state"
