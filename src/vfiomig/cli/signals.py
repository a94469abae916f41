"""What a verb does about signals that end programs, for as long as it has something to tidy up."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

__all__ = ("ENDING", "handled_by")

#: How others than the user at the terminal end a program.
ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handled_by(
    handler: Callable[[int, FrameType | None], None], numbers: Iterable[int]
) -> Iterator[None]:
    """Have signals go to a handler in the block, and to whoever they went to after it."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
