"""VFIO_MIG_GET_PRECOPY_INFO, on the saving data_fd.

Order of checks: another request ENOTTY, the struct EFAULT, argsz EINVAL, a state that is not one
of pre-copy EINVAL, and only then the descriptor's own life ENODEV. Without the v2 opt-in
``flags`` goes back as it came.

``initial_bytes`` never rises again unless the device said REINIT and the caller has opted in to
hear it; what a device reports beyond that is counted as dirty.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.core.migration import as_u64
from vfiomig.core.saving import SavingMigf
from vfiomig.device import PrecopyInfo
from vfiomig.fsm import Capability

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.core.migration import Migration
    from vfiomig.core.transfer import Migf
    from vfiomig.core.vfio_device import VfioDevice

__all__ = ("data_ioctl", "precopy_info")


def data_ioctl(device: VfioDevice, migf: Migf, number: int, arg: int, caller: Caller) -> int:
    """Answer a request on a data_fd; raise ``OSError`` with its errno."""
    known = number == vfio.VFIO_MIG_GET_PRECOPY_INFO and device.dialect is Dialect.LANDED
    serves = known and Capability.PRE_COPY in device.capabilities
    if not serves or not isinstance(migf, SavingMigf):
        raise OSError(errno.ENOTTY, "no request of this data_fd")
    argument = vfio.PrecopyInfo.parse(caller.read(arg, vfio.PrecopyInfo.SIZE))
    if argument.argsz < vfio.PrecopyInfo.SIZE:
        raise OSError(errno.EINVAL, f"argsz is {argument.argsz}: too small")
    caller.blocks()
    info = precopy_info(device.migration, migf)
    if device.migration.precopy_v2:
        argument.flags = vfio.VFIO_PRECOPY_INFO_REINIT if info.reinit else 0
    argument.initial_bytes = as_u64(info.initial_bytes)
    argument.dirty_bytes = as_u64(info.dirty_bytes)
    caller.write(arg, bytes(argument))
    return 0


def precopy_info(migration: Migration, migf: SavingMigf) -> PrecopyInfo:
    """Add up what the device still has and what was taken from it but not read."""
    rest = migration.precopy_info(migf)
    if rest is None:
        # Without the state lock: the author's code may take its time, or hang.
        migf.look()
        rest = migration.precopy_info(migf) or PrecopyInfo(0, 0)
    return migf.account(rest, reinit_heard=migration.precopy_v2)
