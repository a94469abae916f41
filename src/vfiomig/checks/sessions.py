"""The data transfer session: what a data_fd is, how long it lives, and who may do what with it."""

from __future__ import annotations

import errno
import fcntl
import os
import select
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.checks.check import Chapter
from vfiomig.checks.dangers import STALE_WRITE
from vfiomig.checks.evidence import transfer_text
from vfiomig.checks.facts import Shows
from vfiomig.checks.pages import map_descriptor
from vfiomig.fsm import SessionKind, State, session_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER",)

CHAPTER = Chapter(
    "sessions",
    "The data transfer session: what a data_fd is, and how long it lives.",
    {"section": "enum vfio_device_mig_state"},
)

READER = "the thread that reads"
POLL = "VFIO_MIG_GET_PRECOPY_INFO"


def os_errno(call: Callable[[], object]) -> int:
    """Make a system call; return its errno, 0 for success."""
    try:
        call()
    except OSError as failure:
        return failure.errno or errno.EIO
    return 0


@CHAPTER.check("SESSION-1", shows=Shows.DESCRIPTORS)
def a_data_fd_is_close_on_exec(subject: Subject) -> None:
    """Every data_fd comes with close-on-exec set."""
    for state in subject.session_states:
        subject.begin()
        data_fd = subject.session(state)
        subject.evidence.step("F_GETFD")
        flags = fcntl.fcntl(data_fd, fcntl.F_GETFD)
        subject.evidence.expect_that(
            f"close-on-exec in {state.name}", flags & fcntl.FD_CLOEXEC, "set", _set(flags)
        )
        subject.close_all()


def _set(flags: int) -> str:
    return "set" if flags & fcntl.FD_CLOEXEC else "not set"


@CHAPTER.check("SESSION-9", shows=Shows.DESCRIPTORS)
def the_access_mode_is_that_of_the_session(subject: Subject) -> None:
    """F_GETFL says O_RDONLY of a saving data_fd, and O_WRONLY of one of RESUMING."""
    modes = {os.O_RDONLY: "O_RDONLY", os.O_WRONLY: "O_WRONLY", os.O_RDWR: "O_RDWR"}
    for state in subject.session_states:
        subject.begin()
        data_fd = subject.session(state)
        subject.evidence.step("F_GETFL")
        mode = fcntl.fcntl(data_fd, fcntl.F_GETFL) & os.O_ACCMODE
        saving = session_kind(state) is SessionKind.SAVING
        wanted = os.O_RDONLY if saving else os.O_WRONLY
        subject.evidence.expect(f"the mode in {state.name}", mode, wanted, show=modes.__getitem__)
        subject.close_all()


@CHAPTER.check("SESSION-9", shows=Shows.MEANING)
def the_wrong_direction_is_ebadf(subject: Subject) -> None:
    """A write to a saving data_fd, and a read of one of RESUMING, are EBADF."""
    saving = subject.session(State.STOP_COPY)
    result = subject.write(saving, b"x")
    subject.evidence.expect_transfer("a write to a saving data_fd", result, errno.EBADF)
    resuming = subject.session(State.RESUMING)
    result, _ = subject.read(resuming, 1)
    subject.evidence.expect_transfer("a read of a data_fd of RESUMING", result, errno.EBADF)


@CHAPTER.check("SESSION-10", shows=Shows.DESCRIPTORS)
def a_data_fd_cannot_be_sought_in(subject: Subject) -> None:
    """Seeking, and reads and writes at a position, are ESPIPE."""
    saving = subject.session(State.STOP_COPY)
    _expect_espipe(subject, "lseek", lambda: os.lseek(saving, 0, os.SEEK_SET))
    _expect_espipe(subject, "pread", lambda: os.pread(saving, 1, 0))
    resuming = subject.session(State.RESUMING)
    _expect_espipe(subject, "lseek while resuming", lambda: os.lseek(resuming, 0, os.SEEK_CUR))
    _expect_espipe(subject, "pwrite", lambda: os.pwrite(resuming, b"x", 0))


def _expect_espipe(subject: Subject, what: str, call: Callable[[], object]) -> None:
    subject.evidence.step(what)
    subject.evidence.expect_errno(what, os_errno(call), errno.ESPIPE)


@CHAPTER.check("SESSION-10", shows=Shows.DESCRIPTORS)
def a_data_fd_cannot_be_mapped(subject: Subject) -> None:
    """Mmap of a data_fd is ENODEV."""
    data_fd = subject.session(State.STOP_COPY)
    subject.evidence.step("mmap")
    subject.evidence.expect_errno("mmap", map_descriptor(data_fd), errno.ENODEV)


@CHAPTER.check("SESSION-11", shows=Shows.MEANING)
def an_unknown_request_on_a_data_fd_is_enotty(subject: Subject) -> None:
    """A data_fd of RESUMING knows no request at all, and any other not those of a device."""
    argument = vfio.PrecopyInfo(argsz=24)
    for state in (State.STOP_COPY, State.RESUMING):
        data_fd = subject.session(state)
        numbers = [vfio.VFIO_DEVICE_RESET, vfio.VFIO_DEVICE_FEATURE, 0x3BFF]
        if state is State.RESUMING:
            numbers.append(vfio.VFIO_MIG_GET_PRECOPY_INFO)
        for number in numbers:
            what = f"request {number:#x} on a data_fd of {state.name}"
            subject.evidence.step(what)
            result = subject.raw.ioctl(data_fd, number, argument)
            subject.evidence.expect_errno(what, result, errno.ENOTTY)


@CHAPTER.check("POLL-1", "POLL-3", shows=Shows.DESCRIPTORS, section=POLL)
def a_saving_data_fd_polls_readable(subject: Subject) -> None:
    """In STOP_COPY a data_fd is readable, with data and at the permanent end."""
    data_fd = subject.session(State.STOP_COPY)
    seen = _poll(subject, data_fd)
    subject.evidence.expect_that("poll with data", seen & select.POLLIN, "POLLIN", poll_text(seen))
    subject.drain(data_fd)
    seen = _poll(subject, data_fd)
    subject.evidence.expect_that("poll at the end", seen & select.POLLIN, "POLLIN", poll_text(seen))


@CHAPTER.check("POLL-2", "POLL-3", shows=Shows.DESCRIPTORS, section=POLL)
def a_dead_data_fd_polls_hung_up(subject: Subject) -> None:
    """After the end of its session a saving data_fd is readable and hung up.

    Most drivers do not implement poll; theirs is always ready.
    """
    data_fd = subject.session(State.STOP_COPY)
    subject.go(State.STOP)
    seen = _poll(subject, data_fd)
    subject.evidence.expect_that("poll", seen & select.POLLIN, "POLLIN", poll_text(seen))
    hung_up = seen & (select.POLLHUP | select.POLLRDHUP)  # the one driver with poll says the latter
    subject.evidence.prefer(
        "hang-up", hung_up, "POLLHUP or POLLRDHUP as well", poll_text(seen), "POLL-3, FAULT-9"
    )


@CHAPTER.check("POLL-3", shows=Shows.DESCRIPTORS, section=POLL)
def a_data_fd_can_be_watched_by_epoll(subject: Subject) -> None:
    """Epoll takes a data_fd; of drivers without poll it does not (EPERM)."""
    data_fd = subject.session(State.STOP_COPY)
    with select.epoll() as watcher:
        subject.evidence.step("EPOLL_CTL_ADD")
        result = os_errno(lambda: watcher.register(data_fd, select.EPOLLIN))
    subject.evidence.expect_errno(
        "EPOLL_CTL_ADD", result, 0, known={errno.EPERM: "POLL-3, FAULT-9"}
    )


def _poll(subject: Subject, data_fd: int) -> int:
    """Poll until something is there, which it is at once or soon."""
    step = subject.evidence.step("poll for POLLIN")
    seen = poll(data_fd, max(0.0, subject.left / 2))
    subject.evidence.outcome(step, poll_text(seen))
    return seen


def poll(data_fd: int, seconds: float) -> int:
    """Return what is there of a data_fd, nothing if that does not come in time."""
    poller = select.poll()
    poller.register(data_fd, select.POLLIN | select.POLLRDHUP)
    ready = poller.poll(seconds * 1000)
    return ready[0][1] if ready else 0


def poll_text(seen: int) -> str:
    """Name what poll has seen."""
    names = ("POLLIN", "POLLPRI", "POLLOUT", "POLLERR", "POLLHUP", "POLLRDHUP", "POLLNVAL")
    return " and ".join(name for name in names if seen & getattr(select, name)) or "nothing"


# Its end.


@CHAPTER.check("SESSION-4", "SESSION-3", shows=Shows.MEANING)
def a_saving_session_ends_with_its_states(subject: Subject) -> None:
    """When STOP_COPY was left reads are ENODEV, at once and for ever, whatever was unread."""
    data_fd = subject.session(State.STOP_COPY)
    subject.go(State.STOP)
    for target in (State.STOP, State.RUNNING):
        result, _ = subject.read(data_fd, 16)
        subject.evidence.expect_transfer(
            f"a read of the data_fd of STOP_COPY in {target.name}", result, errno.ENODEV
        )
        subject.go(State.RUNNING)


@CHAPTER.check("SESSION-4", "LOAD-6", danger=STALE_WRITE, shows=Shows.MEANING)
def a_resuming_session_ends_with_its_state(subject: Subject) -> None:
    """When RESUMING was left writes are ENODEV."""
    data_fd = subject.loaded()
    subject.go(State.STOP)
    for _ in range(2):
        result = subject.write(data_fd, b"x")
        subject.evidence.expect_transfer("a write after RESUMING was left", result, errno.ENODEV)


@CHAPTER.check("SESSION-1", "SESSION-4", shows=Shows.MEANING)
def an_old_data_fd_stays_dead(subject: Subject) -> None:
    """A later session has a descriptor of its own, and revives no earlier one."""
    old = subject.session(State.STOP_COPY)
    subject.go(State.STOP)
    new = subject.session(State.STOP_COPY)
    wanted = f"another than {old}, which is open"
    subject.evidence.expect_that("the new data_fd", new != old, wanted, str(new))
    result, _ = subject.read(old, 16)
    what = "a read of the old data_fd in the new session"
    subject.evidence.expect_transfer(what, result, errno.ENODEV)
    result, _ = subject.read(new, 16)
    what = "a read of the new data_fd"
    subject.evidence.expect_that(what, result >= 0, "bytes", transfer_text(result))


@CHAPTER.check("SESSION-4", shows=Shows.MEANING)
def a_reader_wakes_when_its_session_ends(subject: Subject) -> None:
    """A thread that reads on and on gets ENODEV when another one leaves STOP_COPY.

    Whether it is in a read that blocks at that moment depends on the device.
    """
    data_fd = subject.session(State.STOP_COPY)
    reader = subject.read_on_beside(data_fd)
    subject.go(State.STOP)
    last = reader.result(READER)
    subject.evidence.expect_transfer("its last read", last, errno.ENODEV)


@CHAPTER.check("SESSION-5", shows=Shows.MEANING)
def closing_a_data_fd_changes_no_state(subject: Subject) -> None:
    """A data_fd that is closed early leaves the device where it is, and free to go on."""
    for state in subject.session_states:
        subject.begin()
        data_fd = subject.session(state)
        subject.close_fd(data_fd)
        subject.expect_state(state)
        if state is not State.RESUMING:
            reply = subject.request(State.RUNNING)
            subject.evidence.expect_errno(f"{state.name} -> RUNNING", reply.errno, 0)


@CHAPTER.check("SESSION-5", "NEXT-6", shows=Shows.MEANING)
def a_closed_data_fd_does_not_come_back(subject: Subject) -> None:
    """After an early close a request for the same state succeeds and gives no descriptor."""
    subject.close_fd(subject.session(State.STOP_COPY))
    reply = subject.request(State.STOP_COPY)
    subject.evidence.expect_errno("STOP_COPY again", reply.errno, 0)
    subject.evidence.expect("data_fd of STOP_COPY again", reply.data_fd, -1)


@CHAPTER.check("SESSION-1", "SESSION-3")
def a_second_session_is_as_good_as_the_first(subject: Subject) -> None:
    """Sessions can be opened one after the other, and each delivers the state, or takes it."""
    lengths = []
    for _ in range(3):
        state = subject.drain(subject.session(State.STOP_COPY))
        lengths.append(len(state))
        subject.go(State.STOP)
    shown = ", ".join(map(str, lengths))
    subject.evidence.expect_that(
        "bytes of three sessions", all(lengths) or not any(lengths), "a state each time", shown
    )
    for time in ("first", "second") if state else ():
        subject.expect_taken(state, f"its own state, the {time} time")


@CHAPTER.check("SESSION-8", shows=Shows.DESCRIPTORS)
def a_duplicate_is_the_same_stream(subject: Subject) -> None:
    """A data_fd and its duplicate have one position."""
    state = subject.stopped_state()
    data_fd = subject.session(State.STOP_COPY)
    subject.evidence.step("dup")
    copy = os.dup(data_fd)
    try:
        _, first = subject.read(data_fd, 1)
        _, second = subject.read(copy, 1)
    finally:
        os.close(copy)
    subject.expect_start_of(state, "a byte from each", first, second)


@CHAPTER.check("SESSION-12", "SESSION-13")
def where_a_read_ends_means_nothing(subject: Subject) -> None:
    """The stream is the same in reads of 1, 7, 64 and 4096 bytes as in large ones."""
    state = subject.stopped_state()
    data_fd = subject.session(State.STOP_COPY)
    pieces: list[bytes] = []
    for number in range(256):
        count, piece = subject.read(data_fd, (1, 7, 64, 4096)[number % 4])
        pieces.append(piece)
        if count <= 0:
            break
    subject.expect_start_of(state, "the bytes of small reads", *pieces)
