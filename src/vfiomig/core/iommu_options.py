"""IOMMU_OPTION and IOMMU_VFIO_IOAS: settings of an iommufd.

Order of checks: ``iommufd_option`` and ``iommufd_vfio_ioas`` in drivers/iommu/iommufd. Memory is
never pinned here (docs/protocol.md, CHOICE-17), so RLIMIT_MODE is remembered and changes nothing; nor are there pages of
several sizes, so all that HUGE_PAGES changes is which mappings are taken.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfiomig.abi import iommufd as abi
from vfiomig.core.ioas import Ioas
from vfiomig.process import CAP_SYS_RESOURCE

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.core.iommufd import Iommufd

__all__ = ("option", "vfio_ioas", "vfio_ioas_told")


def option(context: Iommufd, argument: abi.IommuOption, caller: Caller) -> int:
    """Set an option of the iommufd or of an address space, or tell it."""
    if argument.reserved:
        raise OSError(errno.EOPNOTSUPP, "a reserved field is set")
    if argument.option_id == abi.IOMMU_OPTION_RLIMIT_MODE:
        _rlimit_mode(context, argument, caller)
    elif argument.option_id == abi.IOMMU_OPTION_HUGE_PAGES:
        _huge_pages(context.find(argument.object_id, Ioas), argument)
    else:
        raise OSError(errno.EOPNOTSUPP, f"no option has the id {argument.option_id}")
    return 0


def _rlimit_mode(context: Iommufd, argument: abi.IommuOption, caller: Caller) -> None:
    if argument.object_id:
        raise OSError(errno.EOPNOTSUPP, "the option is one of the iommufd, not of an object")
    if argument.op == abi.IOMMU_OPTION_OP_GET:
        argument.val64 = context.rlimit_mode
        return
    if argument.op != abi.IOMMU_OPTION_OP_SET:
        raise OSError(errno.EOPNOTSUPP, f"no operation has the number {argument.op}")
    if not caller.capable(CAP_SYS_RESOURCE):
        raise OSError(errno.EPERM, "only with CAP_SYS_RESOURCE")
    context.set_rlimit_mode(argument.val64)


def _huge_pages(ioas: Ioas, argument: abi.IommuOption) -> None:
    if argument.op == abi.IOMMU_OPTION_OP_GET:
        argument.val64 = ioas.space.large_pages
        return
    if argument.op != abi.IOMMU_OPTION_OP_SET:
        raise OSError(errno.EOPNOTSUPP, f"no operation has the number {argument.op}")
    if argument.val64 > 1:
        raise OSError(errno.EINVAL, "it is on (1) or off (0)")
    ioas.space.set_large_pages(bool(argument.val64), in_use=ioas.users > 0)


def vfio_ioas(context: Iommufd, argument: abi.IommuVfioIoas, caller: Caller) -> int:  # noqa: ARG001
    """Tell or choose the address space that stands for a container of the old interface."""
    if argument.reserved:
        raise OSError(errno.EOPNOTSUPP, "a reserved field is set")
    if argument.op == abi.IOMMU_VFIO_IOAS_GET:
        if not context.vfio_ioas:
            raise OSError(errno.ENODEV, "there is none")
        argument.ioas_id = context.vfio_ioas
    elif argument.op == abi.IOMMU_VFIO_IOAS_SET:
        context.find(argument.ioas_id, Ioas)
        context.vfio_ioas = argument.ioas_id
    elif argument.op == abi.IOMMU_VFIO_IOAS_CLEAR:
        context.vfio_ioas = 0
    else:
        raise OSError(errno.EOPNOTSUPP, f"no operation has the number {argument.op}")
    return 0


def vfio_ioas_told(argument: abi.IommuVfioIoas) -> bool:
    """Whether there is something to write back."""
    return argument.op == abi.IOMMU_VFIO_IOAS_GET
