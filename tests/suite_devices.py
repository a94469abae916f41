"""Devices for the client's tests, by SPEC, so that any front door can serve them."""

from __future__ import annotations

import errno
import struct
import threading
from typing import TYPE_CHECKING

from vfiomig import Device, DeviceError, Region, State, StateRejected
from vfiomig.device import Msix
from vfiomig.fsm import arcs_of, parse_capabilities

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig import StateReader

MAGIC = b"CARD"
RECORD = struct.Struct("<HH")  # offset and length; bytes of BAR0 follow
SIZE = 4096
END = RECORD.pack(0xFFFF, 0)


class Card(Device):
    """BAR0 is its state. PRE_COPY offers the magic, then nothing, then the first 16 bytes.

    ``fail`` names arcs and what they fail with, ``stop-stop_copy:EIO+running-stop:EBUSY``, the
    first ``times`` times; ``fatal`` sends the device to ERROR then. ``resets`` fail that often.
    """

    bar0 = Region(size=SIZE)

    def __init__(
        self,
        caps: str = "all",
        fail: str = "",
        times: int = 1,
        fatal: bool = False,
        resets: int = 0,
    ) -> None:
        self.capabilities = parse_capabilities(caps)
        self._failures = _parse_failures(self, fail, times)
        self._fatal = fatal
        self._resets = resets
        self._magic_sent = False

    def step(self, origin: State, target: State) -> None:
        number, left = self._failures.get((origin, target), (0, 0))
        if left:
            self._failures[origin, target] = (number, left - 1)
            raise DeviceError(number, fatal=self._fatal)
        if State.STOP_COPY is origin or target is State.RUNNING:
            self._magic_sent = False

    def reset(self) -> None:
        if self._resets:
            self._resets -= 1
            raise DeviceError(errno.EIO)
        self.bar0[:] = bytes(SIZE)
        self._magic_sent = False

    def precopy(self) -> Iterator[bytes]:
        self._magic_sent = True
        yield MAGIC
        yield b""
        yield RECORD.pack(0, 16) + self.bar0[:16]

    def save(self) -> Iterator[bytes]:
        if not self._magic_sent:
            yield MAGIC
        yield RECORD.pack(0, SIZE) + self.bar0
        yield END

    def state_size(self) -> int:
        return len(MAGIC) + RECORD.size + SIZE + len(END)

    def load(self, state: StateReader) -> None:
        if state.read(len(MAGIC)) != MAGIC:
            raise StateRejected("no card's state")
        while (header := state.read(RECORD.size)) != END:
            if len(header) < RECORD.size:
                raise StateRejected("the state is cut off")
            offset, length = RECORD.unpack(header)
            if offset + length > SIZE:
                raise StateRejected("a record leaves BAR0")
            self.bar0[offset : offset + length] = state.read(length)


class Stuck(Card):
    """The second half of its state comes when BAR1 is written to."""

    bar1 = Region(size=16)

    def __init__(self) -> None:
        super().__init__(caps="stop-copy")
        self._go_on = threading.Event()

    @bar1.writer
    def write_bar1(self, offset: int, data: bytes) -> None:
        self._go_on.set()

    def save(self) -> Iterator[bytes]:
        yield MAGIC
        self._go_on.wait(20)
        yield END


class Ring(Device):
    """Writing an IOVA to BAR0 makes it write 16 bytes there by DMA."""

    bar0 = Region(size=16)

    @bar0.writer
    def write_bar0(self, offset: int, data: bytes) -> None:
        self.dma.write(int.from_bytes(data, "little"), b"written by DMA!!")


class Untracked(Ring):
    """The IOMMU in front of it cannot track its writes."""

    iommu_dirty_tracking = False


class Bell(Device):
    """BAR0: byte 0 is the level of INTx, writing byte 1 sends that MSI-X vector.

    BAR1 can be mapped but for its second page, where the MSI-X table and pending bits lie.
    """

    interrupt_pin = 1
    pci_capabilities = (Msix(vectors=4, table=(1, 4096), pending=(1, 4096 + 2048)),)
    bar0 = Region(size=16)
    bar1 = Region(size=4 * 4096, mapped=((0, 4096), (2 * 4096, 2 * 4096)))

    @bar0.writer
    def write_bar0(self, offset: int, data: bytes) -> None:
        if offset == 0:
            self.interrupts.intx(bool(data[0]))
        elif offset == 1:
            self.interrupts.msix(data[0])


class Closed(Device):
    """Refuses to start."""

    def start(self) -> None:
        raise DeviceError(errno.EBUSY)


def _parse_failures(
    device: Device, text: str, times: int
) -> dict[tuple[State, State], tuple[int, int]]:
    names = {
        f"{arc.origin.name}-{arc.target.name}".lower(): (arc.origin, arc.target)
        for arc in arcs_of(device.capabilities)
    }
    parts = (part.split(":") for part in filter(None, text.split("+")))
    return {names[arc]: (getattr(errno, word), times) for arc, word in parts}
