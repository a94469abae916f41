"""The structs of `vfiomig.abi` as compiled formats, for messages that come by the thousand.

A ctypes struct costs a microsecond to make; unpacking with a format that was compiled once costs a
tenth of it. The formats are computed from the declarations, so that there is one truth.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

from vfiomig.abi import vfio, vfio_user

if TYPE_CHECKING:
    from vfiomig.abi.uapi import UapiStruct

_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


def compiled(*structs: type[UapiStruct]) -> struct.Struct:
    """Compile the members of ``structs``, one after the other; all are unsigned numbers."""
    sizes = (ctypes.sizeof(kind) for cls in structs for _, kind in cls._fields_)
    return struct.Struct("<" + "".join(_CODES[size] for size in sizes))


HEADER = compiled(vfio_user.Header)
VERSION = compiled(vfio_user.Version)
REGION_ACCESS = compiled(vfio_user.RegionAccess)
REGION_READ_REPLY = compiled(vfio_user.Header, vfio_user.RegionAccess)
DMA_ACCESS = compiled(vfio_user.DmaRegionAccess)
MIG_DATA = compiled(vfio_user.MigData)
WRITE_MULTI = compiled(vfio_user.WriteMulti)
RANGE = compiled(vfio.DmaLoggingRange)
AREA = compiled(vfio.SparseMmapArea)
