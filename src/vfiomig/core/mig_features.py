"""The migration features of the landed dialect, one function each.

Arguments: the device, GET or SET, the address of the payload behind the feature's header, the
caller. ``core.feature`` has checked the header. Rules: VFIO_DEVICE_FEATURE_MIGRATION,
..._MIG_DEVICE_STATE, ..._MIG_DATA_SIZE in include/uapi/linux/vfio.h; docs/protocol.md.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.fsm import Capability

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.core.vfio_device import VfioDevice

__all__ = (
    "data_size",
    "device_state",
    "lacks_migration",
    "lacks_precopy",
    "migration",
    "precopy_info_v2",
)


def lacks_migration(device: VfioDevice) -> int:
    """ENOTTY where no driver operation stands behind the feature."""
    return 0 if device.capabilities else errno.ENOTTY


def lacks_precopy(device: VfioDevice) -> int:
    """EINVAL, not ENOTTY, and to a PROBE as well: so the kernel answers this one."""
    return 0 if Capability.PRE_COPY in device.capabilities else errno.EINVAL


def migration(device: VfioDevice, operation: int, payload: int, caller: Caller) -> None:  # noqa: ARG001 - GET only
    # The seed's core does not ask the driver: STOP_COPY is what it defines.
    flags = Capability.STOP_COPY if device.dialect is Dialect.V6 else device.capabilities
    caller.write(payload, int(flags).to_bytes(8, "little"))


def device_state(device: VfioDevice, operation: int, payload: int, caller: Caller) -> None:
    """Get or set the state. The payload is read for GET as well, and faults for it."""
    argument = vfio.MigState.parse(caller.read(payload, vfio.MigState.SIZE))
    argument.data_fd = -1
    if operation == vfio.VFIO_DEVICE_FEATURE_GET:
        argument.device_state = device.migration.state(caller.blocks)
        caller.write(payload, bytes(argument))
        return
    caller.blocks()
    outcome = device.migration.set_state(argument.device_state)
    if outcome.migf is not None:

        def render(number: int) -> bytes:
            argument.data_fd = number
            return bytes(argument)

        # From here on the transition has happened: EMFILE and EFAULT leave the device in its
        # new state, with a session that nobody has a descriptor of.
        caller.return_fd(outcome.migf, payload, render)
        return
    # Written back after a failure too, and still holding the request, not the state.
    caller.write(payload, bytes(argument))
    if outcome.errno:
        raise OSError(outcome.errno, "the state was not reached")


def data_size(device: VfioDevice, operation: int, payload: int, caller: Caller) -> None:  # noqa: ARG001 - GET only
    caller.blocks()
    caller.write(payload, device.migration.state_size().to_bytes(8, "little"))


def precopy_info_v2(device: VfioDevice, operation: int, payload: int, caller: Caller) -> None:  # noqa: ARG001 - no payload
    """Make ``flags`` of the pre-copy query an output, until the last close."""
    device.migration.precopy_v2 = True
