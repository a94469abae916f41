"""``mtty``: a PCI serial card with one or two ports, the twin of the kernel's sample driver.

Theory of operation
-------------------
Each port is a 16550A (``uart16550``) behind an I/O BAR of 8 bytes, connected to a line
(``serial_line``). One lock covers the card. After an access, and when a line has news,
``_settle_locked`` moves what can move and then sets INTA, which is high while a port interrupts.

Only a running card settles: one that is stopped still answers its registers, but no byte leaves
or comes in, and the pin stays as it is. Bytes that a client had written to its socket before the
stop, or before it left, and that found no room in the receiver, are held behind it: they travel
with the state, and the driver reads them before anything that the next client writes.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from vfiomig.device import Buffer, Device, PciIdentity, Region, StateReader
from vfiomig.errors import DeviceError, SpecError, StateRejected
from vfiomig.fsm import SAVING_GROUP, Capability, State, parse_capabilities
from vfiomig.models import mtty_stream
from vfiomig.models.mtty_stream import PortState
from vfiomig.models.serial_line import Line, LoopbackPlug, SocketLine
from vfiomig.models.uart16550 import Uart16550

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Mtty",)


class Port:
    """One UART and what it is connected to."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.power_on()

    def power_on(self) -> None:
        self.uart = Uart16550(self.line.lines(0))
        self.held = bytearray()
        self.interrupt = False  # as of the last settling

    def settle(self) -> None:
        """Move what can move, and see what that does to the interrupt."""
        uart = self.uart
        uart.set_lines(self.line.lines(uart.outputs))
        if uart.looped:
            uart.loop_back()
        else:
            if self.held:
                count = uart.room
                uart.receive(self.held[:count])
                del self.held[:count]
            self.line.exchange(uart, self.held)
        self.interrupt = uart.interrupt

    @property
    def state(self) -> PortState:
        uart = self.uart
        return PortState(uart.registers, bytes(uart.rx), bytes(uart.tx), bytes(self.held))

    def restore(self, state: PortState) -> None:
        self.uart.restore(state.registers, state.rx, state.tx)
        self.held = bytearray(state.held)


class Mtty(Device):
    """A PCI serial card; Linux drives it with 8250_pci.

    Keys:
      ports    1 or 2 (2)
      port0    loopback: a plug that leads everything back; or socket:PATH: a unix socket that
               the card listens at while it runs, for one client at a time (loopback)
      port1    likewise (loopback)
      caps     capability set: stop-copy+p2p+pre-copy, some of them, all, or none (all)
    """

    pci = PciIdentity(
        vendor=0x4348,
        device=0x3253,
        subsystem_vendor=0x4348,
        subsystem=0x3253,
        class_code=0x070002,  # serial controller, 16550
        revision=0x10,
        command=0x0001,  # I/O
        status=0x0200,
    )
    interrupt_pin = 1
    bar0 = Region(size=8, io=True)
    bar1 = Region(size=8, io=True)
    capabilities = Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY

    def __init__(
        self, ports: int = 2, port0: str = "loopback", port1: str = "loopback", caps: str = "all"
    ) -> None:
        if ports not in {1, 2}:
            raise SpecError(f"ports={ports}: the card has 1 or 2")
        if ports == 1 and port1 != "loopback":
            raise SpecError(f"port1={port1}: the card has one port; leave it out or give ports=2")
        if port0 == port1 != "loopback":
            raise SpecError(f"port1={port1}: port0 listens there; give it a path of its own")
        self.capabilities = Capability(0) if caps == "none" else parse_capabilities(caps)
        lines = {"port0": port0, "port1": port1} if ports == 2 else {"port0": port0}
        self._ports = [Port(_line(key, text)) for key, text in lines.items()]
        if ports == 1:
            self.regions = {0: Mtty.bar0}  # type: ignore[misc] # this card has no BAR1
        self._lock = threading.Lock()
        self._running = False
        self._level: bool | None = None  # of INTA, as last set
        self._header_due = True

    # Registers.

    @bar0.reader
    def read_port0(self, offset: int, length: int) -> bytes:
        return self._read(0, offset, length)

    @bar0.writer
    def write_port0(self, offset: int, data: bytes) -> None:
        self._write(0, offset, data)

    @bar1.reader
    def read_port1(self, offset: int, length: int) -> bytes:
        return self._read(1, offset, length)

    @bar1.writer
    def write_port1(self, offset: int, data: bytes) -> None:
        self._write(1, offset, data)

    def _read(self, port: int, offset: int, length: int) -> bytes:
        at = self._ports[port]
        with self._lock:
            data = bytes(map(at.uart.read, range(offset, offset + length)))
            self._settle_locked(at)
        return data

    def _write(self, port: int, offset: int, data: bytes) -> None:
        at = self._ports[port]
        with self._lock:
            for register, value in enumerate(data, offset):
                at.uart.write(register, value)
            self._settle_locked(at)

    def _settle_locked(self, *ports: Port) -> None:
        """Move what can move through these ports, and set the pin."""
        if not self._running:
            return
        for port in ports:
            port.settle()
        level = any(port.interrupt for port in self._ports)
        if level != self._level:
            self._level = level
            self.interrupts.intx(level)

    # Run levels. P2P quiescent still runs: the card has no peer-to-peer traffic to hold back.

    def start(self) -> None:
        if self._running:
            return
        try:
            for port in self._ports:
                port.line.open()
            with self._lock:
                self._running = True
                self._level = None
                self._settle_locked(*self._ports)
            for port in self._ports:
                port.line.attend(self._lock, partial(self._settle_locked, port))
        except DeviceError:
            self.stop()
            raise

    quiesce = start

    def stop(self) -> None:
        with self._lock:
            self._running = False
        for port in self._ports:
            rest = port.line.close()
            with self._lock:
                port.held += rest

    def step(self, origin: State, target: State) -> None:
        if origin not in SAVING_GROUP or target not in SAVING_GROUP:
            self._header_due = True

    def reset(self) -> None:
        with self._lock:
            for port in self._ports:
                port.power_on()
            self._header_due = True
            self._settle_locked(*self._ports)

    # State. Pre-copy offers the header, so that a card of another kind refuses it early.

    def precopy(self) -> Iterator[Buffer]:
        self._header_due = False
        yield mtty_stream.pack_header(len(self._ports))

    def save(self) -> Iterator[Buffer]:
        if self._header_due:
            yield mtty_stream.pack_header(len(self._ports))
        with self._lock:
            states = [port.state for port in self._ports]
        yield from map(mtty_stream.pack_port, states)

    def load(self, state: StateReader) -> None:
        loaded = mtty_stream.load(state, len(self._ports))
        with self._lock:
            try:
                for port, content in zip(self._ports, loaded, strict=True):
                    port.restore(content)
            except ValueError as problem:
                raise StateRejected(f"no port can be in this state: {problem}") from problem


def _line(key: str, text: str) -> Line:
    if text == "loopback":
        return LoopbackPlug()
    kind, _, path = text.partition(":")
    if kind != "socket":
        raise SpecError(f"{key}={text}: give loopback or socket:PATH")
    return SocketLine(path)
