"""``DeviceClient`` before the kernel's mtty: what it finds, sessions, errors, a whole migration."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vfiomig
from client_suite import no_free_descriptor, raises, state_of
from kernel_guest import CHECK, PAIR, SINGLE
from vfiomig import Capability, DeviceClient, SessionError, SetStateError, State
from vfiomig.abi import vfio
from vfiomig.checks import Suite, Verdict, find
from vfiomig.client import target_maker
from vfiomig.client.recovery import Outcome, recover
from vfiomig.errors import TargetError
from vmtest.inside import WORK

if TYPE_CHECKING:
    from collections.abc import Iterator

TWO_PORTS, ONE_PORT = 96, 60
HEADER = 24
#: Where this driver differs from the protocol in a way that users have to live with.
KNOWN = {
    "sessions.a-dead-data-fd-polls-hung-up",
    "sessions.a-data-fd-can-be-watched-by-epoll",
    "precopy.poll-knows-the-temporary-end",
    "resuming.corrupt-in-quarter-2",
    "resuming.corrupt-in-quarter-3",
    "resuming.corrupt-in-quarter-4",
    "resuming.a-foreign-state-is-refused",
    "resuming.a-write-after-a-failed-one-saves-nothing",
    "precopy.the-temporary-end-is-enomsg",
    # It is in the state in which its last user left it.
    "reopen.from-stop",
    "reopen.from-stop-copy",
    "reopen.from-running-p2p",
    "reopen.from-pre-copy",
    "reopen.from-pre-copy-p2p",
    # Its log of DMA is a stub, which starts and stops and never reports.
    "dma.start-is-refused-while-logging",
    "dma.stop-ends-the-reports",
    "dma.report-wants-a-page-size",
    "dma.report-needs-a-log",
    "dma.a-bitmap-that-cannot-be-written-is-efault",
    "dma.bits-are-only-set",
    "dma.states-do-not-matter-to-the-log",
    "dma.after-a-reset-it-can-be-started-anew",
}
RBR = 0  # the register that bytes are written to and read from


@pytest.fixture
def dev() -> Iterator[DeviceClient]:
    with vfiomig.open(PAIR[0]) as client:
        yield client


def say(dev: DeviceClient, text: bytes) -> None:
    for byte in text:
        dev.write_region(0, RBR, bytes([byte]))


def hear(dev: DeviceClient, count: int) -> bytes:
    return b"".join(dev.read_region(0, RBR, 1) for _ in range(count))


def saved(dev: DeviceClient) -> bytes:
    with dev.set_state(State.STOP_COPY) as session:
        return b"".join(map(bytes, session.chunks(10)))


@pytest.mark.parametrize(("uuid", "size"), [(PAIR[0], TWO_PORTS), (SINGLE, ONE_PORT)])
def test_a_card_shows_what_it_is(uuid: str, size: int) -> None:
    with vfiomig.open(uuid) as dev:
        assert dev.capabilities == Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY
        assert dev.data_size() == size
        assert state_of(dev) is State.RUNNING
        assert dev.about["driver"] == "mtty"
        assert dev.read_region(7, 0, 4) == bytes.fromhex("48435332")
        assert len(saved(dev)) == size
        assert not dev.precopy_v2()


def test_every_way_to_name_a_device_leads_to_it(flavour: str) -> None:
    targets = [PAIR[0], "/dev/vfio/0", f"/dev/vfio/0:{PAIR[0]}"]
    if flavour == "cdev":
        targets.append("/dev/vfio/devices/vfio0")
    for target in targets:
        with vfiomig.open(target) as dev:
            assert dev.data_size() == TWO_PORTS


def test_a_device_in_use_is_refused_and_the_message_says_what_to_do(dev: DeviceClient) -> None:
    with pytest.raises(TargetError) as caught:
        vfiomig.open(PAIR[0])
    assert caught.value.errno in {errno.EBUSY, errno.EINVAL}


def test_a_descriptor_that_was_handed_over_is_the_device(dev: DeviceClient) -> None:
    number = os.dup(dev._transport.device)
    dev.set_state(State.STOP)
    with vfiomig.open(f"fd:{number}") as other:
        assert state_of(other) is State.STOP
        assert other.data_size() == TWO_PORTS


def test_a_card_arrives_with_the_bytes_that_it_had_not_delivered(dev: DeviceClient) -> None:
    with vfiomig.open(PAIR[1]) as destination:
        say(dev, b"in the FIFO")
        with dev.set_state(State.PRE_COPY) as source:
            assert (dev.precopy_info().initial_bytes, dev.precopy_info().dirty_bytes) == (HEADER, 0)
            with destination.set_state(State.RESUMING) as loading:
                for chunk in source.chunks(7):
                    loading.write_all(chunk)
                assert source.transferred == HEADER
                assert dev.precopy_info().initial_bytes == 0
                assert dev.set_state(State.PRE_COPY_P2P) is source
                assert dev.set_state(State.STOP_COPY) is source
                for chunk in source.chunks(7):
                    loading.write_all(chunk)
                assert source.transferred == TWO_PORTS
                destination.set_state(State.RUNNING_P2P)
        dev.set_state(State.STOP)
        destination.set_state(State.STOP)
        assert saved(destination) == saved(dev)
        destination.set_state(State.RUNNING)
        assert hear(destination, 11) == b"in the FIFO"


def test_a_session_ends_with_its_state(dev: DeviceClient) -> None:
    with dev.set_state(State.STOP_COPY) as session:
        assert session.readinto(bytearray(10)) == 10
        dev.set_state(State.STOP)
        with raises(errno.ENODEV):
            session.readinto(bytearray(10))
        with dev.set_state(State.STOP_COPY) as again:
            assert len(b"".join(map(bytes, again))) == TWO_PORTS
            assert again.readinto(bytearray(1)) == 0
            dev.reset()
            with raises(errno.ENODEV):
                again.readinto(bytearray(1))
        assert state_of(dev) is State.RUNNING


def test_a_data_fd_is_no_file_like_others(dev: DeviceClient) -> None:
    with dev.set_state(State.STOP_COPY) as session:
        fd = session.fileno()
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        for call, number in (
            (lambda: os.lseek(fd, 0, os.SEEK_SET), errno.ESPIPE),
            (lambda: os.pread(fd, 1, 0), errno.ESPIPE),
            (lambda: os.write(fd, b"x"), errno.EBADF),
            (lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ), errno.ENODEV),
            (lambda: os.fsync(fd), errno.EINVAL),
            (lambda: os.ftruncate(fd, 0), errno.EINVAL),
            (lambda: fcntl.ioctl(fd, 0x3BFF), errno.ENOTTY),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == number


def test_without_a_free_descriptor_the_state_has_changed_and_recovery_gets_one(
    dev: DeviceClient,
) -> None:
    with no_free_descriptor(dev), raises(errno.EMFILE) as caught:
        dev.set_state(State.STOP_COPY)
    assert state_of(dev) is State.STOP_COPY
    report = recover(dev, caught[0])
    assert report.outcome is Outcome.SETTLED
    assert report.session is not None
    with report.session as session:
        assert len(b"".join(map(bytes, session))) == TWO_PORTS


@pytest.mark.parametrize("size", [0, 10, HEADER, TWO_PORTS - 1])
def test_a_state_that_is_cut_is_refused_and_can_be_completed(dev: DeviceClient, size: int) -> None:
    state = saved(dev)
    with dev.set_state(State.RESUMING) as session:
        session.write_all(state[:size])
        with pytest.raises(SetStateError) as caught:
            dev.set_state(State.STOP)
        assert (caught.value.errno, caught.value.device_state) == (errno.EINVAL, State.RESUMING)
        session.write_all(state[size:])
        dev.set_state(State.STOP)
    assert state_of(dev) is State.STOP


def test_more_than_a_state_is_not_taken(dev: DeviceClient) -> None:
    state = saved(dev)
    with dev.set_state(State.RESUMING) as session:
        session.write_all(state)
        with raises(errno.ENOMEM):
            session.write(b"x")
        dev.set_state(State.STOP)


def test_a_foreign_header_is_refused_and_recovery_resets(dev: DeviceClient) -> None:
    with dev.set_state(State.RESUMING) as session:
        with raises(errno.EFAULT) as caught:
            session.write_all(bytes(HEADER))
        report = recover(dev, caught[0])
        assert (report.outcome, state_of(dev)) == (Outcome.RESET, State.RUNNING)


def test_a_card_with_one_port_is_not_taken_for_one_with_two(dev: DeviceClient) -> None:
    with vfiomig.open(SINGLE) as single:
        state = saved(single)
    with dev.set_state(State.RESUMING) as session, pytest.raises(SessionError):
        session.write_all(state)
    dev.reset()


def test_precopy_info_is_for_pre_copy_only(dev: DeviceClient) -> None:
    with dev.set_state(State.STOP_COPY) as session, raises(errno.EINVAL):
        session.precopy_info()
    dev.set_state(State.STOP)
    with dev.set_state(State.RESUMING) as session, raises(errno.ENOTTY):
        session.precopy_info()
    dev.reset()


def test_memory_is_mapped_and_unmapped(dev: DeviceClient) -> None:
    with mmap.mmap(-1, 1 << 16) as memory:
        dev.map(0x100000, memory)
        with raises(errno.EEXIST):
            dev.map(0x100000, memory)
        assert dev.unmap(0x100000, 1 << 16) == 1 << 16


def test_the_log_of_the_driver_is_a_stub(dev: DeviceClient) -> None:
    dev.start_dma_logging([(0x100000, 1 << 16)])
    with raises(errno.ENOTSUP):
        dev.report_dma_logging(0x100000, 1 << 16)
    dev.stop_dma_logging()


def test_an_open_finds_running_whatever_the_last_user_left() -> None:
    with vfiomig.open(PAIR[0]) as dev:
        dev.set_state(State.STOP)
    with vfiomig.open(PAIR[0]) as dev:
        assert state_of(dev) is State.RUNNING


def test_unknown_features_and_operations_are_refused(dev: DeviceClient) -> None:
    known = {index for index in range(16) if dev.has_feature(index)}
    assert known == {1, 2, 6, 7, 8, 9}
    assert not dev.has_feature(vfio.VFIO_DEVICE_FEATURE_MIGRATION, vfio.VFIO_DEVICE_FEATURE_SET)


def test_a_write_from_no_memory_is_tried_with_no_more_than_a_short_state() -> None:
    """The driver looks at the length first: of one port's 60 bytes, 64 are ENOMEM, not EFAULT."""
    with Suite(target_maker(SINGLE)) as suite:
        result = suite.run_check(find("resuming.a-write-from-no-memory-gives-nothing"))
    assert result.verdict is Verdict.PASS, result.saw


@pytest.mark.timeout(240)
def test_the_check_finds_nothing_but_what_is_known_of_this_driver() -> None:
    root = Path(vfiomig.__file__).parents[2]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "vfiomig", "check", PAIR[0], "--json"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": f"{root}/src"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    seconds = time.monotonic() - started
    document = json.loads(done.stdout)
    # For people: how long it takes in an emulated machine decides no test.
    (WORK / CHECK).write_text(json.dumps({"seconds": round(seconds, 1), **document}))
    print(f"all checks of mtty took {seconds:.1f} s in the guest")
    checks = document["checks"]
    verdicts = {check["id"]: check["verdict"] for check in checks}
    assert "fail" not in verdicts.values()
    assert sum(verdict == "pass" for verdict in verdicts.values()) > 200
    assert {name for name, verdict in verdicts.items() if verdict == "deviates"} == KNOWN
