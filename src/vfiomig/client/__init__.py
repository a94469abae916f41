"""One face for every device: in this process or behind the kernel, in either dialect.

``opening`` makes a ``DeviceClient`` from a TARGET, by way of ``nodes`` and ``group`` if that is a
device of the kernel; ``face`` is the client, ``session`` what it reads and writes state through,
``dma`` and ``type1`` the memory that it gives the device; ``transport`` says what all of them need
of the world, which ``local`` and ``kernel`` give them; ``recovery`` is what to do after a failure,
``diagnosis`` before there is a client.
"""

from __future__ import annotations

from vfiomig.client.dma import dirty_ranges
from vfiomig.client.face import DeviceClient
from vfiomig.client.opening import (
    Maker,
    device_maker,
    open_device,
    open_target,
    target_maker,
)
from vfiomig.client.session import Session

__all__ = (
    "DeviceClient",
    "Maker",
    "Session",
    "device_maker",
    "dirty_ranges",
    "open_device",
    "open_target",
    "target_maker",
)
