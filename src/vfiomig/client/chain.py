"""The chain of capabilities behind an info struct: each names the offset of the next, 0 at the end.

What the other side wrote is believed only as far as it lies inside the buffer and goes forward.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi.vfio import InfoCapHeader

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("MOST_INFO", "capability_chain")

#: Bytes of an info struct with capabilities that are worth asking for.
MOST_INFO = 1 << 20


def capability_chain(
    buffer: bytearray, first: int, struct_size: int, what: str
) -> Iterator[tuple[int, int]]:
    """Yield the (id, offset) of each capability; ``first`` is 0 where there is none.

    Raises:
        OSError: EPROTO for a chain that makes no sense; ``what`` says whose it is.
    """
    at = first
    while at:
        if at < struct_size or at + InfoCapHeader.SIZE > len(buffer):
            raise OSError(errno.EPROTO, f"a capability of {what} lies outside")
        capability = InfoCapHeader.parse(memoryview(buffer)[at:])
        yield capability.id, at
        if capability.next and capability.next <= at:
            raise OSError(errno.EPROTO, f"the capabilities of {what} go in circles")
        at = capability.next
