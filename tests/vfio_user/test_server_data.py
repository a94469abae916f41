"""The state in messages: filled as far as it goes, waiting without holding others up, refused."""

from __future__ import annotations

import errno
import random
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from raw_vfio_user import (
    FEATURE,
    FULL,
    GET,
    GET_INFO,
    MIB,
    MIG_DATA_READ,
    MIG_DATA_WRITE,
    NO_REPLY,
    PLAIN,
    PRE_COPY,
    PRE_COPY_P2P,
    RESET,
    RESUMING,
    RUNNING,
    SET,
    STATE,
    STOP,
    STOP_COPY,
    Message,
    Raw,
    client_of,
    read_data,
    served,
)
from suite_devices import MAGIC, Card
from vfiomig import Capability, Device, DeviceError, StateReader, StateRejected
from vfiomig.doors.vfio_user import data as data_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = 10.0


class Pieces(Device):
    """Its state are these pieces; what it loads is kept, in buffers of ``room`` bytes."""

    capabilities = Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY

    def __init__(self, *pieces: bytes, room: int = 1000, most: int = 1 << 30) -> None:
        self.pieces = pieces
        self.loaded = bytearray()
        self._room, self._most = room, most

    def precopy(self) -> Iterator[bytes]:
        while True:
            yield b"early"
            yield b""

    def save(self) -> Iterator[bytes]:
        yield from self.pieces

    def load(self, state: StateReader) -> None:
        buffer = memoryview(bytearray(self._room))
        while len(self.loaded) < self._most and (size := state.readinto(buffer)):
            self.loaded += buffer[:size]


class Waiting(Device):
    """Saving and loading wait for ``go`` after the first bytes."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.waits = threading.Event()

    def _wait(self) -> None:
        self.waits.set()
        assert self.go.wait(SECONDS)

    def save(self) -> Iterator[bytes]:
        yield b"first"
        self._wait()
        yield b"second"

    def load(self, state: StateReader) -> None:
        state.read(5)
        self._wait()
        if state.read(MIB).strip(b"x"):
            raise StateRejected


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    device = Waiting()
    yield device
    device.go.set()


def ask(client: Raw, size: int, *, flags: int = 0) -> int:
    """Ask for state without waiting; return the number of the message."""
    return client.send(MIG_DATA_READ, struct.pack("<II", 8 + size, size), flags=flags)


def give(client: Raw, data: bytes) -> int:
    """Send state without waiting; return the number of the message."""
    return client.send(MIG_DATA_WRITE, struct.pack("<II", 8 + len(data), len(data)) + data)


def expect_woken(client: Raw, numbers: list[int]) -> None:
    """Receive ENODEV for each of these requests, in whatever order."""
    left = set(numbers)
    for _ in numbers:
        woken = client.receive()
        assert woken is not None
        left.remove(woken.msg_id)
        assert woken.errno == errno.ENODEV


def expect(client: Raw, number: int) -> Message:
    message = client.receive()
    assert message is not None
    assert message.msg_id == number
    return message


# Reading.


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 10, 11, 1 << 20])
def test_a_reply_has_as_much_as_was_asked_for_until_the_end(size: int) -> None:
    state = b"abc" + b"defghij" + b"k"
    with client_of(Pieces(b"abc", b"", b"defghij", b"k")) as client:
        assert client.set_state(STOP_COPY) == 0
        for at in range(0, len(state), size):
            assert read_data(client.read_state(size)) == state[at : at + size]
        assert read_data(client.read_state(size)) == read_data(client.read_state(size)) == b""


def test_a_large_state_arrives_whole_in_pieces_of_any_size() -> None:
    chance = random.Random(7)
    pieces = [chance.randbytes(chance.choice((10, 5000, 300_000))) for _ in range(60)]
    with client_of(Pieces(*pieces)) as client:
        assert client.set_state(STOP_COPY) == 0
        state = bytearray()
        while piece := read_data(client.read_state(chance.choice((1, 4000, 70_000, MIB)))):
            state += piece
        assert state == b"".join(pieces)


@pytest.mark.parametrize("capabilities", [FULL, PLAIN])
def test_the_temporary_end_is_enomsg_with_the_extension_and_nothing_without(
    capabilities: bytes,
) -> None:
    with client_of(Card(), capabilities) as client:
        assert client.set_state(PRE_COPY) == 0
        assert read_data(client.read_state(100)) == MAGIC
        end = client.read_state(100)
        if capabilities is FULL:
            assert end.errno == errno.ENOMSG
        else:
            assert read_data(end) == b""
        assert client.set_state(PRE_COPY_P2P) == 0
        assert client.set_state(STOP_COPY) == 0
        assert len(client.whole_state()) > 4096
        assert read_data(client.read_state(100)) == b""  # the permanent end is told as ever


def test_a_failure_of_the_device_is_the_errno_of_the_read() -> None:
    class Failing(Pieces):
        def save(self) -> Iterator[bytes]:
            yield b"some"
            raise DeviceError(errno.EREMOTEIO)

    with client_of(Failing()) as client:
        assert client.set_state(STOP_COPY) == 0
        assert read_data(client.read_state(100)) == b"some"
        assert client.read_state(100).errno == errno.EREMOTEIO
        assert client.read_state(100).errno == errno.ENODEV


def test_reads_may_be_sent_ahead() -> None:
    with client_of(Pieces(bytes(10), bytes(range(200)))) as client:
        assert client.set_state(STOP_COPY) == 0
        numbers = [ask(client, 50) for _ in range(6)]
        replies = [read_data(expect(client, number)) for number in numbers]
        assert b"".join(replies) == bytes(10) + bytes(range(200))
        assert [len(reply) for reply in replies] == [50, 50, 50, 50, 10, 0]


def test_a_read_that_wants_no_reply_takes_its_bytes() -> None:
    with client_of(Pieces(b"0123456789", b"abcdefghij")) as client:
        assert client.set_state(STOP_COPY) == 0
        ask(client, 5, flags=NO_REPLY)
        ask(client, 7, flags=NO_REPLY)
        assert read_data(client.read_state(100)) == b"cdefghij"


@pytest.mark.parametrize(
    ("argsz", "size", "capabilities"),
    [
        (8 + (1 << 20) + 1, (1 << 20) + 1, PLAIN),
        (8 + (16 << 20) + 1, (16 << 20) + 1, FULL),
        (0xFFFF_FFFF, 0xFFFF_FFF7, FULL),
        (107, 100, FULL),
        (0, 0, FULL),
    ],
)
def test_more_than_was_agreed_on_and_room_for_less_are_einval(
    argsz: int, size: int, capabilities: bytes
) -> None:
    with client_of(Card(), capabilities) as client:
        assert client.set_state(STOP_COPY) == 0
        body = struct.pack("<II", argsz, size)
        assert client.call(MIG_DATA_READ, body).errno == errno.EINVAL
        assert read_data(client.read_state(4)) == MAGIC


def test_sixteen_mebibytes_fit_into_one_message() -> None:
    state = bytes(1000) + random.Random(1).randbytes(16 * MIB)
    device = Pieces(b"x", state, room=3 * MIB)
    with client_of(device) as client:
        assert client.set_state(STOP_COPY) == 0
        moved = read_data(client.read_state(16 * MIB))
        assert moved == (b"x" + state)[: 16 * MIB]
        assert client.set_state(RESUMING) == 0
        assert client.write_state(moved) == 0
        assert client.set_state(STOP) == 0
    assert device.loaded == moved


# Waiting.


def set_state(client: Raw, state: int) -> int:
    return client.send(FEATURE, struct.pack("<IIIi", 16, STATE | SET, state, -1))


def test_a_read_that_waits_holds_nothing_up(waiting: Waiting) -> None:
    with client_of(waiting) as client:
        assert client.set_state(STOP_COPY) == 0
        number = ask(client, 100)
        assert client.good(GET_INFO, struct.pack("<4I", 16, 0, 0, 0))
        assert client.state() == STOP_COPY
        waiting.go.set()
        assert read_data(expect(client, number)) == b"firstsecond"


@pytest.mark.parametrize("how", [STOP, RUNNING, RESET, RESUMING])
def test_whatever_ends_the_session_wakes_the_reads_that_wait(waiting: Waiting, how: int) -> None:
    with client_of(waiting) as client:
        assert client.set_state(STOP_COPY) == 0
        numbers = [ask(client, 100), ask(client, 100), ask(client, 3)]
        assert waiting.waits.wait(SECONDS)
        ending = client.send(RESET) if how == RESET else set_state(client, how)
        expect_woken(client, numbers)
        waiting.go.set()
        assert expect(client, ending).errno == 0
        assert client.state() == (RUNNING if how == RESET else how)


def test_a_client_that_leaves_while_it_waits_makes_room_for_the_next(waiting: Waiting) -> None:
    with served(waiting) as path:
        with Raw.connect(path) as client:
            assert client.set_state(STOP_COPY) == 0
            ask(client, 100)
            assert waiting.waits.wait(SECONDS)
            waiting.go.set()
        with Raw.connect(path) as client:
            assert client.state() == RUNNING


def test_no_more_transfers_are_begun_than_may_wait(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "LOOK", 0.02)
    with client_of(waiting) as client:
        assert client.set_state(STOP_COPY) == 0
        numbers = [ask(client, 3) for _ in range(data_module.PENDING + 4)]
        late = client.send(GET_INFO, struct.pack("<4I", 16, 0, 0, 0))
        assert read_data(expect(client, numbers[0])) == b"fir"
        assert waiting.waits.wait(SECONDS)
        client.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.receive()
        client.sock.settimeout(SECONDS)
        waiting.go.set()
        replies = {m.msg_id: m for m in (client.receive() for _ in range(8)) if m is not None}
        assert late in replies
        assert b"".join(read_data(replies[n]) for n in numbers[1:]) == b"stsecond"


def test_a_client_that_leaves_ends_what_was_not_begun(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "LOOK", 0.02)
    with served(waiting) as path:
        with Raw.connect(path) as client:
            assert client.set_state(STOP_COPY) == 0
            for _ in range(data_module.PENDING + 4):
                ask(client, 100)
            assert waiting.waits.wait(SECONDS)
        waiting.go.set()
        with Raw.connect(path) as client:
            assert client.state() == RUNNING


# Writing.


@pytest.mark.parametrize("room", [1, 7, 4096, 100_000, 3 * MIB])
def test_what_is_written_is_what_is_loaded(room: int) -> None:
    chance = random.Random(room)
    size = 3000 if room < 10 else 4 * MIB
    state = chance.randbytes(size)
    device = Pieces(room=room)
    with client_of(device) as client:
        assert client.set_state(RESUMING) == 0
        at = 0
        while at < len(state):
            step = min(chance.choice((1, 100, 4072, 4073, 5000, 80_000, MIB)), len(state) - at)
            assert client.write_state(state[at : at + step]) == 0
            at += step
        assert client.set_state(STOP) == 0
    assert device.loaded == state


def test_writes_may_be_sent_ahead() -> None:
    device = Pieces()
    with client_of(device) as client:
        assert client.set_state(RESUMING) == 0
        state = [bytes([number]) * 6000 for number in range(20)]
        sender = threading.Thread(target=lambda: numbers.extend(give(client, s) for s in state))
        numbers: list[int] = []
        sender.start()
        replies = [client.receive() for _ in state]
        sender.join()
        assert [reply.msg_id for reply in replies if reply is not None] == numbers
        assert client.set_state(STOP) == 0
    assert device.loaded == b"".join(state)


def test_a_write_that_waits_holds_nothing_up(waiting: Waiting) -> None:
    with client_of(waiting) as client:
        assert client.set_state(RESUMING) == 0
        number = give(client, b"first" + b"x" * 500_000)
        assert waiting.waits.wait(SECONDS)
        assert client.good(GET_INFO, struct.pack("<4I", 16, 0, 0, 0))
        assert client.state() == RESUMING
        waiting.go.set()
        assert expect(client, number).errno == 0


@pytest.mark.parametrize("count", [1, data_module.PENDING])
def test_a_short_write_that_waits_is_not_changed_by_what_comes_after_it(count: int) -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow(Pieces):
        def load(self, state: StateReader) -> None:
            begun.set()
            assert go.wait(SECONDS)
            super().load(state)

    device = Slow()
    with client_of(device) as client:
        assert client.set_state(RESUMING) == 0
        numbers = [give(client, b"short") for _ in range(count)]
        assert begun.wait(SECONDS)
        for _ in range(2):  # the second one comes after the first was answered, so by itself
            client.good(GET_INFO, struct.pack("<4I", 16, *(3 * [0xFFFFFFFF])))
        go.set()
        assert [expect(client, number).errno for number in numbers] == [0] * count
        assert client.set_state(STOP) == 0
    assert device.loaded == b"short" * count


def test_short_writes_beyond_those_that_may_wait_are_loaded_as_they_were_sent() -> None:
    go = threading.Event()

    class Slow(Pieces):
        def load(self, state: StateReader) -> None:
            assert go.wait(SECONDS)
            super().load(state)

    device, pieces = Slow(), [bytes([number]) * 50 for number in range(data_module.PENDING + 4)]
    with client_of(device) as client:
        assert client.set_state(RESUMING) == 0
        numbers = [give(client, piece) for piece in pieces]
        go.set()
        assert [expect(client, number).errno for number in numbers] == [0] * len(pieces)
        assert client.set_state(STOP) == 0
    assert device.loaded == b"".join(pieces)


def test_a_reset_wakes_the_writes_that_wait(waiting: Waiting) -> None:
    with client_of(waiting) as client:
        assert client.set_state(RESUMING) == 0
        numbers = [give(client, b"first" + b"x" * 50_000), give(client, b"x" * 50_000)]
        assert waiting.waits.wait(SECONDS)
        ending = client.send(RESET)
        expect_woken(client, numbers)
        waiting.go.set()
        assert expect(client, ending).errno == 0


def test_a_write_of_a_refused_state_fails_and_the_stream_of_messages_goes_on() -> None:
    with client_of(Card()) as client:
        assert client.set_state(RESUMING) == 0
        assert client.write_state(bytes(3 * MIB)) == errno.EINVAL
        assert client.write_state(bytes(5 * MIB)) == errno.ENODEV
        assert client.set_state(STOP) == errno.EINVAL
        client.good(RESET)
        assert client.state() == RUNNING


def test_bytes_behind_the_end_of_a_state_are_enomem() -> None:
    device = Pieces(room=100, most=1000)
    with client_of(device) as client:
        assert client.set_state(RESUMING) == 0
        assert client.write_state(bytes(500)) == 0
        assert client.write_state(bytes(2 * MIB)) == errno.ENOMEM
        assert client.write_state(bytes(2 * MIB)) == errno.ENOMEM
        assert client.set_state(STOP) == 0
    assert len(device.loaded) == 1000


def without_a_session(client: Raw) -> tuple[int, int]:
    return errno.EINVAL, errno.EINVAL


def in_saving(client: Raw) -> tuple[int, int]:
    assert client.set_state(STOP_COPY) == 0
    return 0, errno.EBADF


def in_resuming(client: Raw) -> tuple[int, int]:
    assert client.set_state(RESUMING) == 0
    return errno.EBADF, 0


def behind_saving(client: Raw) -> tuple[int, int]:
    in_saving(client)
    assert client.set_state(STOP) == 0
    return errno.ENODEV, errno.EBADF


def behind_a_reset(client: Raw) -> tuple[int, int]:
    in_resuming(client)
    client.good(RESET)
    return errno.EBADF, errno.ENODEV


@pytest.mark.parametrize(
    "situation", [without_a_session, in_saving, in_resuming, behind_saving, behind_a_reset]
)
def test_transfers_fail_as_on_a_descriptor_that_is_missing_dead_or_of_the_other_direction(
    situation: Callable[[Raw], tuple[int, int]],
) -> None:
    with client_of(Pieces(b"state")) as client:
        reading, writing = situation(client)
        assert client.read_state(4).errno == reading
        assert client.write_state(bytes(100_000)) == writing
        assert client.feature(STATE, GET, room=8).errno == 0


@pytest.mark.parametrize(
    ("argsz", "size", "length"), [(107, 100, 100), (108, 100, 99), (108, 100, 101), (8, 0, 1)]
)
def test_a_write_that_contradicts_itself_is_einval(argsz: int, size: int, length: int) -> None:
    device = Pieces()
    with client_of(device) as client:
        assert client.set_state(RESUMING) == 0
        body = struct.pack("<II", argsz, size) + bytes(length)
        assert client.call(MIG_DATA_WRITE, body).errno == errno.EINVAL
        assert client.write_state(b"") == 0
        assert client.set_state(STOP) == 0
    assert not device.loaded


def test_a_client_that_stops_in_the_middle_of_a_write_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vfiomig.doors.vfio_user.line.STALLED", 0.2)
    device = Pieces()
    with served(device) as path:
        for sent in (0, 100, 5000, 100_000):
            with Raw.connect(path) as client:
                assert client.set_state(RESUMING) == 0
                body = struct.pack("<II", 8 + MIB, MIB) + bytes(sent)
                client.send(MIG_DATA_WRITE, body, size=24 + MIB)
                assert client.receive() is None
        with Raw.connect(path) as client:
            assert client.state() == RUNNING


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfiomig.doors.vfio_user.line.STALLED", 0.2)
    device = Pieces(*[bytes(MIB)] * 8)
    with (
        served(device) as path,
        Raw.connect(path) as client,
        Raw.connect(path, None) as second,
    ):
        assert client.set_state(STOP_COPY) == 0
        ask(client, 8 * MIB)
        second.good(1, struct.pack("<HH", 0, 2) + PLAIN)  # answered, so the first is over
        assert second.state() == RUNNING
