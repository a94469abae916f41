"""The stream of PRE_COPY, its temporary end, and what VFIO_MIG_GET_PRECOPY_INFO tells of it."""

from __future__ import annotations

import errno
import select
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.checks.check import LANDED, SHOWN, Chapter
from vfiomig.checks.evidence import Inapplicable, Unrun, errno_text, transfer_text
from vfiomig.checks.facts import Shows
from vfiomig.checks.pages import Pages
from vfiomig.checks.raw import SET
from vfiomig.checks.sessions import poll, poll_text
from vfiomig.fsm import Capability, State

if TYPE_CHECKING:
    from vfiomig.checks.raw import InfoReply
    from vfiomig.checks.stream import Stream
    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

CHAPTER = Chapter(
    "precopy",
    "What is delivered while the device runs, its temporary end, and VFIO_MIG_GET_PRECOPY_INFO.",
    {
        "section": "VFIO_MIG_GET_PRECOPY_INFO",
        "needs": Capability.PRE_COPY,
        "dialects": LANDED,
    },
)

V2 = vfio.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2
NUMBER = vfio.VFIO_MIG_GET_PRECOPY_INFO
OPT_IN = "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2"
#: Reads between which the numbers are asked for.
READS = (1, 64, 4096, *(1 << 20,) * 8)
#: How drivers tell a temporary end other than by ENOMSG.
END_HABITS = {0: "FAULT-8"}
#: How often the temporary end is gone to, where more may have come meanwhile.
END_TRIES = 8


def info(subject: Subject, data_fd: int, flags: int = 0, argsz: int = 24) -> InfoReply:
    step = subject.evidence.step(f"PRECOPY_INFO, argsz {argsz}, flags {flags:#x}")
    reply = subject.raw.info(data_fd, flags, argsz)
    told = f"{reply.initial_bytes} initial, {reply.dirty_bytes} dirty"
    subject.evidence.outcome(step, errno_text(reply.errno) if reply.errno else told)
    return reply


def good_info(subject: Subject, data_fd: int) -> InfoReply:
    reply = info(subject, data_fd)
    subject.evidence.expect_errno("PRECOPY_INFO", reply.errno, 0)
    return reply


def without_opt_in(subject: Subject) -> None:
    """Forget an earlier opt-in to REINIT, which holds until the last close."""
    if V2 not in subject.facts.features:
        return
    if Shows.REOPENING not in subject.facts.shows:
        raise Inapplicable(SHOWN[Shows.REOPENING])
    subject.target.reopen()


# The stream.


@CHAPTER.check("SAVE-2", "CHOICE-8")
def the_temporary_end_is_enomsg(subject: Subject) -> None:
    """When there is nothing more to read for now, a read is ENOMSG; some drivers return 0."""
    data_fd = subject.session(State.PRE_COPY)
    last = subject.precopy_end(data_fd, subject.new_stream(kept=False))
    what = "the read at the temporary end"
    subject.evidence.expect(what, last, -errno.ENOMSG, known=END_HABITS, show=transfer_text)


@CHAPTER.check("SAVE-2", "SAVE-4")
def a_temporary_end_is_no_end(subject: Subject) -> None:
    """Behind the temporary end STOP_COPY delivers the rest, on the same data_fd, and then 0."""
    data_fd = subject.session(State.PRE_COPY)
    subject.precopy_end(data_fd, subject.new_stream(kept=False))
    subject.go(State.STOP_COPY)
    rest = subject.new_stream(kept=False)
    last = subject.read_on(data_fd, rest)
    subject.evidence.expect_errno("the end in STOP_COPY", -last, 0)
    subject.evidence.prefer(
        "what STOP_COPY adds", rest.size, "more bytes", f"{rest.size} bytes", "SAVE-4"
    )


@CHAPTER.check("POLL-1", "POLL-3", shows=Shows.DESCRIPTORS)
def poll_knows_the_temporary_end(subject: Subject) -> None:
    """At the temporary end a data_fd is not readable; of drivers without poll it always is."""
    data_fd = subject.session(State.PRE_COPY)
    for _ in range(END_TRIES):  # while data come, as they may, it is no end
        subject.precopy_end(data_fd, subject.new_stream(kept=False))
        seen = poll(data_fd, 0)
        if not seen & select.POLLIN:
            break
    subject.evidence.step("poll for POLLIN")
    subject.evidence.prefer(
        "poll at the temporary end",
        not seen & select.POLLIN,
        "nothing",
        poll_text(seen),
        "POLL-3, FAULT-9",
    )


@CHAPTER.check("SAVE-4", "LOAD-1")
def what_both_parts_delivered_can_be_loaded(subject: Subject) -> None:
    """The bytes of PRE_COPY and STOP_COPY together are a state that the device takes."""
    data_fd = subject.session(State.PRE_COPY)
    stream = subject.new_stream()
    subject.precopy_end(data_fd, stream)
    _load_rest(subject, data_fd, stream)


@CHAPTER.check("SAVE-4", "PRECOPY-5")
def what_was_not_read_early_comes_later(subject: Subject) -> None:
    """STOP_COPY may come before anything was read: the stream is whole all the same."""
    data_fd = subject.session(State.PRE_COPY)
    _load_rest(subject, data_fd, subject.new_stream())


@CHAPTER.check("SAVE-4", "SESSION-2")
def a_stream_left_in_the_middle_goes_on(subject: Subject) -> None:
    """A few bytes read in PRE_COPY, the rest in STOP_COPY: nothing is lost or told twice.

    Nor is it when the numbers are asked for in between.
    """
    data_fd = subject.session(State.PRE_COPY)
    stream = subject.new_stream()
    subject.evidence.step("read 3")
    if stream.take(lambda room: subject.raw.read(data_fd, room[:3])) <= 0:
        raise Inapplicable("the device offers nothing in PRE_COPY")
    if Shows.ALL_REQUESTS in subject.facts.shows:
        info(subject, data_fd)
    _load_rest(subject, data_fd, stream)


def _load_rest(subject: Subject, data_fd: int, stream: Stream) -> None:
    """Read the rest in STOP_COPY, and load the whole into the device after a reset."""
    subject.go(State.STOP_COPY)
    last = subject.read_on(data_fd, stream)
    subject.evidence.expect_errno("the end in STOP_COPY", -last, 0)
    subject.reset()
    subject.expect_taken(stream.view(), "what PRE_COPY and STOP_COPY delivered")


@CHAPTER.check("ARC-13", "ARC-14", "SESSION-2", needs=Capability.PRE_COPY | Capability.P2P)
def p2p_and_back_keep_the_session(subject: Subject) -> None:
    """PRE_COPY_P2P and back: the data_fd lives, and the stream is whole in the end."""
    data_fd = subject.session(State.PRE_COPY)
    stream = subject.new_stream()
    for target in (State.PRE_COPY_P2P, State.PRE_COPY):
        reply = subject.request(target)
        subject.evidence.expect_errno(target.name, reply.errno, 0)
        subject.evidence.expect("data_fd", reply.data_fd, -1)
        stream.take(lambda room: subject.raw.read(data_fd, room[:2]))
    _load_rest(subject, data_fd, stream)


@CHAPTER.check("ARC-10", "SESSION-4", "USER-8", shows=Shows.MEANING)
def cancelling_ends_the_session(subject: Subject) -> None:
    """PRE_COPY -> RUNNING ends the session: reads are ENODEV, and the device runs."""
    data_fd = subject.session(State.PRE_COPY)
    subject.read(data_fd, 1)
    subject.go(State.RUNNING)
    result, _ = subject.read(data_fd, 16)
    subject.evidence.expect_transfer(
        "a read of the data_fd of PRE_COPY in RUNNING", result, errno.ENODEV
    )
    subject.expect_state(State.RUNNING)


@CHAPTER.check("ARC-9", "SESSION-1", "USER-8")
def after_cancelling_it_begins_anew(subject: Subject) -> None:
    """A session after a pre-copy that was given up delivers a whole state, with pre-copy or not."""
    for state in (State.PRE_COPY, State.STOP_COPY):
        subject.begin()
        subject.precopy_end(subject.session(State.PRE_COPY), subject.new_stream(kept=False))
        subject.go(State.RUNNING)
        _load_rest(subject, subject.session(state), subject.new_stream())
        subject.close_all()


# The numbers.


@CHAPTER.check("PRECOPY-1", "PRECOPY-2", shows=Shows.ALL_REQUESTS)
def it_begins_with_initial_bytes(subject: Subject) -> None:
    """At the start of PRE_COPY initial_bytes is not 0, and dirty_bytes is."""
    data_fd = subject.session(State.PRE_COPY)
    reply = good_info(subject, data_fd)
    initial, dirty = reply.initial_bytes, reply.dirty_bytes
    for what, fair, wanted, told, rule in (
        ("initial_bytes", initial, "more than 0", initial, "PRECOPY-1"),
        ("dirty_bytes", not dirty, "0", dirty, "PRECOPY-2"),
    ):
        subject.evidence.prefer(f"{what} at the start", fair, wanted, str(told), rule)


@CHAPTER.check("PRECOPY-6", "PRECOPY-1", shows=Shows.ALL_REQUESTS)
def initial_bytes_only_fall(subject: Subject) -> None:
    """Without the opt-in to REINIT initial_bytes never rises, however much is read."""
    without_opt_in(subject)
    data_fd = subject.session(State.PRE_COPY)
    told = [good_info(subject, data_fd).initial_bytes]
    for size in READS:
        result, _ = subject.read(data_fd, size)
        told.append(good_info(subject, data_fd).initial_bytes)
        rise = f"from {told[-2]} to {told[-1]}"
        what = "initial_bytes after a read, without the opt-in"
        subject.evidence.expect_that(what, told[-1] <= told[-2], "no rise", rise)
        if result <= 0:
            break


@CHAPTER.check("PRECOPY-1", shows=Shows.ALL_REQUESTS)
def initial_bytes_fall_as_they_are_read(subject: Subject) -> None:
    """When data was read to the temporary end initial_bytes is less than at the start, or 0."""
    data_fd = subject.session(State.PRE_COPY)
    first = good_info(subject, data_fd).initial_bytes
    subject.precopy_end(data_fd, subject.new_stream(kept=False))
    last = good_info(subject, data_fd).initial_bytes
    what, wanted = "initial_bytes at the temporary end", f"less than the {first} of the start"
    fell = last < first or not last
    subject.evidence.prefer(what, fell, wanted, str(last), "PRECOPY-1")


@CHAPTER.check("PRECOPY-4", "SAVE-2", shows=Shows.ALL_REQUESTS)
def both_numbers_zero_is_the_temporary_end(subject: Subject) -> None:
    """When both numbers are 0 there is nothing to read."""
    for _ in range(END_TRIES):  # what came between the last two requests is no lie
        data_fd = subject.session(State.PRE_COPY)
        _go_to_zeros(subject, data_fd)
        count, _ = subject.read(data_fd, 16)
        if count <= 0:
            break
        subject.go(State.RUNNING)
    what, saw = "a read when both numbers are 0", transfer_text(count)
    subject.evidence.prefer(what, count <= 0, "ENOMSG", saw, "PRECOPY-3: an estimate")


def _go_to_zeros(subject: Subject, data_fd: int) -> None:
    """Read until both numbers are told as 0."""
    for _ in range(64):
        subject.precopy_end(data_fd, subject.new_stream(kept=False))
        reply = good_info(subject, data_fd)
        if not reply.initial_bytes and not reply.dirty_bytes:
            return
    raise Inapplicable("there is always more to read")


# The request.


@CHAPTER.check("INFO-3", shows=Shows.ALL_REQUESTS)
def argsz_holds_the_numbers(subject: Subject) -> None:
    """An argsz below 24 is EINVAL, and a larger one is accepted."""
    data_fd = subject.session(State.PRE_COPY)
    for argsz, wanted in ((0, errno.EINVAL), (23, errno.EINVAL), (24, 0), (4096, 0)):
        reply = info(subject, data_fd, argsz=argsz)
        subject.evidence.expect_errno(f"PRECOPY_INFO, argsz {argsz}", reply.errno, wanted)


@CHAPTER.check("INFO-2", "INFO-8", shows=Shows.FAULTS)
def an_argument_in_bad_memory_is_efault(subject: Subject) -> None:
    """An argument that cannot be read, or not be written, is EFAULT."""
    data_fd = subject.session(State.PRE_COPY)
    with Pages("rw", "") as pages:
        half = vfio.PrecopyInfo.from_address(pages.end(0, 8))
        what = "PRECOPY_INFO with half an argument"
        subject.evidence.step(what)
        result = subject.raw.ioctl(data_fd, NUMBER, half)
        subject.evidence.expect_errno(what, result, errno.EFAULT)
        address = pages.read_only(bytes(vfio.PrecopyInfo(argsz=24)))
        what = "PRECOPY_INFO in read-only memory"
        subject.evidence.step(what)
        result = subject.raw.ioctl(data_fd, NUMBER, vfio.PrecopyInfo.from_address(address))
        subject.evidence.expect_errno(what, result, errno.EFAULT)


@CHAPTER.check("INFO-5", shows=Shows.ALL_REQUESTS, needs=Capability.PRE_COPY | Capability.P2P)
def the_numbers_are_told_in_pre_copy_p2p(subject: Subject) -> None:
    """In PRE_COPY_P2P the request succeeds as in PRE_COPY, however that was reached."""
    data_fd = subject.session(State.PRE_COPY)
    subject.go(State.PRE_COPY_P2P)
    good_info(subject, data_fd)
    subject.go(State.RUNNING_P2P)
    good_info(subject, subject.session(State.PRE_COPY_P2P))


@CHAPTER.check("INFO-5", shows=Shows.ALL_REQUESTS)
def outside_pre_copy_it_is_einval(subject: Subject) -> None:
    """In STOP_COPY the request is EINVAL, although the session is the same."""
    data_fd = subject.session(State.PRE_COPY)
    subject.go(State.STOP_COPY)
    result = info(subject, data_fd).errno
    subject.evidence.expect_errno("PRECOPY_INFO in STOP_COPY", result, errno.EINVAL)
    subject.go(State.STOP)
    data_fd = subject.session(State.STOP_COPY)
    result = info(subject, data_fd).errno
    what = "PRECOPY_INFO in a session that began in STOP_COPY"
    subject.evidence.expect_errno(what, result, errno.EINVAL)


@CHAPTER.check("INFO-9", "INFO-6", shows=Shows.MEANING)
def the_state_comes_before_the_session(subject: Subject) -> None:
    """An old data_fd is EINVAL while the device is elsewhere, and ENODEV in a later pre-copy."""
    old = subject.session(State.PRE_COPY)
    subject.go(State.RUNNING)
    result = info(subject, old).errno
    subject.evidence.expect_errno("PRECOPY_INFO of an old data_fd in RUNNING", result, errno.EINVAL)
    subject.session(State.PRE_COPY)
    reply = info(subject, old)
    what = "PRECOPY_INFO of an old data_fd in a later PRE_COPY"
    subject.evidence.expect_errno(what, reply.errno, errno.ENODEV)


@CHAPTER.check("INFO-1", "DIALECT-2", shows=Shows.MEANING)
def another_request_is_enotty(subject: Subject) -> None:
    """A saving data_fd knows no other request; the device itself does not know this one."""
    data_fd = subject.session(State.PRE_COPY)
    argument = vfio.PrecopyInfo(argsz=24)
    for what, on, number in (
        ("RESET on a data_fd", data_fd, vfio.VFIO_DEVICE_RESET),
        ("FEATURE on a data_fd", data_fd, vfio.VFIO_DEVICE_FEATURE),
        ("PRECOPY_INFO on the device", subject.raw.transport.device, NUMBER),
    ):
        subject.evidence.step(what)
        result = subject.raw.ioctl(on, number, argument)
        subject.evidence.expect_errno(what, result, errno.ENOTTY)
    subject.expect_state(State.PRE_COPY)


@CHAPTER.check("INFO-10", shows=Shows.ALL_REQUESTS)
def flags_are_an_echo(subject: Subject) -> None:
    """Without the opt-in to REINIT flags come back as they were, and carry nothing."""
    without_opt_in(subject)
    data_fd = subject.session(State.PRE_COPY)
    for flags in (0, 1, 0x8000_0000):
        reply = info(subject, data_fd, flags)
        subject.evidence.expect_errno("PRECOPY_INFO", reply.errno, 0)
        what = f"flags of PRECOPY_INFO, asked with {flags:#x}"
        known = {0: "INFO-10: the client ignores it"}
        subject.evidence.expect(what, reply.flags, flags, known=known, show=hex)


# The opt-in to REINIT.


def opt_in(subject: Subject) -> None:
    """Turn on version 2 of the answer, if the device's kernel knows it."""
    if V2 not in subject.facts.features:
        raise Inapplicable("the device's kernel does not know MIG_PRECOPY_INFOv2")
    subject.evidence.step("SET of MIG_PRECOPY_INFOv2")
    answer = subject.raw.feature(SET | V2)
    if answer.errno:
        raise Unrun(f"the opt-in is refused: {errno_text(answer.errno)}")


@CHAPTER.check("PRECOPY-7", section=OPT_IN)
def the_opt_in_may_be_repeated(subject: Subject) -> None:
    """SET of MIG_PRECOPY_INFOv2 succeeds in any state, as often as one likes."""
    opt_in(subject)
    for state in (State.RUNNING, State.PRE_COPY, State.STOP_COPY, State.STOP):
        subject.go(state)
        step = subject.evidence.step("SET of MIG_PRECOPY_INFOv2")
        result = subject.raw.feature(SET | V2).errno
        subject.evidence.outcome(step, errno_text(result))
        subject.evidence.expect_errno(f"the opt-in in {state.name}", result, 0)


@CHAPTER.check("INFO-4", "PRECOPY-8", section=OPT_IN)
def after_the_opt_in_flags_are_an_answer(subject: Subject) -> None:
    """With the opt-in flags are 0 or REINIT, whatever was there before."""
    opt_in(subject)
    _expect_answered_flags(subject, subject.session(State.PRE_COPY))


@CHAPTER.check("PRECOPY-8", "PRECOPY-6", section=OPT_IN)
def a_new_first_part_is_announced(subject: Subject) -> None:
    """With the opt-in initial_bytes may rise, with REINIT, and dirty_bytes is 0 then."""
    opt_in(subject)
    data_fd = subject.session(State.PRE_COPY)
    before = good_info(subject, data_fd)
    for size in READS:
        result, _ = subject.read(data_fd, size)
        now = good_info(subject, data_fd)
        rise = f"from {before.initial_bytes} to {now.initial_bytes}, flags {now.flags:#x}"
        announced = bool(now.flags & vfio.VFIO_PRECOPY_INFO_REINIT)
        fair = announced or now.initial_bytes <= before.initial_bytes
        what = "initial_bytes after a read"
        subject.evidence.expect_that(what, fair, "no rise without REINIT", rise)
        if announced:
            saw = str(now.dirty_bytes)
            what = "dirty_bytes with REINIT"
            subject.evidence.prefer(what, not now.dirty_bytes, "0", saw, "PRECOPY-8")
        before = now
        if result <= 0:
            break


@CHAPTER.check("PRECOPY-7", section=OPT_IN)
def a_reset_keeps_the_opt_in(subject: Subject) -> None:
    """Neither a reset nor a change of state turns the opt-in off."""
    opt_in(subject)
    subject.go(State.STOP)
    subject.reset()
    _expect_answered_flags(subject, subject.session(State.PRE_COPY))


def _expect_answered_flags(subject: Subject, data_fd: int) -> None:
    for flags in (0xFFFF_FFFE, 0x8000_0000):
        reply = info(subject, data_fd, flags)
        subject.evidence.expect_errno("PRECOPY_INFO", reply.errno, 0)
        what = f"flags of PRECOPY_INFO with the opt-in, asked with {flags:#x}"
        subject.evidence.expect(what, reply.flags, 0, vfio.VFIO_PRECOPY_INFO_REINIT, show=hex)


@CHAPTER.check("CLOSE-1", "PRECOPY-7", section=OPT_IN, shows=Shows.REOPENING)
def the_last_close_ends_the_opt_in(subject: Subject) -> None:
    """After the device was closed and opened again flags are an echo."""
    opt_in(subject)
    subject.target.reopen()
    data_fd = subject.session(State.PRE_COPY)
    reply = info(subject, data_fd, 0x8000_0000)
    subject.evidence.expect_errno("PRECOPY_INFO", reply.errno, 0)
    what = "flags of PRECOPY_INFO after the last close, asked with 0x80000000"
    subject.evidence.expect(what, reply.flags, 0x8000_0000, show=hex)
