"""vfiomig.qemu.qmp and lines: messages are lines, however they are cut, and nothing waits forever."""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from vfiomig.errors import GuestEnded, GuestError, GuestTimeout
from vfiomig.qemu.lines import Lines
from vfiomig.qemu.qmp import Qmp, QmpError

if TYPE_CHECKING:
    from collections.abc import Iterator

GREETING = {"QMP": {"version": {"qemu": {"major": 10}}, "capabilities": ["oob"]}}


class Monitor:
    """QEMU's side of a monitor, which says what it is told to."""

    def __init__(self) -> None:
        here, self.there = socket.socketpair()
        self.there.settimeout(10)
        self.qmp = Qmp(here, timeout=10)
        self._received = b""

    def says(self, *messages: dict[str, Any]) -> None:
        self.there.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    def heard(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._received += self.there.recv(65536)
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


@contextmanager
def a_monitor() -> Iterator[Monitor]:
    monitor = Monitor()
    try:
        yield monitor
    finally:
        monitor.qmp.close()
        monitor.there.close()


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    with a_monitor() as made:
        yield made


def test_a_greeting_is_answered_before_any_command(monitor: Monitor) -> None:
    monitor.says(GREETING, {"return": {}})
    monitor.qmp.greet()
    assert monitor.heard() == {"execute": "qmp_capabilities"}


def test_something_else_than_a_monitor_is_refused(monitor: Monitor) -> None:
    monitor.says({"hello": 1})
    with pytest.raises(GuestError, match="no QEMU monitor"):
        monitor.qmp.greet()


def test_arguments_have_hyphens_and_the_result_comes_back(monitor: Monitor) -> None:
    monitor.says({"return": {"status": "running"}})
    result = monitor.qmp.execute("migrate-set-parameters", max_bandwidth=5, tls_creds="x")
    assert result == {"status": "running"}
    assert monitor.heard() == {
        "execute": "migrate-set-parameters",
        "arguments": {"max-bandwidth": 5, "tls-creds": "x"},
    }


def test_a_refusal_has_qemus_words_and_class(monitor: Monitor) -> None:
    monitor.says({"error": {"class": "CommandNotFound", "desc": "no such thing"}})
    with pytest.raises(QmpError, match="QEMU refuses frobnicate: no such thing") as caught:
        monitor.qmp.execute("frobnicate")
    assert caught.value.kind == "CommandNotFound"


def test_events_before_an_answer_are_kept_in_their_order(monitor: Monitor) -> None:
    monitor.says(
        {"event": "STOP"}, {"event": "MIGRATION", "data": {"status": "active"}}, {"return": 1}
    )
    assert monitor.qmp.execute("stop") == 1
    assert [event["event"] for event in monitor.qmp.events] == ["STOP", "MIGRATION"]


def test_an_event_is_waited_for_by_name_and_data(monitor: Monitor) -> None:
    monitor.says(
        {"event": "STOP"},
        {"event": "MIGRATION", "data": {"status": "active"}},
        {"event": "MIGRATION", "data": {"status": "completed"}},
        {"event": "RESUME"},
    )
    data = monitor.qmp.wait_event("MIGRATION", lambda data: data["status"] != "active")
    assert data == {"status": "completed"}
    assert monitor.qmp.wait_event("RESUME") == {}


def test_an_event_that_does_not_come_is_an_error_that_says_what_came(monitor: Monitor) -> None:
    monitor.says({"event": "STOP"})
    with pytest.raises(GuestTimeout, match=r"no event RESUME in 0.2 s; seen: \{'STOP': 1\}"):
        monitor.qmp.wait_event("RESUME", timeout=0.2)


def test_an_answer_that_does_not_come_is_an_error(monitor: Monitor) -> None:
    with pytest.raises(GuestTimeout, match="sent no line in time"):
        monitor.qmp.execute("stop", timeout=0.1)


def test_a_monitor_that_goes_away_is_an_error(monitor: Monitor) -> None:
    monitor.there.close()
    with pytest.raises(GuestEnded):
        monitor.qmp.execute("stop")


def test_an_answer_may_come_in_pieces_of_any_size(monitor: Monitor) -> None:
    message = json.dumps({"return": "x" * 100_000}).encode() + b"\r\n"

    def dribble() -> None:
        for start in range(0, len(message), 7001):
            monitor.there.sendall(message[start : start + 7001])

    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        assert monitor.qmp.execute("query-qmp-schema") == "x" * 100_000
    finally:
        thread.join(timeout=10)


def test_a_descriptor_goes_with_its_command(monitor: Monitor) -> None:
    readable, writable = os.pipe()
    try:
        monitor.says({"return": {}})
        monitor.qmp.execute("getfd", fds=[writable], fdname="device")
        data, received, _, _ = socket.recv_fds(monitor.there, 65536, 4)
        assert json.loads(data) == {"execute": "getfd", "arguments": {"fdname": "device"}}
        (passed,) = received
        os.write(passed, b"through")
        os.close(passed)
        assert os.read(readable, 10) == b"through"
    finally:
        os.close(readable)
        os.close(writable)


def test_a_peer_that_does_not_read_is_an_error() -> None:
    here, there = socket.socketpair()
    wire = Lines(here, "the monitor")
    try:
        with there, pytest.raises(GuestTimeout, match="the monitor does not take"):
            wire.send(b"x" * 10_000_000, timeout=0.2)
    finally:
        wire.close()
