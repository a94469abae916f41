"""The state of ``mtty`` as bytes: how it is framed, and how it is read.

::

    header   magic, model, version, number of ports; its CRC-32
    port     the registers, one byte each; bytes in the receiver, in the transmitter, and held
             back behind the receiver; its CRC-32; those bytes; their CRC-32       for every port

Numbers are little endian. Nothing tells when a state was made, nor what the ports are connected
to: a state that moves on unchanged is framed into the same bytes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from vfiomig.errors import StateRejected
from vfiomig.models.sealed import CHECKSUM, identity, read_header, read_sealed, sealed
from vfiomig.models.uart16550 import FIFO, Registers

if TYPE_CHECKING:
    from vfiomig.device import StateReader

__all__ = ("HEADER_BYTES", "PortState", "load", "pack_header", "pack_port")

MODEL: Final = "mtty"
VERSION: Final = 1
HEADER: Final = struct.Struct("<24sII")
PORT: Final = struct.Struct(f"<{len(Registers._fields)}BBBI")
HEADER_BYTES: Final = HEADER.size + CHECKSUM.size


class PortState(NamedTuple):
    """What one port holds. ``held`` follows ``rx``: it came in, and there was no room yet."""

    registers: Registers
    rx: bytes
    tx: bytes
    held: bytes


def pack_header(ports: int) -> bytes:
    return sealed(HEADER.pack(identity(MODEL), VERSION, ports))


def pack_port(port: PortState) -> bytes:
    lengths = len(port.rx), len(port.tx), len(port.held)
    return sealed(PORT.pack(*port.registers, *lengths)) + sealed(port.rx + port.tx + port.held)


def load(state: StateReader, ports: int) -> list[PortState]:
    """Read a whole state; may raise ``StateRejected`` only, whatever comes."""
    version, number = read_header(state, HEADER, MODEL)
    if version != VERSION:
        raise StateRejected(f"the state has version {version}, this card reads {VERSION}")
    if number != ports:
        raise StateRejected(f"the state has {number} ports, this card {ports}: give ports={number}")
    loaded = [_read_port(state) for _ in range(ports)]
    if state.read(1):
        raise StateRejected("bytes follow the end of the state")
    return loaded


def _read_port(state: StateReader) -> PortState:
    *registers, rx, tx, held = PORT.unpack(read_sealed(state, PORT.size, "port"))
    if max(rx, tx) > FIFO:
        raise StateRejected(f"a port of the state has {rx} and {tx} bytes in FIFOs of {FIFO}")
    waiting = read_sealed(state, rx + tx + held, "port's bytes")
    return PortState(Registers(*registers), waiting[:rx], waiting[rx : rx + tx], waiting[rx + tx :])
