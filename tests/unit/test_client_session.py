"""What a session makes of the answers of drivers that no device here would give."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from typing import TYPE_CHECKING, ClassVar

import pytest

from raw_peer import interrupted_when
from vfiomig import Device, SessionError, SetStateError, State
from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.client import DeviceClient, open_device
from vfiomig.client.transport import NO_FD
from vfiomig.core.transfer import Migf, Transfer
from vfiomig.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig import StateReader
    from vfiomig.abi.uapi import UapiStruct

FEATURE_SET = vfio.VFIO_DEVICE_FEATURE_SET | vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
FEATURE_GET = vfio.VFIO_DEVICE_FEATURE_GET | vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
DATA_FD = 7


class Driver:
    """A transport whose device does what a test wrote down."""

    device = 3
    iommufd = NO_FD
    about: ClassVar[dict[str, str | int | bool]] = {}
    lost = ""

    def __init__(self) -> None:
        self.state = int(State.RUNNING)
        #: Errnos of the next requests for a state, 0 for success.
        self.set_answers: list[int] = []
        self.get_answers: list[int] = []
        #: Whether a request that fails has reached its target all the same.
        self.moves_anyway = False
        self.reads: list[bytes | int] = []
        self.writes: list[int] = []
        self.asked: list[int] = []
        self.closed: list[int] = []
        self.new_fd = DATA_FD

    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int:
        if number == vfio.VFIO_DEVICE_RESET:
            return 0
        assert argument is not None
        at = ctypes.addressof(argument)
        if number == vfio.VFIO_DEVICE_MIG_SET_STATE:
            self._set(vfio.MigSetState.from_address(at))
            return 0
        header = vfio.DeviceFeature.from_address(at)
        payload = vfio.MigState.from_address(at + vfio.DeviceFeature.SIZE)
        if header.flags == FEATURE_SET:
            requested = payload.device_state
            try:
                self._set(payload)
            finally:
                payload.device_state = requested
        elif header.flags == FEATURE_GET:
            self._fail(self.get_answers)
            payload.device_state = self.state
        else:
            capabilities = vfio.FeatureMigration.from_address(at + vfio.DeviceFeature.SIZE)
            capabilities.flags = 7
        return 0

    def _set(self, argument: vfio.MigState | vfio.MigSetState) -> None:
        target = argument.device_state
        self.asked.append(target)
        number = self.set_answers.pop(0) if self.set_answers else 0
        if not number or self.moves_anyway:
            self.state = target
        argument.device_state = self.state
        if number:
            raise OSError(number, os.strerror(number))
        argument.data_fd = self.new_fd

    @staticmethod
    def _fail(answers: list[int]) -> None:
        if answers and (number := answers.pop(0)):
            raise OSError(number, os.strerror(number))

    def readinto(self, data_fd: int, buffer: memoryview) -> int:
        answer = self.reads.pop(0)
        if isinstance(answer, int):
            raise OSError(answer, os.strerror(answer))
        buffer[: len(answer)] = answer
        return len(answer)

    def write(self, data_fd: int, data: memoryview) -> int:
        answer = self.writes.pop(0)
        if answer < 0:
            raise OSError(-answer, os.strerror(-answer))
        return min(answer, len(data))

    def pread(self, offset: int, length: int) -> bytes:
        raise NotImplementedError

    def pwrite(self, offset: int, data: bytes) -> int:
        raise NotImplementedError

    def map(self, offset: int, length: int, *, writable: bool) -> memoryview:
        raise NotImplementedError

    def close(self, number: int) -> None:
        self.closed.append(number)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def dev(driver: Driver) -> Iterator[DeviceClient]:
    with DeviceClient(driver, "vfio0", Dialect.LANDED) as client:
        yield client


@pytest.fixture
def v6(driver: Driver) -> Iterator[DeviceClient]:
    with DeviceClient(driver, "vfio0", Dialect.V6) as client:
        yield client


@pytest.mark.parametrize("end", [b"", errno.ENOMSG])
def test_both_temporary_ends_of_drivers_look_the_same(
    end: bytes | int, dev: DeviceClient, driver: Driver
) -> None:
    driver.reads = [b"abc", end, end, b"d", end]
    with dev.set_state(State.PRE_COPY) as session:
        assert [bytes(chunk) for chunk in session] == [b"abc"]
        assert session.readinto(bytearray(9)) is None
        assert [bytes(chunk) for chunk in session] == [b"d"]
        driver.new_fd = NO_FD
        assert dev.set_state(State.STOP_COPY) is session
        driver.reads = [b"e", b""]
        assert [bytes(chunk) for chunk in session] == [b"e"]
        driver.reads = [b""]
        assert session.readinto(bytearray(9)) == 0


def test_a_zero_of_a_read_that_began_in_pre_copy_is_not_taken_for_the_end(
    dev: DeviceClient, driver: Driver
) -> None:
    session = dev.set_state(State.PRE_COPY)

    def readinto(data_fd: int, buffer: memoryview) -> int:
        session.in_precopy = False  # another thread goes to STOP_COPY meanwhile
        return 0

    with session:
        driver.readinto = readinto  # type: ignore[method-assign]
        assert session.readinto(bytearray(9)) is None
        assert session.readinto(bytearray(9)) == 0


def test_a_stray_enomsg_in_stop_copy_is_an_error(dev: DeviceClient, driver: Driver) -> None:
    driver.reads = [errno.ENOMSG]
    with (
        dev.set_state(State.STOP_COPY) as session,
        pytest.raises(SessionError, match="not complete") as caught,
    ):
        session.readinto(bytearray(9))
    assert caught.value.errno == errno.ENOMSG


def test_short_writes_go_on_and_a_write_of_nothing_ends(dev: DeviceClient, driver: Driver) -> None:
    driver.writes = [3, 1, 100]
    with dev.set_state(State.RESUMING) as session:
        session.write_all(bytes(10))
        assert (session.transferred, driver.writes) == (10, [])
        driver.writes = [0]
        with pytest.raises(SessionError, match="reset"):
            session.write_all(b"x")
        driver.writes = [-errno.ENOMEM]
        with pytest.raises(SessionError, match=r"ENOMEM.*reset"):
            session.write_all(b"x")


def test_a_read_without_room_is_a_mistake(dev: DeviceClient) -> None:
    with (
        dev.set_state(State.STOP_COPY) as session,
        pytest.raises(ValueError, match="room"),
    ):
        session.readinto(bytearray())


def test_any_writable_buffer_is_read_into_as_bytes(dev: DeviceClient, driver: Driver) -> None:
    driver.reads = [b"abcdefgh"]
    words = (ctypes.c_uint32 * 2)()
    with dev.set_state(State.STOP_COPY) as session:
        assert session.readinto(words) == 8
    assert bytes(words) == b"abcdefgh"


def test_an_unexpected_data_fd_is_closed(dev: DeviceClient, driver: Driver) -> None:
    assert dev.set_state(State.STOP) is None
    assert driver.closed == [DATA_FD]


def test_a_data_fd_that_was_lost_does_not_come_back(dev: DeviceClient, driver: Driver) -> None:
    driver.new_fd = NO_FD
    with pytest.raises(SessionError, match=r"STOP_COPY before.*enter it again") as caught:
        dev.set_state(State.STOP_COPY)
    assert caught.value.errno == errno.EBADF


def test_sessions_that_were_left_open_are_closed_after_the_device(driver: Driver) -> None:
    dev = DeviceClient(driver, "vfio0", Dialect.LANDED)
    dev.set_state(State.STOP_COPY)
    dev.close()
    dev.close()
    assert driver.closed == [Driver.device, DATA_FD]


def test_a_forgotten_client_warns_and_closes(driver: Driver) -> None:
    dev = DeviceClient(driver, "vfio0", Dialect.LANDED)
    with pytest.warns(ResourceWarning, match="unclosed <DeviceClient of vfio0"):
        del dev
    assert driver.closed == [Driver.device]


def test_an_interrupted_change_of_state_is_asked_again(dev: DeviceClient, driver: Driver) -> None:
    driver.set_answers = [errno.EINTR, errno.EINTR]
    assert dev.set_state(State.STOP_COPY) is dev.session
    assert driver.asked == [State.STOP_COPY] * 3


@pytest.mark.parametrize("dialect", Dialect)
def test_a_change_that_happened_although_it_was_interrupted_is_told(
    dialect: Dialect, driver: Driver
) -> None:
    driver.set_answers = [errno.EINTR]
    driver.moves_anyway = True
    with DeviceClient(driver, "vfio0", dialect) as dev, pytest.raises(SetStateError) as caught:
        dev.set_state(State.STOP_COPY)
    assert (caught.value.errno, caught.value.device_state) == (errno.EINTR, State.STOP_COPY)
    assert driver.asked == [State.STOP_COPY]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EFAULT, errno.ENOTTY])
def test_v6_tells_no_state_with_the_errnos_of_the_core(
    number: int, v6: DeviceClient, driver: Driver
) -> None:
    driver.set_answers = [number]
    with pytest.raises(SetStateError, match="an unknown state") as caught:
        v6.set_state(State.STOP)
    assert caught.value.device_state is None
    driver.set_answers = [number]
    with pytest.raises(RequestError) as refused:
        _ = v6.state
    assert refused.value.errno == number


def test_v6_reads_the_state_from_an_answer_of_either_kind(v6: DeviceClient, driver: Driver) -> None:
    driver.new_fd = NO_FD
    driver.set_answers = [errno.EIO]
    assert v6.state is State.RUNNING
    driver.state = State.ERROR  # the first V6 driver lets ERROR pass there
    assert State(v6.state) is State.ERROR
    assert driver.asked == [State.ERROR] * 2


def test_a_failure_whose_query_fails_too_leaves_the_state_open(
    dev: DeviceClient, driver: Driver
) -> None:
    driver.set_answers = [errno.ENOTCONN]
    driver.get_answers = [errno.ENOTCONN]
    with pytest.raises(SetStateError, match=r"ENOTCONN.*unknown state") as caught:
        dev.set_state(State.STOP)
    assert caught.value.device_state is None


def test_a_state_of_a_later_kernel_is_told_and_not_guessed(
    dev: DeviceClient, driver: Driver
) -> None:
    driver.state = 9
    with pytest.raises(RequestError, match="state 9"):
        _ = dev.state
    driver.set_answers = [errno.EIO]
    with pytest.raises(SetStateError) as caught:
        dev.set_state(State.STOP)
    assert caught.value.device_state is None


def test_the_loop_of_some_kernels_is_not_entered(dev: DeviceClient, driver: Driver) -> None:
    driver.state = State.STOP_COPY
    for target in (State.PRE_COPY, State.PRE_COPY_P2P):
        with pytest.raises(SetStateError, match="RUNNING in between"):
            dev.set_state(target)
    assert driver.asked == []
    assert driver.state == State.STOP_COPY


class Waiting(Device):
    """Its state is asked for, and comes when the test lets it."""

    def __init__(self) -> None:
        self.asked, self.released = threading.Event(), threading.Event()

    def save(self) -> Iterator[bytes]:
        self.asked.set()
        assert self.released.wait(10)
        yield b"late"

    def load(self, state: StateReader) -> None:
        state.read(4)


def test_closing_the_client_wakes_a_blocked_reader() -> None:
    device = Waiting()
    dev = open_device(device)
    session = dev.set_state(State.STOP_COPY)
    caught: list[int | None] = []

    def read() -> None:
        try:
            session.readinto(bytearray(4))
        except SessionError as failure:
            caught.append(failure.errno)
        device.released.set()  # the close waits for the device's code

    reader = threading.Thread(target=read)
    reader.start()
    assert device.asked.wait(10)
    dev.close()
    reader.join(10)
    assert caught == [errno.ENODEV]


def test_an_interrupted_read_takes_no_bytes_from_the_stream() -> None:
    device = Waiting()
    with open_device(device) as dev, dev.set_state(State.STOP_COPY) as session:
        buffer = bytearray(4)
        with interrupted_when(lambda: device.asked.wait(10)):
            session.readinto(buffer)
        device.released.set()
        again = bytearray(4)
        assert session.readinto(again) == 4
        assert bytes(buffer) == bytes(4)
        assert bytes(again) == b"late"


def test_an_interrupt_before_the_wait_leaves_the_buffer_to_its_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submit = Migf.submit

    def submit_and_interrupt(migf: Migf, transfer: Transfer) -> None:
        submit(migf, transfer)
        raise KeyboardInterrupt

    device = Waiting()
    with open_device(device) as dev, dev.set_state(State.STOP_COPY) as session:
        buffer = bytearray(4)
        with monkeypatch.context() as patch:
            patch.setattr(Migf, "submit", submit_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                session.readinto(buffer)
        device.released.set()
        assert session.readinto(bytearray(4)) == 4
        assert bytes(buffer) == bytes(4)


def test_a_reset_by_another_thread_kills_the_session_of_a_change_under_way() -> None:
    class Slow(Device):
        def step(self, origin: State, target: State) -> None:
            if target is State.STOP_COPY:
                under_way.set()
                assert go_on.wait(10)

    under_way, go_on = threading.Event(), threading.Event()
    with open_device(Slow()) as dev:

        def reset() -> None:
            assert under_way.wait(10)
            dev.reset()
            go_on.set()

        other = threading.Thread(target=reset)
        other.start()
        with dev.set_state(State.STOP_COPY) as session:
            other.join(5)
            assert dev.state is State.RUNNING
            with pytest.raises(SessionError) as caught:
                session.readinto(bytearray(1))
        assert caught.value.errno == errno.ENODEV
