"""What a stopped call is answered, seen from a C program."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from in_process import wait_until
from supervise import Served, compile_c, run_served
from vfiomig.abi.syscalls import X86_64
from vfiomig.descriptors import poll_until
from vfiomig.doors.syscall.filter import fast_filter
from vfiomig.doors.syscall.notify import ERESTARTSYS, CallerGone
from vfiomig.memory import CallMemory, MemoryFault, ProcessMemory

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig.doors.syscall.notify import Listener, Notification

IOCTL = X86_64["ioctl"]
FD = 1000  # not open in any client
PREAMBLE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>
#define ASK(n, p) ioctl(1000, 0x3B00 + (n), p)
static inline void show(const char *what, long value)
{
    printf("%s %ld errno %d\n", what, value, value < 0 ? errno : 0);
    fflush(stdout);
}
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One ioctl per number in the arguments."""
    body = r"""
    int main(int argc, char **argv)
    {
        for (int i = 1; i < argc; i++)
            show(argv[i], ASK(atoi(argv[i]), 0));
        return 0;
    }
    """
    return compile_c(PREAMBLE + body, tmp_path_factory.mktemp("notify"))


def request(call: Notification) -> int | None:
    """The number that the client asks with, None for calls of its C library."""
    if call.nr == IOCTL and call.args[0] == FD:
        return call.args[1] & 0xFF
    return None


def test_values_and_errnos_arrive(client: str) -> None:
    answers = {1: 0, 2: 7, 3: 0x7FFFFFFF, 4: -errno.ENOTTY, 5: -errno.EFAULT, 6: -4095}

    def handle(listener: Listener, call: Notification) -> bool:
        value = answers.get(request(call) or 0)
        if value is None:
            return False
        return listener.reply(call.id, value) if value >= 0 else listener.fail(call.id, -value)

    outcome = run_served([client, "1", "2", "3", "4", "5", "6"], handle)
    assert outcome.output.splitlines() == [
        "1 0 errno 0",
        "2 7 errno 0",
        "3 2147483647 errno 0",
        f"4 -1 errno {errno.ENOTTY}",
        f"5 -1 errno {errno.EFAULT}",
        "6 -1 errno 4095",
    ]
    assert outcome.code == 0


@pytest.mark.parametrize("poll_first", [False, True])
def test_a_foreign_descriptor_is_answered_by_the_kernel(client: str, *, poll_first: bool) -> None:
    outcome = run_served([client, "1"], poll_first=poll_first)
    assert outcome.output == f"1 -1 errno {errno.EBADF}\n"


def test_a_notification_carries_the_whole_call(tmp_path: Path) -> None:
    binary = compile_c(
        PREAMBLE
        + r"""
        int main(void)
        {
            show("pid", getpid());
            return ioctl(-2, 0x3B12, 0xFFFFFFFFFFFFFFFFul) == 3 ? 0 : 1;
        }
        """,
        tmp_path,
    )
    seen: list[Notification] = []

    def handle(listener: Listener, call: Notification) -> bool:
        if call.nr == IOCTL and call.args[1] == 0x3B12:
            seen.append(call)
            return listener.reply(call.id, 3)
        return False

    outcome = run_served([binary], handle)
    assert outcome.code == 0
    (call,) = seen
    assert call.tid == int(outcome.output.split()[1])
    assert call.args[0] & 0xFFFFFFFF == 0xFFFFFFFE
    assert call.args[2] == 0xFFFFFFFFFFFFFFFF
    assert len(call.args) == 6
    assert f"thread {call.tid} calls 16(" in repr(call)


def test_descriptors_take_the_number_that_dup_would(tmp_path: Path) -> None:
    binary = compile_c(
        PREAMBLE
        + r"""
        int main(void)
        {
            struct rlimit limit = {64, 64};
            setrlimit(RLIMIT_NOFILE, &limit);
            int lowest = dup(0);
            close(lowest);
            show("lowest", ASK(1, 0) - lowest);
            show("cloexec", fcntl(lowest, F_GETFD));
            show("next", ASK(2, 0) - lowest);
            show("no cloexec", fcntl(lowest + 1, F_GETFD));
            show("chosen", ASK(3, 0));
            show("same file", lseek(40, 0, SEEK_CUR) == lseek(lowest, 0, SEEK_CUR));
            show("beyond the limit", ASK(4, 0));
            while (dup(0) >= 0)
                ;
            show("full", ASK(1, 0));
            show("replaced in the full table", ASK(3, 0));
            return 0;
        }
        """,
        tmp_path,
    )

    def handle(listener: Listener, call: Notification) -> bool:
        number = request(call)
        try:
            if number == 1:
                return listener.reply(call.id, listener.add_fd(call.id, zero, cloexec=True))
            if number == 2:
                return listener.reply(call.id, listener.add_fd(call.id, zero))
            if number == 3:
                return listener.reply(call.id, listener.add_fd(call.id, zero, newfd=40))
            if number == 4:
                return listener.reply(call.id, listener.add_fd(call.id, zero, newfd=64))
        except OSError as error:
            return listener.fail(call.id, error.errno or 0)
        return False

    with open("/dev/zero", "rb", buffering=0) as zero:
        outcome = run_served([binary], handle)
    full = f"-1 errno {errno.EMFILE}"
    assert outcome.output.splitlines() == [
        "lowest 0 errno 0",
        f"cloexec {fcntl.FD_CLOEXEC} errno 0",
        "next 1 errno 0",
        "no cloexec 0 errno 0",
        "chosen 40 errno 0",
        "same file 1 errno 0",
        f"beyond the limit {full}",
        f"full {full}",
        "replaced in the full table 40 errno 0",
    ]


def test_memory_of_the_caller_faults_as_in_the_kernel(tmp_path: Path) -> None:
    """A bad pointer, memory that is read-only, and the new memory after an exec."""
    binary = compile_c(
        PREAMBLE
        + r"""
        int main(int argc, char **argv)
        {
            char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            strcpy(page, argc > 1 ? "after exec" : "before exec");
            show("writable", ASK(1, page));
            printf("%s\n", page);
            mprotect(page, 4096, PROT_READ);
            show("read-only", ASK(1, page));
            show("bad", ASK(1, (void *)8));
            if (argc == 1)
                execl(argv[0], argv[0], "again", NULL);
            return 0;
        }
        """,
        tmp_path,
    )
    seen: list[bytes] = []

    def handle(listener: Listener, call: Notification) -> bool:
        if request(call) is None:
            return False
        memory = CallMemory(ProcessMemory(call.tid))
        try:
            seen.append(memory.read(call.args[2], 12).split(b"\0")[0])
            memory.write(call.args[2], b"answer\0")
        except MemoryFault as fault:
            return listener.fail(call.id, fault.errno or 0)
        return listener.reply(call.id, 0)

    outcome = run_served([binary], handle)
    fault = f"-1 errno {errno.EFAULT}"
    once = ["writable 0 errno 0", "answer", f"read-only {fault}", f"bad {fault}"]
    assert outcome.output.splitlines() == once + once
    assert seen == [b"before exec", b"answer", b"after exec", b"answer"]


def test_forked_children_are_served(tmp_path: Path) -> None:
    binary = compile_c(
        PREAMBLE
        + r"""
        int main(void)
        {
            if (fork() == 0)
                _exit(ASK(5, 0));
            int status;
            wait(&status);
            return WEXITSTATUS(status);
        }
        """,
        tmp_path,
    )
    tids: list[int] = []

    def handle(listener: Listener, call: Notification) -> bool:
        if request(call) != 5:
            return False
        tids.append(call.tid)
        return listener.reply(call.id, 55)

    served = Served([binary], handle)
    pid = served.program.pid
    assert served.finish().code == 55
    assert pid not in tids


@pytest.mark.parametrize(("receivers", "poll_first"), [(1, False), (3, False), (3, True)])
def test_threads_get_their_own_answers(tmp_path: Path, receivers: int, *, poll_first: bool) -> None:
    binary = compile_c(
        PREAMBLE
        + r"""
        static void *ask(void *number)
        {
            for (long i = 0; i < 500; i++) {
                long box[2] = {(long)number, i};
                if (ASK(1, box) || box[0] != (long)number * 1000 + i)
                    exit(1);
            }
            return 0;
        }
        int main(void)
        {
            pthread_t threads[4];
            for (long i = 0; i < 4; i++)
                pthread_create(&threads[i], 0, ask, (void *)(i + 1));
            for (long i = 0; i < 4; i++)
                pthread_join(threads[i], 0);
            return 0;
        }
        """,
        tmp_path,
    )
    served = 0

    def handle(listener: Listener, call: Notification) -> bool:
        nonlocal served
        if request(call) != 1:
            return False
        memory = ProcessMemory(call.tid)
        words = memory.read(call.args[2], 16)
        answer = int.from_bytes(words[:8], "little") * 1000 + int.from_bytes(words[8:], "little")
        memory.write(call.args[2], answer.to_bytes(8, "little"))
        served += 1
        return listener.reply(call.id, 0)

    outcome = run_served([binary], handle, receivers=receivers, poll_first=poll_first)
    assert outcome.code == 0
    assert served > 0


def test_a_held_call_is_answered_later_by_another_thread(tmp_path: Path) -> None:
    binary = compile_c(
        PREAMBLE
        + r"""
        static void *held(void *unused) { show("held", ASK(1, 0)); return 0; }
        int main(void)
        {
            pthread_t thread;
            pthread_create(&thread, 0, held, 0);
            while (ASK(2, 0) == 0)
                ;
            show("served meanwhile", 1);
            ASK(3, 0);
            pthread_join(thread, 0);
            return 0;
        }
        """,
        tmp_path,
    )
    waiting: list[int] = []
    later: list[threading.Thread] = []

    def handle(listener: Listener, call: Notification) -> bool:
        number = request(call)
        if number == 1:
            waiting.append(call.id)
            return True
        if number == 2:
            return listener.reply(call.id, len(waiting))
        if number == 3:
            later.append(threading.Thread(target=listener.reply, args=(waiting[0], 11)))
            later[0].start()
            return listener.reply(call.id, 0)
        return False

    outcome = run_served([binary], handle)
    later[0].join()
    assert outcome.output == "served meanwhile 1 errno 0\nheld 11 errno 0\n"


SIGNALLED = r"""
static volatile int handled;
static void on_signal(int number) { handled++; }
int main(int argc, char **argv)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = atoi(argv[1]) ? SA_RESTART : 0};
    sigaction(SIGALRM, &action, 0);
    show("asked", ASK(1, 0));
    show("handled", handled);
    return 0;
}
"""


def signal_pending(tid: int) -> bool:
    """Whether SIGALRM waits for the process or this thread of it."""
    with open(f"/proc/{tid}/status", encoding="ascii") as status:
        words = dict(line.split(":", 1) for line in status)
    pending = int(words["SigPnd"], 16) | int(words["ShdPnd"], 16)
    return bool(pending & 1 << signal.SIGALRM - 1)


def send_signal(tid: int) -> None:
    """Have a signal wait for whoever waits for its answer."""
    os.kill(tid, signal.SIGALRM)
    wait_until(lambda: signal_pending(tid))


@pytest.mark.parametrize("sa_restart", ["0", "1"])
def test_a_signal_does_not_make_a_call_happen_twice(tmp_path: Path, sa_restart: str) -> None:
    binary = compile_c(PREAMBLE + SIGNALLED, tmp_path)
    calls = 0

    def handle(listener: Listener, call: Notification) -> bool:
        nonlocal calls
        if request(call) != 1:
            return False
        calls += 1
        send_signal(call.tid)
        assert listener.valid(call.id)
        return listener.reply(call.id, 5)

    outcome = run_served([binary, sa_restart], handle)
    assert outcome.output == "asked 5 errno 0\nhandled 1 errno 0\n"
    assert calls == 1


@pytest.mark.parametrize(
    ("sa_restart", "asked", "expected_calls"),
    [("0", f"asked -1 errno {errno.EINTR}", 1), ("1", "asked 5 errno 0", 2)],
)
def test_restart_leaves_the_decision_to_the_callers_handler(
    tmp_path: Path, sa_restart: str, asked: str, expected_calls: int
) -> None:
    binary = compile_c(PREAMBLE + SIGNALLED, tmp_path)
    calls = 0

    def handle(listener: Listener, call: Notification) -> bool:
        nonlocal calls
        if request(call) != 1:
            return False
        calls += 1
        if calls == 1:
            send_signal(call.tid)
            return listener.fail(call.id, ERESTARTSYS)
        return listener.reply(call.id, 5)

    outcome = run_served([binary, sa_restart], handle)
    assert outcome.output == f"{asked}\nhandled 1 errno 0\n"
    assert calls == expected_calls


def test_a_caller_killed_in_the_middle_is_counted_and_told(client: str) -> None:
    facts: dict[str, object] = {}

    def handle(listener: Listener, call: Notification) -> bool:
        if request(call) != 1:
            return False
        facts["valid before"] = listener.valid(call.id)
        os.kill(call.tid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while listener.valid(call.id) and time.monotonic() < deadline:
            time.sleep(0.001)
        facts["valid after"] = listener.valid(call.id)
        with pytest.raises(CallerGone) as gone, open("/dev/zero", "rb") as zero:
            listener.add_fd(call.id, zero)
        facts["errno"] = gone.value.errno
        facts["reply"] = listener.reply(call.id, 0)
        facts["fail"] = listener.fail(call.id, errno.EIO)
        facts["carry on"] = listener.carry_on(call.id)
        return True

    served = Served([client, "1"], handle)
    listener = served.listener
    outcome = served.finish()
    assert outcome.code == 128 + signal.SIGKILL
    assert facts == {
        "valid before": True,
        "valid after": False,
        "errno": errno.ENOENT,
        "reply": False,
        "fail": False,
        "carry on": False,
    }
    assert listener.gone == 4


@pytest.mark.parametrize("poll_first", [False, True])
def test_a_caller_killed_before_it_was_received_is_passed_over(
    client: str, *, poll_first: bool
) -> None:
    """Its call is queued, and by the time of the receive there is nobody who made it."""
    served = Served([client, "1"], receivers=0, poll_first=poll_first)
    try:
        came = poll_until(served.listener, select.POLLIN, time.monotonic() + 10)
        assert came == select.POLLIN, "the dynamic loader's first open does not wait"
        served.program.send_signal(signal.SIGKILL)
        assert served.program.wait(time.monotonic() + 10) == 128 + signal.SIGKILL
        assert served.listener.receive() is None
        assert served.listener.receive() is None
    finally:
        served.finish()


@pytest.mark.parametrize("poll_first", [False, True])
def test_sleeping_receivers_end_with_the_program(*, poll_first: bool) -> None:
    started = time.monotonic()
    outcome = run_served(["sleep", "0.2"], receivers=3, poll_first=poll_first)
    assert outcome.code == 0
    assert time.monotonic() - started < 10


def test_a_supervisor_that_goes_leaves_enosys(client: str) -> None:
    """Both the call that is pending and the later ones."""
    # Of the client's own calls this filter leaves the writes alone.
    program = fast_filter(first_data_fd=500, offset_tag=1)
    served = Served([client, "1", "2"], program=program, receivers=0)
    try:
        while (call := served.listener.receive()) is not None and request(call) != 1:
            served.listener.carry_on(call.id)
        assert call is not None
        served.listener.close()
        with pytest.raises(OSError) as closed:
            served.listener.fileno()
        assert closed.value.errno == errno.EBADF
    finally:
        outcome = served.finish()
    enosys = f"-1 errno {errno.ENOSYS}"
    assert outcome.output == f"1 {enosys}\n2 {enosys}\n"
