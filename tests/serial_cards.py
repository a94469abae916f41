"""A serial card without a front door, its driver's side, and a client of its socket."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

from vfiomig.device import Interrupts
from vfiomig.models.mtty import Mtty

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
#: FIFOs on with a trigger level of one, DTR, RTS and OUT2.
OPENED = ((LCR, 0x03), (FCR, 0x07), (FCR, 0x01), (MCR, 0x0B))
DEADLINE_S = 20.0


class Pin(Interrupts):
    """An interrupt pin that notes its levels, and wakes who waits for one."""

    def __init__(self) -> None:
        self.levels: list[bool] = []
        self._news = threading.Condition()

    def intx(self, level: bool) -> None:
        with self._news:
            self.levels.append(level)
            self._news.notify_all()

    @property
    def high(self) -> bool:
        return bool(self.levels) and self.levels[-1]

    def wait_until_high(self) -> None:
        with self._news:
            assert self._news.wait_for(lambda: self.high, DEADLINE_S)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


class Driver:
    """The registers of one port, as a driver reaches them."""

    def __init__(self, card: Mtty, port: int = 0) -> None:
        self.card = card
        self.region = Mtty.regions[port]

    def read(self, offset: int) -> int:
        return self.region.read(self.card, offset, 1)[0]

    def write(self, offset: int, value: int) -> None:
        self.region.write(self.card, offset, bytes((value,)))

    def open(self) -> None:
        for offset, value in OPENED:
            self.write(offset, value)

    def send_what_fits(self, data: bytes) -> int:
        """Fill the FIFO if it is empty, as the driver does; return how many bytes it took."""
        if not self.read(LSR) & 0x20:
            return 0
        for value in data[:16]:
            self.write(DATA, value)
        return min(len(data), 16)

    def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            assert eventually(lambda: bool(self.read(LSR) & 0x20))
            rest = rest[self.send_what_fits(bytes(rest)) :]

    def receive_what_is_there(self) -> bytes:
        data = bytearray()
        while self.read(LSR) & 0x01:
            data.append(self.read(DATA))
        return bytes(data)

    def receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            assert eventually(lambda: bool(self.read(LSR) & 0x01))
            data.append(self.read(DATA))
        return bytes(data)


def client_of(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(DEADLINE_S)
    client.connect(str(path))
    return client


def receive(client: socket.socket, size: int) -> bytes:
    """Receive so many bytes, fewer only if the card closed before."""
    data = bytearray()
    while len(data) < size and (piece := client.recv(size - len(data))):
        data += piece
    return bytes(data)
