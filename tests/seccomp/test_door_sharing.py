"""One device, many users: threads, children, copies of descriptors, and sudden ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from door_programs import Gated, Plain, Slow, build, serve, served
from in_process import wait_until
from supervise import state_of
from vfiomig import Region
from vfiomig.fsm import State

if TYPE_CHECKING:
    from pathlib import Path


def test_threads_at_once_never_get_a_wrong_answer(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        static int device, other;
        static void *ask(void *nothing)
        {
            for (int i = 0; i < 4000; i++) {
                int state = get_state(device);
                CHECK(state == STOP || state == STOP_COPY);
                IS(get_state(other), RUNNING);
                uint64_t mine = (uintptr_t)&mine, back = 0;
                if (i % 16 == 0) {
                    off_t at = BAR0 + 8 * (gettid() % 500);
                    IS(pwrite(other, &mine, 8, at), 8);
                    IS(pread(other, &back, 8, at), 8);
                    CHECK(mine == back);
                }
            }
            return nothing;
        }
        int main(void)
        {
            device = use_device(0), other = use_device(1);
            IS(set_state(device, STOP, 0), 0);
            pthread_t threads[4];
            for (int i = 0; i < 4; i++)
                pthread_create(&threads[i], 0, ask, 0);
            for (int i = 0; i < 300; i++) {
                int fd = data_fd(device, STOP_COPY);
                unsigned char bytes[1000];
                IS(read(fd, bytes, 1000), 1000);
                for (int k = 0; k < 1000; k++)
                    CHECK(bytes[k] == k % 256);
                IS(set_state(device, STOP, 0), 0);
                FAILS(read(fd, bytes, 1), ENODEV);
                close(fd);
            }
            for (int i = 0; i < 4; i++)
                pthread_join(threads[i], 0);
            return 0;
        }
        """,
    )
    assert serve([Plain(), Plain()], [program]) == 0


def test_threads_read_one_stream_without_losing_or_doubling_a_byte(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        enum { SIZE = 1 << 20 };
        static unsigned char seen[256];
        static unsigned long total, counts[256];
        static int fd;
        static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
        static void *drink(void *nothing)
        {
            unsigned char bytes[777];
            ssize_t n;
            while ((n = read(fd, bytes, sizeof bytes)) > 0) {
                pthread_mutex_lock(&lock);
                for (ssize_t i = 0; i < n; i++)
                    counts[bytes[i]]++;
                total += n;
                pthread_mutex_unlock(&lock);
            }
            IS(n, 0);
            return nothing;
        }
        int main(void)
        {
            (void)seen;
            fd = data_fd(use_device(0), STOP_COPY);
            pthread_t threads[4];
            for (int i = 0; i < 4; i++)
                pthread_create(&threads[i], 0, drink, 0);
            for (int i = 0; i < 4; i++)
                pthread_join(threads[i], 0);
            IS(total, SIZE);
            for (int i = 0; i < 256; i++)
                IS(counts[i], SIZE / 256);
            return 0;
        }
        """,
    )
    assert serve([Plain(1 << 20)], [program]) == 0


def test_a_child_uses_the_device_and_the_last_close_is_when_both_are_gone(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            int device = use_device(0), ready[2];
            CHECK(!pipe(ready));
            IS(set_state(device, STOP, 0), 0);
            pid_t child = fork();
            if (!child) {
                char byte;
                IS(get_state(device), STOP);
                IS(read(ready[0], &byte, 1), 1);  /* the parent has closed */
                IS(get_state(device), STOP);
                int fd = data_fd(device, STOP_COPY);
                IS(read(fd, &byte, 1), 1);
                _exit(0);
            }
            close(device);
            int second = open_device(0);
            struct bind bind = { sizeof bind, 0, open("/dev/iommu", O_RDWR), 0 };
            FAILS(ioctl(second, 0x3B76, &bind), EINVAL);  /* the child's open is bound */
            IS(write(ready[1], "x", 1), 1);
            await_child(child);
            IS(ioctl(second, 0x3B76, &bind), 0);
            IS(get_state(second), RUNNING);
            return 0;
        }
        """,
    )
    assert serve([Plain()], [program]) == 0


def test_exec_keeps_what_is_not_close_on_exec_and_drops_the_rest(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(int argc, char **argv)
        {
            if (argc > 1) {
                int kept = atoi(argv[1]), dropped = atoi(argv[2]), data = atoi(argv[3]);
                IS(get_state(kept), STOP_COPY);
                FAILS(fcntl(dropped, F_GETFD), EBADF);
                FAILS(fcntl(data, F_GETFD), EBADF);  /* data_fds are close-on-exec */
                use_device(1);  /* its only open went with the exec */
                return 0;
            }
            int kept = use_device(0), dropped = use_device(1);
            CHECK(fcntl(dropped, F_GETFD) == FD_CLOEXEC);
            CHECK(!fcntl(kept, F_SETFD, 0));
            int data = data_fd(kept, STOP_COPY);
            IS(fcntl(data, F_GETFD), FD_CLOEXEC);
            char numbers[3][16];
            sprintf(numbers[0], "%d", kept);
            sprintf(numbers[1], "%d", dropped);
            sprintf(numbers[2], "%d", data);
            execl("/proc/self/exe", "again", numbers[0], numbers[1], numbers[2], (char *)0);
            return 9;
        }
        """,
    )
    assert serve([Plain(), Plain()], [program]) == 0


def test_copies_of_a_data_fd_are_one_stream(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        static unsigned char next_byte(int fd)
        {
            unsigned char byte;
            IS(read(fd, &byte, 1), 1);
            return byte;
        }
        int main(void)
        {
            int device = use_device(0), fd = data_fd(device, STOP_COPY);
            int low = dup(fd), high = fcntl(fd, F_DUPFD_CLOEXEC, 500), onto = open("/dev/null", 0);
            IS(high, 500);
            IS(dup2(fd, onto), onto);
            IS(next_byte(fd), 0);
            IS(next_byte(low), 1);
            IS(next_byte(high), 2);
            IS(next_byte(onto), 3);
            close(fd);

            int sockets[2];
            CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
            pid_t child = fork();
            if (!child) {
                close(low), close(high), close(onto), close(device);
                int taken = take_fd(sockets[1]);
                IS(next_byte(taken), 4);
                FAILS(write(taken, "x", 1), EBADF);
                _exit(0);
            }
            send_fd(sockets[0], low);
            await_child(child);
            IS(next_byte(high), 5);

            /* A program may also reach for it. */
            int alive[2];
            CHECK(!pipe(alive));
            pid_t owner = fork();
            if (!owner) {
                char byte;
                close(alive[1]);
                _exit((int)read(alive[0], &byte, 1));
            }
            close(low), close(onto);
            int pidfd = syscall(SYS_pidfd_open, owner, 0);
            int fetched = syscall(SYS_pidfd_getfd, pidfd, high, 0);
            CHECK(fetched >= 0);
            IS(next_byte(fetched), 6);
            close(alive[1]);
            await_child(owner);

            /* Something else put onto the number: ours is gone, the other is itself. */
            int zero = open("/dev/zero", O_RDONLY);
            IS(dup2(zero, high), high);
            IS(next_byte(high), 0);
            IS(next_byte(fetched), 7);
            return 0;
        }
        """,
    )
    assert serve([Plain()], [program]) == 0


def test_close_and_open_at_once_find_running(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            for (int i = 0; i < 200; i++) {
                int device = use_device(0);
                IS(get_state(device), RUNNING);
                int fd = data_fd(device, i % 2 ? STOP_COPY : RESUMING);
                close(i % 3 ? device : fd);
                close(i % 3 ? fd : device);
            }
            return 0;
        }
        """,
    )
    assert serve([Plain(4096)], [program]) == 0


def test_opening_through_proc_is_another_open(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            int device = use_device(0);
            char path[64], link[64] = { 0 };
            sprintf(path, "/proc/self/fd/%d", device);
            int again = open(path, O_RDWR);
            CHECK(again >= 0);
            uint32_t probe[2] = { 8, 1 | 0x40000 };
            FAILS(ioctl(again, FEATURE, probe), EINVAL);  /* it is not bound */
            close(again);
            IS(get_state(device), RUNNING);
            CHECK(readlink(path, link, sizeof link) > 0);
            CHECK(!strcmp(link, "/dev/vfio/devices/vfio0"));
            sprintf(path, "/proc/%d/fd/%d", getpid(), data_fd(device, STOP_COPY));
            FAILS(open(path, O_RDONLY), ENXIO);
            return 0;
        }
        """,
    )
    assert serve([Plain(4096)], [program]) == 0


class Killer:
    """A hook's way to be under way when the program is killed that has written its number."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def kill(self) -> None:
        if self.file.exists():
            pid = int(self.file.read_text())
            self.file.unlink()
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: state_of(pid) in {"gone", "Z"})


#: To be killed, a program is given the name of the file that a ``Killer`` knows.
KILLED = r"""
    static void may_be_killed(int argc, char **argv)
    {
        if (argc > 1) {
            FILE *file = fopen(argv[1], "w");
            CHECK(file && fprintf(file, "%d", getpid()) > 0 && !fclose(file));
        }
    }
"""


def serve_killed_and_again(device: Plain | Gated, folder: Path, body: str) -> None:
    """Run a program that is killed, and then once more as it is."""
    program, file = build(folder, KILLED + body), folder / "pid"
    script = f"{program} {file}; test $? = {128 + signal.SIGKILL} && {program}"
    assert serve([device], ["sh", "-c", script]) == 0


def test_a_program_killed_in_the_middle_of_an_arc_leaves_a_usable_device(tmp_path: Path) -> None:
    killer = Killer(tmp_path / "pid")
    arcs: list[str] = []

    class Killing(Plain):
        def step(self, origin: State, target: State) -> None:
            arcs.append(f"{origin.name}-{target.name}")
            if target is State.STOP:
                killer.kill()

    serve_killed_and_again(
        Killing(4096),
        tmp_path,
        r"""
        int main(int argc, char **argv)
        {
            int device = use_device(0);
            IS(get_state(device), RUNNING);
            may_be_killed(argc, argv);
            set_state(device, argc > 1 ? STOP : RUNNING_P2P, 0);
            return 0;
        }
        """,
    )
    assert arcs == ["RUNNING-RUNNING_P2P", "RUNNING_P2P-STOP", "RUNNING-RUNNING_P2P"]


def test_a_program_killed_while_it_binds_leaves_a_usable_device(tmp_path: Path) -> None:
    killer = Killer(tmp_path / "pid")

    class Killing(Plain):
        def start(self) -> None:
            killer.kill()

    serve_killed_and_again(
        Killing(4096),
        tmp_path,
        r"""
        int main(int argc, char **argv)
        {
            may_be_killed(argc, argv);
            IS(get_state(use_device(0)), RUNNING);
            return 0;
        }
        """,
    )


def test_a_program_killed_in_a_held_read_leaves_a_usable_device(tmp_path: Path) -> None:
    killer = Killer(tmp_path / "pid")

    class Killing(Gated):
        def wait(self) -> bool:
            killer.kill()
            return super().wait()

    device = Killing()
    serve_killed_and_again(
        device,
        tmp_path,
        r"""
        int main(int argc, char **argv)
        {
            char bytes[300];
            int device = use_device(0);
            IS(get_state(device), RUNNING);
            int fd = data_fd(device, STOP_COPY);
            IS(read(fd, bytes, 100), 100);
            may_be_killed(argc, argv);
            if (argc > 1)
                read(fd, bytes, 100);
            return 0;
        }
        """,
    )
    assert device.resets == 2


def test_a_program_may_exit_while_an_arc_runs(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        static int device;
        static void *stop(void *nothing) { set_state(device, STOP, 0); return nothing; }
        int main(void)
        {
            pthread_t thread;
            device = use_device(0);
            pthread_create(&thread, 0, stop, 0);
            await_waiting(device);
            return 7;
        }
        """,
    )
    device = Slow(0.5)
    named = served(device)
    assert serve(named, [program]) == 7
    assert device.arcs == ["RUNNING-RUNNING_P2P", "RUNNING_P2P-STOP"]
    assert not device.under_way
    assert named[0].migration.state() is State.RUNNING


def test_other_devices_are_served_while_one_closes(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            int slow = use_device(0), quick = use_device(1);
            IS(set_state(slow, STOP, 0), 0);
            close(slow);  /* its reset takes until the other one is told, and a while longer */
            for (int i = 0; i < 100; i++)
                IS(get_state(quick), RUNNING);
            IS(pwrite(quick, "", 1, BAR0), 1);
            slow = use_device(0);
            IS(get_state(slow), RUNNING);
            return 0;
        }
        """,
    )
    told = threading.Event()
    log: list[str] = []

    class SlowReset(Plain):
        def start(self) -> None:
            log.append("start")

        def reset(self) -> None:
            log.append("reset begins" if told.wait(20) else "the other was not served")
            time.sleep(0.2)
            log.append("reset ends")

    class Quick(Plain):
        bar0 = Region(size=4096)

        @bar0.writer
        def write_bar0(self, offset: int, data: bytes) -> None:
            told.set()

    assert serve([SlowReset(4096), Quick(4096)], [program]) == 0
    assert log[:4] == ["start", "reset begins", "reset ends", "start"]


@pytest.mark.parametrize("filter_name", ["exact", "fast"])
def test_the_same_program_runs_under_both_filters(filter_name: str, tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            static char bytes[1 << 16];
            int source = use_device(0), target = use_device(1);
            int in = data_fd(source, STOP_COPY), out = data_fd(target, RESUMING);
            ssize_t n;
            while ((n = read(in, bytes, sizeof bytes)) > 0)
                IS(write(out, bytes, n), n);
            IS(n, 0);
            IS(set_state(target, RUNNING, 0), 0);
            IS(set_state(source, RUNNING, 0), 0);
            return 0;
        }
        """,
    )
    source, target = Plain(300_000), Plain(300_000)
    target.memory[:] = bytes(300_000)
    assert serve([source, target], [program], filter_name=filter_name) == 0  # type: ignore[arg-type]
    assert source.memory == target.memory
