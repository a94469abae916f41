"""The serving process: what kills it, what it leaves, and that it does not grow."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import door_programs
from door_programs import ENVIRONMENT, SOURCE, Plain, build, serve
from in_process import wait_until
from supervise import state_of
from vfiomig.abi.ioctls import Dialect
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.doors.syscall.door import Door
from vfiomig.doors.syscall.notify import Listener
from vfiomig.errors import DoorError

if TYPE_CHECKING:
    from vfiomig.doors.syscall.notify import Notification

TESTS = Path(door_programs.__file__).parent

SUPERVISOR = f"""
import sys
sys.path[:0] = [{str(SOURCE)!r}, {str(TESTS)!r}]
import tempfile
tempfile.tempdir = sys.argv[1]
from door_programs import Plain, serve
sys.exit(serve([Plain()], sys.argv[2:]))
"""


def test_a_killed_supervisor_takes_the_program_along_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            char bytes[10];
            int fd = data_fd(use_device(0), STOP_COPY);
            IS(read(fd, bytes, 10), 10);
            printf("%d\n", getpid());
            fflush(stdout);
            for (;;)
                IS(get_state(use_device(0)), STOP_COPY);
        }
        """.replace("IS(get_state(use_device(0)), STOP_COPY);", "pause();"),
    )
    command = [sys.executable, "-c", SUPERVISOR, str(folder), program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        assert state_of(pid) in {"R", "S"}
        supervisor.kill()
        supervisor.wait()
    wait_until(lambda: state_of(pid) in {"gone", "Z"})
    assert list(folder.iterdir()) == []


def test_running_twice_leaves_no_descriptor_thread_or_entry(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            char bytes[10];
            int device = use_device(0), fd = data_fd(device, STOP_COPY);
            IS(read(fd, bytes, 10), 10);
            open("/dev/vfio/devices", O_RDONLY | O_DIRECTORY);
            data_fd(use_device(1), RESUMING);
            return 0;  /* all that is open goes with the program */
        }
        """,
    )
    devices = [VfioDevice(Plain(), f"vfio{n}", dialect=Dialect.LANDED) for n in range(2)]
    before = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    for _ in range(2):
        assert serve(devices, [program]) == 0
        assert [device.users for device in devices] == [0, 0]
        assert (set(os.listdir("/proc/self/fd")), set(threading.enumerate())) == before


def test_thousands_of_sessions_do_not_grow_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half way and at the end the program makes a request, at which the door is measured."""
    sizes = []

    class Measured(Door):
        def _answer(self, call: Notification, turn: object) -> None:
            if call.nr == 16 and call.args[1] == 0x3BFE:
                gc.collect()
                sizes.append(
                    (
                        len(self.table),
                        len(self._memfds),
                        len(self._held),
                        len(os.listdir("/proc/self/fd")),
                        threading.active_count(),
                    )
                )
            super()._answer(call, turn)  # type: ignore[arg-type]  # a Turn

    monkeypatch.setattr("vfiomig.doors.syscall.run.Door", Measured)
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            char bytes[10];
            int device = use_device(0), kept = -1;
            for (int i = 0; i < 2000; i++) {
                int fd = data_fd(device, i % 2 ? STOP_COPY : RESUMING);
                if (i % 2)
                    IS(read(fd, bytes, 10), 10);
                if (i % 100 == 99) {  /* an old one stays open: it is still known */
                    close(kept);
                    kept = dup(fd);
                }
                if (i % 3 == 0)
                    close(fd);
                IS(ioctl(device, 0x3B6F, 0), 0);
                if (i % 3)
                    close(fd);
                if (kept >= 0)
                    FAILS(read(kept, bytes, 10), ENODEV);
                if (i % 10 == 0) {
                    close(use_device(1));
                    close(open("/dev/iommu", O_RDWR));
                }
                if (i % 1000 == 500) {
                    nap(0.1);
                    ioctl(device, 0x3BFE, 0);
                }
            }
            return 0;
        }
        """,
    )
    assert serve([Plain(4096), Plain(4096)], [program]) == 0
    half, end = sizes
    # A thousand sessions lie between them; a few of the last may not be quite over.
    assert all(last <= first + 5 for first, last in zip(half, end, strict=True)), sizes
    assert end[0] <= 10


def test_a_receiver_that_fails_is_told_and_ends_the_service(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    receive = Listener.receive
    left = [20]

    def fail(listener: Listener) -> Notification | None:
        left[0] -= 1
        if not left[0]:
            raise ZeroDivisionError
        return receive(listener)

    monkeypatch.setattr(Listener, "receive", fail)
    with pytest.raises(DoorError, match="ZeroDivisionError"):
        serve([Plain(4096)], ["sh", "-c", "while cat /dev/null; do :; done; exit 3"])
    assert "receiving failed" in caplog.text


#: Root may look into everybody, but for this capability.
UNPRIVILEGED = f"""
import ctypes, os, struct, sys
sys.path[:0] = [{str(SOURCE)!r}, {str(TESTS)!r}]
from door_programs import Plain, serve
CAPGET, CAPSET, CAP_SYS_PTRACE = 125, 126, 19
header, sets = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
assert ctypes.CDLL(None).syscall(CAPGET, header, sets) == 0
words = [word & ~(1 << CAP_SYS_PTRACE) for word in struct.unpack("6I", sets.raw)[:3]]
kept = struct.pack("6I", *words, *struct.unpack("6I", sets.raw)[3:])
assert ctypes.CDLL(None).syscall(CAPSET, header, kept) == 0
sys.exit(serve([Plain()], sys.argv[1:]))
"""


def test_a_program_that_is_not_dumpable_is_named_once_and_goes_on_without_us(
    tmp_path: Path,
) -> None:
    program = build(
        tmp_path,
        r"""
        #include <sys/prctl.h>
        int main(void)
        {
            int device = use_device(0), null = open("/dev/null", O_RDWR);
            prctl(PR_SET_DUMPABLE, 0);
            for (int i = 0; i < 3; i++) {
                close(open("/dev/null", O_RDONLY));
                IS(write(null, "x", 1), 1);
            }
            CHECK(get_state(device) < 0);
            return 6;
        }
        """,
    )
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, program],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 6, done.stderr
    assert done.stderr.count("cannot be reached") == 1


def test_a_program_that_takes_the_descriptors_of_the_door_is_told_emfile_and_goes_on(
    tmp_path: Path,
) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            struct rlimit limit;
            int device = use_device(0), opened = 0, fds[1000];
            getrlimit(RLIMIT_NOFILE, &limit);
            limit.rlim_cur = limit.rlim_max;
            CHECK(!setrlimit(RLIMIT_NOFILE, &limit));
            while ((fds[opened] = open("/dev/iommu", O_RDWR)) >= 0)
                opened++;
            IS(errno, EMFILE);
            CHECK(opened > 10);
            IS(get_state(device), RUNNING);
            while (opened)
                close(fds[--opened]);
            IS(get_state(device), RUNNING);
            CHECK(open("/dev/iommu", O_RDWR) >= 0);
            return 7;
        }
        """,
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, hard))
    try:
        assert serve([Plain(4096)], [program]) == 7
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
