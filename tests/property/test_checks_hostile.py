"""The checks on a device that lies: whatever it answers, the report is complete, and in time.

Errnos, fields, counts and descriptors come out of a seed. No verdict is expected of that, but that
each check has one that is the device's and not a mistake of its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
from typing import TYPE_CHECKING

import pytest

from devices.drilled import LEVERS, Drilled
from vfiomig.abi.ioctls import Dialect
from vfiomig.checks import CHECKS, Suite
from vfiomig.checks.suite import BUG
from vfiomig.client.connecting import connect
from vfiomig.client.local import LocalTransport
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.errors import TargetError
from vfiomig.memory import ProcessMemory

if TYPE_CHECKING:
    from vfiomig import DeviceClient
    from vfiomig.abi.uapi import UapiStruct

#: Errnos that a device may come up with; some mean something to whoever hears them.
ERRNOS = (
    *(errno.EIO, errno.EINVAL, errno.ENODEV, errno.EFAULT, errno.ENOTTY, errno.EMFILE),
    *(errno.ENOMSG, errno.EBADF, errno.EINTR, errno.EAGAIN, errno.EOPNOTSUPP, 4000),
)
WORDS = (0, 1, 3, 8, 77, 0x7FFF_FFFF, 0xFFFF_FFFF)


class Lying(LocalTransport):
    """Tells the truth but for a share of its answers."""

    def __init__(self, served: VfioDevice, chance: random.Random, share: float) -> None:
        self._chance = chance
        self._share = 0.0  # it has to be opened
        super().__init__(served)
        self.share = share

    def lies(self) -> bool:
        return self._chance.random() < self._share

    def trust(self, *, over: bool) -> None:
        self._share = self.share if over else 0.0

    def _may_fail(self) -> None:
        if self.lies():
            number = self._chance.choice(ERRNOS)
            raise OSError(number, os.strerror(number))

    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int:
        self._may_fail()
        result = super().ioctl(on, number, argument)
        if argument is not None and self.lies():
            place = ctypes.addressof(argument) + 4 * self._chance.randrange(4)
            if ProcessMemory(os.getpid()).check(place, 4, writable=True):
                word = self._chance.choice(WORDS)
                ctypes.memmove(place, word.to_bytes(4, "little"), 4)
        return result

    def readinto(self, data_fd: int, buffer: memoryview) -> int:
        self._may_fail()
        if self.lies():
            return self._chance.choice((0, 1, len(buffer)))
        return super().readinto(data_fd, buffer)

    def write(self, data_fd: int, data: memoryview) -> int:
        self._may_fail()
        if self.lies():
            return self._chance.choice((0, min(1, len(data)), len(data)))
        return super().write(data_fd, data)


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_a_device_that_lies_gets_a_complete_report(
    seed: int, share: float, dialect: Dialect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "vfiomig")
    chance = random.Random(seed)
    served = VfioDevice(Drilled(), "lying", dialect)
    opened: list[Lying] = []

    def make() -> DeviceClient:
        try:
            opened.append(Lying(served, chance, share))
        except OSError as refusal:
            raise TargetError(refusal.errno or errno.EIO, "it does not start") from None
        client = connect(opened[-1], "lying")
        _ = client.capabilities
        opened[-1].trust(over=True)
        return client

    with Suite(make, levers=LEVERS, deadline=2.0, state_limit=1 << 20) as suite:
        report = suite.run(CHECKS)
    assert [result.check for result in report.results] == list(CHECKS)
    bugs = {r.check.id: r.saw for r in report.results if r.saw.startswith(BUG) or not r.saw}
    assert bugs == {}
