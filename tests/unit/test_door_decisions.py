"""What the door decides, where a kernel and a program show only one side of it."""

from __future__ import annotations

import errno
import os
import resource
import select
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pytest

from in_process import wait_until
from vfiomig import Device, Region
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.descriptors import Fd, poll_until
from vfiomig.doors.syscall import run
from vfiomig.doors.syscall.caller import _open_thread
from vfiomig.doors.syscall.closing import Closing
from vfiomig.doors.syscall.door import Door
from vfiomig.doors.syscall.held import interruption
from vfiomig.doors.syscall.notify import ERESTARTSYS
from vfiomig.doors.syscall.opened import DeviceOpen, IommufdOpen, Table, link_of
from vfiomig.doors.syscall.paths import DevTree, join
from vfiomig.doors.syscall.readiness import DataPipe
from vfiomig.doors.syscall.receivers import Receivers, Turn
from vfiomig.doors.syscall.standin import StandIn
from vfiomig.doors.syscall.transfer import MAX_RW_COUNT, buffers
from vfiomig.fsm import SessionKind

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig.core.iommufd import Iommufd
    from vfiomig.core.transfer import Migf
    from vfiomig.doors.syscall.notify import Listener, Notification

USR1, STOP, CHLD, QUIT = (1 << number - 1 for number in (10, 19, 17, 3))


def status(threads: int = 1, **masks: int) -> str:
    names = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")
    lines = [f"{name}:\t{masks.get(name, 0):016x}" for name in names]
    return "\n".join(["Name:\ta: b", f"Threads:\t{threads}", *lines, ""])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (status(), 0),
        (status(SigPnd=USR1, SigCgt=USR1), ERESTARTSYS),
        (status(threads=9, SigPnd=USR1, SigCgt=USR1), ERESTARTSYS),
        (status(ShdPnd=USR1, SigCgt=USR1), ERESTARTSYS),
        # Another thread may take it, and the internal errno would reach the program.
        (status(threads=2, ShdPnd=USR1, SigCgt=USR1), errno.EINTR),
        (status(SigPnd=USR1, SigCgt=USR1, SigBlk=USR1), 0),
        (status(SigPnd=USR1, SigIgn=USR1), 0),
        (status(SigPnd=QUIT), ERESTARTSYS),
        (status(threads=2, ShdPnd=QUIT), errno.EINTR),
        (status(ShdPnd=STOP), ERESTARTSYS),
        # A read does not fail because its process was stopped.
        (status(threads=2, ShdPnd=STOP), 0),
        (status(threads=2, ShdPnd=1 << 19, SigCgt=1 << 19), errno.EINTR),
        (status(SigPnd=CHLD | USR1, SigCgt=CHLD, SigBlk=CHLD, SigIgn=USR1), 0),
        ("", 0),
    ],
)
def test_which_signals_a_held_call_gives_way_to(text: str, number: int) -> None:
    assert interruption(text) == number


def test_buffers_are_cut_to_what_one_call_moves() -> None:
    assert buffers([(4096, 0), (8192, 10)]) == [(8192, 10)]
    assert buffers([(0, MAX_RW_COUNT), (1, 7)]) == [(0, MAX_RW_COUNT)]
    assert buffers([(0, MAX_RW_COUNT - 5), (1, 7), (2, 2)]) == [(0, MAX_RW_COUNT - 5), (1, 5)]
    with pytest.raises(OSError, match="no buffer") as refused:
        buffers([(1 << 63, 1)])
    assert refused.value.errno == errno.EFAULT


@pytest.mark.parametrize(
    ("base", "path", "whole"),
    [
        ("/", "/dev//vfio/./devices/../devices/vfio0", "/dev/vfio/devices/vfio0"),
        ("/dev/vfio", "devices/vfio0", "/dev/vfio/devices/vfio0"),
        ("/", "//dev/iommu", "/dev/iommu"),
        ("/dev/vfio/devices", "../..//iommu/", "/dev/iommu"),
    ],
)
def test_paths_are_walked_by_name(base: str, path: str, whole: str) -> None:
    assert join(base, path) == whole


def test_where_device_nodes_cannot_be_made_a_listing_has_plain_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "mknod", refuse)
    stand_in = StandIn(DevTree(["vfio0", "vfio1"]).fill)
    with stand_in.open("/dev/vfio/devices") as folder:
        assert sorted(os.listdir(folder.fileno())) == ["vfio0", "vfio1"]
        link = os.readlink(f"/proc/self/fd/{folder.fileno()}")
    assert stand_in.name_of(link) == "/dev/vfio/devices"
    assert stand_in.name_of("/etc") == "/etc"
    stand_in.close()
    assert not os.path.lexists(link)


def test_a_directory_that_cannot_be_filled_is_removed_and_tried_again(tmp_path: Path) -> None:
    failures = [OSError(errno.ENOSPC, "")]

    def fill(root: Path) -> None:
        (root / "there").touch()
        if failures:
            raise failures.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        stand_in = StandIn(fill)
        with pytest.raises(OSError, match="28"):
            stand_in.path("/there")
        assert list(tmp_path.iterdir()) == []
        assert os.path.exists(stand_in.path("/there"))
        stand_in.close()
    assert list(tmp_path.iterdir()) == []


def test_descriptors_that_may_not_be_looked_at_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused: list[int] = []
    table = Table(refused.append)

    def refuse(*_: object) -> bytes:
        raise PermissionError

    monkeypatch.setattr(os, "readlink", refuse)
    assert table.find(1234, 5) is None
    assert refused == [1234]


def test_a_table_finds_by_what_a_number_leads_to() -> None:
    table = Table()
    one, other = map(Fd, os.pipe2(os.O_CLOEXEC))
    opened = IommufdOpen(cast("Iommufd", None), os.O_RDWR)
    with one, other:
        assert table.find(os.getpid(), one.fileno()) is None
        table.add(link_of(one), opened)
        # The number is an int in the kernel: its upper half is not looked at.
        assert table.find(os.getpid(), one.fileno() | 7 << 32) is opened
        assert table.find(threading.get_native_id(), one.fileno()) is opened
        assert table.find(os.getpid(), -1) is None
        table.remove(opened)
        assert len(table) == 0
        assert table.find(os.getpid(), one.fileno()) is None


class Hooked(Device):
    bar0 = Region(size=16)

    @bar0.reader
    def read_bar0(self, offset: int, length: int) -> bytes:
        return bytes(length)


class Recorded:
    """Stands for an open file; notes its release."""

    def __init__(self, device: VfioDevice) -> None:
        self.device = device
        self.released = 0

    def release(self) -> None:
        self.released += 1


def opened_device(number: int, device: Device | None = None) -> DeviceOpen:
    file = Recorded(VfioDevice(device or Device(), f"vfio{number}"))
    return DeviceOpen(number, cast("Any", file), os.O_RDWR)


def released(opened: DeviceOpen) -> int:
    return cast("Recorded", opened.file).released


def test_a_device_with_hooked_regions_is_known() -> None:
    assert opened_device(0, Hooked()).hooked
    assert not opened_device(0).hooked


def test_a_close_waits_for_the_calls_of_its_dead_user() -> None:
    opened = opened_device(0)
    opened.enter()
    opened.enter()
    closer = threading.Thread(target=opened.close)
    closer.start()
    wait_until(lambda: opened.closed)
    opened.leave()
    time.sleep(0.02)
    assert released(opened) == 0
    with pytest.raises(OSError, match="closed") as late:
        opened.enter()
    assert late.value.errno == errno.EBADF
    assert released(opened) == 0
    opened.leave()
    closer.join(10)
    assert released(opened) == 1


def test_closes_are_carried_out_once_and_before_whoever_asks() -> None:
    closing = Closing()
    slow, other = opened_device(0), opened_device(1)
    slow.enter()
    closing.note(slow)
    closing.note(other)
    waits: list[int] = []
    threads = [
        threading.Thread(target=closing.finish, args=(0, lambda: waits.append(1))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    closing.finish(1)
    assert (released(slow), released(other)) == (0, 1)
    wait_until(lambda: len(waits) == 3 and not closing.waiting)
    assert bool(closing)
    assert all(thread.is_alive() for thread in threads)
    slow.leave()
    for thread in threads:
        thread.join(10)
    assert released(slow) == 1
    assert not closing


def test_where_a_thread_cannot_be_opened_its_process_stands_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Linux before 6.9."""
    opened: list[int] = []
    real = os.pidfd_open

    def pidfd_open(pid: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EINVAL, "unknown flag")
        opened.append(pid)
        return real(pid)

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    with ThreadPoolExecutor() as other:
        tid = other.submit(threading.get_native_id).result()
        _open_thread(tid).close()
    assert opened == [os.getpid()] != [tid]


class Session:
    """Stands for a saving session."""

    kind = SessionKind.SAVING
    dead = False
    ready = True

    def watch(self, callback: object) -> None:
        """Nothing is told."""


def test_where_no_descriptor_is_left_a_data_fd_looks_ready_for_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> Fd:
        raise OSError(errno.EMFILE, "too many open files")

    session = Session()
    with select.epoll() as work:
        pipe = DataPipe(cast("Migf", session), work)
        pipe.follow(0, lambda: None)
        session.ready = False
        with monkeypatch.context() as patch:
            patch.setattr("vfiomig.doors.syscall.readiness.reopen", refuse)
            pipe.refresh()
        assert poll_until(pipe.program_end, select.POLLIN, 0.0)
        pipe.refresh()
        assert not poll_until(pipe.program_end, select.POLLIN, 0.0)
        pipe.close()


class Calls:
    """Stands for a listener: what is put in is received."""

    def __init__(self) -> None:
        self.waiting: list[object] = []
        self.arrived = threading.Condition()
        self.receiving = 0
        self.most = 0

    def put(self, call: object) -> None:
        with self.arrived:
            self.waiting.append(call)
            self.arrived.notify()

    def receive(self) -> object:
        with self.arrived:
            self.receiving += 1
            self.most = max(self.most, self.receiving)
            self.arrived.wait_for(lambda: self.waiting)
            self.receiving -= 1
            if self.waiting[0] is None:
                return None
            return self.waiting.pop(0)

    def close(self) -> None:
        self.put(None)


def test_one_thread_receives_and_slow_calls_are_out_of_its_way() -> None:
    calls, go_on = Calls(), threading.Event()
    answered: list[tuple[object, int]] = []

    def answer(call: Notification, turn: Turn) -> None:
        if cast("Any", call) == "slow":
            turn.pass_on()
            turn.pass_on()
            go_on.wait(10)
        answered.append((call, threading.get_ident()))

    receivers = Receivers(cast("Listener", calls), answer)
    receivers.receive_elsewhere()
    for call in ("quick", "slow", "quick", "slow", "quick"):
        calls.put(call)
    wait_until(lambda: len(answered) == 3)
    assert [call for call, _ in answered] == ["quick"] * 3
    assert not receivers.finish(time.monotonic() + 0.05)  # the slow ones are not done
    go_on.set()
    calls.put(None)
    assert receivers.finish(time.monotonic() + 10)
    assert len(answered) == 5
    assert len({thread for _, thread in answered}) == 3
    assert calls.most == 1
    assert receivers.failure is None


def test_where_no_thread_can_be_had_calls_wait_for_a_slow_one_and_are_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls, go_on = Calls(), threading.Event()
    answered: list[object] = []

    def answer(call: Notification, turn: Turn) -> None:
        turn.if_long()
        if cast("Any", call) == "slow":
            turn.pass_on()
            go_on.wait(10)
        answered.append(call)

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    receivers = Receivers(cast("Listener", calls), answer)
    receivers.receive_elsewhere()
    wait_until(lambda: calls.receiving)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        calls.put("slow")
        calls.put("quick")
        wait_until(lambda: "can't start new thread" in caplog.text)
        go_on.set()
        wait_until(lambda: len(answered) == 2)
    calls.put(None)
    assert receivers.finish(time.monotonic() + 10)
    assert receivers.failure is None


def test_a_close_is_carried_out_even_where_no_thread_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Door([VfioDevice(Device())]) as door:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        door.open_device(0, os.O_RDWR).close()
        door._notice_closes()
        assert door.closing.waiting
        door._close_elsewhere()
        assert not door.closing
        door.open_device(0, os.O_RDWR).close()
    assert not door.closing


def test_idle_threads_are_used_again() -> None:
    calls, threads = Calls(), set()
    done = threading.Semaphore(0)

    def answer(call: Notification, turn: Turn) -> None:
        turn.pass_on()
        threads.add(threading.get_ident())
        done.release()

    receivers = Receivers(cast("Listener", calls), answer)
    receivers.receive_elsewhere()
    for _ in range(50):
        calls.put("call")
        assert done.acquire(timeout=10)
        wait_until(lambda: receivers._idle)
    calls.put(None)
    assert receivers.finish(time.monotonic() + 10)
    assert len(threads) <= 3


@pytest.mark.parametrize(
    ("limit", "first"),
    [(1024, 768), (256, 128), (64, 32), (1 << 30, (1 << 16) - 256), (-1, (1 << 16) - 256)],
)
def test_high_numbers_stay_where_a_table_costs_little(
    limit: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limits(_: int) -> tuple[int, int]:
        return limit, limit

    monkeypatch.setattr(resource, "getrlimit", limits)
    assert run._first_data_fd() == first
