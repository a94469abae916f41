"""Eventfds that belong to somebody else as well: counted, full, given up, and no eventfds."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading

import pytest

from leftovers import is_open
from vfiomig import eventfd as eventfd_module
from vfiomig.eventfd import EventFd, _Requests

#: As far as a writer can fill a counter.
FULL = (1 << 64) - 2
MANY = 64


def test_an_eventfd_counts_signals_until_it_is_taken() -> None:
    number = os.eventfd(0)
    with EventFd(os.dup(number)) as eventfd:
        eventfd.signal()
        eventfd.signal()
        assert os.eventfd_read(number) == 2
        assert not eventfd.take(), "it does not wait, although the eventfd would"
        os.eventfd_write(number, 3)
        assert eventfd.take()
        assert not eventfd.take()
    os.close(number)


def test_a_full_eventfd_stays_full_and_nobody_waits() -> None:
    """As with a signal of the kernel, which goes one further than a write could."""
    number = os.eventfd(0)
    with EventFd(os.dup(number)) as eventfd:
        os.eventfd_write(number, FULL)
        for _ in range(3):
            eventfd.signal()
        assert os.eventfd_read(number) == FULL + 1
    os.close(number)


def test_a_counter_that_is_filled_after_a_look_at_it_holds_nobody_up() -> None:
    """Two threads fill it, each at any moment of the other's signals."""
    number = os.eventfd(0)
    with EventFd(os.dup(number)) as ours, EventFd(os.dup(number)) as theirs:
        for _ in range(200):
            signaller = threading.Thread(target=signal_many, args=(ours,))
            signaller.start()
            try:
                os.eventfd_write(number, FULL - MANY)  # there is room, also after all signals
                signal_many(theirs)
                signaller.join(10)
                assert not signaller.is_alive(), "it waits for a reader"
            finally:
                while signaller.is_alive():
                    ours.take()
                    signaller.join(0.01)
            assert os.eventfd_read(number) == FULL + 1
    os.close(number)


def signal_many(eventfd: EventFd) -> None:
    for _ in range(MANY):
        eventfd.signal()


def test_a_forked_process_and_one_without_asynchronous_io_signal_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = os.eventfd(0)
    with EventFd(os.dup(number)) as eventfd:
        eventfd.signal()
        child = os.fork()
        if not child:
            eventfd.signal()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert os.eventfd_read(number) == 2
        monkeypatch.setattr(eventfd_module, "_requests", _Requests())
        monkeypatch.setattr(eventfd_module, "_SETUP", ctypes.c_long(-1))
        eventfd.signal()
        assert os.eventfd_read(number) == 1
        os.eventfd_write(number, FULL)
        eventfd.signal()
        assert os.eventfd_read(number) == FULL, "a writer gets no further, and does not wait"
    os.close(number)


def test_signals_of_many_threads_are_all_counted() -> None:
    """More than the kernel has room for before what has ended is collected."""
    number = os.eventfd(0)
    with EventFd(os.dup(number)) as eventfd:

        def signal() -> None:
            for _ in range(2000):
                eventfd.signal()

        threads = [threading.Thread(target=signal) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.eventfd_read(number) == 8000
    os.close(number)


def test_an_eventfd_is_given_up_when_its_owner_has_closed_every_copy() -> None:
    number = os.eventfd(0)
    program = "import os, sys; sys.stdin.read(1); os.close(int(sys.argv[1])); print(); input()"
    with (
        EventFd(os.dup(number)) as own,
        subprocess.Popen(
            [sys.executable, "-c", program, str(number)],
            pass_fds=[number],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other,
        EventFd(os.dup(number), owner=other.pid) as shared,
    ):
        assert other.stdin is not None
        assert other.stdout is not None
        assert not shared.is_given_up()
        other.stdin.write(b"x")
        other.stdin.flush()
        assert other.stdout.readline() == b"\n"
        assert shared.is_given_up()
        assert not own.is_given_up(), "whose owner nobody knows"
        other.stdin.write(b"\n")
    assert other.returncode == 0
    os.close(number)


def test_what_is_no_eventfd_is_refused_and_closed() -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError) as failure:
        EventFd(reader)
    assert failure.value.errno == errno.EINVAL
    assert not is_open(reader)
    os.close(writer)
    with pytest.raises(OSError) as failure:
        EventFd(reader)
    assert failure.value.errno == errno.EBADF
