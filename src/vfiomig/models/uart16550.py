"""The register block of a 16550A: two FIFOs of 16 bytes, an interrupt and the modem's lines.

Theory of operation
-------------------
A pure machine: bytes wait in ``tx`` until somebody outside takes them (``sent``), and come in by
``receive``. There is no clock. A byte that can leave has left; a character takes no time, so a
byte below the trigger level is due as a character timeout at once, and the transmitter has no
shift register of its own: THRE and TEMT are one and the same.

What interrupts, first the most urgent, and what ends it:

======================  ==========================================  ===========================
receiver line status    an overrun                                  LSR is read
received data           the trigger level is reached (without       RBR is read below the level
                        FIFO: a byte is there)
character timeout       fewer bytes than that are there             RBR is read until it is empty
transmitter empty       the last byte left, or IER bit 1 was set    IIR is read while it says so,
                        while none was there                        or THR is written
modem status            a line changed                              MSR is read
======================  ==========================================  ===========================

The loop of MCR bit 4 joins the transmitter to the receiver inside the chip: whoever fills it
faster than it is read gets overruns there, as the drivers' measuring of the FIFO expects. The pin
is gated by OUT2, as on the PC's cards; the loop does not disconnect it, so that drivers can test
their interrupts with it. FCR answers whatever DLAB says, as in every 16550A.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ("CTS", "DCD", "DSR", "DTR", "FIFO", "RI", "RTS", "Registers", "Uart16550")

FIFO: Final = 16

# Offsets; the first two are others while LCR has DLAB.
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)
DLL, DLM = DATA, IER

IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 0x01, 0x02, 0x04, 0x08
IER_BITS: Final = 0x0F
IIR_NO_INT, IIR_MSI, IIR_THRI, IIR_RDI, IIR_RLSI, IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_BITS, IIR_FIFO = 0x0F, 0xC0
FCR_ENABLE, FCR_CLEAR_RX, FCR_CLEAR_TX = 0x01, 0x02, 0x04
#: Enable, DMA mode and trigger level: what FCR keeps.
FCR_BITS: Final = 0xC9
TRIGGERS: Final = (1, 4, 8, 14)
LCR_DLAB: Final = 0x80
DTR, RTS, OUT1, OUT2, LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
MCR_BITS: Final = 0x1F
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 0x01, 0x02, 0x20, 0x40
CTS, DSR, RI, DCD = 0x10, 0x20, 0x40, 0x80
#: Where the loop leads the outputs of MCR.
LOOPED: Final = {RTS: CTS, DTR: DSR, OUT1: RI, OUT2: DCD}
CHANGED: Final = 0x0F
RI_CHANGED: Final = RI >> 4


class Registers(NamedTuple):
    """What the chip holds beside its FIFOs, one byte each."""

    ier: int = 0
    fcr: int = 0
    lcr: int = 0
    mcr: int = 0
    scr: int = 0
    dll: int = 0
    dlm: int = 0
    overrun: int = 0  # LSR bit 1 until LSR is read
    empty: int = 0  # 1: the transmitter ran empty, and nobody has been told
    msr: int = 0


class Uart16550:
    """One chip, as after a reset with ``lines`` (CTS, DSR, RI, DCD) at its inputs."""

    def __init__(self, lines: int = 0) -> None:
        self.rx = bytearray()
        self.tx = bytearray()
        self._registers = Registers(msr=lines)
        self._lines = lines

    # What the card around it sees.

    @property
    def depth(self) -> int:
        """Bytes that wait in each direction at most."""
        return FIFO if self._registers.fcr & FCR_ENABLE else 1

    @property
    def looped(self) -> bool:
        """Whether transmitter and receiver are joined inside, away from the outside."""
        return bool(self._registers.mcr & LOOP)

    @property
    def outputs(self) -> int:
        """The modem control pins, DTR and RTS: the loop holds them inactive."""
        return 0 if self.looped else self._registers.mcr & (DTR | RTS)

    @property
    def room(self) -> int:
        """Bytes that ``receive`` takes without an overrun."""
        return self.depth - len(self.rx)

    @property
    def interrupt(self) -> bool:
        """The level of the interrupt pin."""
        return not self.identification & IIR_NO_INT and bool(self._registers.mcr & OUT2)

    @property
    def identification(self) -> int:
        """What IIR says; looking at it here changes nothing."""
        return self._source() | (IIR_FIFO if self._registers.fcr & FCR_ENABLE else 0)

    def receive(self, data: bytes | bytearray) -> None:
        """Take bytes in; those that find no room are an overrun.

        The FIFO keeps what it has, the single register the last that came.
        """
        if len(data) > self.room:
            self._set(overrun=LSR_OE)
        if self.depth == 1:
            self.rx[:] = data[-1:] or self.rx
        else:
            self.rx += data[: self.room]

    def sent(self, count: int) -> None:
        """Forget the first ``count`` bytes of ``tx``: they have left."""
        if count:
            del self.tx[:count]
            if not self.tx:
                self._set(empty=1)

    def loop_back(self) -> None:
        """Move what waits in ``tx`` through the loop inside."""
        if self.tx:
            data = bytes(self.tx)
            self.sent(len(data))
            self.receive(data)

    def set_lines(self, lines: int) -> None:
        """Put ``lines`` at the inputs; the loop hides them."""
        self._lines = lines
        self._see_lines()

    # What the driver sees.

    def read(self, offset: int) -> int:
        """Read a register, with the effects that reading has."""
        held = self._registers
        if offset in {DLL, DLM} and held.lcr & LCR_DLAB:
            return held.dll if offset == DLL else held.dlm
        if offset == DATA:
            return self.rx.pop(0) if self.rx else 0
        if offset == IIR_FCR:
            return self._read_iir()
        if offset == LSR:
            return self._read_lsr()
        if offset == MSR:
            self._set(msr=held.msr & ~CHANGED)
            return held.msr
        return {IER: held.ier, LCR: held.lcr, MCR: held.mcr, SCR: held.scr}[offset]

    def write(self, offset: int, value: int) -> None:
        """Write a register; LSR and MSR keep what they have."""
        divisor = self._registers.lcr & LCR_DLAB
        if offset == DATA:
            self._set(dll=value) if divisor else self._write_thr(value)
        elif offset == IER:
            self._set(dlm=value) if divisor else self._write_ier(value & IER_BITS)
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self._set(lcr=value)
        elif offset == MCR:
            self._set(mcr=value & MCR_BITS)
            self._see_lines()
        elif offset == SCR:
            self._set(scr=value)

    # State.

    @property
    def registers(self) -> Registers:
        return self._registers

    def restore(self, registers: Registers, rx: bytes, tx: bytes) -> None:
        """Become the chip that these were read from; the inputs stay as they are for now.

        Raises:
            ValueError: no 16550A can hold them.
        """
        bits = Registers(
            IER_BITS, FCR_BITS, 0xFF, MCR_BITS, 0xFF, 0xFF, 0xFF, overrun=LSR_OE, empty=1, msr=0xFF
        )
        for name, value, possible in zip(Registers._fields, registers, bits, strict=True):
            if value & ~possible:
                raise ValueError(f"{name} cannot be {value:#04x}")
        if registers.fcr and not registers.fcr & FCR_ENABLE:
            raise ValueError(f"fcr cannot be {registers.fcr:#04x}")
        depth = FIFO if registers.fcr else 1
        if len(rx) > depth or len(tx) > depth:
            raise ValueError(f"{len(rx)} and {len(tx)} bytes wait where {depth} have room")
        if registers.empty and tx:
            raise ValueError("the transmitter cannot have run empty with bytes in it")
        self._registers = registers
        self.rx[:], self.tx[:] = rx, tx

    # Inside.

    def _set(self, **fields: int) -> None:
        self._registers = self._registers._replace(**fields)

    def _source(self) -> int:
        """Choose the most urgent of the interrupts that are enabled and pending."""
        held = self._registers
        if held.ier & IER_RLSI and held.overrun:
            return IIR_RLSI
        if held.ier & IER_RDI and self.rx:
            fifo = held.fcr & FCR_ENABLE
            due = not fifo or len(self.rx) >= TRIGGERS[held.fcr >> 6]
            return IIR_RDI if due else IIR_TIMEOUT
        if held.ier & IER_THRI and held.empty:
            return IIR_THRI
        if held.ier & IER_MSI and held.msr & CHANGED:
            return IIR_MSI
        return IIR_NO_INT

    def _read_iir(self) -> int:
        value = self.identification
        if value & IIR_BITS == IIR_THRI:
            self._set(empty=0)
        return value

    def _read_lsr(self) -> int:
        status = self._registers.overrun
        if status:
            self._set(overrun=0)
        if self.rx:
            status |= LSR_DR
        if not self.tx:
            status |= LSR_THRE | LSR_TEMT
        return status

    def _write_thr(self, value: int) -> None:
        """Queue a byte. A full FIFO drops it, the single register keeps only it."""
        if self._registers.empty:
            self._set(empty=0)
        if self.depth == 1:
            self.tx.clear()
        if len(self.tx) < self.depth:
            self.tx.append(value)

    def _write_ier(self, value: int) -> None:
        rises = value & ~self._registers.ier
        self._set(ier=value)
        if rises & IER_THRI and not self.tx:
            self._set(empty=1)

    def _write_fcr(self, value: int) -> None:
        kept = value & FCR_BITS if value & FCR_ENABLE else 0
        switched = (kept ^ self._registers.fcr) & FCR_ENABLE
        self._set(fcr=kept)
        if switched or (value & FCR_ENABLE and value & FCR_CLEAR_RX):
            self.rx.clear()
        if switched or (value & FCR_ENABLE and value & FCR_CLEAR_TX):
            self.sent(len(self.tx))

    def _see_lines(self) -> None:
        """Note what changed at the inputs; RI counts only when it ends."""
        mcr, before = self._registers.mcr, self._registers.msr
        lines = self._lines
        if mcr & LOOP:
            lines = sum(line for output, line in LOOPED.items() if mcr & output)
        if lines == before & ~CHANGED:
            return
        changed = (lines ^ before) >> 4
        if lines & RI:
            changed &= ~RI_CHANGED
        self._set(msr=lines | before & CHANGED | changed)
