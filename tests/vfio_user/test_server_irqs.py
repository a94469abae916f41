"""Interrupts: eventfds that come beside messages, in as many messages as it takes."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import pytest

from raw_vfio_user import RESET, SET_IRQS, Raw, client_of, served
from suite_devices import Bell
from vfiomig.descriptors import Fd

if TYPE_CHECKING:
    from collections.abc import Iterator

NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = 1, 2, 4, 8, 16, 32
INTX, MSI, MSIX, ERR, REQ = range(5)


@pytest.fixture
def client() -> Iterator[Raw]:
    with client_of(Bell()) as raw:
        yield raw


@pytest.fixture
def eventfds() -> Iterator[list[Fd]]:
    fds = [Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) for _ in range(4)]
    yield fds
    for fd in fds:
        fd.close()


def body(flags: int, index: int, start: int, count: int, *bools: int, argsz: int = 20) -> bytes:
    return struct.pack("<5I", argsz + len(bools), flags, index, start, count) + bytes(bools)


def give(client: Raw, index: int, start: int, fds: list[Fd]) -> int:
    """Return the errno."""
    request = body(EVENTFD | TRIGGER, index, start, len(fds))
    return client.call(SET_IRQS, request, [fd.fileno() for fd in fds]).errno


def ring(client: Raw, vector: int) -> None:
    assert client.write_region(0, 1, bytes([vector])) == 0


def signalled(fd: Fd) -> int:
    try:
        return os.eventfd_read(fd.fileno())
    except BlockingIOError:
        return 0


def test_a_vector_signals_the_eventfd_that_it_was_given(client: Raw, eventfds: list[Fd]) -> None:
    assert give(client, MSIX, 0, eventfds) == 0
    ring(client, 2)
    assert [signalled(fd) for fd in eventfds] == [0, 0, 1, 0]


def test_vectors_may_come_in_several_messages_and_in_any_order(
    client: Raw, eventfds: list[Fd]
) -> None:
    assert give(client, MSIX, 0, eventfds[:1]) == 0
    assert give(client, MSIX, 3, eventfds[3:]) == 0
    assert give(client, MSIX, 1, eventfds[1:3]) == 0
    for vector in range(4):
        ring(client, vector)
    assert [signalled(fd) for fd in eventfds] == [1, 1, 1, 1]


def test_without_descriptors_eventfds_are_taken_away(client: Raw, eventfds: list[Fd]) -> None:
    assert give(client, MSIX, 0, eventfds) == 0
    assert client.call(SET_IRQS, body(EVENTFD | TRIGGER, MSIX, 1, 2)).errno == 0
    for vector in range(4):
        ring(client, vector)
    assert [signalled(fd) for fd in eventfds] == [1, 0, 0, 1]


def test_the_pin_is_masked_by_its_interrupt_and_unmasked_by_message_or_eventfd(
    client: Raw, eventfds: list[Fd]
) -> None:
    trigger, unmask = eventfds[:2]
    assert give(client, INTX, 0, [trigger]) == 0
    assert client.write_region(0, 0, b"\1") == 0
    assert signalled(trigger) == 1
    assert signalled(trigger) == 0
    assert client.call(SET_IRQS, body(NONE | UNMASK, INTX, 0, 1)).errno == 0
    assert signalled(trigger) == 1
    request = body(EVENTFD | UNMASK, INTX, 0, 1)
    assert client.call(SET_IRQS, request, [unmask.fileno()]).errno == 0
    os.eventfd_write(unmask.fileno(), 1)
    os.set_blocking(trigger.fileno(), True)
    assert os.eventfd_read(trigger.fileno()) == 1


def test_bools_say_which_vectors_to_try_out(client: Raw, eventfds: list[Fd]) -> None:
    assert give(client, MSIX, 0, eventfds) == 0
    request = body(BOOL | TRIGGER, MSIX, 0, 4, 1, 0, 0, 1)
    assert client.call(SET_IRQS, request).errno == 0
    assert [signalled(fd) for fd in eventfds] == [1, 0, 0, 1]


def test_a_reset_and_the_end_of_a_visit_drop_triggers(eventfds: list[Fd]) -> None:
    with served(Bell()) as path:
        with Raw.connect(path) as client:
            assert give(client, MSIX, 0, eventfds) == 0
            client.good(RESET)
            ring(client, 0)
            assert give(client, MSIX, 0, eventfds) == 0
        with Raw.connect(path) as client:
            ring(client, 0)
    assert [signalled(fd) for fd in eventfds] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("request_body", "fds", "number"),
    [
        (body(EVENTFD | TRIGGER, MSIX, 0, 2), 1, errno.EINVAL),
        (body(EVENTFD | TRIGGER, MSIX, 0, 1), 2, errno.EINVAL),
        (body(NONE | TRIGGER, MSIX, 0, 1), 1, errno.EINVAL),
        (body(EVENTFD | TRIGGER, MSIX, 4, 1), 1, errno.EINVAL),
        (body(EVENTFD | TRIGGER, MSIX, 3, 2), 2, errno.EINVAL),
        (body(EVENTFD | TRIGGER, 5, 0, 1), 1, errno.EINVAL),
        (body(EVENTFD | TRIGGER, MSI, 0, 1), 1, errno.EINVAL),
        (body(EVENTFD | TRIGGER, MSIX, 0, 0xFFFF_FFFF), 0, errno.EINVAL),
        (body(EVENTFD | TRIGGER, MSIX, 0xFFFF_FFFF, 2), 0, errno.EINVAL),
        (body(EVENTFD | NONE | TRIGGER, MSIX, 0, 1), 0, errno.EINVAL),
        (body(BOOL | TRIGGER, MSIX, 0, 4, 1, 1), 0, errno.EINVAL),
        (body(0, MSIX, 0, 1), 0, errno.EINVAL),
        (body(EVENTFD | TRIGGER, MSIX, 0, 1, argsz=19), 1, errno.EINVAL),
        (body(EVENTFD | MASK, MSIX, 0, 1), 1, errno.ENOTTY),
        (body(NONE | TRIGGER, MSIX, 0, 0), 0, errno.EINVAL),
    ],
)
def test_what_cannot_be_set_is_an_errno_and_keeps_no_descriptor(
    client: Raw, eventfds: list[Fd], request_body: bytes, fds: int, number: int
) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    numbers = [fd.fileno() for fd in eventfds[:fds]]
    assert client.call(SET_IRQS, request_body, numbers).errno == number
    client.read_region(0, 0, 1)  # the last one's descriptors are closed behind its answer
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert give(client, MSIX, 0, eventfds) == 0


def test_a_descriptor_that_is_no_eventfd_is_einval(client: Raw) -> None:
    reader, writer = os.pipe()
    with Fd(reader) as fd, Fd(writer):
        assert give(client, MSIX, 0, [fd]) == errno.EINVAL
