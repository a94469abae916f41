"""The 16550A register by register, interrupt by interrupt, and as Linux's 8250 driver probes it."""

from __future__ import annotations

import pytest

from vfiomig.models.uart16550 import FIFO, Registers, Uart16550

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
DLL, DLM = 0, 1
DLAB = 0x80
OUT2 = 0x08
NO_INTERRUPT = 0x01


def chip(**writes: int) -> Uart16550:
    """A chip after writes in the order of the arguments, with CTS, DSR and DCD at its inputs."""
    uart = Uart16550(0xB0)
    for name, value in writes.items():
        uart.write(globals()[name], value)
    return uart


# Registers.

#: offset, what it shows after a reset, what it shows after 0xFF was written to it
AFTER_RESET = [
    (DATA, 0x00, 0x00),
    (IER, 0x00, 0x0F),
    (IIR, 0x01, 0xC1),
    (LCR, 0x00, 0xFF),
    (MCR, 0x00, 0x1F),
    (LSR, 0x60, 0x60),
    (MSR, 0xB0, 0xB0),
    (SCR, 0x00, 0xFF),
]


@pytest.mark.parametrize(("offset", "reset", "written"), AFTER_RESET)
def test_a_register_after_reset_and_with_all_bits_written(
    offset: int, reset: int, written: int
) -> None:
    uart = chip()
    assert uart.read(offset) == reset
    uart = chip()
    uart.write(offset, 0xFF)
    assert uart.read(offset) == written


def test_dlab_shows_the_divisor_in_place_of_data_and_enables() -> None:
    uart = chip(IER=0x05, LCR=DLAB | 3, DLL=0x34, DLM=0x12)
    assert (uart.read(DLL), uart.read(DLM)) == (0x34, 0x12)
    assert not uart.tx
    uart.write(LCR, 3)
    assert (uart.read(DATA), uart.read(IER)) == (0, 0x05)
    uart.write(LCR, DLAB)
    assert (uart.read(DLL), uart.read(DLM)) == (0x34, 0x12)


@pytest.mark.parametrize("lcr", [0x03, DLAB | 0x03, 0xBF])
def test_fifo_control_answers_with_and_without_dlab(lcr: int) -> None:
    uart = chip(LCR=lcr, FCR=0x01)
    assert uart.read(IIR) >> 6 == 3
    uart.write(FCR, 0x00)
    assert uart.read(IIR) >> 6 == 0


@pytest.mark.parametrize("value", [0xC0, 0x08, 0xFE])
def test_fifo_control_without_the_enable_bit_keeps_nothing(value: int) -> None:
    uart = chip(FCR=value)
    assert uart.registers.fcr == 0
    uart = chip(FCR=0xC1)
    uart.write(FCR, value)
    assert uart.registers.fcr == 0


# FIFOs.


@pytest.mark.parametrize(("fcr", "depth"), [(0x00, 1), (0x01, FIFO)])
def test_so_many_bytes_wait_in_each_direction(fcr: int, depth: int) -> None:
    uart = chip(FCR=fcr)
    assert uart.room == depth
    uart.receive(bytes(range(depth)))
    assert uart.room == 0
    assert uart.read(LSR) == 0x61
    assert [uart.read(DATA) for _ in range(depth)] == list(range(depth))
    assert uart.read(LSR) == 0x60
    for value in range(depth):
        uart.write(DATA, value)
        assert uart.read(LSR) == 0x00
    assert uart.tx == bytes(range(depth))


def test_an_overrun_keeps_what_the_fifo_has_and_ends_when_lsr_is_read() -> None:
    uart = chip(FCR=0x01)
    uart.receive(bytes(range(18)))
    assert uart.read(LSR) == 0x63
    assert uart.read(LSR) == 0x61
    assert [uart.read(DATA) for _ in range(17)] == [*range(16), 0]


def test_an_overrun_of_the_single_register_keeps_the_last() -> None:
    uart = chip()
    uart.receive(b"ab")
    uart.receive(b"")
    uart.receive(b"c")
    assert uart.read(LSR) == 0x63
    assert uart.read(DATA) == ord("c")
    assert uart.read(LSR) == 0x60


def test_a_full_transmitter_drops_what_is_written_to_it() -> None:
    uart = chip(FCR=0x01)
    for value in range(20):
        uart.write(DATA, value)
    assert uart.tx == bytes(range(16))
    uart = chip()
    uart.write(DATA, 1)
    uart.write(DATA, 2)
    assert uart.tx == b"\2"


@pytest.mark.parametrize(
    ("fcr", "rx", "tx"),
    [(0x03, b"", b"t"), (0x05, b"r", b""), (0x07, b"", b""), (0x01, b"r", b"t"), (0x00, b"", b"")],
)
def test_fifo_control_clears_the_fifos_that_it_names(fcr: int, rx: bytes, tx: bytes) -> None:
    uart = chip(FCR=0x01, DATA=ord("t"))
    uart.receive(b"r")
    uart.write(FCR, fcr)
    assert uart.rx == rx
    assert uart.tx == tx


def test_switching_the_fifos_on_clears_both() -> None:
    uart = chip(DATA=1)
    uart.receive(b"r")
    uart.write(FCR, 0x01)
    assert not uart.rx
    assert not uart.tx


# Interrupts.


@pytest.mark.parametrize(("bits", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_received_data_interrupts_from_the_trigger_level_on(bits: int, level: int) -> None:
    uart = chip(FCR=bits | 0x01, IER=0x01, MCR=OUT2)
    for number in range(1, FIFO + 1):
        uart.receive(b"x")
        assert uart.read(IIR) == (0xC4 if number >= level else 0xCC)
        assert uart.interrupt
    for number in range(FIFO - 1, 0, -1):
        uart.read(DATA)
        assert uart.read(IIR) == (0xC4 if number >= level else 0xCC)
    uart.read(DATA)
    assert uart.read(IIR) == 0xC1
    assert not uart.interrupt


def test_without_fifo_every_byte_interrupts_and_none_is_late() -> None:
    uart = chip(IER=0x01, MCR=OUT2)
    uart.receive(b"x")
    assert uart.read(IIR) == 0x04
    uart.read(DATA)
    assert uart.read(IIR) == NO_INTERRUPT


def test_an_overrun_interrupts_until_lsr_is_read() -> None:
    uart = chip(IER=0x04)
    uart.receive(b"ab")
    assert [uart.read(IIR), uart.read(IIR)] == [0x06, 0x06]
    uart.read(LSR)
    assert uart.read(IIR) == NO_INTERRUPT


def test_an_empty_transmitter_interrupts_when_that_is_enabled_and_once_it_runs_empty() -> None:
    uart = chip(IER=0x02)
    assert [uart.read(IIR), uart.read(IIR)] == [0x02, 0x01]
    uart.write(IER, 0x02)
    assert uart.read(IIR) == NO_INTERRUPT
    uart.write(DATA, 1)
    assert uart.read(IIR) == NO_INTERRUPT
    uart.sent(1)
    assert [uart.read(IIR), uart.read(IIR)] == [0x02, 0x01]
    uart.write(IER, 0x00)
    uart.write(IER, 0x02)
    assert uart.read(IIR) == 0x02


def test_writing_a_byte_ends_the_interrupt_of_the_empty_transmitter() -> None:
    uart = chip(FCR=0x01, IER=0x02)
    uart.write(DATA, 1)
    assert uart.read(IIR) == 0xC1
    uart.write(DATA, 2)
    uart.sent(1)
    assert uart.read(IIR) == 0xC1
    uart.sent(1)
    assert uart.read(IIR) == 0xC2


def test_clearing_a_transmitter_that_holds_bytes_leaves_it_empty() -> None:
    uart = chip(FCR=0x01, DATA=1, IER=0x02)
    assert uart.read(IIR) == 0xC1
    uart.write(FCR, 0x05)
    assert uart.read(IIR) == 0xC2


@pytest.mark.parametrize(
    ("line", "changed", "back"), [(0x10, 1, 1), (0x20, 2, 2), (0x40, 0, 4), (0x80, 8, 8)]
)
def test_a_changed_line_interrupts_until_msr_is_read(line: int, changed: int, back: int) -> None:
    uart = Uart16550(0)
    uart.write(IER, 0x08)
    uart.set_lines(line)
    assert uart.read(IIR) == (0x00 if changed else 0x01)
    assert uart.read(MSR) == line | changed
    assert uart.read(MSR) == line
    assert uart.read(IIR) == NO_INTERRUPT
    uart.set_lines(0)
    assert uart.read(MSR) == back


def test_the_most_urgent_interrupt_is_shown_first() -> None:
    uart = chip(FCR=0x01, IER=0x0F, MCR=OUT2)
    uart.receive(bytes(17))
    uart.set_lines(0)
    assert uart.read(IIR) == 0xC6
    uart.read(LSR)
    assert uart.read(IIR) == 0xC4
    while uart.rx:
        uart.read(DATA)
    assert uart.read(IIR) == 0xC2
    assert uart.read(IIR) == 0xC0
    assert uart.interrupt
    uart.read(MSR)
    assert uart.read(IIR) == 0xC1
    assert not uart.interrupt


def test_the_empty_transmitter_waits_its_turn_behind_another_interrupt() -> None:
    uart = chip(IER=0x03)
    uart.receive(b"x")
    assert uart.read(IIR) == 0x04  # and does not count as told
    uart.read(DATA)
    assert uart.read(IIR) == 0x02


@pytest.mark.parametrize("enables", range(16))
def test_only_what_is_enabled_interrupts_and_out2_gates_the_pin(enables: int) -> None:
    uart = chip(FCR=0x01, IER=enables)
    uart.receive(bytes(17))
    uart.set_lines(0)
    expected = {0x04: 0x06, 0x01: 0x04, 0x02: 0x02, 0x08: 0x00}
    source = next((code for bit, code in expected.items() if enables & bit), 0x01)
    assert not uart.interrupt
    uart.write(MCR, OUT2)
    assert uart.interrupt == (enables != 0)
    assert uart.read(IIR) == 0xC0 | source


# The loop.


@pytest.mark.parametrize(
    ("output", "line"), [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)]
)
def test_the_loop_leads_each_output_to_its_line(output: int, line: int) -> None:
    uart = chip(MCR=0x10 | output)
    assert uart.read(MSR) & 0xF0 == line
    assert uart.outputs == 0
    uart.write(MCR, output)
    assert uart.read(MSR) & 0xF0 == 0xB0
    assert uart.outputs == output & 0x03


def test_the_loop_hides_the_lines_outside() -> None:
    uart = chip(MCR=0x10)
    uart.read(MSR)
    uart.set_lines(0x40)
    assert uart.read(MSR) == 0
    uart.write(MCR, 0)
    assert uart.read(MSR) == 0x40


# As Linux probes it.


def settle(uart: Uart16550) -> None:
    if uart.looped:
        uart.loop_back()
    else:
        uart.sent(len(uart.tx))


def write(uart: Uart16550, offset: int, value: int) -> None:
    uart.write(offset, value)
    settle(uart)


def test_autoconfig_finds_a_uart_by_its_enables_and_its_loop() -> None:
    uart = chip()
    write(uart, IER, 0)
    assert uart.read(IER) & 0x0F == 0
    write(uart, IER, 0x0F)
    assert uart.read(IER) & 0x0F == 0x0F
    write(uart, IER, 0)
    write(uart, SCR, 0xA5)
    assert uart.read(SCR) == 0xA5
    write(uart, MCR, 0x10 | 0x0A)
    assert uart.read(MSR) & 0xF0 == 0x90


def test_autoconfig_takes_it_for_a_16550a_and_for_no_later_chip() -> None:
    uart = chip()
    write(uart, LCR, 0xBF)
    write(uart, FCR, 0)  # EFR, where there is one
    write(uart, LCR, 0)
    write(uart, FCR, 0x01)
    assert uart.read(IIR) >> 6 == 3
    for lcr in (0x80, 0xBF):  # an EFR would read as 0
        write(uart, LCR, lcr)
        assert uart.read(2) != 0
    write(uart, LCR, 0)
    mcr = uart.read(MCR)
    write(uart, MCR, mcr ^ 0x10)  # EXCR1 of a SuperIO chip would show the loop
    write(uart, LCR, 0xE0)
    assert not (uart.read(2) ^ mcr) & 0x10
    write(uart, LCR, 0)
    write(uart, MCR, mcr)
    for lcr in (0x00, 0x80):  # 64 bytes of FIFO
        write(uart, LCR, lcr)
        write(uart, FCR, 0x21)
        assert uart.read(IIR) & 0xE0 == 0xC0
    write(uart, LCR, 0)
    write(uart, IER, 0x40)  # the unit enable of an XScale
    assert not uart.read(IER) & 0x40


def test_the_drivers_measure_of_the_fifo_is_16() -> None:
    uart = chip()
    for offset, value in ((LCR, 0), (FCR, 0x07), (MCR, 0x10), (LCR, 0x03)):
        write(uart, offset, value)
    for value in range(256):
        write(uart, DATA, value)
    count = 0
    while uart.read(LSR) & 0x01 and count < 256:
        assert uart.read(DATA) == count
        count += 1
    assert count == FIFO


def test_the_driver_finds_neither_of_the_transmitter_bugs() -> None:
    uart = chip(FCR=0x01)
    for _ in range(2):
        write(uart, IER, 0x02)
        assert not uart.read(IIR) & NO_INTERRUPT
        write(uart, IER, 0)
    write(uart, IER, 0x02)
    assert uart.read(LSR) & 0x40
    assert not uart.read(IIR) & NO_INTERRUPT


# State.


@pytest.mark.parametrize(
    ("fields", "rx", "tx"),
    [
        ({"ier": 0x10}, b"", b""),
        ({"mcr": 0x20}, b"", b""),
        ({"fcr": 0x02}, b"", b""),
        ({"fcr": 0xC0}, b"", b""),
        ({"overrun": 1}, b"", b""),
        ({"empty": 2}, b"", b""),
        ({"empty": 1}, b"", b"x"),
        ({}, b"ab", b""),
        ({}, b"", b"ab"),
        ({"fcr": 1}, bytes(17), b""),
    ],
)
def test_what_no_16550a_can_hold_is_refused(fields: dict[str, int], rx: bytes, tx: bytes) -> None:
    uart = chip(SCR=7)
    with pytest.raises(ValueError, match=r"cannot|room"):
        uart.restore(Registers(**fields), rx, tx)
    assert uart.registers == Registers(scr=7, msr=0xB0)
