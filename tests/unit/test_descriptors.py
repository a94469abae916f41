from __future__ import annotations

import errno
import gc
import mmap
import os
import select
import socket
import time
import warnings

import pytest

from leftovers import is_open
from vfiomig.descriptors import (
    RIGHTS_ROOM,
    Fd,
    create_sealed_memfd,
    passed_descriptors,
    poll_until,
    reopen,
    rights,
)


def test_leaving_the_block_closes_the_descriptor() -> None:
    with Fd(os.dup(0)) as fd:
        number = fd.fileno()
        assert is_open(number)
    assert fd.closed
    assert not is_open(number)


def test_closing_twice_spares_a_stranger_with_the_same_number() -> None:
    fd = Fd(os.dup(0))
    number = fd.fileno()
    fd.close()
    with Fd(os.dup(0)) as stranger:
        assert stranger.fileno() == number
        fd.close()
        assert is_open(number)


def test_a_moved_descriptor_belongs_to_the_receiver() -> None:
    fd = Fd(os.dup(0))
    number = fd.move()
    fd.close()
    assert is_open(number)
    os.close(number)
    with pytest.raises(OSError) as failure:
        fd.fileno()
    assert failure.value.errno == errno.EBADF


def test_a_closed_number_is_refused_at_once() -> None:
    number = os.dup(0)
    os.close(number)
    with pytest.raises(OSError) as failure:
        Fd(number)
    assert failure.value.errno == errno.EBADF


def test_an_inheritable_descriptor_becomes_close_on_exec() -> None:
    number = os.dup(0)
    os.set_inheritable(number, True)
    with Fd(number):
        assert not os.get_inheritable(number)


def test_a_forgotten_descriptor_is_a_warning_and_is_closed() -> None:
    fd = Fd(os.dup(0))
    number = fd.fileno()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del fd
        gc.collect()
    assert [warning.category for warning in seen] == [ResourceWarning]
    assert not is_open(number)


def test_poll_tells_what_is_ready() -> None:
    reader, writer = os.pipe()
    with Fd(reader) as read_end, Fd(writer) as write_end:
        assert poll_until(write_end, select.POLLOUT, None) == select.POLLOUT
        assert poll_until(read_end, select.POLLIN, time.monotonic() - 1) == 0
        os.write(write_end.fileno(), b"x")
        assert poll_until(read_end, select.POLLIN, time.monotonic() + 5) == select.POLLIN


def test_poll_ends_at_its_deadline_and_not_before() -> None:
    reader, writer = os.pipe()
    with Fd(reader) as read_end, Fd(writer):
        started = time.monotonic()
        assert poll_until(read_end, select.POLLIN, started + 0.05) == 0
        assert time.monotonic() - started >= 0.05


def test_a_far_deadline_is_no_overflow() -> None:
    reader, writer = os.pipe()
    with Fd(reader) as read_end, Fd(writer) as write_end:
        os.write(write_end.fileno(), b"x")
        assert poll_until(read_end, select.POLLIN, time.monotonic() + 1e9) == select.POLLIN


def test_a_sealed_memfd_cannot_be_resized_but_written() -> None:
    with create_sealed_memfd("test", 8192) as memfd:
        for size in (0, 4096, 16384):
            with pytest.raises(PermissionError):
                os.truncate(memfd.fileno(), size)
        with mmap.mmap(memfd.fileno(), 8192) as pages:
            pages[8191] = 7
            assert os.pread(memfd.fileno(), 1, 8191) == b"\x07"
        assert not os.get_inheritable(memfd.fileno())


def test_a_sparse_memfd_of_the_size_of_tagged_offsets_is_possible() -> None:
    with create_sealed_memfd("sparse", 0x7FFF_FFFF_FFFF_F000) as memfd:
        os.pwrite(memfd.fileno(), b"far", 0x7E << 56)
        assert os.pread(memfd.fileno(), 3, 0x7E << 56) == b"far"


def test_a_reopened_file_has_an_offset_and_flags_of_its_own() -> None:
    with create_sealed_memfd("test", 16) as memfd:
        os.write(memfd.fileno(), b"0123")
        with reopen(memfd, os.O_RDONLY) as other:
            assert os.read(other.fileno(), 4) == b"0123"
            assert not os.get_inheritable(other.fileno())
            with pytest.raises(OSError) as failure:
                os.write(other.fileno(), b"x")
            assert failure.value.errno == errno.EBADF


@pytest.mark.parametrize("count", [0, 1, 3, 253])
def test_descriptors_are_passed_along_over_a_socket(count: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Fd(os.memfd_create("passed")) as fd:
        ours.sendmsg([b"x"], rights([fd.fileno()] * count))
        _, ancillary, flags, _ = theirs.recvmsg(1, RIGHTS_ROOM)
        passed = passed_descriptors(ancillary)
        assert (len(passed), flags & socket.MSG_CTRUNC) == (count, 0)
        for number in passed:
            assert os.path.sameopenfile(number, fd.fileno())
            os.close(number)
