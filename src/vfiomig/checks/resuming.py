"""What a device does with a state that is written to it: its own, and what only looks like one.

Bytes of a state are opaque, so a device need not notice all damage: integrity is its user's
business (docs/protocol.md, USER-11). A device that takes a damaged state deviates; one that is
anywhere but in STOP, RESUMING or ERROR afterwards, or accepts nothing any more, is broken.
"""

from __future__ import annotations

import errno
import mmap
import random
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from vfiomig.checks.check import LANDED, Chapter
from vfiomig.checks.evidence import Inapplicable, Unrun, errno_text, transfer_text
from vfiomig.checks.facts import Shows
from vfiomig.checks.pages import Pages, buffer_at
from vfiomig.checks.resets import reset
from vfiomig.fsm import Capability, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

CHAPTER = Chapter(
    "resuming",
    "What a device does with a state that is written to it: whole, cut, damaged or foreign.",
    {"section": "enum vfio_device_mig_state"},
)

#: Errnos of a write that mean something else to its caller: bad memory, and a dead session.
MISLEADING = {errno.EFAULT: "LOAD-2, FAULT-13", errno.ENODEV: "LOAD-2, FAULT-17"}
#: As large as a write gets in Linux.
HUGE = 0x7FFF_F000
#: <linux/mman.h>; not every Python names it.
MAP_NORESERVE = 0x4000


class Offer(NamedTuple):
    """What came of a state that was offered: of the writes, and of leaving RESUMING."""

    write: int
    leave: int


def offer(subject: Subject, *parts: bytes | memoryview) -> Offer:
    """Write the parts of a state and leave RESUMING; the device may refuse both."""
    data_fd = subject.session(State.RESUMING)
    failure = subject.write_all(data_fd, *parts)
    return Offer(failure, subject.request(State.STOP).errno)


def expect_coherent(subject: Subject, offered: Offer) -> None:
    """Compare where the device is with what it answered."""
    if offered.leave:
        subject.expect_state(State.RESUMING, State.ERROR)
    else:
        subject.expect_state(State.STOP)


def prefer_refusal(subject: Subject, what: str, offered: Offer, rule: str) -> None:
    """Note whether a bad state was refused, by a write or at the end; say so if by neither."""
    expect_coherent(subject, offered)
    refusal = offered.write or offered.leave
    saw = errno_text(refusal) if refusal else "it was taken"
    subject.evidence.prefer(what, refusal, "a refusal", saw, rule)


def foreign_bytes(length: int) -> list[bytes]:
    """Bytes that are no state, always the same, in parts."""
    block = random.Random(length).randbytes(min(length, 1 << 16))
    whole, rest = divmod(length, len(block))
    return [block] * whole + [block[:rest]]


# Too short.


@CHAPTER.check("LOAD-3")
def an_empty_state_is_refused(subject: Subject) -> None:
    """Leaving RESUMING with nothing written fails, and the device stays there or is in ERROR."""
    subject.some_state()
    prefer_refusal(subject, "a load of nothing", offer(subject, b""), "FAULT-12, FAULT-16")


def cut(part: Callable[[int], int], subject: Subject) -> None:
    state = subject.some_state()
    length = part(len(state))
    if not 0 < length < len(state):
        raise Inapplicable(f"the device's state has {len(state)} bytes")
    offered = offer(subject, state[:length])
    what = f"a load of {length} of {len(state)} bytes"
    prefer_refusal(subject, what, offered, "FAULT-12, FAULT-14, FAULT-15, FAULT-16")


CUTS: tuple[tuple[str, str, Callable[[int], int]], ...] = (
    ("after_a_quarter", "after a quarter", lambda length: length // 4),
    ("after_a_half", "in the middle", lambda length: length // 2),
    ("after_three_quarters", "after three quarters", lambda length: length * 3 // 4),
    ("by_one_byte", "one byte before its end", lambda length: length - 1),
)
for _name, _words, _part in CUTS:
    CHAPTER.add(
        f"cut_{_name}",
        f"A state that ends {_words} is refused when RESUMING is left.",
        ("LOAD-3",),
        partial(cut, _part),
        "Devices that leave this to their user are known.",
    )


@CHAPTER.check("LOAD-3", needs=Capability.PRE_COPY, dialects=LANDED)
def the_pre_copy_part_alone_is_refused(subject: Subject) -> None:
    """What PRE_COPY delivers is no whole state, and refused when RESUMING is left.

    One driver takes such a state for an empty device's.
    """
    data_fd = subject.session(State.PRE_COPY)
    stream = subject.new_stream()
    subject.precopy_end(data_fd, stream)
    early = stream.size
    subject.go(State.STOP_COPY)
    if subject.read_on(data_fd, stream):
        raise Unrun("the state cannot be read")
    if not 0 < early < stream.size:
        raise Inapplicable(f"PRE_COPY delivers {early} of {stream.size} bytes")
    offered = offer(subject, stream.view()[:early])
    what = f"a load of the {early} bytes that PRE_COPY delivers, of {stream.size}"
    prefer_refusal(subject, what, offered, "FAULT-12, FAULT-14")


@CHAPTER.check("LOAD-3", "CHOICE-3")
def more_than_a_state_is_refused(subject: Subject) -> None:
    """A byte behind the end of the state fails its write, or RESUMING -> STOP."""
    offered = offer(subject, subject.some_state(), b"\xa5")
    expect_coherent(subject, offered)
    saw = f"the write: {errno_text(offered.write)}, leaving: {errno_text(offered.leave)}"
    subject.evidence.prefer(
        "a load with one byte more", offered.write or offered.leave, "a refusal", saw, "USER-11"
    )


# Damaged, and not its own.


def corrupt(quarter: int, subject: Subject) -> None:
    state = subject.some_state()
    at = (2 * quarter + 1) * len(state) // 8
    subject.evidence.step(f"invert byte {at} of the state")
    offered = offer(subject, state[:at], bytes([state[at] ^ 0xFF]), state[at + 1 :])
    prefer_refusal(subject, f"a load with byte {at} of {len(state)} inverted", offered, "USER-11")


for _quarter in range(4):
    CHAPTER.add(
        f"corrupt_in_quarter_{_quarter + 1}",
        f"A state with a damaged byte in quarter {_quarter + 1} is refused.",
        ("LOAD-3", "USER-11"),
        partial(corrupt, _quarter),
        "A device may leave this to its user, but must not get lost in it.",
    )


@CHAPTER.check("LOAD-3", "LOAD-2")
def a_foreign_state_is_refused(subject: Subject) -> None:
    """Bytes of another kind, as many as the state has, are refused."""
    length = len(subject.some_state())
    offered = offer(subject, *foreign_bytes(length))
    prefer_refusal(subject, f"a load of {length} foreign bytes", offered, "USER-11")
    if not offered.write:
        return
    rule = MISLEADING.get(offered.write, "")
    saw = errno_text(offered.write)
    what, wanted = "the errno of the write that was refused", "EINVAL, or another that fits"
    subject.evidence.prefer(what, not rule, wanted, saw, rule)
    saw = errno_text(offered.leave)
    subject.evidence.prefer(
        "leaving RESUMING after a write that failed",
        offered.leave,
        "a refusal",
        saw,
        "LOAD-5, FAULT-12, FAULT-13",
    )


@CHAPTER.check("LOAD-5", "CHOICE-3")
def a_write_after_a_failed_one_saves_nothing(subject: Subject) -> None:
    """After a failed write no later one makes the state acceptable again."""
    state = subject.some_state()
    data_fd = subject.session(State.RESUMING)
    failure = subject.write_all(data_fd, *foreign_bytes(len(state)))
    if not failure:
        raise Inapplicable("no write of a foreign state fails")
    again = subject.write_all(data_fd, state)
    reply = subject.request(State.STOP)
    expect_coherent(subject, Offer(failure, reply.errno))
    saw = f"{errno_text(reply.errno)} (the later write: {errno_text(again)})"
    what = "leaving RESUMING after a write that failed"
    subject.evidence.prefer(what, reply.errno, "a refusal", saw, "FAULT-12, FAULT-13")


@CHAPTER.check("LOAD-4", "LOAD-5")
def after_a_refusal_and_a_reset_a_state_is_taken(subject: Subject) -> None:
    """A device that refused a state and was reset takes its own; it keeps nothing of the first."""
    state = subject.some_state()
    offer(subject, state[: len(state) // 2])
    reset(subject)
    subject.expect_taken(state)


@CHAPTER.check("LOAD-3", "LOAD-1")
def one_good_load_vouches_for_no_other(subject: Subject) -> None:
    """After a state was taken a foreign one is refused all the same."""
    length = len(subject.some_state())
    subject.loaded()
    subject.go(State.STOP)
    offered = offer(subject, *foreign_bytes(length))
    prefer_refusal(
        subject, f"a load of {length} foreign bytes", offered, "FAULT-14, FAULT-15, USER-11"
    )


@CHAPTER.check("LOAD-3", "LOAD-1")
def an_earlier_load_completes_no_other(subject: Subject) -> None:
    """After a state was taken one that ends a byte early is refused: no old bytes fill it up."""
    state = subject.some_state()
    if len(state) < 2:
        raise Inapplicable("the device's state has one byte")
    subject.loaded()
    subject.go(State.STOP)
    offered = offer(subject, state[:-1])
    what = f"a load of {len(state) - 1} of {len(state)} bytes, after one of them all"
    prefer_refusal(subject, what, offered, "FAULT-12, FAULT-15, FAULT-16")


@CHAPTER.check("LOAD-3", "CHOICE-3")
def what_was_refused_may_be_completed(subject: Subject) -> None:
    """After a refusal for being short, the rest either makes the state whole or is refused."""
    state = subject.some_state()
    data_fd = subject.session(State.RESUMING)
    if subject.write_all(data_fd, state[:-1]) or not subject.request(State.STOP).errno:
        raise Inapplicable("the device does not refuse a short state at its end")
    if subject.state() != State.RESUMING:
        raise Inapplicable("the refusal leads to ERROR")
    rest = subject.write_all(data_fd, state[-1:])
    reply = subject.request(State.STOP)
    expect_coherent(subject, Offer(rest, reply.errno))
    taken = not rest and not reply.errno
    refused = rest and reply.errno
    saw = f"the write: {errno_text(rest)}, leaving: {errno_text(reply.errno)}"
    wanted = "both succeed, or both fail"
    subject.evidence.prefer(
        "the write of the rest, and leaving RESUMING", taken or refused, wanted, saw, "FAULT-12"
    )


# The way in.


@CHAPTER.check("SESSION-12", "LOAD-1")
def where_a_write_ends_means_nothing(subject: Subject) -> None:
    """A state in pieces of 1, 7, 64 and 4096 bytes is as good as one in large ones."""
    state = subject.some_state()
    data_fd = subject.session(State.RESUMING)
    done = 0
    for number in range(256):
        piece = state[done : done + (1, 7, 64, 4096)[number % 4]]
        if not piece:
            break
        count = subject.write(data_fd, piece)
        what = f"a write of {transfer_text(len(piece))} at {done}"
        subject.evidence.expect_that(what, count > 0, "some are taken", transfer_text(count))
        done += count
    rest = subject.write_all(data_fd, state[done:])
    subject.evidence.expect_errno("writes of the rest", rest, 0)
    subject.evidence.expect_errno("RESUMING -> STOP", subject.request(State.STOP).errno, 0)


@CHAPTER.check("LOAD-3", "ARC-8")
def a_loaded_device_runs(subject: Subject) -> None:
    """RESUMING -> RUNNING takes the state, and the device goes on from there."""
    subject.loaded()
    reply = subject.request(State.RUNNING)
    subject.evidence.expect_errno("RESUMING -> RUNNING", reply.errno, 0)
    subject.expect_state(State.RUNNING)


@CHAPTER.check("LOAD-4", "RESET-2")
def a_load_is_abandoned_by_a_reset(subject: Subject) -> None:
    """A reset in the middle of a load leads to RUNNING, and a whole load works afterwards."""
    state = subject.some_state()
    data_fd = subject.session(State.RESUMING)
    subject.write_all(data_fd, state[: len(state) // 2])
    reset(subject)
    subject.expect_state(State.RUNNING)
    subject.expect_taken(state)


@CHAPTER.check("LOAD-2", "SESSION-13")
def a_huge_write_is_not_taken_whole(subject: Subject) -> None:
    """2 GiB in one write, behind the first bytes of a state, are refused or taken in part.

    Where a device adds lengths in too few bits, this is where it shows. One that is still taking
    bytes after a while is stopped by a reset.
    """
    state = subject.some_state()
    data_fd = subject.session(State.RESUMING)
    subject.write_all(data_fd, state[: len(state) // 2])
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    zeros = mmap.mmap(-1, HUGE, flags=flags, prot=mmap.PROT_READ)
    writer = subject.beside(lambda: subject.write(data_fd, memoryview(zeros)))
    if not writer.wait(share=0.2):
        subject.reset()
        writer.result("the write")
        raise Inapplicable("the device was still taking bytes")
    count = writer.result("the write")
    what, wanted = f"a write of {HUGE} bytes", "an error, or fewer bytes"
    saw = transfer_text(count)
    subject.evidence.prefer(what, count < HUGE, wanted, saw, "USER-11: it has no limit")


@CHAPTER.check("LOAD-2", shows=Shows.DESCRIPTORS)
def a_write_from_no_memory_gives_nothing(subject: Subject) -> None:
    """A write from memory that cannot be read is EFAULT, and the state can be written after it.

    Some drivers count bytes that never came.
    """
    state = subject.some_state()
    data_fd = subject.session(State.RESUMING)
    size = min(64, len(state))  # or it is too long, which may be said first
    with Pages("rw", "") as pages:
        subject.evidence.step("write from no memory")
        result = subject.raw.write(data_fd, buffer_at(pages.page(1), size))
    subject.evidence.expect_transfer("a write from no memory", result, errno.EFAULT)
    failure = subject.write_all(data_fd, state)
    leave = subject.request(State.STOP).errno
    saw = f"the writes: {errno_text(failure)}, leaving: {errno_text(leave)}"
    subject.evidence.prefer(
        "the whole state, after that write", not failure and not leave, "it is taken", saw, "LOAD-5"
    )
