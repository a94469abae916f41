"""What the tests of the system call door share: small C programs, devices, and running both.

A program checks by itself and prints "ok"; a check that fails prints its line, what it compared
and the errno.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from supervise import compile_c
from vfiomig import (
    Capability,
    Device,
    DeviceError,
    Region,
    State,
    StateReader,
    StateRejected,
)
from vfiomig.abi.ioctls import Dialect
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.doors.syscall.run import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfiomig.device import Buffer
    from vfiomig.doors.syscall.run import FilterName
    from vfiomig.doors.syscall.trace import Trace

__all__ = (
    "COMMAND",
    "ENVIRONMENT",
    "SOURCE",
    "WAIT",
    "Gated",
    "Plain",
    "Slow",
    "Worker",
    "build",
    "serve",
    "served",
)

SOURCE = Path(__file__).parent.parent / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}
COMMAND = [sys.executable, "-m", "vfiomig", "run"]
PATIENCE = 20.0

PRELUDE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <limits.h>
#include <unistd.h>

/* Calls that a compiler can see to be wrong are what these programs are about. */
#pragma GCC diagnostic ignored "-Wstringop-overread"
#pragma GCC diagnostic ignored "-Wstringop-overflow"
#pragma GCC diagnostic ignored "-Wnonnull"

enum { ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P };
#define FEATURE 0x3B75
#define UNUSED __attribute__((unused))
#define CHECK(what) do { if (!(what)) { \
    fprintf(stderr, "line %d: %s, errno %d (%s)\n", __LINE__, #what, errno, strerror(errno)); \
    _exit(1); } } while (0)
/* The value of an expression is `want`. */
#define IS(what, want) do { long long got_ = (what), want_ = (want); if (got_ != want_) { \
    fprintf(stderr, "line %d: %s is %lld, not %lld; errno %d (%s)\n", __LINE__, #what, got_, \
        want_, errno, strerror(errno)); _exit(1); } } while (0)
/* A call fails with errno `want`. */
#define FAILS(what, want) do { errno = 0; long long got_ = (long long)(what); \
    if (got_ != -1 || errno != (want)) { \
    fprintf(stderr, "line %d: %s is %lld, errno %d (%s), not %s\n", __LINE__, #what, got_, \
        errno, strerror(errno), strerror(want)); _exit(1); } } while (0)

struct bind { uint32_t argsz, flags; int32_t iommufd; uint32_t out_devid; };

UNUSED static int open_device(int number)
{
    char path[64];
    snprintf(path, sizeof path, "/dev/vfio/devices/vfio%d", number);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

/* Open and bind: the iommufd stays open. */
UNUSED static int use_device(int number)
{
    static int iommu = -1;
    if (iommu < 0)
        iommu = open("/dev/iommu", O_RDWR | O_CLOEXEC);
    int device = open_device(number);
    struct bind bind = { sizeof bind, 0, iommu, 0 };
    CHECK(!ioctl(device, 0x3B76, &bind));
    return device;
}

/* 0 or -errno; *fd gets the data_fd or -1. */
UNUSED static int set_state(int device, uint32_t state, int *fd)
{
    uint32_t words[4] = { 16, 2 | 0x20000, state, -1 };
    int result = ioctl(device, FEATURE, words);
    if (fd)
        *fd = words[3];
    return result < 0 ? -errno : 0;
}

/* The state or -errno. */
UNUSED static int get_state(int device)
{
    uint32_t words[4] = { 16, 2 | 0x10000, 77, 77 };
    return ioctl(device, FEATURE, words) < 0 ? -errno : (int)words[2];
}

UNUSED static int data_fd(int device, uint32_t state)
{
    int fd;
    IS(set_state(device, state, &fd), 0);
    CHECK(fd >= 0);
    return fd;
}

UNUSED static int revents(int fd, int events)
{
    struct pollfd one = { fd, events, 0 };
    CHECK(poll(&one, 1, 0) >= 0);
    return one.revents;
}

UNUSED static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

UNUSED static void nap(double seconds)
{
    struct timespec t = { (time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9) };
    while (nanosleep(&t, &t) < 0)
        ;
}

/* Child processes do their part and leave with 0. */
UNUSED static void await_child(pid_t pid)
{
    int status;
    CHECK(waitpid(pid, &status, 0) == pid);
    IS(status, 0);
}

/* BAR0 of a bound device. */
#define BAR0 (0x56ULL << 56)

/* Until a device that tells in BAR0 whether it is waiting is so. */
UNUSED static void await_waiting(int device)
{
    char waiting;
    do {
        nap(0.001);
        CHECK(pread(device, &waiting, 1, BAR0) == 1);
    } while (!waiting);
}

/* Hand a descriptor over a socket, and take one. */
UNUSED static void send_fd(int socket, int fd)
{
    char byte = 0, space[CMSG_SPACE(sizeof fd)] = { 0 };
    struct iovec part = { &byte, 1 };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = space,
        .msg_controllen = sizeof space };
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    IS(sendmsg(socket, &message, 0), 1);
}

UNUSED static int take_fd(int socket)
{
    char byte, space[CMSG_SPACE(sizeof(int))];
    struct iovec part = { &byte, 1 };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = space,
        .msg_controllen = sizeof space };
    IS(recvmsg(socket, &message, 0), 1);
    int fd;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}
"""

#: For programs with a ``Worker``.
WAIT = r"""
UNUSED static void await_rounds(int device, uint64_t more)
{
    uint64_t first, seen;
    CHECK(pread(device, &first, 8, BAR0) == 8);
    do {
        nap(0.001);
        CHECK(pread(device, &seen, 8, BAR0) == 8);
    } while (seen < first + more);
}
"""

BASIC = Capability.STOP_COPY | Capability.P2P


class Plain(Device):
    """``size`` bytes, n at place n; BAR0 is memory."""

    bar0 = Region(size=4096)
    capabilities = BASIC

    def __init__(self, size: int = 1 << 20) -> None:
        self.memory = bytearray(bytes(range(256)) * (size // 256 + 1))[:size]

    def save(self) -> Iterator[Buffer]:
        yield memoryview(self.memory)

    def load(self, state: StateReader) -> None:
        if state.readinto(memoryview(self.memory)) != len(self.memory) or state.read(1):
            raise StateRejected("not the size of this device")

    def state_size(self) -> int:
        return len(self.memory)


class Gated(Device):
    """Saves and loads 100 bytes, waits, and goes on with 100 more when BAR0 is written to.

    The value written is the number of waits that it lets pass; what is read tells whether it waits.
    """

    bar0 = Region(size=4096)
    capabilities = BASIC

    def __init__(self, *, first: bool = True) -> None:
        self.gate = threading.Semaphore(0)
        self.waiting = False
        self.first = first
        self.resets = 0

    @bar0.reader
    def read_bar0(self, offset: int, length: int) -> bytes:
        return bytes([self.waiting]) * length

    @bar0.writer
    def write_bar0(self, offset: int, data: bytes) -> None:
        for _ in range(data[0]):
            self.gate.release()

    def wait(self) -> bool:
        self.waiting = True
        went_on = self.gate.acquire(timeout=PATIENCE)
        self.waiting = False
        return went_on

    def save(self) -> Iterator[Buffer]:
        if self.first:
            yield b"a" * 100
        while self.wait():
            yield b"b" * 100

    def load(self, state: StateReader) -> None:
        state.read(100)
        self.wait()
        state.read(100)

    def state_size(self) -> int:
        return 200

    def reset(self) -> None:
        self.resets += 1
        for _ in range(3):
            self.gate.release()  # whatever waits is abandoned


class Slow(Plain):
    """Takes its time for every arc into STOP, and tells in BAR0 that it is at one."""

    bar0 = Region(size=4096)

    def __init__(self, seconds: float) -> None:
        super().__init__(4096)
        self.seconds = seconds
        self.arcs: list[str] = []
        self.under_way = False

    @bar0.reader
    def read_bar0(self, offset: int, length: int) -> bytes:
        return bytes([self.under_way]) * length

    def step(self, origin: State, target: State) -> None:
        self.arcs.append(f"{origin.name}-{target.name}")
        if target is State.STOP:
            self.under_way = True
            time.sleep(self.seconds)
            self.under_way = False


class Worker(Device):
    """Writes and reads at ``BUS`` all the time that it runs, and notes which memory it met.

    BAR0 tells how often it could, and behind that how often it was refused.
    """

    BUS = 0x100000
    bar0 = Region(size=4096)
    capabilities = Capability.STOP_COPY
    dma_logging = False

    def __init__(self) -> None:
        self.rounds = self.refusals = 0
        self.problem: BaseException | None = None
        self.met: set[type] = set()
        self._stops = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._stops.clear()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def stop(self) -> None:
        assert self._thread is not None
        self._stops.set()
        self._thread.join(PATIENCE)

    def _work(self) -> None:
        into = bytearray(100)
        while not self._stops.wait(0.0001):
            try:
                self.dma.write(self.BUS + 5, self.rounds.to_bytes(8, "little"))
                self.dma.read_into(self.BUS + 5, into)
                self.rounds += 1
                self._look()
            except DeviceError:
                self.refusals += 1
            except BaseException as problem:  # noqa: BLE001 - raised again by the test
                self.problem = problem
                return

    def _look(self) -> None:
        space = self.dma.space
        if space is not None:
            with space.lock:
                mapping = space.find_locked(self.BUS, 1)
            if mapping is not None:
                self.met.add(type(mapping.memory))

    @bar0.reader
    def read_bar0(self, offset: int, size: int) -> bytes:
        numbers = self.rounds, self.refusals
        told = b"".join(number.to_bytes(8, "little") for number in numbers)
        return told[offset : offset + size]

    def check(self) -> None:
        """Nothing went wrong, and something happened."""
        if self.problem is not None:
            raise self.problem
        assert self.rounds


def build(folder: Path, body: str, name: str = "program") -> str:
    """Compile ``body``, C code with a ``main``, behind what all programs share."""
    return compile_c(f'{PRELUDE}\n#line 1 "{name}.c"\n{body}', folder, name)


def served(*devices: Device, dialect: Dialect = Dialect.LANDED) -> list[VfioDevice]:
    """Give devices their names."""
    return [VfioDevice(device, f"vfio{n}", dialect) for n, device in enumerate(devices)]


def serve(
    devices: Sequence[VfioDevice | Device],
    argv: Sequence[str],
    *,
    filter_name: FilterName = "exact",
    trace: Trace | None = None,
) -> int:
    """Run ``argv`` with ``devices``."""
    named = [
        one if isinstance(one, VfioDevice) else VfioDevice(one, f"vfio{n}")
        for n, one in enumerate(devices)
    ]
    return run(named, argv, env=ENVIRONMENT, filter_name=filter_name, trace=trace)


def errno_name(number: int) -> str:
    return errno.errorcode[number]
