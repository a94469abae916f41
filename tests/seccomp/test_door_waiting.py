"""Calls that wait, hooks that hang, and what poll says of a data_fd."""

from __future__ import annotations

import errno
import logging
import threading
import time
from typing import TYPE_CHECKING

import pytest

from door_programs import BASIC, Gated, Plain, build, serve
from vfiomig import Capability, Device, DeviceError, Region
from vfiomig.core.vfio_device import SERVED
from vfiomig.device import PrecopyInfo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vfiomig import StateReader
    from vfiomig.device import Buffer


def test_other_calls_are_served_while_a_read_is_held(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        static int fd;
        static volatile int done;
        static void *drink(void *nothing)
        {
            char bytes[100];
            IS(read(fd, bytes, 100), 100);
            done = 1;
            return nothing;
        }
        int main(void)
        {
            char one = 1;
            int device = use_device(0), other = use_device(1);
            fd = data_fd(device, STOP_COPY);
            pthread_t thread;
            pthread_create(&thread, 0, drink, 0);
            nap(0.1);
            CHECK(!done);
            for (int i = 0; i < 50; i++) {
                IS(get_state(device), STOP_COPY);
                IS(get_state(other), RUNNING);
                close(open("/dev/null", O_RDONLY));
            }
            IS(set_state(other, STOP, 0), 0);
            CHECK(!done);
            IS(pwrite(device, &one, 1, BAR0), 1);
            pthread_join(thread, 0);
            return 0;
        }
        """,
    )
    assert serve([Gated(first=False), Plain()], [program]) == 0


def test_leaving_the_session_wakes_whoever_waits_in_it(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        static int fd;
        static void *wait_for_it(void *write_size)
        {
            static char bytes[200];
            if (write_size)
                FAILS(write(fd, bytes, 200), ENODEV);
            else
                FAILS(read(fd, bytes, 100), ENODEV);
            return 0;
        }
        int main(void)
        {
            int device = use_device(0);
            pthread_t threads[3];
            fd = data_fd(device, STOP_COPY);
            for (int i = 0; i < 3; i++)
                pthread_create(&threads[i], 0, wait_for_it, 0);
            nap(0.1);
            double started = now();  /* from here on the device's code waits for 20 seconds */
            if (fork() == 0) {  /* whoever asks may wait for the device's code: not the readers */
                IS(set_state(device, STOP, 0), 0);
                _exit(0);
            }
            for (int i = 0; i < 3; i++)
                pthread_join(threads[i], 0);
            CHECK(now() - started < 15);
            char one = 1;
            IS(pwrite(device, &one, 1, BAR0), 1);
            wait(0);

            fd = data_fd(device, RESUMING);
            pthread_create(&threads[0], 0, wait_for_it, &fd);
            nap(0.1);
            IS(ioctl(device, 0x3B6F, 0), 0);  /* reset */
            pthread_join(threads[0], 0);
            IS(get_state(device), RUNNING);
            return 0;
        }
        """,
    )
    assert serve([Gated(first=False)], [program]) == 0


def test_a_nonblocking_read_does_not_wait(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            char bytes[100], one = 1;
            int device = use_device(0), fd = data_fd(device, STOP_COPY);
            CHECK(!fcntl(fd, F_SETFL, O_NONBLOCK));
            FAILS(read(fd, bytes, 100), EAGAIN);
            IS(pwrite(device, &one, 1, BAR0), 1);
            ssize_t n;
            while ((n = read(fd, bytes, 100)) < 0 && errno == EAGAIN)
                ;
            IS(n, 100);
            return 0;
        }
        """,
    )
    assert serve([Gated(first=False)], [program]) == 0


class Hanging(Plain):
    """Hangs in ``stop``, or in ``reset``, or in its BAR, until the test lets go of it.

    ``other`` tells in its BAR0 that it does.
    """

    def __init__(self, where: str, other: Plain) -> None:
        super().__init__(4096)
        self.where = where
        self.other = other
        self.let_go = threading.Event()

    def hang(self, where: str) -> None:
        if self.where == where:
            self.other.bar0[0] = 1
            self.let_go.wait(60)

    def stop(self) -> None:
        self.hang("stop")

    def reset(self) -> None:
        self.hang("reset")


class HangingBar(Hanging):
    bar0 = Region(size=4096)

    @bar0.reader
    def read_bar0(self, offset: int, length: int) -> bytes:
        self.hang("bar")
        return bytes(length)


@pytest.mark.parametrize("where", ["stop", "reset", "bar"])
def test_a_hook_that_hangs_holds_up_nobody_else_and_not_the_end(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = build(
        tmp_path,
        r"""
        static int device;
        static void *hang(void *where)
        {
            char byte;
            if (!strcmp(where, "bar"))
                pread(device, &byte, 1, BAR0);
            else if (!strcmp(where, "reset"))
                ioctl(device, 0x3B6F, 0);
            else
                set_state(device, STOP, 0);
            return 0;
        }
        int main(int argc, char **argv)
        {
            int other = use_device(1);
            device = use_device(0);
            pthread_t thread;
            pthread_create(&thread, 0, hang, argv[1]);
            await_waiting(other);
            for (int i = 0; i < 20; i++)
                IS(get_state(other), RUNNING);
            IS(set_state(other, STOP, 0), 0);
            return 11;
        }
        """,
    )
    monkeypatch.setattr("vfiomig.doors.syscall.door.END_SECONDS", 0.5)
    other = Plain(4096)
    device = HangingBar(where, other)
    threads = set(threading.enumerate())
    started = time.monotonic()
    try:
        assert serve([device, other], [program, where]) == 11
        assert time.monotonic() - started < 40, "it hangs for a minute"
        assert "hangs" in caplog.text
    finally:
        device.let_go.set()
        for thread in set(threading.enumerate()) - threads:
            thread.join(10)


class Precopying(Device):
    """Yields 10 bytes, has nothing for now, and 10 more when BAR0 is written."""

    bar0 = Region(size=4096)
    capabilities = BASIC | Capability.PRE_COPY

    def __init__(self, *, poll: bool = True) -> None:
        self.poll = poll
        self.more = 1

    @bar0.writer
    def write_bar0(self, offset: int, data: bytes) -> None:
        self.more += 1
        self.data_ready()

    def precopy(self) -> Iterator[Buffer]:
        while True:
            if self.more:
                self.more -= 1
                yield bytes(10)
            else:
                yield b""

    def precopy_info(self) -> PrecopyInfo:
        return PrecopyInfo(10 * self.more, 0)

    def save(self) -> Iterator[Buffer]:
        yield b"rest"

    def load(self, state: StateReader) -> None:
        state.read(24)


POLLED = r"""
    static int ep;
    static int epolled(int fd)
    {
        struct epoll_event event = { .events = 0 };
        int n = epoll_wait(ep, &event, 1, 0);
        CHECK(n >= 0);
        return n ? (int)event.events : 0;
    }
    static int selected(int fd, int writing)
    {
        fd_set set;
        struct timeval none = { 0, 0 };
        FD_ZERO(&set);
        FD_SET(fd, &set);
        return select(fd + 1, writing ? 0 : &set, writing ? &set : 0, 0, &none);
    }
    static void follow(int fd, int events)
    {
        struct epoll_event event = { .events = events };
        ep = epoll_create1(EPOLL_CLOEXEC);
        CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, fd, &event));
    }
    #define SEEN(fd, events) do { IS(revents(fd, POLLIN | POLLOUT), events); \
        IS(epolled(fd), events); } while (0)
"""


def test_poll_select_and_epoll_see_a_driver_with_poll(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        POLLED
        + r"""
        static void *write_later(void *device)
        {
            nap(0.1);
            IS(pwrite(*(int *)device, "", 1, BAR0), 1);
            return 0;
        }
        int main(void)
        {
            char bytes[100];
            int device = use_device(0), fd = data_fd(device, PRE_COPY);
            IS(fcntl(fd, F_GETFL) & O_ACCMODE, O_RDONLY);
            IS(fcntl(fd, F_GETFD), FD_CLOEXEC);
            follow(fd, EPOLLIN);
            SEEN(fd, POLLIN);
            IS(read(fd, bytes, 100), 10);
            FAILS(read(fd, bytes, 100), ENOMSG);
            SEEN(fd, 0);  /* the temporary end */
            IS(selected(fd, 0), 0);
            pthread_t thread;
            pthread_create(&thread, 0, write_later, &device);
            struct epoll_event event;
            IS(epoll_wait(ep, &event, 1, 5000), 1);  /* wakes */
            pthread_join(thread, 0);
            SEEN(fd, POLLIN);
            IS(selected(fd, 0), 1);
            IS(read(fd, bytes, 100), 10);
            FAILS(read(fd, bytes, 100), ENOMSG);
            SEEN(fd, 0);
            IS(set_state(device, STOP_COPY, 0), 0);
            SEEN(fd, POLLIN);
            IS(read(fd, bytes, 100), 4);
            IS(read(fd, bytes, 100), 0);
            SEEN(fd, POLLIN);  /* the permanent end */
            IS(set_state(device, STOP, 0), 0);
            SEEN(fd, POLLIN | POLLHUP);
            FAILS(read(fd, bytes, 100), ENODEV);
            SEEN(fd, POLLIN | POLLHUP);
            close(ep);
            close(fd);

            fd = data_fd(device, RESUMING);
            IS(fcntl(fd, F_GETFL) & O_ACCMODE, O_WRONLY);
            follow(fd, EPOLLOUT);
            SEEN(fd, POLLOUT);
            IS(selected(fd, 1), 1);
            IS(write(fd, bytes, 24), 24);
            SEEN(fd, POLLOUT);
            IS(ioctl(device, 0x3B6F, 0), 0);
            SEEN(fd, POLLOUT | POLLERR);
            FAILS(write(fd, bytes, 4), ENODEV);  /* and no SIGPIPE */
            return 0;
        }
        """,
    )
    assert serve([Precopying()], [program]) == 0


def test_without_poll_a_data_fd_is_always_ready_and_epoll_refuses_it(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            char bytes[100];
            struct epoll_event event = { .events = EPOLLIN };
            int device = use_device(0), fd = data_fd(device, PRE_COPY), ep = epoll_create1(0);
            IS(revents(fd, POLLIN | POLLOUT), POLLIN | POLLOUT);
            FAILS(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &event), EPERM);
            IS(fcntl(fd, F_GETFL) & O_ACCMODE, O_RDONLY);
            IS(fcntl(fd, F_GETFD), FD_CLOEXEC);
            IS(read(fd, bytes, 100), 10);
            FAILS(read(fd, bytes, 100), ENOMSG);
            FAILS(lseek(fd, 0, SEEK_CUR), ESPIPE);
            FAILS(fallocate(fd, 0, 0, 1), EBADF);
            CHECK(mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == ENODEV);
            IS(set_state(device, RUNNING, 0), 0);
            FAILS(read(fd, bytes, 100), ENODEV);
            IS(revents(fd, POLLIN | POLLOUT), POLLIN | POLLOUT);
            fd = data_fd(device, RESUMING);
            IS(fcntl(fd, F_GETFL) & O_ACCMODE, O_WRONLY);
            FAILS(fallocate(fd, 0, 0, 1), ENODEV);
            FAILS(ftruncate(fd, 1), EINVAL);
            IS(write(fd, bytes, 24), 24);
            return 0;
        }
        """,
    )
    assert serve([Precopying(poll=False)], [program]) == 0


class Broken(Plain):
    """Raises what a hook may not, and what it may."""

    def save(self) -> Iterator[Buffer]:
        yield bytes(10)
        raise DeviceError(errno.EPROTO, "half way")


def test_failures_are_errnos_and_never_the_end_of_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler's own bug is answered as well: EIO, with a trace in the log."""
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            char bytes[100];
            int device = use_device(0), fd = data_fd(device, STOP_COPY);
            IS(read(fd, bytes, 10), 10);
            FAILS(read(fd, bytes, 10), EPROTO);
            FAILS(read(fd, bytes, 10), ENODEV);
            FAILS(ioctl(device, 0x3B6B, bytes), EIO);
            IS(get_state(device), STOP_COPY);
            return 0;
        }
        """,
    )

    def fail(*_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(SERVED, "VFIO_DEVICE_GET_INFO", fail)
    with caplog.at_level(logging.ERROR):
        assert serve([Broken()], [program]) == 0
    assert "ZeroDivisionError" in caplog.text
