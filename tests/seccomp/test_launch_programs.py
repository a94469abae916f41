"""Real programs: how they start, what they inherit, how they end."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import supervise
from supervise import Served, compile_c, run_served
from vfiomig.abi.seccomp import (
    PR_GET_CHILD_SUBREAPER,
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_USER_NOTIF,
)
from vfiomig.doors.syscall.bpf import NUMBER, Assembler
from vfiomig.doors.syscall.filter import exact_filter
from vfiomig.doors.syscall.launch import LaunchError, launch
from vfiomig.doors.syscall.program import relaying_signals

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).parents[2] / "src"
SENDMSG = 46


def status_of(pid: int | str, name: str) -> str:
    """The line NAME of /proc/PID/status; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return ""
    return dict(line.split(":\t", 1) for line in text.splitlines())[name]


def wait_until(condition: object, what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]  # a callable
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -KILL $$", 128 + 9),
        ("kill -TERM $$", 128 + 15),
        ("kill -SEGV $$", 128 + 11),
    ],
)
def test_exit_codes_are_a_shells(script: str, code: int) -> None:
    assert run_served(["sh", "-c", script]).code == code


def script(folder: Path, text: str, mode: int = 0o755) -> str:
    file = folder / "tool"
    file.write_text(text, encoding="ascii")
    file.chmod(mode)
    return str(file)


@pytest.mark.parametrize(
    ("text", "mode", "code"),
    [
        ("#!/bin/sh\nexit 0\n", 0o644, 126),
        ("no program at all\n", 0o755, 126),
        ("#!/nonexistent/interpreter\n", 0o755, 126),
    ],
)
def test_files_that_cannot_be_executed_are_126(
    tmp_path: Path, text: str, mode: int, code: int
) -> None:
    with pytest.raises(LaunchError) as failure:
        launch([script(tmp_path, text, mode)], {}, exact_filter())
    assert failure.value.exit_code == code


@pytest.mark.parametrize(
    ("name", "code"),
    [("/nonexistent", 127), ("no-such-tool", 127), ("", 127), ("/dev/null/x", 127), ("/tmp", 126)],
)
def test_names_that_lead_to_no_program(name: str, code: int) -> None:
    with pytest.raises(LaunchError) as failure:
        launch([name], {"PATH": "/usr/bin:/bin"}, exact_filter())
    assert failure.value.exit_code == code


def test_the_path_of_the_programs_environment_is_searched(tmp_path: Path) -> None:
    script(tmp_path, "#!/bin/sh\necho found, $0\n")
    unusable = tmp_path / "unusable"
    unusable.mkdir()
    script(unusable, "", 0o644)
    path = f"/nonexistent:/dev/null:{unusable}:{tmp_path}"
    assert run_served(["tool"], env={"PATH": path}).output == f"found, {tmp_path}/tool\n"
    with pytest.raises(LaunchError) as failure:
        launch(["tool"], {"PATH": str(unusable)}, exact_filter())
    assert failure.value.exit_code == 126


def test_arguments_and_environment_arrive_byte_for_byte(tmp_path: Path) -> None:
    binary = compile_c(
        r"""
        #include <stdio.h>
        extern char **environ;
        int main(int argc, char **argv)
        {
            for (int i = 1; i < argc; i++)
                printf("<%s>", argv[i]);
            for (char **one = environ; *one; one++)
                printf("[%s]", *one);
            return 0;
        }
        """,
        tmp_path,
    )
    arguments = ["", "two words", "{dev0}", "ä\udcff", "-x"]
    outcome = Served([binary, *arguments], env={"A": "1", "Ü": "=\n"})
    os.set_blocking(outcome._reader, True)
    assert outcome.program.wait(time.monotonic() + 10) == 0
    raw = os.read(outcome._reader, 4096)
    outcome.finish()
    assert raw == b"<><two words><{dev0}><" + "ä".encode() + b"\xff><-x>[A=1][" + b"\xc3\x9c==\n]"


@pytest.fixture
def blocked_and_ignored() -> Iterator[None]:
    """This process blocks SIGUSR1 and ignores SIGHUP, as a caller may have wished."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("blocked_and_ignored")
def test_signals_are_the_callers_not_the_interpreters() -> None:
    own = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    outcome = run_served(["cat", "/proc/self/status"])
    lines = dict(line.split(":\t", 1) for line in outcome.output.splitlines())
    assert int(lines["SigBlk"], 16) == sum(1 << number - 1 for number in own)
    # Python ignores SIGPIPE and SIGXFSZ for itself and handles SIGINT. Whatever started this
    # process may have had it ignore others.
    status = Path("/proc/self/status").read_text()
    ignored_here = int(status.partition("SigIgn:")[2].split()[0], 16)
    pythons = {signal.SIGPIPE, signal.SIGXFSZ}
    assert int(lines["SigIgn"], 16) == ignored_here & ~sum(1 << n - 1 for n in pythons)
    assert int(lines["SigIgn"], 16) & 1 << signal.SIGHUP - 1
    assert int(lines["SigCgt"], 16) == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == own


def test_only_the_named_descriptors_are_inherited(tmp_path: Path) -> None:
    kept, other = os.open(tmp_path, os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)
    show = ["sh", "-c", "cd /proc/$$/fd && echo *"]
    try:
        without = subprocess.run(show, stdout=subprocess.PIPE, close_fds=False, check=True).stdout
        outcome = run_served(show, keep_open=[kept])
        assert os.get_inheritable(kept) is False
    finally:
        os.close(kept)
        os.close(other)
    # What this process was given by its own caller passes through as well.
    assert set(map(int, outcome.output.split())) == {*map(int, without.split()), kept}


def test_the_program_has_no_new_privileges_and_one_filter() -> None:
    outcome = run_served(["grep", "-E", "^(NoNewPrivs|Seccomp)", "/proc/self/status"])
    assert outcome.output == "NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n"


def test_a_failing_preparation_is_told(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.EDQUOT, "")

    def odd() -> None:
        raise ValueError

    with pytest.raises(LaunchError, match=os.strerror(errno.EDQUOT)) as failure:
        launch(["true"], {"PATH": os.defpath}, exact_filter(), prepare=full)
    assert failure.value.exit_code == 125
    with pytest.raises(LaunchError, match="preparation"):
        launch(["true"], {"PATH": os.defpath}, exact_filter(), prepare=odd)


def test_a_child_that_dies_early_is_told() -> None:
    with pytest.raises(LaunchError, match="died before its filter"):
        launch(["true"], {}, exact_filter(), prepare=lambda: os._exit(3))


def filter_that_stops(number: int) -> bytes:
    code = Assembler()
    code.load(NUMBER)
    code.if_equal(number, then="stop")
    code.ret(SECCOMP_RET_ALLOW)
    code.label("stop")
    code.ret(SECCOMP_RET_USER_NOTIF)
    return code.assemble()


def test_a_filter_that_stops_the_hand_over_is_no_deadlock() -> None:
    started = time.monotonic()
    with pytest.raises(LaunchError, match="sendmsg"):
        launch(["true"], {"PATH": os.defpath}, filter_that_stops(SENDMSG), timeout=0.3)
    assert time.monotonic() - started >= 0.3


def test_no_call_between_filter_and_exec_is_one_that_a_filter_may_stop() -> None:
    """All but the three calls of the hand-over stop: the exec is reached nevertheless."""
    code = Assembler()
    code.load(NUMBER)
    for number in (SENDMSG, 14, 59):  # sendmsg, rt_sigprocmask, execve
        code.if_equal(number, then="pass")
    code.ret(SECCOMP_RET_USER_NOTIF)
    code.label("pass")
    code.ret(SECCOMP_RET_ALLOW)
    outcome = run_served(["sh", "-c", "echo every call was served"], program=code.assemble())
    assert outcome.output == "every call was served\n"


def test_a_broken_filter_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="refuses the seccomp filter"):
        launch(["true"], {"PATH": os.defpath}, b"\xff" * 8)


NESTED = f"""
import os, sys
sys.path.insert(0, {str(SOURCE)!r})
from vfiomig.doors.syscall.filter import exact_filter
from vfiomig.doors.syscall.launch import LaunchError, launch
try:
    launch(["true"], dict(os.environ), exact_filter())
except LaunchError as error:
    print(error.exit_code, error)
"""


def test_a_second_listener_is_refused_with_its_cause() -> None:
    outcome = run_served([sys.executable, "-c", NESTED])
    assert outcome.output.startswith("125 this process itself runs under a seccomp listener")


SUPERVISOR = f"""
import os, sys, threading, time
sys.path[:0] = [{str(SOURCE)!r}, {str(Path(supervise.__file__).parent)!r}]
from supervise import Served
served = Served(["sh", "-c", "echo ready; while :; do :; done"])
assert os.read(served._reader, 6) == b"ready\\n"
print(served.program.pid, flush=True)
time.sleep(60)
"""


def test_the_program_does_not_outlive_a_killed_supervisor() -> None:
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        assert status_of(pid, "State")[:1] == "R"
        supervisor.kill()
    wait_until(lambda: status_of(pid, "State")[:1] in {"", "Z"}, "the program still runs")


def test_launching_beside_busy_threads_does_not_hang() -> None:
    """Threads that hold the allocator's, the logger's and the import lock at the time of fork."""
    stop = threading.Event()

    def be_busy() -> None:
        import importlib
        import logging

        log = logging.getLogger("busy")
        log.addHandler(logging.NullHandler())
        while not stop.is_set():
            importlib.import_module("json")
            log.warning("%s", [bytearray(5000) for _ in range(50)])

    busy = [threading.Thread(target=be_busy) for _ in range(3)]
    for thread in busy:
        thread.start()
    try:
        assert [run_served(["true"]).code for _ in range(15)] == [0] * 15
    finally:
        stop.set()
        for thread in busy:
            thread.join()


def test_descendants_are_served_after_the_programs_end_and_collected() -> None:
    script = "(sleep 0.3; cat /proc/self/comm; exit 3) & exit 5"
    served = Served(["sh", "-c", script])
    assert served.program.wait(time.monotonic() + 10) == 5
    assert served.finish().output == "cat\n"
    # The subshell was left to this process: nothing of it is there any more.
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def inherits_orphans() -> bool:
    answer = ctypes.c_int()
    assert not ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0)
    return bool(answer.value)


def test_a_process_that_has_served_programs_inherits_no_orphans_of_others_afterwards() -> None:
    assert not inherits_orphans()
    first, second = Served(["true"]), Served(["true"])
    first.finish()
    assert inherits_orphans()
    second.finish()
    assert not inherits_orphans()
    with pytest.raises(LaunchError):
        launch(["/nowhere"], {}, exact_filter())
    assert not inherits_orphans()
    # The child of a child that ends first: it is init's, or whoever has taken this process in.
    subprocess.run(["sh", "-c", "sleep 0.1 &"], check=True)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_other_children_of_this_process_are_left_to_their_owners() -> None:
    other = subprocess.Popen(["sh", "-c", "exit 42"])
    wait_until(lambda: status_of(other.pid, "State").startswith("Z"), "it did not end")
    served = Served(["true"])
    second = Served(["sh", "-c", "exit 9"])
    assert served.finish().code == 0
    assert served.program.reap_orphans() == 0
    assert second.finish().code == 9
    assert other.wait(10) == 42


def test_waiting_ends_at_its_deadline_and_the_program_goes_on(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    served = Served(["cat", str(fifo)])
    with pytest.raises(TimeoutError, match=str(served.program.pid)):
        served.program.wait(time.monotonic() + 0.05)
    os.close(os.open(fifo, os.O_WRONLY))
    assert served.finish().code == 0
    assert served.program.wait() == 0


def test_closing_ends_a_program_that_still_runs() -> None:
    served = Served(["sleep", "60"])
    served.program.close()
    assert served.program.exit_code == 128 + signal.SIGKILL
    served.finish()


def test_a_signal_to_an_ended_program_is_no_error() -> None:
    served = Served(["true"])
    served.program.wait(time.monotonic() + 10)
    assert served.program.send_signal(signal.SIGTERM) is False
    served.finish()


def test_termination_is_passed_on_and_the_terminals_signals_are_not() -> None:
    trap = "trap 'echo hangup' HUP; trap 'exit 33' TERM; echo ready; while :; do sleep 0.05; done"
    served = Served(["sh", "-c", trap])
    handlers = [signal.getsignal(number) for number in range(1, 16)]
    with relaying_signals(served.program):
        assert os.read(served._reader, 6) == b"ready\n"
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert os.read(served._reader, 7) == b"hangup\n"
        os.kill(os.getpid(), signal.SIGTERM)
        assert served.program.wait(time.monotonic() + 10) == 33
    assert [signal.getsignal(number) for number in range(1, 16)] == handlers
    served.finish()


@pytest.mark.usefixtures("blocked_and_ignored")
def test_an_ignored_signal_stays_ignored_while_the_program_runs() -> None:
    served = Served(["sleep", "0.2"])
    with relaying_signals(served.program):
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
        assert served.finish().code == 0


def test_two_programs_are_served_side_by_side() -> None:
    first, second = (Served(["sh", "-c", f"sleep 0.1; echo {name}"]) for name in "ab")
    assert second.finish().output == "b\n"
    assert first.finish().output == "a\n"


def test_the_program_is_killed_when_the_thread_that_launched_it_ends() -> None:
    """The kernel counts the thread as the parent: it must outlive the program."""
    launched: list[Served] = []
    thread = threading.Thread(target=lambda: launched.append(Served(["sleep", "60"])))
    thread.start()
    thread.join()
    assert launched[0].finish().code == 128 + signal.SIGKILL
