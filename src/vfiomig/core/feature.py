"""VFIO_DEVICE_FEATURE: the header's rules, and the features that one row each describes.

Order of checks: ``vfio_ioctl_device_feature`` reads the header (EFAULT), then looks at argsz, the
flag bits and the operation (EINVAL), then at the index; ``check_feature`` compares the operation
and the payload's size with what the feature has. docs/protocol.md, "the landed dialect".
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect, Feature, find_feature
from vfiomig.core import dma_logging, mig_features

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.core.vfio_device import VfioDevice

__all__ = ("device_feature",)

GET = vfio.VFIO_DEVICE_FEATURE_GET
SET = vfio.VFIO_DEVICE_FEATURE_SET
PROBE = vfio.VFIO_DEVICE_FEATURE_PROBE
INDEX_MASK = vfio.VFIO_DEVICE_FEATURE_MASK

#: (device, operation bits, address of the payload, caller)
Handler: TypeAlias = Callable[["VfioDevice", int, int, "Caller"], None]


class Served(NamedTuple):
    """A feature that can be served: what says whether this device has it, and what answers."""

    refuse: Callable[[VfioDevice], int]
    answer: Handler


SERVED: dict[str, Served] = {
    "MIGRATION": Served(mig_features.lacks_migration, mig_features.migration),
    "MIG_DEVICE_STATE": Served(mig_features.lacks_migration, mig_features.device_state),
    "MIG_DATA_SIZE": Served(mig_features.lacks_migration, mig_features.data_size),
    "MIG_PRECOPY_INFOv2": Served(mig_features.lacks_precopy, mig_features.precopy_info_v2),
    "DMA_LOGGING_START": Served(dma_logging.lacks_logging, dma_logging.start),
    "DMA_LOGGING_STOP": Served(dma_logging.lacks_logging, dma_logging.stop),
    "DMA_LOGGING_REPORT": Served(dma_logging.lacks_logging, dma_logging.report),
}


def device_feature(device: VfioDevice, arg: int, caller: Caller) -> int:
    """Answer the request; raise ``OSError`` with its errno."""
    header = caller.read(arg, vfio.DeviceFeature.SIZE)
    argsz = int.from_bytes(header[:4], "little")
    flags = int.from_bytes(header[4:], "little")
    if argsz < vfio.DeviceFeature.SIZE or flags & ~(INDEX_MASK | GET | SET | PROBE):
        raise OSError(errno.EINVAL, "argsz or an unknown flag")
    if flags & GET and flags & SET and not flags & PROBE:
        raise OSError(errno.EINVAL, "GET and SET together")
    row = find_feature(flags & INDEX_MASK, device.dialect)
    served = SERVED.get(row.name) if row is not None else None
    if row is None or served is None:
        # Without a driver hook the index is nobody's: EINVAL at the time of V6, ENOTTY today.
        raise OSError(errno.EINVAL if device.dialect is Dialect.V6 else errno.ENOTTY, "no feature")
    refusal = served.refuse(device)
    if refusal:
        raise OSError(refusal, f"the device lacks {row.name}")
    if check_feature(row, flags, argsz):
        served.answer(device, flags & (GET | SET), arg + vfio.DeviceFeature.SIZE, caller)
    return 0


def check_feature(row: Feature, flags: int, argsz: int) -> bool:
    """Tell whether to go on: ``False`` for a PROBE that succeeds; EINVAL for what cannot be."""
    operation = flags & (GET | SET)
    if operation & ~row.ops:
        raise OSError(errno.EINVAL, f"{row.name} has no such operation")
    if flags & PROBE:
        return False
    if not operation or argsz < row.minsz:
        raise OSError(errno.EINVAL, f"{row.name}: no operation, or argsz below {row.minsz}")
    return True
