"""What a handler of a system call can say besides a result."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.doors.syscall.notify import Notification
    from vfiomig.doors.syscall.receivers import Turn

    Handler: TypeAlias = Callable[[Notification, Turn], "Answer"]

__all__ = ("CARRY_ON", "HELD", "Answer")


class Later(Enum):
    #: The kernel does the call itself.
    CARRY_ON = auto()
    #: The call has been answered already, or will be.
    HELD = auto()


CARRY_ON: Final = Later.CARRY_ON
HELD: Final = Later.HELD
Answer: TypeAlias = int | Later
