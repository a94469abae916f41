"""A client as ``core`` sees it during one request: what its message brought, and room for answers.

A message has no pointers. The argument of the ioctl that stands for it is built in a scratch
memory; what the kernel would fetch or fill elsewhere lies there as well, behind the argument, and
the pointers lead to it. What core leaves there becomes the reply.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NoReturn

from vfiomig.descriptors import Fd
from vfiomig.eventfd import EventFd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfiomig.core.transfer import Migf
    from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
    from vfiomig.descriptors import HasFileno
    from vfiomig.iommu import Backings, Place

__all__ = ("BASE", "ScratchCaller")

#: Where the scratch memory begins; 0 is nobody's address.
BASE = 0x1000


class ScratchCaller:
    """``core.Caller`` for one message."""

    __slots__ = ("_fds", "_memory", "_owner", "migf")

    def __init__(
        self, memory: bytearray, fds: Sequence[int] = (), owner: int | None = None
    ) -> None:
        """``fds`` came with the message, from process ``owner``; what is kept are copies."""
        self._memory = memory
        self._fds = fds
        self._owner = owner
        #: The session that the request opened.
        self.migf: Migf | None = None

    def read(self, address: int, length: int) -> bytes:
        self._require(address, length)
        return bytes(self._memory[address - BASE : address - BASE + length])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self._require(address, len(data))
        self._memory[address - BASE : address - BASE + len(data)] = data

    def check(self, address: int, length: int, *, writable: bool) -> bool:  # noqa: ARG002 - all of it is
        return address >= BASE and address + length <= BASE + len(self._memory)

    def _require(self, address: int, length: int) -> None:
        # There is room for every answer, so it is the message that lacks something.
        if not self.check(address, length, writable=True):
            raise OSError(errno.EINVAL, "the message ends before all that it should say")

    def memory(self, address: int, length: int, *, writable: bool, known: Backings) -> Place:  # noqa: ARG002
        _no_pointers()

    def file(self, number: int) -> Fd:
        return Fd(self._copy(number))

    def eventfd(self, number: int) -> EventFd:
        return EventFd(self._copy(number), self._owner)

    def _copy(self, number: int) -> int:
        if number >= len(self._fds):
            raise OSError(errno.EBADF, f"the message came with {len(self._fds)} descriptors")
        return os.dup(self._fds[number])

    def capable(self, capability: int) -> bool:  # noqa: ARG002 - over a socket nobody shows any
        return False

    def blocks(self) -> None:
        """Do nothing: whoever waits for the client receives by itself (line.py)."""

    def return_fd(self, migf: Migf, address: int, render: Callable[[int], bytes]) -> None:
        """Remember the session, which needs no descriptor here; -1 stands for it."""
        self.write(address, render(-1))
        self.migf = migf

    def return_device(
        self,
        device: VfioDevice,  # noqa: ARG002
        open_file: Callable[[HasFileno | None], VfioDeviceFile],  # noqa: ARG002
    ) -> int:
        _no_pointers()

    def opened(self, number: int) -> object:  # noqa: ARG002
        _no_pointers()


def _no_pointers() -> NoReturn:
    raise OSError(errno.EINVAL, "a vfio-user message has no addresses and no descriptors of ours")
