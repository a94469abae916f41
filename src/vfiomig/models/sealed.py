r"""Parts of a state that carry their own checksum, and the header that says what a state is of.

::

    part     its content; the CRC-32 of that
    header   a part that begins with "VFIOMIG\n" and the model, filled up with zeros to 24 bytes

Numbers are little endian. Whatever comes, reading raises ``StateRejected`` and nothing else.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any, Final

from vfiomig.errors import StateRejected

if TYPE_CHECKING:
    from vfiomig.device import StateReader

__all__ = ("CHECKSUM", "identity", "read_exactly", "read_header", "read_sealed", "sealed")

CHECKSUM: Final = struct.Struct("<I")
MAGIC: Final = b"VFIOMIG\n"
#: Bytes are read so many at a time: a length that is a lie costs no memory.
STEP: Final = 64 << 10


def identity(model: str) -> bytes:
    """Return the 24 bytes that the states of a model begin with."""
    return MAGIC + model.encode().ljust(16, b"\0")


def sealed(content: bytes) -> bytes:
    return content + CHECKSUM.pack(zlib.crc32(content))


def read_header(state: StateReader, layout: struct.Struct, model: str) -> tuple[Any, ...]:
    """Return the fields behind the identity, which is the first field of ``layout``."""
    content = read_exactly(state, layout.size, "header")
    begins, *fields = layout.unpack(content)
    if begins != identity(model):
        raise StateRejected(f"this is no state of a device {model!r}: it begins with {begins!r}")
    _check_seal(state, content, "header")
    return tuple(fields)


def read_sealed(state: StateReader, size: int, part: str) -> bytes:
    content = read_exactly(state, size, part)
    _check_seal(state, content, part)
    return content


def read_exactly(state: StateReader, size: int, part: str) -> bytes:
    pieces = []
    while size:
        piece = state.read(min(size, STEP))
        if not piece:
            raise StateRejected(f"the state ends in its {part}")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _check_seal(state: StateReader, content: bytes, part: str) -> None:
    (checksum,) = CHECKSUM.unpack(read_exactly(state, CHECKSUM.size, part))
    if zlib.crc32(content) != checksum:
        raise StateRejected(f"the {part} of the state is damaged")
