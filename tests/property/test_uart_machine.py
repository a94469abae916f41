"""The 16550A against a model of its data sheet, in any order of accesses, bytes and lines."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pattern_streams import Chunks
from uart_model import ModelUart
from vfiomig.models import mtty_stream
from vfiomig.models.mtty_stream import PortState
from vfiomig.models.uart16550 import Uart16550

OFFSETS = st.integers(0, 7)
#: Values that mean something somewhere, and any other.
VALUES = st.one_of(
    st.sampled_from([0x00, 0x01, 0x02, 0x03, 0x07, 0x0B, 0x0F, 0x1A, 0x80, 0xC1, 0xC7]),
    st.integers(0, 255),
)
ENABLES = st.integers(0, 15)
LINES = st.integers(0, 15).map(lambda bits: bits << 4)


def moved(uart: Uart16550) -> tuple[Uart16550, bytes]:
    """What a state of ``uart`` makes of a new one, and the state."""
    port = PortState(uart.registers, bytes(uart.rx), bytes(uart.tx), b"")
    stream = mtty_stream.pack_header(1) + mtty_stream.pack_port(port)
    (loaded,) = mtty_stream.load(Chunks([stream]), 1)
    assert loaded == port
    copy = Uart16550()
    copy.restore(loaded.registers, loaded.rx, loaded.tx)
    again = PortState(copy.registers, bytes(copy.rx), bytes(copy.tx), b"")
    assert mtty_stream.pack_header(1) + mtty_stream.pack_port(again) == stream
    return copy, stream


class UartMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = ModelUart(0xB0)
        self.uart = Uart16550(0xB0)

    def turn_around(self) -> None:
        self.model.turn_around()
        if self.uart.looped:
            self.uart.loop_back()

    @rule(offset=OFFSETS, value=VALUES)
    def write(self, offset: int, value: int) -> None:
        self.model.write(offset, value)
        self.uart.write(offset, value)
        self.turn_around()

    @rule(data=st.binary(min_size=1, max_size=20))
    def write_bytes(self, data: bytes) -> None:
        for byte in data:
            self.write(0, byte)

    @initialize(fifo=st.sampled_from([0x00, 0x01, 0x41, 0x81, 0xC1]), enables=ENABLES)
    def set_up(self, fifo: int, enables: int) -> None:
        for offset, value in ((3, 0x03), (2, fifo), (4, 0x0B), (1, enables)):
            self.write(offset, value)

    @rule(enables=ENABLES)
    def write_enables(self, enables: int) -> None:
        self.write(1, enables)

    @rule()
    def read_identification(self) -> None:
        self.read(2)

    @rule(offset=OFFSETS)
    def read(self, offset: int) -> None:
        assert self.uart.read(offset) == self.model.read(offset)
        self.turn_around()

    @rule(times=st.integers(1, 20))
    def read_data(self, times: int) -> None:
        for _ in range(times):
            self.read(0)

    @rule(data=st.binary(min_size=1, max_size=20))
    def arrive(self, data: bytes) -> None:
        self.uart.receive(data)
        for byte in data:
            self.model.arrive(byte)

    @precondition(lambda self: self.model.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(self.model.waiting)))
        assert list(self.uart.tx[:count]) == [self.model.leave() for _ in range(count)]
        self.uart.sent(count)

    @rule(lines=LINES)
    def change_lines(self, lines: int) -> None:
        self.model.put_lines(lines)
        self.uart.set_lines(lines)

    @rule()
    def move(self) -> None:
        self.uart, _ = moved(self.uart)
        self.uart.set_lines(self.model.outside)

    @invariant()
    def both_agree(self) -> None:
        model, uart = self.model, self.uart
        assert uart.interrupt == model.pin
        assert uart.identification == model.identification
        assert uart.room == (16 if model.fifos else 1) - len(model.received)
        assert list(uart.rx) == model.received
        assert list(uart.tx) == model.waiting

    @invariant()
    def its_state_makes_the_same_chip(self) -> None:
        copy, stream = moved(self.uart)
        assert moved(copy)[1] == stream


TestUart = UartMachine.TestCase
TestUart.settings = settings(max_examples=150, stateful_step_count=60)
