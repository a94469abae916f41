"""`vfiomig serve`: a process of its own, from its readiness line to the end of its socket."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from raw_vfio_user import (
    CONFIG,
    GET_INFO,
    PLAIN,
    RESUMING,
    RUNNING,
    STOP,
    STOP_COPY,
    Raw,
)
from vfiomig.cli.app import main
from vfiomig.descriptors import Fd, poll_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECONDS = 20.0
STOPPED = ["RUNNING -> RUNNING_P2P", "RUNNING_P2P -> STOP"]
SRC = Path(__file__).parents[2] / "src"


class Process:
    """A server in a process of its own."""

    def __init__(self, *arguments: str, pass_fds: Sequence[int] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vfiomig", "serve", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=pass_fds,
            env=os.environ | {"PYTHONPATH": str(SRC)},
        )
        self.lines = b""

    def line(self) -> str:
        """The next line of its stderr."""
        assert self.process.stderr is not None
        deadline = time.monotonic() + SECONDS
        while b"\n" not in self.lines:
            assert poll_until(self.process.stderr, select.POLLIN, deadline), "it says nothing"
            piece = os.read(self.process.stderr.fileno(), 4096)
            assert piece, f"it ended, and said {self.lines!r}"
            self.lines += piece
        first, _, self.lines = self.lines.partition(b"\n")
        return first.decode()

    def end(self) -> int:
        return self.process.wait(SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stderr, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
def serving(path: str) -> Iterator[Process]:
    with Process("counter", "--socket", path) as process:
        assert process.line() == f"serving counter on {path}"
        yield process


def test_clients_are_served_in_turn_and_each_finds_the_device_running(
    serving: Process, path: str
) -> None:
    with Raw.connect(path) as first, socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(path)
        assert first.set_state(STOP_COPY) == 0
        first.close()
        second = Raw(waiting)
        second.good(1, b"\0\0\2\0" + PLAIN)
        assert second.state() == RUNNING
    assert serving.process.poll() is None


def test_once_it_ends_with_its_first_client(path: str) -> None:
    with Process("counter", "--socket", path, "--once") as process:
        process.line()
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)  # whoever only looks is no client
        with Raw.connect(path) as client:
            assert client.state() == RUNNING
        assert process.end() == 0
    assert not Path(path).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("visited", [False, True])
def test_a_signal_ends_it_and_its_socket(
    serving: Process, path: str, number: signal.Signals, visited: bool
) -> None:
    with contextlib.ExitStack() as stack:
        if visited:
            client = stack.enter_context(Raw.connect(path))
            assert client.set_state(RESUMING) == 0
        serving.process.send_signal(number)
        assert serving.end() == 128 + number
        if visited:
            assert client.receive() is None
    assert not Path(path).exists()


def test_a_socket_that_a_killed_server_left_is_replaced(serving: Process, path: str) -> None:
    serving.process.kill()
    serving.process.wait()
    assert Path(path).exists()
    with Process("counter", "--socket", path, "--once") as process:
        process.line()
        with Raw.connect(path) as client:
            assert client.state() == RUNNING
        assert process.end() == 0


@pytest.mark.parametrize("busy", [False, True])
def test_the_socket_of_a_living_server_is_not_taken(
    serving: Process, path: str, busy: bool
) -> None:
    with contextlib.ExitStack() as stack:
        if busy:
            stack.enter_context(Raw.connect(path))
        with Process("counter", "--socket", path) as process:
            assert "another server lives there" in process.line()
            assert process.end() == 2
    with Raw.connect(path) as client:
        assert client.state() == RUNNING


def test_what_is_no_socket_is_not_touched(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(path).write_text("precious")
    assert main(["serve", "counter", "--socket", path]) == 2
    assert "is there and is no socket" in capsys.readouterr().err
    assert Path(path).read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a socket"),
        (["--socket", "s", "--fd", "0"], "not both"),
        (["--socket", "/nowhere/at/all"], "No such file or directory"),
        (["--socket", "x" * 108], "choose a shorter one"),
        (["--fd", "1000"], "it is not open"),
        (["--fd", str(1 << 40)], "it is not open"),
    ],
)
def test_what_cannot_be_served_on_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "counter", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_descriptor_that_is_no_socket_stays_open(capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    with Fd(reader), Fd(writer), socket.socket(socket.AF_INET) as other:
        for number in (reader, other.fileno()):
            assert main(["serve", "counter", "--fd", str(number)]) == 2
            assert "no Unix stream socket" in capsys.readouterr().err
            os.fstat(number)


def test_a_socket_that_listens_can_be_inherited(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        number = listener.fileno()
        with Process("counter", "--fd", str(number), pass_fds=[number]) as process:
            assert process.line() == f"serving counter on descriptor {number}"
            for _ in range(2):
                with Raw.connect(path) as client:
                    assert client.state() == RUNNING
            process.process.terminate()
            assert process.end() == 128 + signal.SIGTERM
    assert Path(path).exists()  # it is not the server's to remove


def test_a_socket_that_is_connected_can_be_inherited() -> None:
    ours, theirs = socket.socketpair()
    with Raw(ours) as client:
        number = theirs.fileno()
        with Process("counter", "--fd", str(number), pass_fds=[number]) as process:
            theirs.close()
            client.good(1, b"\0\0\2\0" + PLAIN)
            assert client.state() == RUNNING
            client.close()
            assert process.end() == 0


def test_the_trace_tells_every_request(path: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    words = ("--trace", str(trace), "--trace-format", "json", "--once")
    with Process("counter", "--socket", path, *words) as process:
        process.line()
        with Raw.connect(path) as client:
            client.read_region(CONFIG, 0, 4)
            assert client.set_state(STOP) == 0
            assert client.read_state(7).errno
            client.good(GET_INFO, bytes([16]) + bytes(15))
        assert process.end() == 0
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [(row["request"], row["result"], row["errno"], row["arcs"]) for row in rows] == [
        ("VERSION()", 0, None, []),
        ("REGION_READ(config+0x0, 4)", 4, None, []),
        ("DEVICE_FEATURE(SET MIG_DEVICE_STATE STOP)", 0, None, STOPPED),
        ("MIG_DATA_READ(7)", -1, "EINVAL", []),
        ("DEVICE_GET_INFO()", 0, None, []),
    ]
    assert {(row["client"], row["on"]) for row in rows} == {(1, "vfio0")}


def test_the_trace_of_people_goes_to_stderr(path: str) -> None:
    with Process("counter", "--socket", path, "--trace", "-", "--once") as process:
        process.line()
        with Raw.connect(path):
            pass
        assert process.line().endswith("client 1 vfio0 VERSION() = 0")
        assert process.end() == 0


def test_it_can_behave_in_the_manner_of_libvfio_user(path: str) -> None:
    with Process("counter", "--socket", path, "--compat", "libvfio-user") as process:
        process.line()
        with Raw.connect(path, PLAIN) as client:
            assert client.set_state(STOP) == 0
        with Raw.connect(path, PLAIN) as client:
            assert client.state() == STOP


def test_a_large_device_is_served_as_soon_as_it_says_so(path: str) -> None:
    with Process("pattern,size=256G", "--socket", path) as process:
        process.line()
        with Raw.connect(path) as client:  # which does not wait long for any answer
            assert client.state() == RUNNING
