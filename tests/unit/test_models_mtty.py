"""``mtty``: its keys, its ports, its socket, its interrupt and what of it travels."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from pattern_streams import load, state_of
from serial_cards import (
    DATA,
    DEADLINE_S,
    IER,
    IIR,
    LSR,
    MCR,
    MSR,
    SCR,
    Driver,
    Pin,
    client_of,
    eventually,
    receive,
)
from vfiomig import Capability, SpecError, State, StateRejected
from vfiomig.client import open_device
from vfiomig.errors import DeviceError, RequestError, SetStateError
from vfiomig.models import make
from vfiomig.models.mtty import Mtty
from vfiomig.models.mtty_stream import HEADER_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vfiomig.client import DeviceClient

CONFIG = 7


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "port"


@pytest.fixture
def card(path: Path) -> Iterator[Mtty]:
    """A running card with a socket at its first port."""
    card = Mtty(port0=f"socket:{path}")
    card.interrupts = Pin()
    card.start()
    yield card
    card.stop()


@pytest.fixture
def plugged() -> Iterator[Mtty]:
    """A running card with a loopback plug at each port."""
    card = Mtty()
    card.interrupts = Pin()
    card.start()
    yield card
    card.stop()


def pin_of(card: Mtty) -> Pin:
    assert isinstance(card.interrupts, Pin)
    return card.interrupts


# What it is.


def test_its_configuration_space_is_that_of_the_sample_card() -> None:
    with open_device(Mtty()) as client:
        header = client.read_region(CONFIG, 0, 64)
    assert header[:8] == bytes.fromhex("48435332 0100 0002")
    assert header[8:12] == bytes.fromhex("10 020007")  # revision, 16550, serial controller
    assert header[0x10:0x28] == (b"\1\0\0\0" * 2).ljust(24, b"\0")  # two I/O BARs
    assert header[0x2C:0x30] == bytes.fromhex("48435332")
    assert header[0x34] == 0
    assert header[0x3D] == 1


@pytest.mark.parametrize(("ports", "bars"), [(1, {0}), (2, {0, 1})])
def test_each_port_has_a_bar_of_8_bytes(ports: int, bars: set[int]) -> None:
    with open_device(make(f"mtty,ports={ports}")) as client:
        assert {index for index in client.regions if index < CONFIG} == bars
        assert all(client.regions[index].size == 8 for index in bars)
        client.write_region(CONFIG, 0x10, b"\xff" * 8)
        sized = client.read_region(CONFIG, 0x10, 8)
    assert sized == (b"\xf9\xff\xff\xff" * len(bars)).ljust(8, b"\0")


def test_ports_are_two_16550s_that_know_nothing_of_each_other() -> None:
    with open_device(Mtty()) as client:
        client.write_region(0, SCR, b"\x11")
        client.write_region(1, SCR, b"\x22")
        assert client.read_region(0, SCR, 1) == b"\x11"
        assert client.read_region(1, SCR, 1) == b"\x22"
        assert client.read_region(0, LSR, 3) == b"\x60\x00\x11"  # any width, byte by byte


@pytest.mark.parametrize(
    ("caps", "bits"), [("none", 0), ("stop-copy", 1), ("stop-copy+pre-copy", 5), ("all", 7)]
)
def test_caps_are_what_the_card_reports(caps: str, bits: int) -> None:
    with open_device(Mtty(caps=caps)) as client:
        assert client.capabilities == Capability(bits)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mtty,ports=3", ["ports=3", "1 or 2"]),
        ("mtty,ports=0", ["ports=0"]),
        ("mtty,port0=modem", ["port0=modem", "loopback or socket:PATH"]),
        ("mtty,port1=socket:", ["socket:", "1 to 107 bytes"]),
        (f"mtty,port0=socket:/{'x' * 107}", ["1 to 107 bytes"]),
        ("mtty,ports=1,port1=socket:/a", ["port1=socket:/a", "one port"]),
        ("mtty,port0=socket:/a,port1=socket:/a", ["port0 listens there"]),
        ("mtty,caps=warp", ["'warp'"]),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_form(spec: str, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        make(spec)
    for word in words:
        assert word in str(caught.value)


# A loopback plug.


def test_a_plug_leads_data_and_lines_back(plugged: Mtty) -> None:
    driver = Driver(plugged)
    assert driver.read(MSR) == 0
    driver.open()
    assert driver.read(MSR) == 0xBB  # CTS, DSR, DCD, and that they changed
    driver.send(b"hello")
    assert driver.receive(5) == b"hello"
    assert Driver(plugged, 1).read(LSR) == 0x60


def test_a_plug_holds_the_sender_up_where_the_receiver_is_full(plugged: Mtty) -> None:
    driver = Driver(plugged)
    driver.open()
    driver.send(bytes(range(16)))
    assert driver.read(LSR) == 0x61
    assert driver.send_what_fits(bytes(range(16, 32))) == 16
    assert driver.read(LSR) == 0x01
    assert [driver.read(DATA) for _ in range(32)] == list(range(32))
    assert driver.read(LSR) == 0x60


def test_many_bytes_go_round_a_plug_by_interrupts(plugged: Mtty) -> None:
    driver, pin, data = Driver(plugged), pin_of(plugged), os.urandom(5000)
    driver.open()
    driver.write(IER, 0x03)
    sent, received = 0, bytearray()
    while len(received) < len(data):
        assert pin.high
        while not (source := driver.read(IIR)) & 1:
            if source & 0x0E in {4, 0x0C}:
                received += driver.receive_what_is_there()
            elif source & 0x0E == 2 and sent < len(data):
                sent += driver.send_what_fits(data[sent:])
    assert received == data


# The interrupt.


def test_the_pin_is_high_while_any_port_interrupts(plugged: Mtty) -> None:
    drivers, pin = (Driver(plugged, 0), Driver(plugged, 1)), pin_of(plugged)
    assert pin.levels == [False]
    for driver in drivers:
        driver.open()
        driver.write(IER, 0x01)
        driver.send(b"x")
    assert pin.levels == [False, True]
    drivers[0].read(DATA)
    assert pin.high
    drivers[1].read(DATA)
    assert pin.levels == [False, True, False]


def test_without_out2_no_interrupt_leaves_the_card(plugged: Mtty) -> None:
    driver, pin = Driver(plugged), pin_of(plugged)
    driver.write(IER, 0x02)
    assert not driver.read(IIR) & 1
    driver.write(IER, 0x00)
    driver.write(IER, 0x02)
    assert pin.levels == [False]
    driver.write(MCR, 0x08)
    assert pin.levels == [False, True]


def test_a_byte_from_the_socket_interrupts(card: Mtty, path: Path) -> None:
    driver = Driver(card)
    driver.open()
    driver.write(IER, 0x01)
    with client_of(path) as client:
        client.sendall(b"!")
        pin_of(card).wait_until_high()
        assert driver.read(IIR) == 0xC4
        assert driver.read(DATA) == ord("!")
        assert not pin_of(card).high


def test_the_pin_is_told_again_at_every_start(plugged: Mtty) -> None:
    driver, pin = Driver(plugged), pin_of(plugged)
    driver.open()
    driver.write(IER, 0x02)
    plugged.stop()
    told = list(pin.levels)
    driver.write(IER, 0x00)
    assert pin.levels == told
    driver.write(IER, 0x02)
    plugged.start()
    assert pin.levels == [*told, True]


# A socket.


def test_bytes_go_both_ways_through_the_socket(card: Mtty, path: Path) -> None:
    driver = Driver(card)
    driver.open()
    assert driver.read(MSR) == 0xB0
    with client_of(path) as client:
        client.sendall(b"from outside")
        assert driver.receive(12) == b"from outside"
        driver.send(b"from the driver, more than a FIFO")
        assert receive(client, 33) == b"from the driver, more than a FIFO"


def test_bytes_wait_in_the_transmitter_until_there_is_a_client(card: Mtty, path: Path) -> None:
    driver = Driver(card)
    driver.open()
    assert driver.send_what_fits(b"is anybody there") == 16
    assert driver.read(LSR) == 0x00
    with client_of(path) as client:
        assert receive(client, 16) == b"is anybody there"
        assert eventually(lambda: driver.read(LSR) == 0x60)


def test_a_client_that_does_not_read_holds_the_driver_up_and_loses_nothing(
    card: Mtty, path: Path
) -> None:
    driver, sent = Driver(card), bytearray()
    driver.open()
    with client_of(path) as client:
        client.sendall(b"x")
        assert driver.receive(1) == b"x"
        while count := driver.send_what_fits(number := len(sent).to_bytes(16, "big")):
            assert count == 16
            sent += number
        assert len(sent) > 16  # of which the socket has taken some
        assert driver.read(LSR) == 0x00
        received = receive(client, len(sent))
        assert received == sent
        assert eventually(lambda: driver.read(LSR) == 0x60)
        driver.send(b"on")
        assert receive(client, 2) == b"on"


def test_a_driver_that_does_not_read_holds_the_client_up_and_loses_nothing(
    card: Mtty, path: Path
) -> None:
    driver, sent = Driver(card), 0
    driver.open()
    data = os.urandom(1 << 20)
    with client_of(path) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while sent < len(data):
                sent += client.send(data[sent : sent + 1000])
        assert 1000 <= sent < len(data)
        assert driver.receive(sent) == data[:sent]
        assert not driver.read(LSR) & 0x02


def test_the_next_client_is_served_when_the_one_before_has_gone(card: Mtty, path: Path) -> None:
    driver = Driver(card)
    driver.open()
    with client_of(path) as first, client_of(path) as second:
        first.sendall(b"first, more than a FIFO has room for")
        second.sendall(b"second")
        assert driver.receive(1) == b"f"
        first.close()
        assert driver.receive(35 + 6) == b"irst, more than a FIFO has room forsecond"
        driver.send(b"!")
        assert receive(second, 1) == b"!"


def test_a_client_that_left_unread_bytes_behind_does_not_keep_the_next_waiting(
    card: Mtty, path: Path
) -> None:
    driver = Driver(card)
    driver.open()
    with client_of(path) as client:
        client.sendall(bytes(range(100)))
    with client_of(path) as client:
        driver.send(b"nobody has read that")
        assert receive(client, 20) == b"nobody has read that"
        client.sendall(b"!")
        assert driver.receive(101) == bytes(range(100)) + b"!"


def test_a_client_that_does_not_listen_is_heard_all_the_same(card: Mtty, path: Path) -> None:
    driver = Driver(card)
    driver.open()
    with client_of(path) as client:
        client.shutdown(socket.SHUT_RD)
        driver.send_what_fits(b"?")
        client.sendall(bytes(100))
        assert driver.receive(100) == bytes(100)
    with client_of(path) as client:
        assert receive(client, 1) == b"?"


def test_a_client_that_has_said_everything_still_hears(card: Mtty, path: Path) -> None:
    driver = Driver(card)
    driver.open()
    with client_of(path) as client:
        client.sendall(b"bye")
        client.shutdown(socket.SHUT_WR)
        assert driver.receive(3) == b"bye"
        driver.send(b"and to you")
        assert receive(client, 10) == b"and to you"
    with client_of(path) as client:
        client.sendall(b"next")
        assert driver.receive(4) == b"next"


def test_the_loop_inside_keeps_the_line_out(card: Mtty, path: Path) -> None:
    driver = Driver(card)
    driver.open()
    with client_of(path) as client:
        client.sendall(b"x")
        assert driver.receive(1) == b"x"
        driver.write(MCR, 0x1B)
        client.sendall(b"outside")
        driver.send(b"inside")
        assert driver.receive_what_is_there() == b"inside"
        driver.write(MCR, 0x0B)
        assert driver.receive(7) == b"outside"


# The life of a socket.


def test_the_socket_is_there_while_the_card_runs(path: Path) -> None:
    with open_device(Mtty(port0=f"socket:{path}")) as client:
        for state in (State.STOP, State.RUNNING_P2P, State.RUNNING, State.STOP):
            client.set_state(state)
            assert path.exists() == (state is not State.STOP)
        client.reset()
        assert path.exists()
    assert not path.exists()


def test_a_socket_that_nobody_listens_at_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(path))
    card = Mtty(port1=f"socket:{path}")
    card.start()
    client_of(path).close()
    card.stop()
    assert not path.exists()


def test_a_path_in_use_is_not_taken_and_the_other_port_lets_go(card: Mtty, path: Path) -> None:
    other = path.with_name("other")
    late = Mtty(port0=f"socket:{other}", port1=f"socket:{path}")
    with pytest.raises(DeviceError, match=str(path)) as caught:
        late.start()
    assert caught.value.errno == errno.EADDRINUSE
    assert not other.exists()
    client_of(path).close()


def test_a_file_at_the_path_stays(path: Path) -> None:
    path.write_text("precious")
    with open_device(Mtty()) as client, pytest.raises(RequestError) as caught:
        open_device(Mtty(port0=f"socket:{path}"))
    assert caught.value.errno == errno.EADDRINUSE
    assert path.read_text() == "precious"
    assert client is not None


def test_a_card_that_cannot_have_its_path_stays_stopped(card: Mtty, path: Path) -> None:
    with open_device(Mtty()) as client:
        client.set_state(State.STOP)
    late = Mtty(port0=f"socket:{path.with_name('late')}")
    with open_device(late) as client:
        client.set_state(State.STOP)
        late._ports[0].line.path = str(path)  # type: ignore[attr-defined]
        with pytest.raises(SetStateError) as caught:
            client.set_state(State.RUNNING)
        assert (caught.value.errno, caught.value.device_state) == (errno.EADDRINUSE, State.STOP)


def test_no_thread_to_be_had_is_eagain(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    card = Mtty(port0=f"socket:{path}")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(DeviceError) as caught:
            card.start()
    assert caught.value.errno == errno.EAGAIN
    assert not path.exists()
    card.start()
    client_of(path).close()
    card.stop()


def test_a_stopped_card_answers_its_registers_and_moves_nothing(plugged: Mtty) -> None:
    driver, pin = Driver(plugged), pin_of(plugged)
    driver.open()
    driver.write(IER, 0x01)
    plugged.stop()
    driver.write(DATA, 0x55)
    driver.write(SCR, 0x66)
    assert driver.read(LSR) == 0x00
    assert driver.read(SCR) == 0x66
    assert pin.levels == [False]
    plugged.start()
    assert pin.high
    assert driver.read(DATA) == 0x55


def test_a_reset_clears_registers_and_bytes_and_keeps_the_client(card: Mtty, path: Path) -> None:
    driver, fresh = Driver(card), state_of(Mtty(port0="socket:/fresh"))
    driver.open()
    with client_of(path) as client:
        client.sendall(bytes(16))
        assert driver.receive(1) == b"\0"
        card.reset()
        assert state_of(card) == fresh
        client.sendall(b"x")
        assert driver.receive(1) == b"x"


# State.


def migrate(source: DeviceClient, destination: DeviceClient) -> None:
    saving = source.set_state(State.STOP_COPY)
    loading = destination.set_state(State.RESUMING)
    assert saving is not None
    assert loading is not None
    for chunk in saving:
        loading.write_all(chunk)
    destination.set_state(State.RUNNING)


def test_bytes_in_flight_travel_and_the_socket_is_handed_over(path: Path) -> None:
    old, new = Mtty(port0=f"socket:{path}"), Mtty(port0=f"socket:{path}")
    data = os.urandom(1000)
    with open_device(old) as source:
        Driver(old).open()
        with client_of(path) as client:
            client.sendall(data)
            received = Driver(old).receive(10)
            Driver(old).send(b"the last that it sent")
            destination = open_idle(new)
            migrate(source, destination)
            assert receive(client, 100) == b"the last that it sent"
            with pytest.raises(BrokenPipeError):
                client.send(b"lost, and told so")
        with destination, client_of(path) as client:
            client.sendall(b"then this")
            received += Driver(new).receive(990 + 9)
            assert received == data + b"then this"
            Driver(new).send(b"ok")
            assert receive(client, 2) == b"ok"


def open_idle(card: Mtty) -> DeviceClient:
    """Open a card whose path another one still has: it is a destination and does not run yet."""
    line, card._ports[0].line = card._ports[0].line, Mtty()._ports[0].line
    client = open_device(card)
    client.set_state(State.STOP)
    card._ports[0].line = line
    return client


def test_what_the_transmitter_holds_is_sent_by_the_destination(path: Path) -> None:
    source, destination = Mtty(port0=f"socket:{path}"), Mtty(port0=f"socket:{path}")
    source.start()
    driver = Driver(source)
    driver.open()
    assert driver.send_what_fits(b"sixteen in there") == 16
    source.stop()
    load(destination, state_of(source))
    destination.start()
    with client_of(path) as client:
        assert receive(client, 16) == b"sixteen in there"
    destination.stop()


def test_what_was_written_before_the_stop_comes_after_a_start_of_the_same_card(
    card: Mtty, path: Path
) -> None:
    driver, data = Driver(card), os.urandom(500)
    driver.open()
    with client_of(path) as client:
        client.sendall(data)  # perhaps nobody has accepted the client yet
        card.stop()
        assert client.recv(1) == b""
    card.start()
    assert driver.receive(500) == data


def test_clients_whose_turn_had_not_come_are_heard_as_well(card: Mtty, path: Path) -> None:
    driver = Driver(card)
    driver.open()
    with client_of(path) as first, client_of(path) as second, client_of(path) as third:
        for client, data in ((first, bytes(100)), (second, b"second"), (third, b"third")):
            client.sendall(data)
        card.stop()
        assert [client.recv(1) for client in (first, second, third)] == [b""] * 3
    card.start()
    assert driver.receive(111) == bytes(100) + b"secondthird"


def test_a_restored_card_saves_the_same_bytes_until_it_runs(plugged: Mtty) -> None:
    for port in (0, 1):
        driver = Driver(plugged, port)
        driver.open()
        driver.write(SCR, 0x70 + port)
        driver.write(IER, 0x0F)
        driver.send(b"some bytes in the receiver"[: 16 + port])
        driver.read(IIR)
    plugged.stop()
    copy = Mtty()
    load(copy, state_of(plugged))
    assert state_of(copy) == state_of(plugged)
    assert Driver(copy, 1).read(SCR) == 0x71


def test_pre_copy_offers_the_header_and_stop_copy_the_rest() -> None:
    card = Mtty()
    with open_device(card) as client:
        whole = state_of(card)
        session = client.set_state(State.PRE_COPY)
        assert session is not None
        buffer = bytearray(1000)
        assert session.readinto(buffer) == HEADER_BYTES
        assert buffer[:HEADER_BYTES] == whole[:HEADER_BYTES]
        client.set_state(State.STOP_COPY)
        assert b"".join(map(bytes, session)) == whole[HEADER_BYTES:]
        client.set_state(State.STOP)
        session = client.set_state(State.STOP_COPY)
        assert session is not None
        assert b"".join(map(bytes, session)) == whole


def test_a_card_with_fewer_ports_refuses_the_state_with_what_to_do() -> None:
    with pytest.raises(StateRejected, match="give ports=2"):
        load(Mtty(ports=1), state_of(Mtty()))


def test_a_thread_of_clients_and_a_driver_lose_nothing(card: Mtty, path: Path) -> None:
    """Both directions at once, with the driver and the clients in threads of their own."""
    driver, data = Driver(card), os.urandom(20_000)
    driver.open()
    heard = bytearray()

    def talk() -> None:
        with client_of(path) as client:
            client.settimeout(DEADLINE_S)
            writer = threading.Thread(target=client.sendall, args=(data,))
            writer.start()
            heard.extend(receive(client, len(data)))
            writer.join()

    talker = threading.Thread(target=talk)
    talker.start()
    received, sent = bytearray(), 0
    while len(received) < len(data) or sent < len(data):
        received += driver.receive_what_is_there()
        sent += driver.send_what_fits(data[sent:])
    talker.join()
    assert received == data
    assert heard == data
