"""One open of the device: the file, the memory that may be mapped, and the session."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.core.regions import memory_size
from vfiomig.descriptors import create_sealed_memfd
from vfiomig.doors.vfio_user.caller import BASE, ScratchCaller
from vfiomig.fsm import Capability, SessionKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.core.transfer import Migf
    from vfiomig.core.vfio_device import VfioDevice
    from vfiomig.descriptors import Fd

__all__ = ("Opened",)


class Opened:
    """The device in use, until ``close``."""

    def __init__(self, served: VfioDevice) -> None:
        """Take the device into use.

        Raises:
            OSError: EBUSY if it is in use by another way, what its ``start`` refused with, or no
                descriptor is left.
        """
        self.served = served
        #: The last session that was opened; dead when something has ended it.
        self.migf: Migf | None = None
        self._memory: Fd | None = None
        size = memory_size(served.device)
        if size:
            self._memory = create_sealed_memfd(f"vfiomig-{served.name}", size)
        try:
            self.file = served.open(self._memory, in_use=True)
        except BaseException:
            self._close_memory()
            raise
        # A message has room for a few descriptors, so many vectors are given by several.
        served.irqs.set_grows(True)

    def close(self) -> None:
        """Release the device, which ends its session and brings it back to RUNNING."""
        self.file.release()
        self.served.irqs.set_grows(False)
        self._close_memory()

    def _close_memory(self) -> None:
        if self._memory is not None:
            self._memory.close()

    @property
    def memory(self) -> Fd:
        """The file in which mapped regions are."""
        assert self._memory is not None
        return self._memory

    def ioctl(
        self,
        number: int,
        argument: bytearray,
        fds: Sequence[int] = (),
        owner: int | None = None,
    ) -> None:
        """Make a request of the device's; ``argument`` is read and written."""
        caller = ScratchCaller(argument, fds, owner)
        self.file.ioctl(number, BASE, caller)
        if caller.migf is not None:
            self.migf = caller.migf

    def precopy_info(self, argument: bytearray) -> None:
        """Make VFIO_MIG_GET_PRECOPY_INFO, which is about where the device is, of its session."""
        if Capability.PRE_COPY not in self.served.capabilities:
            raise OSError(errno.ENOTTY, "a device without PRE_COPY")
        if self.migf is None or self.migf.kind is not SessionKind.SAVING:
            raise OSError(errno.EINVAL, "the device is in no state of pre-copy")
        number, caller = vfio.VFIO_MIG_GET_PRECOPY_INFO, ScratchCaller(argument)
        self.served.data_ioctl(self.migf, number, BASE, caller)

    def session(self, kind: SessionKind) -> Migf:
        """Return the session for a transfer: EBADF if it is one of the other direction."""
        migf = self.migf
        if migf is None:
            raise OSError(errno.EINVAL, "no data transfer session was opened so far")
        if migf.kind is not kind:
            raise OSError(errno.EBADF, f"the session is one of {migf.kind.name}")
        return migf
