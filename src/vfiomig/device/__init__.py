"""For device authors: ``Device`` and what its class body is made of."""

from __future__ import annotations

from vfiomig.device.base import Buffer, Device, PrecopyInfo, SessionBody, StateReader
from vfiomig.device.region import PciIdentity, Region

__all__ = (
    "Buffer",
    "Device",
    "PciIdentity",
    "PrecopyInfo",
    "Region",
    "SessionBody",
    "StateReader",
)
