"""What a check tells of itself: its steps, what it compared, and what followed from that."""

from __future__ import annotations

import errno
import select
import socket

import pytest

from vfiomig import State
from vfiomig.checks.evidence import Broken, Evidence, errno_text, state_text, transfer_text
from vfiomig.checks.sessions import poll, poll_text


def test_steps_are_told_in_order_with_what_came_of_them() -> None:
    evidence = Evidence()
    step = evidence.step("SET STOP")
    assert evidence.last_step == "SET STOP"
    evidence.outcome(step, "EIO")
    for _ in range(3):
        evidence.step("read 1")
    assert evidence.did == "SET STOP -> EIO; read 1 (3 times)"


def test_many_steps_are_told_by_their_number_and_the_last_one_always() -> None:
    evidence = Evidence()
    for number in range(100):
        evidence.step(f"step {number}")
    assert evidence.did.endswith("; step 38; ... 60 more ...; step 99")
    assert evidence.last_step == "step 99"


def test_a_difference_ends_the_check_and_both_sides_are_told() -> None:
    evidence = Evidence()
    evidence.expect_errno("lseek", errno.ESPIPE, errno.ESPIPE)
    with pytest.raises(Broken):
        evidence.expect_errno("pread", 0, errno.ESPIPE, errno.EINVAL)
    assert evidence.first_difference == ("pread: ESPIPE or EINVAL", "pread: success")


def test_a_known_habit_is_a_deviation_and_the_check_goes_on() -> None:
    evidence = Evidence()
    evidence.expect_errno("the end", 0, errno.ENOMSG, known={0: "FAULT-8"})
    evidence.prefer("poll", False, "POLLHUP", "0x1", "FAULT-9")
    evidence.prefer("the bytes", True, "the same", "the same", "STATE-3")
    assert evidence.deviations == [
        ("the end: ENOMSG", "the end: success (FAULT-8)"),
        ("poll: POLLHUP", "poll: 0x1 (FAULT-9)"),
    ]
    assert evidence.saw == "the end: success; poll: 0x1; the bytes: the same"


def test_what_is_alike_is_told_once_and_too_much_by_its_number() -> None:
    evidence = Evidence()
    for number in range(20):
        evidence.expect("count", number % 2, number % 2)
        evidence.expect(f"item {number}", number, number)
    assert evidence.saw.startswith("count: 0; item 0: 0; count: 1; item 1: 1; item 2: 2;")
    assert evidence.saw.endswith("; ... 6 more alike")
    assert "wanted" not in evidence.expected


@pytest.mark.parametrize(
    ("number", "name"), [(0, "ERROR"), (State.STOP, "STOP"), (8, "0x8"), (0xFFFFFFFF, "0xffffffff")]
)
def test_states_have_names_and_other_numbers_are_shown(number: int, name: str) -> None:
    assert state_text(number) == name


def test_results_have_names() -> None:
    numbers = (0, errno.EINVAL, errno.EOPNOTSUPP, 4000)
    assert list(map(errno_text, numbers)) == ["success", "EINVAL", "EOPNOTSUPP", "errno 4000"]


def test_what_a_read_returned_is_told_as_bytes_or_an_errno() -> None:
    evidence = Evidence()
    with pytest.raises(Broken):
        evidence.expect_transfer("a read", 16, errno.ENODEV)
    assert evidence.first_difference == ("a read: ENODEV", "a read: 16 bytes")
    assert list(map(transfer_text, (0, 1, -errno.EIO))) == ["0 bytes", "1 byte", "EIO"]


def test_a_stream_that_its_other_end_has_left_polls_hung_up() -> None:
    """mlx5 says POLLRDHUP of a dead session, which poll only tells who asks for it."""
    stream, other = socket.socketpair()
    with stream, other:
        assert poll_text(poll(stream.fileno(), 0)) == "nothing"
        other.shutdown(socket.SHUT_WR)
        seen = poll(stream.fileno(), 5)
    assert poll_text(seen) == "POLLIN and POLLRDHUP"
    assert not seen & select.POLLHUP
