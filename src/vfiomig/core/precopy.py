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
from vfiomig.core.saving import SavingMigf
from vfiomig.device import PrecopyInfo

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.core.migration import Migration
    from vfiomig.core.transfer import Migf
    from vfiomig.core.vfio_device import VfioDevice

__all__ = ("data_ioctl", "precopy_info")


def data_ioctl(device: VfioDevice, migf: Migf, number: int, arg: int, caller: Caller) -> int:
    """Answer a request on a data_fd; raise ``OSError`` with its errno."""
    known = number == vfio.VFIO_MIG_GET_PRECOPY_INFO and device.dialect is Dialect.LANDED
    if not known or not isinstance(migf, SavingMigf):
        raise OSError(errno.ENOTTY, "no request of a data_fd")
    argument = vfio.PrecopyInfo.parse(caller.read(arg, vfio.PrecopyInfo.SIZE))
    if argument.argsz < vfio.PrecopyInfo.SIZE:
        raise OSError(errno.EINVAL, f"argsz is {argument.argsz}: too small")
    caller.blocks()
    info = device.migration.while_in_precopy(lambda: precopy_info(device.migration, migf))
    if device.migration.precopy_v2:
        argument.flags = vfio.VFIO_PRECOPY_INFO_REINIT if info.reinit else 0
    argument.initial_bytes = info.initial_bytes
    argument.dirty_bytes = info.dirty_bytes
    caller.write(arg, bytes(argument))
    return 0


def precopy_info(migration: Migration, migf: SavingMigf) -> PrecopyInfo:
    """Add up what the device still has and what was taken from it but not read."""
    if migf.dead:
        raise OSError(errno.ENODEV, "the session is over")
    answer = migration.ask_locked("precopy_info", migration.device.precopy_info)
    rest = PrecopyInfo(*answer) if answer is not None else PrecopyInfo(0, 0)
    return migf.account(rest, look=answer is None, reinit_heard=migration.precopy_v2)
