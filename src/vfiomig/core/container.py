"""/dev/vfio/vfio: what groups are put into to share one IOMMU.

A container is nothing before a group is in it. Then SET_IOMMU gives it an IOMMU (type1.py), which
answers every request that is not the container's own, and which goes when the last group leaves.
A container lives on while a group is in it, also when its descriptor is closed. The order of
checks is that of drivers/vfio/container.c.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from vfiomig.abi import vfio_iommu as abi
from vfiomig.core.type1 import Type1, check_extension

if TYPE_CHECKING:
    from vfiomig.core.caller import Caller
    from vfiomig.iommu import DmaPort

__all__ = ("Container",)


class Container:
    """One open of /dev/vfio/vfio. Safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: The devices of the groups in it.
        self._ports: list[DmaPort] = []
        self.iommu: Type1 | None = None

    def ioctl(self, number: int, arg: int, caller: Caller) -> int:
        """Answer a request; raise ``OSError`` with its errno."""
        if number == abi.VFIO_GET_API_VERSION:
            return abi.VFIO_API_VERSION
        if number == abi.VFIO_CHECK_EXTENSION:
            return check_extension(arg, in_use=self.iommu is not None)
        if number == abi.VFIO_SET_IOMMU:
            return self._set_iommu(arg)
        iommu = self.iommu
        if iommu is None:
            raise OSError(errno.EINVAL, "the container has no IOMMU yet")
        return iommu.ioctl(number, arg, caller)

    def attach(self, port: DmaPort) -> None:
        """Put a group's device in: EBUSY while addresses of mappings are being changed."""
        with self._lock:
            if self.iommu is not None:
                self.iommu.attach(port)
            self._ports.append(port)

    def detach(self, port: DmaPort) -> None:
        with self._lock:
            self._ports.remove(port)
            if self.iommu is not None:
                self.iommu.detach(port)
                if not self._ports:
                    self.iommu.release()
                    self.iommu = None

    def _set_iommu(self, kind: int) -> int:
        with self._lock:
            if not self._ports or self.iommu is not None:
                raise OSError(errno.EINVAL, "there is no group, or an IOMMU already")
            if not check_extension(kind, in_use=False):
                raise OSError(errno.ENODEV, f"there is no IOMMU of type {kind}")
            iommu = Type1(kind)
            for port in self._ports:
                iommu.attach(port)
            self.iommu = iommu
        return 0
