"""Everything that a client does with a device, one thing after the other, whatever fails."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from vfiomig import Session, State, VfioMigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig import DeviceClient

PAGE = mmap.PAGESIZE
#: What the server's device is to have for a state.
STATE = bytes(range(256)) * 30
#: As many replies as a server gives from VERSION to the end.
REPLIES = 39


def scenario(dev: DeviceClient, memory: mmap.mmap) -> list[VfioMigError]:
    """Do everything; return what failed. Whatever is no error of ours is raised."""
    failed: list[VfioMigError] = []

    def attempt(step: Callable[[], object]) -> None:
        try:
            step()
        except VfioMigError as error:
            failed.append(error)

    def stream(target: State, move: Callable[[Session], object]) -> None:
        session = dev.set_state(target)
        assert session is not None
        with session:
            move(session)

    number = os.eventfd(0)
    attempt(lambda: dev.capabilities)
    attempt(lambda: dev.map(0x10000, memory))
    attempt(lambda: dev.interrupts.enable(2, [number, None, number]))
    attempt(lambda: dev.start_dma_logging([(0x10000, PAGE)]))
    attempt(lambda: dev.write_region(0, 0, b"0123"))
    attempt(lambda: dev.read_region(0, 0, 4))
    attempt(lambda: stream(State.STOP_COPY, lambda session: b"".join(session.chunks(5000))))
    attempt(lambda: stream(State.RESUMING, lambda session: session.write_all(bytes(50000))))
    attempt(lambda: dev.set_state(State.RUNNING))
    attempt(lambda: dev.report_dma_logging(0x10000, PAGE))
    attempt(dev.stop_dma_logging)
    attempt(dev.reset)
    attempt(lambda: dev.unmap(0x10000, PAGE))
    os.close(number)
    return failed
