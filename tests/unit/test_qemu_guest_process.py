"""vfiomig.qemu.guest: a process that is started, asked, and always ended; here QEMU is a small program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_qemu import QEMU, qemu
from vfiomig.errors import GuestEnded, GuestTimeout
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.machine import Machine


def folders() -> set[Path]:
    return set(Path(os.environ.get("TMPDIR", "/tmp")).glob("vfiomig-guest-*"))


def assert_gone(group: int) -> None:
    """Nobody is in the process group, or is in a moment: a kill takes its time."""
    deadline = time.monotonic() + 20
    while (living := members(group)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert living == []


def members(group: int) -> list[str]:
    """The processes of a group, zombies that init has not collected yet aside."""
    return [
        stat.parent.name
        for stat in Path("/proc").glob("[0-9]*/stat")
        if (fields := read(stat).rpartition(")")[2].split())
        and fields[2] == str(group)
        and fields[0] != "Z"
    ]


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_commands_run_and_the_end_has_the_status(tmp_path: Path) -> None:
    with Guest(qemu(tmp_path), Machine()) as guest:
        guest.wait_ready()
        assert guest.run("echo out; echo err >&2; exit 3").status == 3
        assert guest.check("echo it\\'s; printf 'no end'") == "it's\nno end"
        assert guest.power_off(9) == 9
        assert guest.wait() == 19
    assert folders() == set()


def test_the_output_of_a_command_has_its_errors_and_every_byte(tmp_path: Path) -> None:
    with Guest(qemu(tmp_path), Machine()) as guest:
        guest.wait_ready()
        outcome = guest.run("printf '\\000\\r\\n\\377'; nonsense 2>&1 | wc -l >&2")
        assert outcome.output == b"\0\r\n\xff1\n"


def test_a_qemu_that_refuses_its_arguments_is_an_error_with_its_words(tmp_path: Path) -> None:
    refusing = qemu(tmp_path, "import sys; sys.exit('qemu: no such device')")
    with pytest.raises(GuestEnded, match="exit code 1\nqemu: no such device"):
        Guest(refusing, Machine())
    assert folders() == set()


#: Ends when it is told to do something, or when it was told nothing for a moment.
WORDY = (
    QEMU.split("shell = re")[0]
    + """
print("qemu: warning: first", file=sys.stderr, flush=True)
if json.loads(lines.readline())["execute"] == "crash":
    sys.exit("qemu: assertion failed: fd >= 0")
say({"return": {}})
sys.exit("qemu: nobody needs me")
"""
)


def test_a_qemu_that_ends_during_a_command_says_why(tmp_path: Path) -> None:
    with Guest(qemu(tmp_path, WORDY), Machine()) as guest:
        with pytest.raises(GuestEnded) as ended:
            guest.qmp.execute("crash")
        assert str(ended.value).splitlines() == [
            "QEMU ended during crash: exit code 1",
            "qemu: warning: first",
            "qemu: assertion failed: fd >= 0",
        ]
        assert guest.wait() == 1
        with pytest.raises(GuestEnded, match="ended during query-status: exit code 1\n"):
            guest.qmp.execute("query-status")


def test_a_qemu_that_ends_before_an_event_says_why(tmp_path: Path) -> None:
    with Guest(qemu(tmp_path, WORDY), Machine()) as guest:
        guest.qmp.execute("stop")
        with pytest.raises(
            GuestEnded, match=r"before an event STOP: exit code 1\n(.*\n)*.*needs me"
        ):
            guest.qmp.wait_event("STOP")


def test_a_qemu_that_is_killed_during_a_command_says_by_what(tmp_path: Path) -> None:
    body = QEMU.split("shell = re")[0] + "lines.readline()\nos.kill(os.getpid(), 9)"
    with (
        Guest(qemu(tmp_path, body), Machine()) as guest,
        pytest.raises(GuestEnded, match="ended during migrate: exit code -9"),
    ):
        guest.qmp.execute("migrate")


def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GuestEnded, match=r"exit code 127\n.*/absent: No such file"):
        Guest(tmp_path / "absent", Machine())
    assert folders() == set()


def test_a_qemu_that_ends_during_a_command_is_an_error(tmp_path: Path) -> None:
    with Guest(qemu(tmp_path), Machine()) as guest:
        guest.wait_ready()
        with pytest.raises(GuestEnded, match=r"ended during 'kill .*exit code -9"):
            guest.run(f"kill -9 {guest.pid}; sleep 30")


def test_an_end_that_is_no_status_is_an_error(tmp_path: Path) -> None:
    switched_off = qemu(tmp_path, QEMU.replace("status * 2 + 1", "0"))
    with Guest(switched_off, Machine()) as guest:
        guest.wait_ready()
        with pytest.raises(GuestEnded, match="exit code 0"):
            guest.power_off(0)


def test_a_command_that_takes_too_long_is_an_error_and_the_guest_is_ended(tmp_path: Path) -> None:
    with Guest(qemu(tmp_path), Machine()) as guest:
        guest.wait_ready()
        with pytest.raises(GuestTimeout, match=r"'sleep 30' took longer than 0\.2 s"):
            guest.run("sleep 30", timeout=0.2)
        group = guest.pid
    assert_gone(group)


def test_what_a_launcher_leaves_behind_is_ended_too(tmp_path: Path) -> None:
    leaving = qemu(tmp_path, "import subprocess\nsubprocess.Popen(['sleep', '100'])\n" + QEMU)
    with Guest(leaving, Machine()) as guest:
        guest.wait_ready()
        group = guest.pid
        assert guest.power_off() == 0
    assert_gone(group)


def test_closing_ends_a_process_that_does_not_listen_and_its_children(tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + QEMU
    with Guest(qemu(tmp_path, stubborn), Machine()) as guest:
        guest.wait_ready()
        guest.kill()
        assert_gone(guest.pid)
        guest.close()
        guest.close()


def test_a_launcher_stands_in_front_and_passes_descriptors_on(tmp_path: Path) -> None:
    readable, writable = os.pipe()
    try:
        with Guest(
            qemu(tmp_path), Machine(), launcher=["env", "GREETING=hello"], pass_fds=[writable]
        ) as guest:
            guest.wait_ready()
            assert guest.check("echo $GREETING") == "hello\n"
            assert Path(f"/proc/{guest.pid}/fd/{writable}").exists()
            assert guest.power_off() == 0
    finally:
        os.close(readable)
        os.close(writable)


def test_a_guest_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from vfiomig.qemu.guest import Guest\n"
        "from vfiomig.qemu.machine import Machine\n"
        f"guest = Guest(Path({str(qemu(tmp_path))!r}), Machine())\n"
        "print(guest.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        started = os.pidfd_open(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    try:
        deadline = time.monotonic() + 10
        signal.pidfd_send_signal(started, 0)
        while time.monotonic() < deadline:
            signal.pidfd_send_signal(started, 0)
            time.sleep(0.01)
    except ProcessLookupError:
        pass
    else:
        pytest.fail("it still runs")
    finally:
        os.close(started)
    (left,) = folders()
    with Guest(qemu(tmp_path), Machine()):
        assert not left.exists(), "the next one removes what nobody could"
    assert folders() == set()
