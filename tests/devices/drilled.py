"""A device that does what it is told to: to write memory, and to fail for good.

Its state is BAR0, in records that end with a checksum over everything that was sent, so that any
damage is noticed. PRE_COPY offers the magic, then nothing, then the first 16 bytes.
"""

from __future__ import annotations

import errno
import struct
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING

from vfiomig import Device, DeviceError, PrecopyInfo, Region, State, StateRejected
from vfiomig.abi import pci, vfio
from vfiomig.checks import Levers
from vfiomig.errors import RequestError
from vfiomig.fsm import SAVING_GROUP, parse_capabilities

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig import StateReader
    from vfiomig.checks import Subject

SIZE = 4096
MAGIC = b"DRILLED1"
RECORD = struct.Struct("<HH")  # offset and length; bytes of BAR0 follow
END = RECORD.pack(0xFFFF, 0)
CHECKSUM = struct.Struct("<I")
STATE_SIZE = len(MAGIC) + 2 * RECORD.size + 16 + SIZE + len(END) + CHECKSUM.size
#: What BAR2 holds before a write to BAR4: an IOVA, a length, and bytes to be written there.
COMMAND = struct.Struct("<QQ")
CONFIG = vfio.VFIO_PCI_CONFIG_REGION_INDEX
WRITE, FAIL = b"\1", b"\0"


class Drilled(Device):
    """See above. ``caps`` is its capability set."""

    bar0 = Region(size=SIZE)
    bar2 = Region(size=64)
    bar4 = Region(size=16)

    def __init__(self, caps: str = "all") -> None:
        self.capabilities = parse_capabilities(caps)
        self.reset()

    @bar4.writer
    def write_bar4(self, offset: int, data: bytes) -> None:
        if data == FAIL:
            raise DeviceError(errno.EIO, "as it was told to", fatal=True)
        iova, length = COMMAND.unpack_from(self.bar2)
        self.dma.write(iova, bytes(self.bar2[COMMAND.size : COMMAND.size + length]))

    def reset(self) -> None:
        self.bar0[:] = bytes(range(256)) * (SIZE // 256)
        self._begin()

    def _begin(self) -> None:
        """Begin a stream: nothing was sent."""
        self.sent = b""
        self._parts: list[bytes] = []

    def step(self, origin: State, target: State) -> None:
        if origin not in SAVING_GROUP:
            self._begin()

    def _send(self, data: bytes) -> bytes:
        self.sent += data
        return data

    def precopy(self) -> Iterator[bytes]:
        self._parts = [MAGIC, RECORD.pack(0, 16) + self.bar0[:16]]
        return self._send_parts()

    def _send_parts(self) -> Iterator[bytes]:
        while self._parts:
            yield self._send(self._parts.pop(0))
            yield b""

    def precopy_info(self) -> PrecopyInfo:
        initial = len(MAGIC) if len(self._parts) == 2 else 0
        return PrecopyInfo(initial, 0 if initial else sum(map(len, self._parts)))

    def save(self) -> Iterator[bytes]:
        if not self.sent:
            yield self._send(MAGIC)
        yield self._send(RECORD.pack(0, SIZE) + self.bar0)
        yield self._send(END)
        yield CHECKSUM.pack(zlib.crc32(self.sent))

    def state_size(self) -> int:
        return STATE_SIZE

    def load(self, state: StateReader) -> None:
        content = bytearray(SIZE)
        seen = self._take(state, len(MAGIC))
        if seen != MAGIC:
            raise StateRejected("no state of this device")
        while (header := self._take(state, RECORD.size)) != END:
            offset, length = RECORD.unpack(header)
            if not length or offset + length > SIZE:
                raise StateRejected("a record leaves BAR0")
            piece = self._take(state, length)
            content[offset : offset + length] = piece
            seen += header + piece
        if self._take(state, CHECKSUM.size) != CHECKSUM.pack(zlib.crc32(seen + END)):
            raise StateRejected("the checksum is another")
        self.finish(state, content)

    def finish(self, state: StateReader, content: bytes | bytearray) -> None:
        if state.read(1):
            raise StateRejected("bytes behind the end")
        self.bar0[:] = content

    def _take(self, state: StateReader, size: int) -> bytes:
        data = state.read(size)
        if len(data) < size:
            raise StateRejected("the state is cut off")
        return data


def enter_error(subject: Subject) -> None:
    with suppress(RequestError):
        subject.client.write_region(4, 0, FAIL)


def write_by_dma(subject: Subject, iova: int, data: bytes) -> None:
    command = pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER
    subject.client.write_region(CONFIG, pci.PCI_COMMAND, command.to_bytes(2, "little"))
    subject.client.write_region(2, 0, COMMAND.pack(iova, len(data)) + data)
    subject.client.write_region(4, 0, WRITE)


LEVERS = Levers(enter_error, write_by_dma)
