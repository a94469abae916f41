"""A device whose pre-copy takes as many rounds as it says, however fast anybody is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiomig.models.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig import Buffer
    from vfiomig.models.block_stream import Outgoing

__all__ = ("PORTIONS", "Portioned")

PORTIONS = 8


class Portioned(Pattern):
    """Offers a part of its memory at a time, and the next one at the temporary end of that."""

    def __init__(self, size: int, dirty: int, seed: int) -> None:
        super().__init__(size=size, dirty=dirty, seed=seed, precopy=1 / PORTIONS)

    def _send_precopy(self, outgoing: Outgoing) -> Iterator[Buffer]:
        portion = outgoing.offered
        for buffer in super()._send_precopy(outgoing):
            if not buffer:
                with self._memory.lock:
                    outgoing.offered = min(outgoing.offered + portion, self._memory.blocks)
            yield buffer
