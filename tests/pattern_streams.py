"""States of ``pattern`` as bytes, outside of any session."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from vfiomig import StateReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfiomig import Buffer, Device
    from vfiomig.models.pattern import Pattern

#: Bytes of the header and of a record's head, each with the checksum behind it.
HEADER_BYTES = 52
RECORD_BYTES = 16
#: What a state of one small block has beside the block.
AROUND_ONE_BLOCK = HEADER_BYTES + 2 * RECORD_BYTES + 4096 + 4 + 4


class Chunks(StateReader):
    """A stream that arrives in pieces."""

    def __init__(self, pieces: Iterable[Buffer]) -> None:
        self._pieces = iter(pieces)
        self._piece = memoryview(b"")

    def readinto(self, buffer: bytearray | memoryview) -> int:
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view):
            if not self._piece:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._piece = memoryview(piece).cast("B")
                continue
            size = min(len(self._piece), len(view) - filled)
            view[filled : filled + size] = self._piece[:size]
            self._piece = self._piece[size:]
            filled += size
        return filled


def state_of(device: Device) -> bytes:
    """The whole state, as a saving session without pre-copy carries it."""
    return b"".join(device.save())


def load(device: Device, *pieces: Buffer) -> None:
    device.load(Chunks(pieces))


def early_part(device: Pattern) -> bytes:
    """What pre-copy offers up to its first temporary end."""
    parts = []
    for buffer in device.precopy():
        if not buffer:
            break
        parts.append(bytes(buffer))
    return b"".join(parts)


def sealed(content: bytes) -> bytes:
    """``content`` with its checksum, as a forger who knows the format would write it."""
    return content + zlib.crc32(content).to_bytes(4, "little")
