"""Last closes of a program that closes and asks again at once."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from supervise import Served, compile_c, run_served
from vfiomig.abi.syscalls import X86_64
from vfiomig.descriptors import create_sealed_memfd
from vfiomig.doors.syscall.lastclose import LastClose

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig.doors.syscall.notify import Listener, Notification

PREAMBLE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#define OPEN() ioctl(1000, 0x3B01, 0)
#define ENDED() ioctl(1000, 0x3B02, 0) /* how many opens are over */
static inline void expect(const char *what, int value, int wanted)
{
    if (value == wanted)
        return;
    printf("%s: %d instead of %d\n", what, value, wanted);
    exit(1);
}
"""


class OpeningSupervisor:
    """Opens descriptors for the program on request, and counts the ends of those."""

    def __init__(self) -> None:
        self.memfd = create_sealed_memfd("device", 4096)
        self.closes: LastClose[int] = LastClose()
        self.opened = 0
        self.ended: list[int] = []

    def handle(self, listener: Listener, call: Notification) -> bool:
        if call.nr != X86_64["ioctl"] or call.args[0] != 1000:
            return False
        self.ended += self.closes.drain()
        if call.args[1] == 0x3B02:
            return listener.reply(call.id, len(self.ended))
        self.opened += 1
        with self.closes.open(self.memfd, os.O_RDWR, self.opened) as opened:
            try:
                return listener.reply(call.id, listener.add_fd(call.id, opened))
            except OSError as error:
                return listener.fail(call.id, error.errno or 0)

    def close(self) -> None:
        self.closes.close()
        self.memfd.close()


def run(folder: Path, body: str) -> OpeningSupervisor:
    binary = compile_c(PREAMBLE + body, folder)
    supervisor = OpeningSupervisor()
    try:
        outcome = run_served([binary], supervisor.handle)
        supervisor.ended += supervisor.closes.drain()
    finally:
        supervisor.close()
    assert outcome.output == ""
    assert outcome.code == 0
    return supervisor


def test_a_close_is_seen_before_the_next_request_of_its_thread(tmp_path: Path) -> None:
    supervisor = run(
        tmp_path,
        r"""
        int main(void)
        {
            for (int i = 0; i < 1000; i++) {
                int fd = OPEN();
                expect("while it is open", ENDED(), i);
                close(fd);
                expect("after its close", ENDED(), i + 1);
            }
            return 0;
        }
        """,
    )
    assert supervisor.ended == list(range(1, 1001))


def test_dup_fork_exec_and_mappings_keep_an_open_alive(tmp_path: Path) -> None:
    supervisor = run(
        tmp_path,
        r"""
        int main(void)
        {
            int fd = OPEN(), status;
            int copy = dup(fd);
            close(fd);
            expect("a copy is left", ENDED(), 0);
            dup2(0, copy);
            expect("replaced by dup2", ENDED(), 1);

            fd = OPEN();
            void *page = mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0);
            close(fd);
            expect("a mapping is left", ENDED(), 1);
            munmap(page, 4096);
            expect("unmapped", ENDED(), 2);

            fd = OPEN();
            if (fork() == 0)
                _exit(0);
            wait(&status);
            expect("the child has ended", ENDED(), 2);
            pid_t child = fork();
            if (child == 0) {
                pause();
                _exit(0);
            }
            close(fd);
            expect("the child has it", ENDED(), 2);
            kill(child, SIGKILL);
            wait(&status);
            expect("the child was killed", ENDED(), 3);

            fd = OPEN();
            fcntl(fd, F_SETFD, FD_CLOEXEC);
            child = fork();
            if (child == 0) {
                execl("/bin/true", "true", NULL);
                _exit(1);
            }
            close(fd);
            wait(&status);
            expect("closed by exec", ENDED(), 4);
            OPEN();
            return 0;
        }
        """,
    )
    assert supervisor.ended == [1, 2, 3, 4, 5]


def test_an_open_that_finds_no_number_is_over(tmp_path: Path) -> None:
    supervisor = run(
        tmp_path,
        r"""
        int main(void)
        {
            int fd = OPEN();
            while (dup(0) >= 0)
                ;
            expect("full", OPEN(), -1);
            expect("undone", ENDED(), 1);
            close(fd);
            return 0;
        }
        """,
    )
    assert supervisor.ended == [2, 1]


def test_a_killed_program_closes_everything(tmp_path: Path) -> None:
    binary = compile_c(
        PREAMBLE
        + r"""
        int main(void)
        {
            OPEN();
            OPEN();
            return write(1, "x", 1) != 1 || pause();
        }
        """,
        tmp_path,
    )
    supervisor = OpeningSupervisor()
    try:
        served = Served([binary], supervisor.handle)
        assert os.read(served._reader, 1) == b"x"
        assert supervisor.closes.drain() == []
        served.program.send_signal(signal.SIGKILL)
        served.program.wait(time.monotonic() + 10)
        assert supervisor.closes.drain() == [1, 2]
        served.finish()
    finally:
        supervisor.close()
