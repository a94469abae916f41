"""A device's interrupts as a client has them: counted by index, and signalled through eventfds.

Requests: VFIO_DEVICE_GET_IRQ_INFO and VFIO_DEVICE_SET_IRQS in include/uapi/linux/vfio.h, and
``VFIO_PCI_INTX_IRQ_INDEX`` and its neighbours for the indices. An eventfd stays the caller's: the
device has a share in it until it is given another one, the index is disabled, a reset (not of ERR
and REQ) or the last close.
"""

from __future__ import annotations

import errno
from functools import cached_property
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.client.requests import failed
from vfiomig.client.transport import NO_FD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfiomig.client.requests import Requests
    from vfiomig.descriptors import HasFileno

__all__ = ("Interrupts",)

NONE = vfio.VFIO_IRQ_SET_DATA_NONE
EVENTFD = vfio.VFIO_IRQ_SET_DATA_EVENTFD
MASK = vfio.VFIO_IRQ_SET_ACTION_MASK
UNMASK = vfio.VFIO_IRQ_SET_ACTION_UNMASK
TRIGGER = vfio.VFIO_IRQ_SET_ACTION_TRIGGER


class Interrupts:
    """The interrupts of one open device. Failures are ``RequestError`` with the errno."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    @cached_property
    def present(self) -> dict[int, vfio.IrqInfo]:
        """The interrupts that the device has, by index."""
        infos = {}
        for index in range(vfio.VFIO_PCI_NUM_IRQS):
            try:
                info = self.info(index)
            except OSError as refusal:
                if refusal.errno != errno.EINVAL:
                    raise
                continue  # ERR of a device that is not PCI Express
            if info.count:
                infos[index] = info
        return infos

    def info(self, index: int) -> vfio.IrqInfo:
        """Ask about one index: ``count`` and ``VFIO_IRQ_INFO_...`` flags; EINVAL if it has none."""
        info = vfio.IrqInfo(argsz=vfio.IrqInfo.SIZE, index=index)
        try:
            self._requests.on_device(vfio.VFIO_DEVICE_GET_IRQ_INFO, info)
        except OSError as failure:
            what = f"VFIO_DEVICE_GET_IRQ_INFO of {index}"
            raise failed(self._requests.name, what, failure) from None
        return info

    def enable(
        self, index: int, eventfds: Sequence[HasFileno | int | None], start: int = 0
    ) -> None:
        """Have vectors from ``start`` on signalled through ``eventfds``; ``None`` leaves one out.

        The first call for INTx, MSI or MSI-X enables the index, and settles how many vectors it
        has where ``VFIO_IRQ_INFO_NORESIZE`` is set. EINVAL while another of the three is enabled.
        """
        numbers = (
            NO_FD if fd is None else fd if isinstance(fd, int) else fd.fileno() for fd in eventfds
        )
        data = b"".join(number.to_bytes(4, "little", signed=True) for number in numbers)
        self._set(EVENTFD | TRIGGER, index, start, len(eventfds), data)

    def disable(self, index: int) -> None:
        """Take every eventfd of the index back; EINVAL if it was not enabled."""
        self._set(NONE | TRIGGER, index, 0, 0)

    def mask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Hold interrupts back. INTx only, as in vfio-pci: ENOTTY for the others."""
        self._set(NONE | MASK, index, start, count)

    def unmask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Let interrupts through again: after each INTx, which masks itself, and after ``mask``."""
        self._set(NONE | UNMASK, index, start, count)

    def trigger(self, index: int, start: int = 0, count: int = 1) -> None:
        """Have the device's side signal the eventfds, to try the way out."""
        self._set(NONE | TRIGGER, index, start, count)

    def _set(self, flags: int, index: int, start: int, count: int, data: bytes = b"") -> None:
        argument = vfio.IrqSet.from_buffer(bytearray(vfio.IrqSet.SIZE) + data)
        argument.argsz = vfio.IrqSet.SIZE + len(data)
        argument.flags, argument.index = flags, index
        argument.start, argument.count = start, count
        try:
            self._requests.on_device(vfio.VFIO_DEVICE_SET_IRQS, argument)
        except OSError as failure:
            what = f"VFIO_DEVICE_SET_IRQS of index {index}"
            raise failed(self._requests.name, what, failure) from None
