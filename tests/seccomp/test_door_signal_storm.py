"""Signals at every moment of a call: none takes effect twice, none is lost, none tells a wrong result.

A second thread of the program signals the first one as fast as it can. A call that has not been
received yet fails with EINTR, or begins anew if the handler was installed so; from then on it is
completed first. Either way what the program counts is what the device has seen.
"""

from __future__ import annotations

import struct
from itertools import count
from typing import TYPE_CHECKING

import pytest

from door_programs import build, serve
from vfiomig import Capability, Device, Region, State, StateReader
from vfiomig.device import Msi

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vfiomig.device import Buffer
    from vfiomig.doors.syscall.run import FilterName

WORDS = 50_000

STORM = r"""
#include <stdatomic.h>
#include <sys/eventfd.h>
#define WORDS 50000
static atomic_int signals, over;
static pthread_t caller;
static int restarts;

static void caught(int number) { signals += number == SIGUSR1; }

/* Signals one after the other, each at another moment after the one before. */
static void *storm(void *nothing)
{
    for (int sent = 0; !over; sent++) {
        CHECK(!pthread_kill(caller, SIGUSR1));
        for (int handled = signals, i = 0; signals == handled && i < 100; i++)
            sched_yield();
        for (volatile int pause = sent * 7919 % 50000; pause > 0; pause--)
            ;
    }
    return nothing;
}

static pthread_t begin(int argc, char **argv)
{
    pthread_t thread;
    caller = pthread_self();
    restarts = argc > 1 && !strcmp(argv[1], "SA_RESTART");
    struct sigaction action = { .sa_handler = caught, .sa_flags = restarts ? SA_RESTART : 0 };
    CHECK(!sigaction(SIGUSR1, &action, 0));
    CHECK(!pthread_create(&thread, 0, storm, 0));
    return thread;
}

static void end(pthread_t thread)
{
    over = 1;
    CHECK(!pthread_join(thread, 0));
}

/* The result of a call, made again as often as a signal kept it from beginning. */
#define MADE(call) ({ long made_; do made_ = (call); \
    while (made_ < 0 && errno == EINTR && !restarts); made_; })
/* A machine that has much else to do need not make as many: what counts is that the counts agree. */
UNUSED static int wants_more(int made, int signalled, int wanted)
{
    static double until;
    if (!made)
        until = now() + 5;
    if (now() > until)
        wanted /= 10;
    return made < wanted || signalled < wanted / 4;
}

/* `n` rounds, with a signal for every fourth or more. */
#define ROUNDS(n) (int i = 0, first = signals; wants_more(i, signals - first, n); i++)
"""


class Tally(Device):
    """Notes what is done to it. BAR0 counts reads; its state is a row of words."""

    bar0 = Region(size=4096)
    pci_capabilities = (Msi(),)
    capabilities = Capability.STOP_COPY | Capability.P2P

    def __init__(self) -> None:
        self.written: list[int] = []
        self.reads = count()
        self.arcs: list[State] = []
        self.loaded: list[int] = []

    @bar0.reader
    def read_bar0(self, offset: int, length: int) -> bytes:
        return next(self.reads).to_bytes(length, "little")

    @bar0.writer
    def write_bar0(self, offset: int, data: bytes) -> None:
        self.written.append(int.from_bytes(data, "little"))

    def step(self, origin: State, target: State) -> None:
        self.arcs.append(target)

    def save(self) -> Iterator[Buffer]:
        words = struct.pack(f"<{WORDS}I", *range(WORDS))
        for at in range(0, len(words), 777):
            yield words[at : at + 777]

    def load(self, state: StateReader) -> None:
        while word := state.read(4):
            self.loaded.append(int.from_bytes(word, "little"))

    def state_size(self) -> int:
        return WORDS * 4


@pytest.fixture(params=["exact", "fast"])
def filter_name(request: pytest.FixtureRequest) -> FilterName:
    name: FilterName = request.param
    return name


@pytest.fixture(params=["SA_RESTART", "EINTR"])
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def run(tmp_path: Path, body: str, filter_name: FilterName, way: str) -> Tally:
    device = Tally()
    program = build(tmp_path, STORM + body)
    assert serve([device], [program, way], filter_name=filter_name) == 0
    return device


def test_registers_are_read_and_written_once(
    tmp_path: Path, filter_name: FilterName, way: str
) -> None:
    body = r"""
    int main(int argc, char **argv)
    {
        pid_t child;
        if (argc == 2) {  /* what comes from the program is treated like it */
            if (!(child = fork()))
                execl(argv[0], argv[0], argv[1], "again", NULL);
            await_child(child);
            return 0;
        }
        int device = use_device(0);
        pthread_t thread = begin(argc, argv);
        for ROUNDS(1000) {
            uint32_t word = i;
            IS(MADE(pwrite(device, &word, 4, BAR0)), 4);
            IS(MADE(pread(device, &word, 4, BAR0)), 4);
            IS(word, i);
        }
        end(thread);
        return 0;
    }
    """
    device = run(tmp_path, body, filter_name, way)
    assert device.written == list(range(next(device.reads)))


def test_changes_of_state_happen_once(tmp_path: Path, filter_name: FilterName, way: str) -> None:
    body = r"""
    static int go(int device, uint32_t state)
    {
        uint32_t words[4] = { 16, 2 | 0x20000, state, -1 };
        return ioctl(device, FEATURE, words);
    }
    int main(int argc, char **argv)
    {
        int device = use_device(0);
        pthread_t thread = begin(argc, argv);
        for ROUNDS(300) {
            IS(MADE(go(device, RUNNING_P2P)), 0);
            IS(MADE(go(device, STOP)), 0);
            IS(MADE(go(device, RUNNING_P2P)), 0);
            IS(MADE(go(device, RUNNING)), 0);
        }
        end(thread);
        return 0;
    }
    """
    arcs = run(tmp_path, body, filter_name, way).arcs
    there_and_back = [State.RUNNING_P2P, State.STOP, State.RUNNING_P2P, State.RUNNING]
    assert arcs == there_and_back * (len(arcs) // 4)


def test_interrupts_are_signalled_once(tmp_path: Path, filter_name: FilterName, way: str) -> None:
    body = r"""
    static int msi(int device, uint32_t flags, int32_t fd)
    {
        uint32_t words[6] = { 24, flags, 1, 0, 1, fd };
        return ioctl(device, 0x3B6E, words);
    }
    int main(int argc, char **argv)
    {
        int device = use_device(0), event = eventfd(0, EFD_NONBLOCK), rounds = 0;
        pthread_t thread = begin(argc, argv);
        IS(MADE(msi(device, 4 | 32, event)), 0);
        for ROUNDS(500) {
            IS(MADE(msi(device, 1 | 32, 0)), 0);
            rounds++;
        }
        end(thread);
        uint64_t signalled;
        IS(read(event, &signalled, 8), 8);
        IS(signalled, rounds);
        return 0;
    }
    """
    run(tmp_path, body, filter_name, way)


def test_a_state_is_read_and_written_whole(
    tmp_path: Path, filter_name: FilterName, way: str
) -> None:
    body = r"""
    static uint32_t saved[WORDS];
    int main(int argc, char **argv)
    {
        static char end_of_it[4];
        char *bytes = (char *)saved;
        size_t done = 0;
        long n;
        int device = use_device(0), fd = data_fd(device, STOP_COPY);
        pthread_t thread = begin(argc, argv);
        for (size_t size = 1; done < sizeof saved; size = size % 500 + 1) {
            CHECK((n = MADE(read(fd, bytes + done, size))) > 0);
            done += n;
        }
        IS(MADE(read(fd, end_of_it, 4)), 0);
        for (int i = 0; i < WORDS; i++)
            IS(saved[i], i);
        end(thread);
        close(fd);
        fd = data_fd(device, RESUMING);
        over = 0;
        thread = begin(argc, argv);
        for (size_t size = 1, done = 0; done < sizeof saved; size = size % 500 + 1) {
            if (size > sizeof saved - done)
                size = sizeof saved - done;
            CHECK((n = MADE(write(fd, bytes + done, size))) > 0);
            done += n;
        }
        end(thread);
        IS(set_state(device, STOP, 0), 0);
        return 0;
    }
    """
    assert run(tmp_path, body, filter_name, way).loaded == list(range(WORDS))


def test_opening_leaves_no_descriptor_behind(
    tmp_path: Path, filter_name: FilterName, way: str
) -> None:
    body = r"""
    int main(int argc, char **argv)
    {
        int device = use_device(0), lowest = dup(0), fd;
        close(lowest);
        pthread_t thread = begin(argc, argv);
        for ROUNDS(300) {
            IS(fd = MADE(open("/dev/vfio/devices/vfio0", O_RDWR)), lowest);
            close(fd);
            IS(fd = MADE(open("/dev/iommu", O_RDWR)), lowest);
            close(fd);
        }
        end(thread);
        IS(get_state(device), RUNNING);
        return 0;
    }
    """
    run(tmp_path, body, filter_name, way)
