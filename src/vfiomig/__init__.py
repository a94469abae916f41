"""VFIO live migration without the hardware.

Write a migratable device in Python; let a program that speaks VFIO use it, unmodified; drive any
VFIO device, real or virtual, through its migration.
"""

from __future__ import annotations

from vfiomig.client import DeviceClient, Session
from vfiomig.client import open_target as open  # noqa: A004  vfiomig.open, never imported bare
from vfiomig.device import Buffer, Device, PciIdentity, PrecopyInfo, Region, StateReader
from vfiomig.errors import (
    DeviceError,
    SessionError,
    SetStateError,
    SpecError,
    StateRejected,
    TargetError,
    VfioMigError,
)
from vfiomig.fsm import Capability, State

__all__ = (
    "Buffer",
    "Capability",
    "Device",
    "DeviceClient",
    "DeviceError",
    "PciIdentity",
    "PrecopyInfo",
    "Region",
    "Session",
    "SessionError",
    "SetStateError",
    "SpecError",
    "State",
    "StateReader",
    "StateRejected",
    "TargetError",
    "VfioMigError",
    "open",
)
