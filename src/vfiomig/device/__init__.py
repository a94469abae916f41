"""For device authors: ``Device`` and what its class body is made of."""

from __future__ import annotations

from vfiomig.device.base import Buffer, Device, PrecopyInfo, SessionBody, StateReader
from vfiomig.device.capabilities import (
    Msi,
    Msix,
    PciCapability,
    PciExpress,
    PowerManagement,
    RegionWindow,
    VendorCapability,
)
from vfiomig.device.configuration import ConfigurationSpace
from vfiomig.device.interrupts import Interrupts
from vfiomig.device.region import PciIdentity, Region

__all__ = (
    "Buffer",
    "ConfigurationSpace",
    "Device",
    "Interrupts",
    "Msi",
    "Msix",
    "PciCapability",
    "PciExpress",
    "PciIdentity",
    "PowerManagement",
    "PrecopyInfo",
    "Region",
    "RegionWindow",
    "SessionBody",
    "StateReader",
    "VendorCapability",
)
