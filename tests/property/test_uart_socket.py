"""Whatever a driver, a client and migrations do in any order, no byte is lost, doubled or moved."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pattern_streams import Chunks, state_of
from serial_cards import FCR, IER, IIR, LCR, LSR, MCR, MSR, SCR, Driver, Pin, client_of, receive
from vfiomig.models.mtty import Mtty

if TYPE_CHECKING:
    import socket

SIZES = st.integers(1, 60)


class SocketMachine(RuleBasedStateMachine):
    """A card with a socket and a plug, a client, and a driver that takes what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "port"
        self.numbers = itertools.count()
        self.client: socket.socket | None = None
        #: Written and not yet read, from the client, to it, and round the plug.
        self.inward, self.outward, self.around = bytearray(), bytearray(), bytearray()
        self.card = self.new_card()
        self.card.start()
        for driver in self.drivers:
            driver.open()

    def new_card(self) -> Mtty:
        card = Mtty(port0=f"socket:{self.path}")
        card.interrupts = Pin()
        return card

    @property
    def drivers(self) -> tuple[Driver, Driver]:
        return Driver(self.card, 0), Driver(self.card, 1)

    def fresh(self, size: int) -> bytes:
        """Bytes that follow those of before, so that a lost one shows."""
        return bytes(number % 251 for number in itertools.islice(self.numbers, size))

    # The client.

    def connected(self) -> socket.socket:
        if self.client is None:
            self.client = client_of(self.path)
        return self.client

    @rule(size=SIZES)
    def client_writes(self, size: int) -> None:
        data = self.fresh(size)
        self.connected().sendall(data)
        self.inward += data

    @rule()
    def client_reads_all(self) -> None:
        assert receive(self.connected(), len(self.outward)) == self.outward
        self.outward.clear()

    @rule(size=SIZES)
    def client_reads(self, size: int) -> None:
        expected = self.outward[:size]
        assert receive(self.connected(), len(expected)) == expected
        del self.outward[:size]

    @rule()
    def client_goes(self) -> None:
        """End in order: it says that it has finished, and hears what was sent to it."""
        if self.client is None or self.outward:
            return
        self.client.close()
        self.client = None

    # The driver.

    @rule(size=SIZES)
    def driver_writes(self, size: int) -> None:
        data = self.fresh(size)
        taken = self.drivers[0].send_what_fits(data)
        if taken < len(data):
            self.numbers = itertools.count(data[taken])
        self.outward += data[:taken]

    @rule()
    def driver_reads_what_is_there(self) -> None:
        data = self.drivers[0].receive_what_is_there()
        assert self.inward[: len(data)] == data
        del self.inward[: len(data)]

    @rule()
    def driver_reads_all(self) -> None:
        assert self.drivers[0].receive(len(self.inward)) == self.inward
        self.inward.clear()

    @rule(size=SIZES)
    def driver_writes_to_the_plug(self, size: int) -> None:
        data = self.fresh(size)
        taken = self.drivers[1].send_what_fits(data)
        if taken < len(data):
            self.numbers = itertools.count(data[taken])
        self.around += data[:taken]

    @rule(size=SIZES)
    def driver_reads_from_the_plug(self, size: int) -> None:
        size = min(size, len(self.around))
        assert self.drivers[1].receive(size) == self.around[:size]
        del self.around[:size]

    @rule(port=st.sampled_from([0, 1]), trigger=st.sampled_from([0x01, 0x41, 0x81, 0xC1]))
    def driver_sets_the_trigger_level(self, port: int, trigger: int) -> None:
        self.drivers[port].write(FCR, trigger)

    @rule(
        port=st.sampled_from([0, 1]),
        offset_and_value=st.one_of(
            st.tuples(st.just(IER), st.integers(0, 15)),
            st.tuples(st.just(MCR), st.integers(0, 15)),
            st.tuples(st.just(LCR), st.integers(0, 127)),
            st.tuples(st.just(SCR), st.integers(0, 255)),
        ),
    )
    def driver_writes_a_register(self, port: int, offset_and_value: tuple[int, int]) -> None:
        self.drivers[port].write(*offset_and_value)

    @rule(port=st.sampled_from([0, 1]), offset=st.sampled_from([IIR, LCR, MCR, MSR, SCR]))
    def driver_reads_a_register(self, port: int, offset: int) -> None:
        self.drivers[port].read(offset)

    # The card.

    @rule()
    def pause(self) -> None:
        self.card.stop()
        self.client_hears_the_end()
        self.card.start()

    @rule()
    def migrate(self) -> None:
        self.card.stop()
        self.client_hears_the_end()
        stream, destination = state_of(self.card), self.new_card()
        destination.load(Chunks([stream]))
        assert state_of(destination) == stream
        self.card = destination
        self.card.start()

    def client_hears_the_end(self) -> None:
        """Read what had left the card; the rest of it is still in there."""
        if self.client is not None:
            heard = receive(self.client, len(self.outward) + 1)
            assert self.outward[: len(heard)] == heard
            del self.outward[: len(heard)]
            self.client.close()
            self.client = None

    @invariant()
    def nothing_is_overrun(self) -> None:
        assert not any(driver.read(LSR) & 0x02 for driver in self.drivers)

    def teardown(self) -> None:
        try:
            self.driver_reads_all()
            self.client_reads_all()
            assert self.drivers[1].receive(len(self.around)) == self.around
            assert not any(driver.read(LSR) & 0x01 for driver in self.drivers)
        finally:
            self.card.stop()
            if self.client is not None:
                self.client.close()
            self.folder.cleanup()


TestSocket = SocketMachine.TestCase
TestSocket.settings = settings(max_examples=40, stateful_step_count=40)
