"""vfiomig.qemu.workload: whatever happens to a byte or a block on its way is noticed."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

from fake_qemu import qemu
from serial_cards import eventually
from vfiomig.errors import GuestTimeout
from vfiomig.qemu import workload
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.machine import Machine
from vfiomig.qemu.workload import (
    SerialEcho,
    acknowledged_blocks,
    finish_blocks,
    start_blocks,
    wait_for_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PATIENCE_S = 20


class Port:
    """A serial card with a guest behind it that sends back what it gets, with its mistakes."""

    def __init__(self, path: Path, greeting: bytes = b"") -> None:
        self.mistake: Callable[[bytes], bytes] = lambda data: data
        #: Whether what comes stays in the card.
        self.holds = False
        self.held = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._greeting = greeting
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            self._connection, _ = self._listener.accept()
            self._connection.sendall(self._greeting)
            while data := self._connection.recv(100):
                if self.holds:
                    self.held += data
                else:
                    self._connection.sendall(self.mistake(data))

    def close(self) -> bytes:
        """Close as a card does that stops; return what is in it by then. Once more is harmless."""
        for end in (self._listener, self._connection):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RD)
        self._thread.join(PATIENCE_S)
        if self._connection is not None:
            self._connection.close()
        self._listener.close()
        return self.held


class Line:
    """A stream from a source's port to a destination's."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._stack = stack
        self._folder = folder
        self.source = Port(folder / "source", b"ready\n")
        stack.callback(self.source.close)
        self.echo = stack.enter_context(SerialEcho(folder / "source", folder / "destination"))

    def flow(self, count: int = 3000) -> None:
        self.echo.wait(self.echo.returned + count, timeout=PATIENCE_S)

    def fill(self) -> None:
        """Let all that may be on its way be in the source's card."""
        self.source.holds = True
        assert eventually(lambda: len(self.source.held) >= workload._WINDOW)

    def move(self, carried: Callable[[bytes], bytes] = lambda data: data) -> Port:
        """Stop the source's card; what it had taken comes out of the destination's."""
        destination = Port(self._folder / "destination", carried(self.source.close()))
        self._stack.callback(destination.close)
        self.echo.go_on()
        return destination


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with ExitStack() as stack:
        yield Line(tmp_path, stack)


def test_all_comes_back_from_one_port_and_then_from_the_other(line: Line) -> None:
    line.flow()
    line.move()
    line.flow()
    line.echo.finish()
    assert line.echo.failure == ""
    assert line.echo.returned >= 6000
    assert line.echo.on_their_way is not None


def test_the_number_of_bytes_on_their_way_is_limited(line: Line) -> None:
    line.flow()
    line.fill()
    assert len(line.source.close()) == workload._WINDOW
    line.echo.wait(1 << 30, timeout=PATIENCE_S)
    assert line.echo.on_their_way == workload._WINDOW


MISTAKES: dict[str, Callable[[bytes], bytes]] = {
    "lost": lambda data: data[1:],
    "doubled": lambda data: data[:1] + data,
    "moved": lambda data: data[1:2] + data[:1] + data[2:],
    "changed": lambda data: data[:-1] + b"?",
    "foreign": lambda data: data + b"?",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_byte_that_goes_wrong_in_the_port_is_noticed(line: Line, mistake: str) -> None:
    line.flow()
    line.source.mistake = lambda data: MISTAKES[mistake](data) if b"7\n" in data else data
    line.echo.wait(1 << 30, timeout=PATIENCE_S)
    assert "came back, and" in line.echo.failure
    assert f"after byte {line.echo.returned} " in line.echo.failure


@pytest.mark.parametrize("mistake", ["lost", "doubled", "foreign"])
def test_a_byte_that_goes_wrong_at_the_switch_is_noticed(line: Line, mistake: str) -> None:
    line.flow()
    line.fill()
    line.move(MISTAKES[mistake])
    line.echo.wait(1 << 30, timeout=PATIENCE_S)
    assert "came back, and" in line.echo.failure


def test_nothing_more_is_a_failure_after_a_while(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    line.flow()
    line.fill()
    line.move(lambda _: b"").holds = True
    monkeypatch.setattr(workload, "_PATIENCE_S", 0.3)
    line.echo.finish()
    assert "nothing came back for" in line.echo.failure


def test_a_destination_whose_port_is_not_there_is_a_failure(line: Line) -> None:
    line.flow()
    line.source.close()
    line.echo.wait(1 << 30, timeout=PATIENCE_S)
    line.echo.finish()
    assert line.echo.failure == (
        f"a port cannot be used after byte {line.echo.returned}: No such file or directory"
    )


def test_a_port_that_closes_once_more_is_a_failure(line: Line) -> None:
    line.flow()
    destination = line.move()
    line.flow()
    destination.close()
    line.echo.wait(1 << 30, timeout=PATIENCE_S)
    assert "the port closed once more" in line.echo.failure


def test_a_stream_that_is_given_up_has_no_failure(line: Line) -> None:
    line.flow()
    line.echo.close()
    line.echo.close()
    assert line.echo.failure == ""


def test_the_stream_is_numbered_lines_wherever_it_is_cut() -> None:
    whole = b"".join(b"%08d\n" % number for number in range(300))
    for offset in range(30):
        for size in range(30):
            assert workload._stream(offset, size) == whole[offset : offset + size]


# Blocks, with the host's shell and a file for a disk.


class Blocks:
    """A guest that writes blocks to ``disk``."""

    def __init__(self, guest: Guest, folder: Path) -> None:
        self.guest = guest
        self.disk = folder / "disk"
        self.disk.touch()
        guest.wait_ready()
        guest.shell.send(f"mkdir {folder}/work; cd {folder}/work\n".encode())


@pytest.fixture
def blocks(tmp_path: Path) -> Iterator[Blocks]:
    with Guest(qemu(tmp_path), Machine()) as guest:
        yield Blocks(guest, tmp_path)


def test_every_block_that_was_noted_is_read_back(blocks: Blocks) -> None:
    start_blocks(blocks.guest, str(blocks.disk))
    wait_for_blocks(blocks.guest, 10)
    assert acknowledged_blocks(blocks.guest) >= 10
    count, wrong = finish_blocks(blocks.guest, str(blocks.disk))
    assert count >= 10
    assert wrong == []
    assert blocks.disk.stat().st_size >= count * 4096


def test_a_block_that_is_not_what_was_written_is_named(blocks: Blocks) -> None:
    start_blocks(blocks.guest, str(blocks.disk))
    wait_for_blocks(blocks.guest, 8)
    with blocks.disk.open("r+b") as disk:
        for number in (2, 5):
            os.pwrite(disk.fileno(), b"x", number * 4096 + 4095)
    assert finish_blocks(blocks.guest, str(blocks.disk))[1] == [2, 5]


def test_blocks_that_are_not_there_any_more_are_named(blocks: Blocks) -> None:
    start_blocks(blocks.guest, str(blocks.disk))
    wait_for_blocks(blocks.guest, 8)
    blocks.guest.check("touch stop; until [ -e ended ]; do sleep 0.1; done")
    os.truncate(blocks.disk, 3 * 4096)
    count, wrong = finish_blocks(blocks.guest, str(blocks.disk))
    assert wrong == list(range(3, count))


def test_a_block_that_was_different_at_once_is_named_though_it_is_right_now(
    blocks: Blocks,
) -> None:
    start_blocks(blocks.guest, str(blocks.disk))
    wait_for_blocks(blocks.guest, 4)
    blocks.guest.check("echo 3 >>different")
    assert finish_blocks(blocks.guest, str(blocks.disk))[1] == [3]


def test_a_block_that_the_disk_refuses_is_wrong_and_the_last(blocks: Blocks) -> None:
    start_blocks(blocks.guest, "/dev/full")
    wait_for_blocks(blocks.guest, 1000)
    assert finish_blocks(blocks.guest, "/dev/full") == (1, [0])


def test_a_guest_that_hangs_is_an_error(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "_PATIENCE_S", 0.3)
    with pytest.raises(GuestTimeout):
        wait_for_blocks(blocks.guest, 1)
