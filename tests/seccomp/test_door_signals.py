"""Signals and exit codes: what a program under the door, and its user, would expect anyway."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from door_programs import COMMAND, ENVIRONMENT, Gated, Plain, Slow, build, serve

if TYPE_CHECKING:
    from pathlib import Path

ALARMED = r"""
    static volatile int alarms;
    static void ring(int number) { alarms += number == SIGALRM; }
    UNUSED static void on_alarm(int flags)
    {
        struct sigaction action = { .sa_handler = ring, .sa_flags = flags };
        CHECK(!sigaction(SIGALRM, &action, 0));
    }
    /* The device waits in a call of this process, and then the alarm comes. */
    UNUSED static pid_t alarm_when_waiting(int device)
    {
        pid_t parent = getpid(), child = fork();
        if (!child) {
            await_waiting(device);
            kill(parent, SIGALRM);
            _exit(0);
        }
        return child;
    }
"""


@pytest.mark.parametrize("flags", ["0", "SA_RESTART"])
def test_an_arc_runs_once_whatever_signals_come(flags: str, tmp_path: Path) -> None:
    program = build(
        tmp_path,
        ALARMED
        + r"""
        int main(void)
        {
            int device = use_device(0);
            on_alarm(FLAGS);
            pid_t child = alarm_when_waiting(device);
            IS(set_state(device, STOP, 0), 0);
            await_child(child);
            IS(alarms, 1);
            IS(get_state(device), STOP);
            return 0;
        }
        """.replace("FLAGS", flags),
    )
    device = Slow(0.3)
    assert serve([device], [program]) == 0
    assert device.arcs == ["RUNNING-RUNNING_P2P", "RUNNING_P2P-STOP"]


def test_a_held_read_fails_with_eintr_and_loses_nothing(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        ALARMED
        + r"""
        int main(void)
        {
            char bytes[100], one = 1;
            int device = use_device(0), fd = data_fd(device, STOP_COPY);
            IS(read(fd, bytes, 100), 100);
            on_alarm(0);
            pid_t child = alarm_when_waiting(device);
            FAILS(read(fd, bytes, 100), EINTR);
            await_child(child);
            IS(alarms, 1);
            IS(pwrite(device, &one, 1, BAR0), 1);
            IS(read(fd, bytes, 100), 100);
            CHECK(bytes[0] == 'b' && bytes[99] == 'b');
            return 0;
        }
        """,
    )
    assert serve([Gated()], [program]) == 0


@pytest.mark.parametrize("threads", [0, 2])
def test_a_held_read_is_restarted_if_the_handler_was_installed_so(
    threads: int, tmp_path: Path
) -> None:
    """In a process of one thread; the signal of several is the process's, or one thread's own."""
    program = build(
        tmp_path,
        ALARMED
        + r"""
        static int device;
        static pthread_t reader;
        static volatile int *heard;
        static void *open_the_gate(void *parent)
        {
            char one = 1;
            await_waiting(device);
            if (THREADS)
                pthread_kill(reader, SIGALRM);
            else
                kill((pid_t)(long)parent, SIGALRM);
            while (!*heard)
                nap(0.001);
            IS(pwrite(device, &one, 1, BAR0), 1);
            return 0;
        }
        static void ring_and_tell(int number) { ring(number); *heard = 1; }
        int main(void)
        {
            char bytes[100];
            device = use_device(0);
            int fd = data_fd(device, STOP_COPY);
            IS(read(fd, bytes, 100), 100);
            reader = pthread_self();
            heard = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
            struct sigaction action = { .sa_handler = ring_and_tell, .sa_flags = SA_RESTART };
            CHECK(!sigaction(SIGALRM, &action, 0));
            pthread_t thread;
            void *self = (void *)(long)getpid();
            if (THREADS)
                pthread_create(&thread, 0, open_the_gate, 0);
            else if (!fork()) {
                open_the_gate(self);
                _exit(0);
            }
            IS(read(fd, bytes, 100), 100);
            IS(alarms, 1);
            CHECK(bytes[0] == 'b');
            return 0;
        }
        """.replace("THREADS", str(threads)),
    )
    assert serve([Gated()], [program]) == 0


def test_a_held_read_does_not_keep_a_program_from_stopping_or_dumping_core(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            char bytes[100], one = 1;
            int device = use_device(0), fd = data_fd(device, STOP_COPY), status;
            IS(read(fd, bytes, 100), 100);
            pid_t child = fork();
            if (!child) {
                IS(read(fd, bytes, 100), 100);
                read(fd, bytes, 100);
                _exit(9);
            }
            nap(0.1);
            kill(child, SIGSTOP);
            CHECK(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status));
            kill(child, SIGCONT);
            nap(0.1);
            IS(pwrite(device, &one, 1, BAR0), 1);  /* the read went on after all that */
            nap(0.2);
            kill(child, SIGQUIT);
            CHECK(waitpid(child, &status, 0) == child);
            CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGQUIT);
            return 0;
        }
        """,
    )
    assert serve([Gated()], [program]) == 0


def test_a_held_write_gives_way_to_a_signal(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        ALARMED
        + r"""
        int main(void)
        {
            char bytes[200] = { 0 }, one = 1;
            int device = use_device(0), fd = data_fd(device, RESUMING);
            IS(write(fd, bytes, 50), 50);
            on_alarm(0);
            pid_t child = alarm_when_waiting(device);
            ssize_t n = write(fd, bytes, 150);  /* the device takes 50 of it, then waits */
            await_child(child);
            IS(alarms, 1);
            IS(n, 50);
            IS(pwrite(device, &one, 1, BAR0), 1);
            IS(write(fd, bytes, 100), 100);
            IS(set_state(device, STOP, 0), 0);
            return 0;
        }
        """,
    )
    assert serve([Gated()], [program]) == 0


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 3", 3), ("kill -TERM $$", 143), ("kill -SEGV $$", 139)],
)
def test_exit_codes_are_the_programs(script: str, code: int) -> None:
    assert serve([Plain(4096)], ["sh", "-c", script]) == code


def run_command(*arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=ENVIRONMENT,
        input=data,
        capture_output=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--device", "counter", "--", "/nonexistent"], 127, b"not found"),
        (["--device", "counter", "--", "/etc/passwd"], 126, b"not executable"),
        (["--device", "counter", "--", "sh", "-c", "exit 2"], 2, b""),
        (["--device", "no-such-model", "--", "true"], 2, b"no-such-model"),
        (["--device", "counter"], 2, b"name a program"),
        (["--device", "counter", "--trace", "/nonexistent/x", "--", "true"], 2, b"/nonexistent/x"),
    ],
)
def test_exit_codes_of_the_command(arguments: list[str], code: int, says: bytes) -> None:
    done = run_command(*arguments)
    assert (done.returncode, done.stdout) == (code, b"")
    assert says in done.stderr
    assert done.stderr.count(b"\n") == (1 if says else 0)


def test_a_door_that_cannot_be_opened_is_125() -> None:
    nested = [*COMMAND, "--device", "counter", "--", "true"]
    done = run_command("--device", "counter", "--", *nested)
    assert done.returncode == 125
    assert b"seccomp listener" in done.stderr


def test_input_and_output_are_the_programs_alone() -> None:
    script = "cat; echo to stderr >&2; exit 5"
    done = run_command("--device", "counter", "--", "sh", "-c", script, data=b"\0line\n\xff")
    assert (done.returncode, done.stdout, done.stderr) == (5, b"\0line\n\xff", b"to stderr\n")


def test_termination_is_passed_on() -> None:
    script = "trap 'echo told; exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(
        [*COMMAND, "--device", "counter", "--", "sh", "-c", script],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
    ) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"ready\n"
        command.terminate()
        assert command.stdout.read() == b"told\n"
        assert command.wait(10) == 9


def read_until(terminal: int, text: bytes) -> bytes:
    seen = b""
    deadline = time.monotonic() + 20
    while text not in seen:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], seen
        seen += os.read(terminal, 1000)
    return seen


EARLY = """
import signal
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.doors.syscall.door import Door
from vfiomig.doors.syscall.run import run
from vfiomig.models import make

start = Door.start

def start_and_interrupt(self, listener):
    start(self, listener)
    signal.raise_signal(signal.SIGINT)

Door.start = start_and_interrupt
raise SystemExit(run([VfioDevice(make("counter"), "vfio0")], ["sh", "-c", "exit 4"]))
"""


def test_ctrl_c_as_soon_as_the_program_runs_does_not_end_its_supervisor() -> None:
    command = [sys.executable, "-c", EARLY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (4, "")


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("trap 'echo caught; exit 4' INT; echo ready; while :; do sleep 0.05; done", 4),
        ("echo ready; exec sleep 20", 128 + signal.SIGINT),
    ],
)
def test_ctrl_c_reaches_the_program_which_decides(script: str, code: int) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        command = [*COMMAND, "--device", "counter", "--", "sh", "-c", script]
        os.execve(command[0], command, ENVIRONMENT)
    try:
        read_until(terminal, b"ready")
        os.write(terminal, b"\x03")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    finally:
        os.close(terminal)
