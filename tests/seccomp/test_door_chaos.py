"""Everything at once: threads and processes make any calls on any descriptors, under signals.

What each call answers is other tests' business. Here nobody waits for ever, nothing is logged as
an error, and when all descriptors are closed the next user finds the device as after power-on.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import pytest

from door_programs import BASIC, Plain, build, serve
from vfiomig import Capability, StateRejected

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vfiomig import StateReader
    from vfiomig.device import Buffer
    from vfiomig.doors.syscall.run import FilterName

PROGRAM = r"""
enum { FDS = 24, OURS = 8, CALLS = 1000, THREADS = 4, PROCESSES = 3 };
static int fds[FDS];
static int killed;

static void caught(int number) { }

static void call(unsigned *random)
{
    static char junk[1 << 17];
    int at = rand_r(random) % FDS, fd = fds[at], made = -1;
    int *any = &fds[OURS + rand_r(random) % (FDS - OURS)];
    char path[64];

    switch (rand_r(random) % 16) {
    case 0:
        sprintf(path, "/dev/vfio/devices/vfio%d", rand_r(random) % 2);
        *any = open(path, O_RDWR | O_CLOEXEC);
        break;
    case 1:
        made = open("/dev/iommu", O_RDWR | O_CLOEXEC);
        struct bind bind = { sizeof bind, 0, made, 0 };
        ioctl(fd, 0x3B76, &bind);
        close(made);
        break;
    case 2: case 3: case 4: case 5:
        set_state(fd, rand_r(random) % 9, &made);
        if (made >= 0)
            *any = made;
        break;
    case 6: case 7:
        if (read(fd, junk, rand_r(random) % sizeof junk) < 0)
            (void)!write(fd, junk, rand_r(random) % 5000);
        break;
    case 8:
        if (*any > 2)
            close(*any);
        *any = -1;
        break;
    case 9:
        *any = dup(fd);
        break;
    case 10:
        ioctl(fd, 0x3B6F, 0);  /* reset */
        break;
    case 11:
        (void)!pread(fd, junk, 8, BAR0);
        break;
    case 12:
        (void)!pwrite(fd, junk, 8, BAR0);
        break;
    case 13:
        revents(fd, POLLIN | POLLOUT);
        break;
    case 14:
        sprintf(path, "/proc/self/fd/%d", fd);
        close(open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC));
        break;
    case 15:
        pthread_kill(pthread_self(), SIGUSR1);
        kill(getpid(), SIGUSR2);
    }
}

static void *work(void *number)
{
    unsigned random = (long)number;
    for (int i = 0; i < CALLS; i++) {
        if (killed && i == CALLS / 2)
            kill(getpid(), SIGKILL);
        call(&random);
    }
    return 0;
}

int main(void)
{
    struct rlimit limit = { 200, 200 };
    struct sigaction action = { .sa_handler = caught };
    struct itimerval often = { { 0, 500 }, { 0, 500 } };
    CHECK(!sigaction(SIGUSR1, &action, 0) && !sigaction(SIGALRM, &action, 0));
    action.sa_flags = SA_RESTART;
    CHECK(!sigaction(SIGUSR2, &action, 0) && !setrlimit(RLIMIT_NOFILE, &limit));
    for (int i = 0; i < FDS; i++)
        fds[i] = i < 2 ? use_device(i) : i < OURS ? fds[i % 2] : -1;
    for (int process = 0; process < PROCESSES; process++)
        if (!fork()) {
            pthread_t threads[THREADS];
            killed = process == 1;
            CHECK(!setitimer(ITIMER_REAL, &often, 0));
            for (long i = 0; i < THREADS; i++)
                CHECK(!pthread_create(&threads[i], 0, work, (void *)(process * 100 + i)));
            for (int i = 0; i < THREADS; i++)
                pthread_join(threads[i], 0);
            _exit(0);
        }
    while (wait(0) > 0 || errno == EINTR)
        ;
    close(fds[0]);
    close(fds[1]);
    IS(get_state(use_device(0)), RUNNING);
    IS(get_state(use_device(1)), RUNNING);
    return 7;
}
"""


class Unhurried(Plain):
    """Takes a moment for everything, so that calls wait, and refuses some of what it is given."""

    capabilities = BASIC | Capability.PRE_COPY

    def __init__(self) -> None:
        super().__init__(100_000)
        self.loads = 0

    def precopy(self) -> Iterator[Buffer]:
        for _ in range(3):
            time.sleep(0.002)
            yield bytes(1000)
            yield b""

    def save(self) -> Iterator[Buffer]:
        for _ in range(10):
            time.sleep(0.002)
            yield bytes(700)

    def load(self, state: StateReader) -> None:
        self.loads += 1
        while len(state.read(999)) == 999:
            time.sleep(0.002)
        if self.loads % 3 == 0:
            raise StateRejected("this time")


@pytest.mark.parametrize("filter_name", ["exact", "fast"])
def test_nothing_that_a_program_does_hangs_the_door_or_is_its_bug(
    filter_name: FilterName, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        program = build(tmp_path, PROGRAM)
        assert serve([Unhurried(), Plain(300_000)], [program], filter_name=filter_name) == 7
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
