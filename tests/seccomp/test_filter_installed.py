"""The two filters in the kernel: what gets through, what stops, what does not exist."""

from __future__ import annotations

import errno
import os
import resource
from typing import TYPE_CHECKING

import pytest

from supervise import compile_c, run_served
from vfiomig.abi.syscalls import X86_64
from vfiomig.doors.syscall.filter import exact_filter, fast_filter

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig.doors.syscall.notify import Listener, Notification

NAMES = {number: name for name, number in X86_64.items()}
TAG = 0x56
FILTERS = {"exact": exact_filter(), "fast": fast_filter(first_data_fd=900, offset_tag=TAG)}

FOREIGN = r"""
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
static sigjmp_buf no_gate;
static void on_fault(int number) { siglongjmp(no_gate, 1); }
int main(void)
{
    long result = -ENOSYS; /* a kernel without i386 calls says no in its own way */
    signal(SIGSEGV, on_fault);
    /* ioctl, 54 of i386, through the gate of 32-bit programs */
    if (!sigsetjmp(no_gate, 1))
        __asm__ volatile("int $0x80" : "=a"(result) : "a"(54), "b"(1), "c"(0x3B64), "d"(0)
                         : "memory");
    printf("i386 %ld\n", result);
    result = syscall(0x40000000 + 514, 1, 0x3B64, 0); /* ioctl of x32 */
    printf("x32 %ld %d\n", result, errno);
    result = syscall(0x40000000 + 0, 0, &result, 0); /* read of x32 */
    printf("x32 %ld %d\n", result, errno);
    result = syscall(425, 8, 0);
    printf("io_uring_setup %ld %d\n", result, errno);
    return 0;
}
"""


@pytest.mark.parametrize("kind", FILTERS)
def test_foreign_calls_and_io_uring_do_not_exist(tmp_path: Path, kind: str) -> None:
    outcome = run_served([compile_c(FOREIGN, tmp_path)], program=FILTERS[kind])
    refused = f"-1 {errno.ENOSYS}"
    assert outcome.output.splitlines() == [
        f"i386 {-errno.ENOSYS}",
        f"x32 {refused}",
        f"x32 {refused}",
        f"io_uring_setup {refused}",
    ]


CALLS = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
int main(void)
{
    char byte = 0;
    struct iovec vector = {&byte, 1};
    off_t tagged = (off_t)0x56 << 56;
    int available, high;
    int zero = syscall(SYS_openat, AT_FDCWD, "/dev/zero", O_RDWR, 0);

    high = fcntl(zero, F_DUPFD, 900);
    ioctl(0, 0x3B64, 0);
    ioctl(0, FIONREAD, &available);
    ioctl(0, TCGETS, 0);
    for (int fd = zero; ; fd = high) {
        read(fd, &byte, 1);
        writev(fd, &vector, 1);
        pread(fd, &byte, 1, 0);
        pwrite(fd, &byte, 1, tagged);
        preadv(fd, &vector, 1, tagged);
        preadv2(fd, &vector, 1, -1, 0);
        splice(0, 0, fd, 0, 0, 0);
        sendfile(fd, fd, 0, 0);
        lseek(fd, 0, SEEK_CUR);
        if (fd == high)
            break;
    }
    mmap(0, 4096, PROT_READ, MAP_PRIVATE, zero, 0);
    mmap(0, 4096, PROT_READ, MAP_PRIVATE, zero, tagged);
    mmap(0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    dup(zero);
    close(high);
    return access("/dev/vfio", F_OK) == 0;
}
"""
CAUGHT = "read writev pread64 pwrite64 preadv preadv2 splice sendfile lseek"
HIGH = CAUGHT.split()


@pytest.mark.parametrize(
    ("kind", "low", "maps"),
    [
        ("exact", HIGH, ["mmap", "mmap"]),
        ("fast", ["pwrite64", "preadv"], ["mmap"]),
    ],
)
def test_the_calls_of_a_program_stop_as_the_table_says(
    tmp_path: Path, kind: str, low: list[str], maps: list[str]
) -> None:
    stopped: list[str] = []

    def handle(_listener: Listener, call: Notification) -> bool:
        stopped.append(NAMES[call.nr])
        return False

    source = CALLS.replace("int main", '#pragma GCC diagnostic ignored "-Wunused-result"\nint main')
    outcome = run_served(
        [compile_c(source, tmp_path)], handle, program=FILTERS[kind], prepare=allow_high_numbers
    )
    assert outcome.code in {0, 1}
    # Before that come the calls of the dynamic loader.
    expected = ["openat", "ioctl", "ioctl", *low, *HIGH, *maps, "access"]
    assert stopped[-len(expected) :] == expected


def allow_high_numbers() -> None:
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )


def test_a_program_runs_as_if_nobody_looked() -> None:
    script = "cat /proc/self/comm; echo $((6 * 7)); head -c 3 /dev/zero | wc -c; ls -d /proc/self"
    for program in FILTERS.values():
        outcome = run_served(["sh", "-c", script], program=program, env={"PATH": os.defpath})
        assert outcome.output == "cat\n42\n3\n/proc/self\n"
        assert outcome.code == 0
