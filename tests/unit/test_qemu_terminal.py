"""vfiomig.qemu.terminal: what a guest says is found, however it comes, and nothing waits forever."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from vfiomig.errors import GuestEnded, GuestTimeout
from vfiomig.qemu import terminal
from vfiomig.qemu.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Port:
    """The machine's side of a serial port, with a process that stands for QEMU."""

    def __init__(self, folder: Path) -> None:
        self.said, self.told = folder / "shell", folder / "commands"
        self.terminal = Terminal(self.said, self.told, "the shell")
        self.qemu = subprocess.Popen(["sleep", "100"])
        self.terminal.attach(self.qemu.pid)

    def says(self, data: bytes) -> None:
        with self.said.open("ab") as file:
            file.write(data)

    def ends(self) -> None:
        self.qemu.kill()
        self.qemu.wait(timeout=10)


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    made = Port(tmp_path)
    yield made
    made.ends()
    made.terminal.close()


def test_a_match_takes_all_up_to_its_end_and_leaves_the_rest(port: Port) -> None:
    port.says(b"login: root\nready 42\nrest")
    before, match = port.terminal.take(rb"ready (\d+)\n")
    assert (before, match[1]) == (b"login: root\n", b"42")
    assert port.terminal.drain() == b"rest"
    assert port.terminal.drain() == b""


def test_a_match_may_come_later_and_in_pieces(port: Port) -> None:
    def say_slowly() -> None:
        for piece in (b"x" * 9000, b"vfio", b"mig: re", b"ady\nmore"):
            time.sleep(0.02)
            port.says(piece)

    thread = threading.Thread(target=say_slowly)
    thread.start()
    try:
        before, _ = port.terminal.take(rb"vfiomig: ready\n", timeout=10)
    finally:
        thread.join(timeout=10)
    assert before == b"x" * 9000
    assert port.terminal.drain() == b"more"


def test_the_wait_ends_when_the_words_come_not_at_a_tick(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait lasts as long as there is time, and something has come when it ends."""
    waiting = threading.Event()
    waits: list[tuple[float, set[int]]] = []
    poll = terminal._poll

    def wait(wanted: list[tuple[int, int]], timeout: float) -> set[int]:
        if timeout:
            waiting.set()
        ready = poll(wanted, timeout)
        if timeout:
            waits.append((timeout, ready))
        return ready

    def say() -> None:
        assert waiting.wait(10)
        port.says(b"now\n")

    monkeypatch.setattr(terminal, "_poll", wait)
    saying = threading.Thread(target=say)
    saying.start()
    port.terminal.expect(rb"now\n", timeout=1000)
    saying.join(timeout=10)
    assert waits
    assert all(timeout > 900 and ready for timeout, ready in waits), waits


def test_words_that_do_not_come_are_an_error_with_those_that_did(port: Port) -> None:
    port.says(b"panic at the start")
    with pytest.raises(GuestTimeout, match=r"the shell sent no b'ready'.*panic at the start"):
        port.terminal.expect(rb"ready", timeout=0.1)
    # Nothing was taken, so somebody else may look for something else.
    assert port.terminal.expect(rb"panic").group() == b"panic"


def test_the_last_words_of_a_guest_are_heard_before_its_end(port: Port) -> None:
    port.says(b"last words\n")
    port.ends()
    assert port.terminal.expect(rb"words\n").group() == b"words\n"
    with pytest.raises(GuestEnded, match="before its end"):
        port.terminal.expect(rb"more")


def test_an_end_is_noticed_while_waiting(port: Port) -> None:
    timer = threading.Timer(0.1, port.qemu.kill)
    timer.start()
    try:
        with pytest.raises(GuestEnded):
            port.terminal.expect(rb"ready", timeout=1000)
    finally:
        timer.join(timeout=10)


def test_what_is_sent_comes_out_of_the_fifo(port: Port) -> None:
    reader = os.open(port.told, os.O_RDONLY)
    try:
        port.terminal.send(b"echo hello\n")
        assert os.read(reader, 100) == b"echo hello\n"
    finally:
        os.close(reader)


def test_a_guest_that_does_not_read_is_an_error(port: Port) -> None:
    with pytest.raises(GuestTimeout, match="does not take"):
        port.terminal.send(b"x" * 1_000_000, timeout=0.2)


def test_a_guest_that_ended_takes_nothing(port: Port) -> None:
    port.terminal.send(b"x" * 65536)
    port.ends()
    with pytest.raises(GuestEnded, match="it has ended"):
        port.terminal.send(b"x" * 65536)
