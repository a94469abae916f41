"""--trace: one line per request, before the program goes on, for people or as JSON."""

from __future__ import annotations

import io
import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import door_programs
from door_programs import COMMAND, ENVIRONMENT, SOURCE, Gated, Plain, build, serve, served
from vfiomig import DeviceError, State
from vfiomig.doors.syscall.trace import Trace
from vfiomig.doors.tracing import open_trace

if TYPE_CHECKING:
    import pytest

TRACED = r"""
    int main(void)
    {
        char bytes[100];
        int device = use_device(0), fd = data_fd(device, STOP_COPY);
        IS(get_state(device), STOP_COPY);
        IS(read(fd, bytes, 100), 100);
        FAILS(write(fd, bytes, 10), EBADF);
        FAILS(open("/dev/vfio/devices/vfio5", O_RDWR), ENOENT);
        IS(pwrite(device, bytes, 8, BAR0 + 16), 8);
        IS(set_state(device, ERROR, 0), -EINVAL);
        FAILS(ioctl(device, FEATURE, 8), EFAULT);
        FAILS(ioctl(device, 0x3BFF, 0), ENOTTY);
        FAILS(lseek(fd, 0, SEEK_SET), ESPIPE);
        IS(ioctl(device, 0x3B6F, 0), 0);
        FAILS(read(fd, bytes, 100), ENODEV);
        close(open("/dev/null", O_RDONLY));  /* none of ours */
        return 0;
    }
"""

#: What it is made on, what it asks, result, errno, arcs.
EXPECTED = [
    ("/dev/vfio/devices/vfio0", "openat", 4, None, []),
    ("vfio0", "VFIO_DEVICE_BIND_IOMMUFD()", 0, None, []),
    (
        "vfio0",
        "VFIO_DEVICE_FEATURE(SET MIG_DEVICE_STATE STOP_COPY)",
        0,
        None,
        ["RUNNING -> RUNNING_P2P", "RUNNING_P2P -> STOP", "STOP -> STOP_COPY"],
    ),
    ("vfio0", "VFIO_DEVICE_FEATURE(GET MIG_DEVICE_STATE)", 0, None, []),
    ("vfio0:saving", "read(100)", 100, None, []),
    ("vfio0:saving", "write(10)", -1, "EBADF", []),
    ("/dev/vfio/devices/vfio5", "openat", -1, "ENOENT", []),
    ("vfio0", "pwrite64(8, 0x5600000000000010)", 8, None, []),
    ("vfio0", "VFIO_DEVICE_FEATURE(SET MIG_DEVICE_STATE ERROR)", -1, "EINVAL", []),
    ("vfio0", "VFIO_DEVICE_FEATURE(0x8)", -1, "EFAULT", []),
    ("vfio0", "0x3bff()", -1, "ENOTTY", []),
    ("vfio0:saving", "lseek()", -1, "ESPIPE", []),
    ("vfio0", "VFIO_DEVICE_RESET()", 0, None, []),
    ("vfio0:saving", "read(100)", -1, "ENODEV", []),
]


def test_json_lines_tell_everything(tmp_path: Path) -> None:
    devices = served(Plain())
    out = io.StringIO()
    trace = Trace(out, devices, as_json=True)
    assert serve(devices, [build(tmp_path, TRACED)], trace=trace) == 0
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert (rows[0]["on"], rows[0]["request"]) == ("/dev/iommu", "openat")
    seen = [
        (row["on"], row["request"], row["result"], row["errno"], row["arcs"]) for row in rows[1:]
    ]
    assert seen == EXPECTED
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    assert all(row["thread"] > 0 for row in rows)
    by_request = {row["request"]: row["fd"] for row in rows}
    assert by_request["openat"] is None
    assert by_request["VFIO_DEVICE_RESET()"] == 4
    assert by_request["read(100)"] == 5


LINE = re.compile(
    r" *\d+\.\d{6} \d+ (?P<on>\S+)(?: fd (?P<fd>\d+))? (?P<request>.+) = (?P<result>-?\d+)"
    r"(?: (?P<errno>E[A-Z0-9]+))?(?:  \[(?P<arcs>.+)\])?"
)


def test_lines_for_people_say_the_same(tmp_path: Path) -> None:
    program, file = build(tmp_path, TRACED), tmp_path / "trace"
    spec = f"{door_programs.__file__}:Plain"
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{SOURCE}:{Path(door_programs.__file__).parent}"}
    command = [*COMMAND, "--device", spec, "--trace", str(file), "--", program]
    subprocess.run(command, env=environment, check=True, timeout=100)
    lines = [LINE.fullmatch(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert all(lines)
    seen = [
        (
            m["on"],
            m["request"],
            int(m["result"]),
            m["errno"],
            m["arcs"].split(", ") if m["arcs"] else [],
        )
        for m in lines[1:]
        if m is not None
    ]
    assert seen == EXPECTED


def test_a_failed_arc_is_told_with_its_errno(tmp_path: Path) -> None:
    class Refusing(Plain):
        def step(self, origin: State, target: State) -> None:
            if target is State.STOP_COPY:
                raise DeviceError(28, "no room")

    program = build(
        tmp_path,
        "int main(void) { IS(set_state(use_device(0), STOP_COPY, 0), -ENOSPC); return 0; }",
    )
    devices = served(Refusing())
    out = io.StringIO()
    assert serve(devices, [program], trace=Trace(out, devices, as_json=False)) == 0
    assert (
        out.getvalue()
        .splitlines()[-1]
        .endswith(
            "= -1 ENOSPC  [RUNNING -> RUNNING_P2P, RUNNING_P2P -> STOP, "
            "STOP -> STOP_COPY failed with ENOSPC]"
        )
    )


def test_a_woken_reader_does_not_show_the_arcs_of_another(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        static int fd;
        static void *drink(void *nothing)
        {
            char bytes[100];
            FAILS(read(fd, bytes, 100), ENODEV);
            return nothing;
        }
        int main(void)
        {
            int device = use_device(0);
            fd = data_fd(device, STOP_COPY);
            pthread_t thread;
            pthread_create(&thread, 0, drink, 0);
            nap(0.1);
            IS(pwrite(device, "", 1, BAR0), 1);
            IS(ioctl(device, 0x3B6F, 0), 0);
            pthread_join(thread, 0);
            return 0;
        }
        """,
    )
    devices = served(Gated(first=False))
    out = io.StringIO()
    assert serve(devices, [program], trace=Trace(out, devices, as_json=True)) == 0
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    (read,) = (row for row in rows if row["request"] == "read(100)")
    assert (read["errno"], read["arcs"]) == ("ENODEV", [])


def test_a_trace_that_cannot_be_written_does_not_touch_the_program(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    devices = served(Plain())
    with open_trace(Path("/dev/full")) as full:
        trace = Trace(full, devices, as_json=False)
        assert serve(devices, [build(tmp_path, TRACED)], trace=trace) == 0
    assert caplog.text.count("the trace ends here") == 1
