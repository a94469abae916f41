"""VFIO_DEVICE_MIG_SET_STATE, the seed's own request.

Order of checks and the write-back are those of "vfio: Define device migration protocol v2":
wrong argsz and flags are EOPNOTSUPP, the state reached is written back after a failure, and
EOPNOTSUPP, ENOTTY and EFAULT always mean that no state was written, so a driver's own use of
them is turned into EINVAL. docs/protocol.md, "V6".
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from vfiomig.abi import vfio

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.core.vfio_device import VfioDevice

__all__ = ("mig_set_state",)

log = logging.getLogger("vfiomig.core")

#: What a driver may not say: the core alone does.
RESERVED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EFAULT)


def mig_set_state(device: VfioDevice, arg: int, caller: Caller) -> int:
    """Answer the request; raise ``OSError`` with its errno."""
    if not device.capabilities:
        raise OSError(errno.EOPNOTSUPP, "the device cannot migrate")
    argument = vfio.MigSetState.parse(caller.read(arg, vfio.MigSetState.SIZE))
    if argument.argsz < vfio.MigSetState.SIZE or argument.flags:
        raise OSError(errno.EOPNOTSUPP, "argsz or flags")
    caller.blocks()
    outcome = device.migration.set_state(argument.device_state)
    argument.device_state = int(outcome.final_state or vfio.VFIO_DEVICE_STATE_ERROR)
    argument.data_fd = -1
    if outcome.migf is not None:

        def render(number: int) -> bytes:
            argument.data_fd = number
            return bytes(argument)

        # Only EMFILE writes nothing; the device is in its new state all the same.
        caller.return_fd(outcome.migf, arg, render)
        return 0
    caller.write(arg, bytes(argument))
    if outcome.errno:
        raise OSError(_driver_errno(device, outcome.errno), "the state was not reached")
    return 0


def _driver_errno(device: VfioDevice, failure: int) -> int:
    """Return what a driver's errno is for the caller."""
    if failure not in RESERVED:
        return failure
    name = errno.errorcode[failure]
    log.warning("%s: a device may not fail with %s in V6: EINVAL instead", device.name, name)
    return errno.EINVAL
