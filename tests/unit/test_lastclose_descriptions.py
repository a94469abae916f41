"""LastClose on descriptors of this process and its forks, without any filter."""

from __future__ import annotations

import mmap
import os
import resource
import select
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from vfiomig.descriptors import Fd, create_sealed_memfd, poll_until, reopen
from vfiomig.doors.syscall import lastclose
from vfiomig.doors.syscall.lastclose import LastClose
from vfiomig.errors import PrerequisiteError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def memfd() -> Iterator[Fd]:
    with create_sealed_memfd("device", 4096) as fd:
        yield fd


@pytest.fixture
def closes() -> Iterator[LastClose[str]]:
    with LastClose[str]() as watch:
        yield watch


def is_ready(closes: LastClose[str]) -> bool:
    return bool(poll_until(closes, select.POLLIN, time.monotonic()))


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_NONBLOCK])
def test_the_close_of_the_only_copy_is_told_once(
    closes: LastClose[str], memfd: Fd, flags: int
) -> None:
    opened = closes.open(memfd, flags, "one")
    assert closes.drain() == []
    assert not is_ready(closes)
    opened.close()
    assert is_ready(closes)
    assert closes.drain() == ["one"]
    assert closes.drain() == []
    assert closes.settled
    assert not is_ready(closes)


def test_flags_that_speak_of_the_path_do_no_harm(closes: LastClose[str], memfd: Fd) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOFOLLOW
    os.pwrite(memfd.fileno(), b"kept", 0)
    with closes.open(memfd, flags, "one") as opened:
        assert os.pread(opened.fileno(), 4, 0) == b"kept"
    assert closes.drain() == ["one"]


def test_opens_of_one_memfd_are_told_apart(closes: LastClose[str], memfd: Fd) -> None:
    opens = {name: closes.open(memfd, os.O_RDWR, name) for name in "abcd"}
    opens["c"].close()
    assert closes.drain() == ["c"]
    opens["a"].close()
    opens["d"].close()
    assert closes.drain() == ["a", "d"]
    opens["b"].close()
    assert closes.drain() == ["b"]


def test_a_copy_keeps_the_open_alive(closes: LastClose[str], memfd: Fd) -> None:
    opened = closes.open(memfd, os.O_RDWR, "one")
    copy = os.dup(opened.fileno())
    opened.close()
    assert closes.drain() == []
    os.dup2(memfd.fileno(), copy)  # replaced, not closed
    assert closes.drain() == ["one"]
    os.close(copy)
    assert closes.drain() == []


def test_a_mapping_keeps_the_open_alive(closes: LastClose[str], memfd: Fd) -> None:
    opened = closes.open(memfd, os.O_RDWR, "one")
    pages = mmap.mmap(opened.fileno(), 4096)
    opened.close()
    # The mapping object holds a copy of the descriptor as well as the pages.
    assert closes.drain() == []
    pages.close()
    assert closes.drain() == ["one"]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_forked_child_keeps_the_open_alive_until_it_ends(
    closes: LastClose[str], memfd: Fd, end: signal.Signals | None
) -> None:
    opened = closes.open(memfd, os.O_RDWR, "one")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    opened.close()
    assert closes.drain() == []
    if end is not None:
        os.kill(child, end)
    os.close(writer)
    os.waitpid(child, 0)
    assert closes.drain() == ["one"]


def test_a_copy_in_flight_keeps_the_open_alive(closes: LastClose[str], memfd: Fd) -> None:
    opened = closes.open(memfd, os.O_RDWR, "one")
    here, there = socket.socketpair()
    with here, there:
        socket.send_fds(here, [b"x"], [opened.fileno()])
        opened.close()
        assert closes.drain() == []
        _, fds, _, _ = socket.recv_fds(there, 1, 1)
        assert closes.drain() == []
        os.close(fds[0])
        assert closes.drain() == ["one"]


def test_a_copy_that_nobody_receives_ends_with_its_socket(
    closes: LastClose[str], memfd: Fd
) -> None:
    opened = closes.open(memfd, os.O_RDWR, "one")
    here, there = socket.socketpair()
    with here, there:
        socket.send_fds(here, [b"x"], [opened.fileno()])
        opened.close()
    assert closes.drain() == ["one"]


def test_opens_of_two_memfds_do_not_mix(closes: LastClose[str], memfd: Fd) -> None:
    with create_sealed_memfd("other", 4096) as other:
        first = closes.open(memfd, os.O_RDWR, "first")
        second = closes.open(other, os.O_RDWR, "second")
        second.close()
        assert closes.drain() == ["second"]
        closes.forget(other)
    first.close()
    assert closes.drain() == ["first"]


def test_an_open_that_was_not_made_here_is_not_told(closes: LastClose[str], memfd: Fd) -> None:
    with closes.open(memfd, os.O_RDWR, "one"):
        with reopen(memfd, os.O_RDWR):
            pass
        assert (closes.drain(), closes.settled) == ([], False)
        assert (closes.drain(), closes.settled) == ([], True)
    assert closes.drain() == ["one"]


def test_a_forgotten_memfd_is_told_no_more(closes: LastClose[str], memfd: Fd) -> None:
    opened = closes.open(memfd, os.O_RDWR, "one")
    closes.forget(memfd)
    closes.forget(memfd)
    opened.close()
    assert closes.drain() == []
    with closes.open(memfd, os.O_RDWR, "again"):
        pass
    assert closes.drain() == ["again"]


def test_a_mark_that_goes_after_its_event_is_seen_later(
    closes: LastClose[str], memfd: Fd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a thread that looks between the kernel's report and its dropping of the lock."""
    held = lastclose._has_mark
    monkeypatch.setattr(lastclose, "_has_mark", lambda _one: True)
    closes.open(memfd, os.O_RDWR, "one").close()
    assert (closes.drain(), closes.settled) == ([], False)
    monkeypatch.setattr(lastclose, "_has_mark", held)
    assert (closes.drain(), closes.settled) == (["one"], True)


def test_merged_events_lose_no_close(closes: LastClose[str], memfd: Fd) -> None:
    """A thousand equal events are one in the queue."""
    opens = [closes.open(memfd, os.O_RDWR, f"{number}") for number in range(1000)]
    for one in opens:
        one.close()
    assert closes.drain() == [f"{number}" for number in range(1000)]


def test_closes_of_many_threads_are_all_told_once(closes: LastClose[str], memfd: Fd) -> None:
    opens = [closes.open(memfd, os.O_RDWR, f"{number}") for number in range(200)]

    def close_every_fourth(start: int) -> None:
        for one in opens[start::4]:
            one.close()

    threads = [threading.Thread(target=close_every_fourth, args=(start,)) for start in range(4)]
    told: list[str] = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        told += closes.drain()
    told += closes.drain()
    assert sorted(told, key=int) == [f"{number}" for number in range(200)]


def test_without_a_free_watch_the_limit_is_named() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(PrerequisiteError, match="max_user_instances"):
            LastClose[str]()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
