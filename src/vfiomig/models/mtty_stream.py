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
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from vfiomig.errors import StateRejected
from vfiomig.models.uart16550 import FIFO, Registers

if TYPE_CHECKING:
    from vfiomig.device import StateReader

__all__ = ("HEADER_BYTES", "PortState", "load", "pack_header", "pack_port")

MAGIC: Final = b"VFIOMIG\n"
MODEL: Final = b"mtty".ljust(16, b"\0")
VERSION: Final = 1
HEADER: Final = struct.Struct("<8s16sII")
PORT: Final = struct.Struct(f"<{len(Registers._fields)}BBBI")
CHECKSUM: Final = struct.Struct("<I")
HEADER_BYTES: Final = HEADER.size + CHECKSUM.size
#: Bytes are read so many at a time: a length that is a lie costs no memory.
STEP: Final = 64 << 10


class PortState(NamedTuple):
    """What one port holds. ``held`` follows ``rx``: it came in, and there was no room yet."""

    registers: Registers
    rx: bytes
    tx: bytes
    held: bytes


def pack_header(ports: int) -> bytes:
    return _sealed(HEADER.pack(MAGIC, MODEL, VERSION, ports))


def pack_port(port: PortState) -> bytes:
    lengths = len(port.rx), len(port.tx), len(port.held)
    return _sealed(PORT.pack(*port.registers, *lengths)) + _sealed(port.rx + port.tx + port.held)


def load(state: StateReader, ports: int) -> list[PortState]:
    """Read a whole state; may raise ``StateRejected`` only, whatever comes."""
    magic, model, version, number = HEADER.unpack(_read_sealed(state, HEADER.size, "header"))
    if (magic, model) != (MAGIC, MODEL):
        raise StateRejected(f"this is no state of an mtty card: it begins with {magic + model!r}")
    if version != VERSION:
        raise StateRejected(f"the state has version {version}, this card reads {VERSION}")
    if number != ports:
        raise StateRejected(f"the state has {number} ports, this card {ports}: give ports={number}")
    loaded = [_read_port(state) for _ in range(ports)]
    if state.read(1):
        raise StateRejected("bytes follow the end of the state")
    return loaded


def _read_port(state: StateReader) -> PortState:
    *registers, rx, tx, held = PORT.unpack(_read_sealed(state, PORT.size, "port"))
    if max(rx, tx) > FIFO:
        raise StateRejected(f"a port of the state has {rx} and {tx} bytes in FIFOs of {FIFO}")
    waiting = _read_sealed(state, rx + tx + held, "port's bytes")
    return PortState(Registers(*registers), waiting[:rx], waiting[rx : rx + tx], waiting[rx + tx :])


def _sealed(content: bytes) -> bytes:
    return content + CHECKSUM.pack(zlib.crc32(content))


def _read_sealed(state: StateReader, size: int, part: str) -> bytes:
    content = _read_exactly(state, size, part)
    (checksum,) = CHECKSUM.unpack(_read_exactly(state, CHECKSUM.size, part))
    if zlib.crc32(content) != checksum:
        raise StateRejected(
            f"a {part} of the state is damaged, or this is no state of an mtty card"
        )
    return content


def _read_exactly(state: StateReader, size: int, part: str) -> bytes:
    pieces = []
    while size:
        piece = state.read(min(size, STEP))
        if not piece:
            raise StateRejected(f"the state ends in its {part}")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
