"""Every hook and every attribute of a device, with what each is for. Copy, and delete the rest.

The device has memory in BAR2 and a doorbell in BAR0: an IOVA that is written to it makes the
device copy its first page there. ``python examples/template.py`` migrates one inside this process,
beginning while it still runs. ``examples/template.py:Template,rings=5`` works wherever a SPEC does.
"""

from __future__ import annotations

import errno
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import vfiomig
from vfiomig import (
    Capability,
    Device,
    DeviceError,
    PciIdentity,
    PrecopyInfo,
    Region,
    State,
    StateReader,
    StateRejected,
)
from vfiomig.device import Msi, PciExpress, PowerManagement

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vfiomig import Buffer

PAGE = 4096
PAGES = 16
#: BAR0: how often the doorbell rang, and the doorbell.
RUNG_AT, DOORBELL_AT = 0, 8
#: The state is pages, each behind its number, and ends with the registers behind this number.
NUMBER = struct.Struct("<Q")
REGISTERS = struct.Struct("<QQ")
REGISTERS_FOLLOW = (1 << 64) - 1
#: The states that share one session.
SAVING = {State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY}


class Template(Device):
    """A device with memory and a doorbell that does DMA.

    Keys:
      rings    what the count of rings begins with (0)
    """

    # Attributes. All have defaults; these are what a subclass may say otherwise.

    #: The identification part of the PCI configuration header.
    pci = PciIdentity(vendor=0x1AF4, device=0x10F2, class_code=0xFF0000, revision=1)
    #: 1 is INTA; 0, the default, is a function without a pin.
    interrupt_pin = 0
    #: In their order in configuration space. There are Msix and VendorCapability as well.
    pci_capabilities = (PowerManagement(), Msi(vectors=1), PciExpress())
    #: bar0 to bar5, each a power of two from 16 bytes on. Here every access is trapped;
    #: mapped=((offset, size), …) lets programs map these pages.
    bar0 = Region(size=PAGE)
    bar2 = Region(size=PAGES * PAGE)
    #: STOP_COPY makes it migratable, P2P and PRE_COPY are options; Capability(0): not migratable.
    capabilities = Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY
    #: Whether the data_fd answers poll(). Most kernel drivers have none: False to be like them.
    poll = True
    #: Whether the device can log its DMA. True costs nothing: self.dma does the logging.
    dma_logging = True
    #: Whether the IOMMU in front of it can track DMA, for programs that prefer that.
    iommu_dirty_tracking = True

    def __init__(self, rings: int = 0) -> None:
        """Parameters are the keys of a SPEC, converted to int, float or bool as annotated."""
        self.power_on_rings = self.rings = rings
        self.rung_iova = 0  # a ring that waits until the device may do DMA again
        self.may_dma = False
        # Accesses come from threads of the program that owns the device, hooks from others.
        self.lock = threading.Lock()
        self.unsent = set(range(PAGES))
        self.sent_once = False

    # Run levels. Each is called on entering; the device was in any of the others before.

    def start(self) -> None:
        """RUNNING and PRE_COPY."""
        with self.lock:
            self.may_dma = True
            self._answer_ring_locked()

    def quiesce(self) -> None:
        """The P2P states: it runs, but starts no DMA that might go to another device."""
        with self.lock:
            self.may_dma = False

    def stop(self) -> None:
        """All others: no DMA, no interrupt, no change from the moment that this returns."""
        self.quiesce()

    def step(self, origin: State, target: State) -> None:
        """See every arc before it is taken; raise DeviceError to refuse it."""
        if origin not in SAVING or target not in SAVING:
            self._forget_sessions()

    def reset(self) -> None:
        """Power-on state again; start() follows unless the device runs."""
        with self.lock:
            self.rings, self.rung_iova = self.power_on_rings, 0
            self.bar2[:] = bytes(len(self.bar2))
            self._forget_sessions()

    # Regions. One without handlers is plain memory; the others are asked access by access.

    @bar0.reader
    def read_register(self, offset: int, length: int) -> bytes:
        """Answer an aligned read of 1, 2, 4 or 8 bytes."""
        registers = self.rings.to_bytes(8, "little")
        return registers[offset - RUNG_AT :][:length].ljust(length, b"\0")

    @bar0.writer
    def write_register(self, offset: int, data: bytes) -> None:
        """Take an aligned write of 1, 2, 4 or 8 bytes."""
        if offset == DOORBELL_AT and len(data) == 8:
            with self.lock:
                self.rung_iova = int.from_bytes(data, "little")
                self._answer_ring_locked()

    @bar2.writer
    def write_memory(self, offset: int, data: bytes) -> None:
        """Note what changes, so that pre-copy sends it again."""
        self.bar2[offset : offset + len(data)] = data
        self.unsent.add(offset // PAGE)  # after the change: a page sent in between goes again
        self.data_ready()  # whoever polls the data_fd at its temporary end wakes

    def _answer_ring_locked(self) -> None:
        if not self.may_dma or not self.rung_iova:
            return
        iova, self.rung_iova = self.rung_iova, 0
        with suppress(DeviceError):  # EFAULT, no mapping there: a bus master can tell nobody
            self.dma.write(iova, bytes(self.bar2[:PAGE]))
            self.rings += 1
            self.interrupts.msi(0)  # or msix(vector), or intx(level); dropped if not enabled

    # Saving. Iterables are walked in a thread of the session, at the reader's pace.

    def precopy(self) -> Iterable[Buffer]:
        """Yield what can go while the device runs; one iteration lasts for the whole session."""
        return self._send_early(self.unsent)

    def precopy_info(self) -> PrecopyInfo:
        """Estimate what precopy() has yet to yield. None instead: look at its next buffer."""
        left = self._unsent_bytes()
        return PrecopyInfo(0, left) if self.sent_once else PrecopyInfo(left, 0, reinit=False)

    def save(self) -> Iterable[Buffer]:
        """Yield the whole state, or what pre-copy left of it, when it is asked for and no sooner."""
        return self._send_rest(self.unsent)

    def state_size(self) -> int:
        """Estimate what STOP_COPY will take, in any state. Without this, save() is walked."""
        return self._unsent_bytes() + NUMBER.size + REGISTERS.size

    def _send_early(self, unsent: set[int]) -> Iterator[Buffer]:
        while True:
            yield from self._send_pages(unsent)
            self.sent_once = True
            yield b""  # nothing now: the reader gets ENOMSG, and may come back

    def _send_rest(self, unsent: set[int]) -> Iterator[Buffer]:
        yield from self._send_pages(unsent)
        yield NUMBER.pack(REGISTERS_FOLLOW) + REGISTERS.pack(self.rings, self.rung_iova)

    def _send_pages(self, unsent: set[int]) -> Iterator[Buffer]:
        while unsent:
            number = unsent.pop()
            page = bytes(self.bar2[number * PAGE :][:PAGE])  # a copy: the device may be running
            yield NUMBER.pack(number) + page

    def _forget_sessions(self) -> None:
        # A set of its own for every session: one that is about to end cannot disturb the next.
        self.unsent = set(range(PAGES))
        self.sent_once = False

    def _unsent_bytes(self) -> int:
        return len(self.unsent) * (NUMBER.size + PAGE)

    # Loading.

    def load(self, state: StateReader) -> None:
        """Take a whole state; what is raised is the write's errno, or RESUMING -> STOP's."""
        while (number := self._read_number(state)) != REGISTERS_FOLLOW:
            if number >= PAGES:
                raise StateRejected(f"there is no page {number}")
            page = memoryview(self.bar2)[number * PAGE :][:PAGE]
            if state.readinto(page) < PAGE:
                raise StateRejected("the state ends inside a page")
        registers = state.read(REGISTERS.size + 1)
        if len(registers) != REGISTERS.size:
            raise StateRejected("the state ends too early, or goes on behind the registers")
        self.rings, self.rung_iova = REGISTERS.unpack(registers)

    @staticmethod
    def _read_number(state: StateReader) -> int:
        number = state.read(NUMBER.size)
        if len(number) < NUMBER.size:
            raise StateRejected("the state ends before the registers")
        return int(NUMBER.unpack(number)[0])


class Stubborn(Device):
    """Whole control: one method in place of all the hooks above, as the seed's driver operation.

    Regions, reset() and the run levels of the first open and the last close stay as they are.
    """

    capabilities = Capability.STOP_COPY

    def __init__(self) -> None:
        self.state = State.RUNNING

    def reset(self) -> None:
        self.state = State.RUNNING

    def migration_set_state(self, requested: int) -> tuple[State | None, int, None]:
        """Return the state now (None: unset), an errno or 0, and the body of a new session.

        The body is an iterable of buffers to save, or a function that takes a StateReader.
        """
        if requested not in {State.RUNNING, State.STOP}:
            return self.state, errno.EINVAL, None
        self.state = State(requested)
        return self.state, 0, None


def main() -> None:
    """Migrate one, beginning while it still runs."""
    spec = f"model:{__file__}:Template,rings=5"
    with vfiomig.open(spec) as source, vfiomig.open(spec) as destination:
        saving, loading = source.set_state(State.PRE_COPY), destination.set_state(State.RESUMING)
        assert saving is not None
        assert loading is not None
        for chunk in saving:  # ends at the temporary end
            loading.write_all(chunk)
        early = loading.transferred
        source.write_region(2, offset=PAGE, data=b"changed meanwhile")
        source.set_state(State.STOP_COPY)
        for chunk in saving:  # ends at the permanent end
            loading.write_all(chunk)
        destination.set_state(State.RUNNING)
        memory = destination.read_region(2, offset=PAGE, length=17)
        rings = int.from_bytes(destination.read_region(0, offset=RUNG_AT, length=8), "little")
        print(f"{early} bytes before the stop, {loading.transferred - early} after it")
        print(f"arrived: {memory.decode()!r}, {rings} rings")


if __name__ == "__main__":
    main()
