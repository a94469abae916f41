"""The modern PCI transport of virtio devices: BAR, capabilities, interrupts, and who does what when.

Theory of operation
-------------------
BAR 4 holds the structures that the vendor capabilities name, each in a page of its own: common
configuration, ISR status, the device's configuration, notifications, and MSI-X. Firmware that
cannot reach a BAR has a window onto it in configuration space. There is no legacy interface.

A notification kicks the ``Worker``, whose work is: carry out a reset that the driver has asked
for, else answer what waits in the queues, some requests at a time. A request that is taken is
answered before anything else happens, so whenever nobody works, no request is under way: the
indices of the rings are all there is to say about them. That is what ``stop`` and ``quiesce``
wait for; P2P quiescent, the device answers nothing either, as its transfers may go to a peer.

A message that was sent just before a migration may have ended in a machine that is gone. So the
first start after ``load`` interrupts for every queue once more; drivers bear with that.

A driver that breaks the rules of a ring, or puts it where no memory is, gets DEVICE_NEEDS_RESET
in the status and an interrupt for a change of configuration; no queue is touched until it resets.
"""

from __future__ import annotations

import logging
import struct
import threading
from typing import TYPE_CHECKING, ClassVar, Final

from vfiomig.device import Device, Msix, Region, RegionWindow, VendorCapability
from vfiomig.errors import DeviceError, StateRejected
from vfiomig.models.virtio_registers import COMMON_SIZE, DEVICE_STATUS, CommonConfiguration
from vfiomig.models.virtio_worker import Worker
from vfiomig.models.virtqueue import NO_VECTOR, RingBroken

if TYPE_CHECKING:
    from vfiomig.device import PciCapability
    from vfiomig.models.virtqueue import Chain, Virtqueue

__all__ = ("QUEUE_SIZE", "VirtioPci", "virtio_capabilities")

log = logging.getLogger("vfiomig.models")

BAR: Final = 4
PAGE: Final = 4096
COMMON, ISR, CONFIG, NOTIFY, TABLE, PENDING = range(0, 6 * PAGE, PAGE)
BAR_SIZE: Final = 8 * PAGE
#: Bytes between the notification addresses of two queues (notify_off_multiplier).
NOTIFY_STEP: Final = 4
QUEUE_SIZE: Final = 256

VIRTIO_PCI_CAP: Final = struct.Struct("<BBBxxII")  # from cfg_type on: type, bar, id, offset, length
VIRTIO_PCI_CAP_COMMON_CFG: Final = 1
VIRTIO_PCI_CAP_NOTIFY_CFG: Final = 2
VIRTIO_PCI_CAP_ISR_CFG: Final = 3
VIRTIO_PCI_CAP_DEVICE_CFG: Final = 4

QUEUE_INTERRUPT: Final = 1
CONFIG_INTERRUPT: Final = 2

#: Of the window's registers, which say a place, and then hold what is read or written there.
WINDOW_SIZE: Final = RegionWindow.DATA - RegionWindow.PLACE

#: Requests that are answered before the driver hears of them, and by whoever notified.
BATCH: Final = 16
FIRST_SHARE: Final = 4


def virtio_capabilities(queues: int, config_size: int) -> tuple[PciCapability, ...]:
    """Declare the capabilities of a device with so many queues and bytes of configuration."""

    def structure(kind: int, offset: int, length: int, more: bytes = b"") -> VendorCapability:
        return VendorCapability(VIRTIO_PCI_CAP.pack(kind, BAR, 0, offset, length) + more)

    step = struct.pack("<I", NOTIFY_STEP)
    return (
        Msix(vectors=1 + queues, table=(BAR, TABLE), pending=(BAR, PENDING)),
        structure(VIRTIO_PCI_CAP_COMMON_CFG, COMMON, COMMON_SIZE),
        structure(VIRTIO_PCI_CAP_ISR_CFG, ISR, 1),
        structure(VIRTIO_PCI_CAP_DEVICE_CFG, CONFIG, config_size),
        structure(VIRTIO_PCI_CAP_NOTIFY_CFG, NOTIFY, NOTIFY_STEP * queues, step),
        RegionWindow(),
    )


class VirtioPci(Device):
    """A virtio device; a subclass says what it is and answers its requests.

    ``features`` are the bits that it offers, ``config`` its device configuration.
    """

    interrupt_pin = 1
    bar4 = Region(size=BAR_SIZE, bits64=True)
    queue_sizes: ClassVar[tuple[int, ...]] = (QUEUE_SIZE,)

    def __init__(self, features: int, config: bytes) -> None:
        self.common = CommonConfiguration(features, self.queue_sizes)
        self._config = config
        self._isr = 0
        self._isr_lock = threading.Lock()
        self._worker = Worker("vfiomig-virtio", self._work)
        self._loaded = False

    def answer(self, chain: Chain, *, may_wait: bool) -> int | None:
        """Answer a request; return how many bytes were written to its chain.

        ``None``: it would have to wait, or takes long, and ``may_wait`` is not given; it will be
        asked again. May raise ``RingBroken``, or ``DeviceError`` where the driver's memory fails.
        """
        raise NotImplementedError

    # Run levels.

    def start(self) -> None:
        self._worker.start()
        if self._isr:
            self.interrupts.intx(True)
        if self._loaded:
            self._loaded = False
            self._interrupt_again()
        if self.common.live or self.common.reset_wanted:
            self._worker.wake()

    def quiesce(self) -> None:
        self._worker.stop()

    def stop(self) -> None:
        self._worker.stop()

    def reset(self) -> None:
        ran = self._worker.running
        self._worker.stop()
        self._loaded = False
        self._reset_transport()
        if ran:
            self._worker.start()

    def _reset_transport(self) -> None:
        self.common.reset()
        with self._isr_lock:
            self._isr = 0
            self.interrupts.intx(False)

    # The structures in the BAR.

    @bar4.reader
    def read_bar4(self, offset: int, length: int) -> bytes:
        structure, at = offset - offset % PAGE, offset % PAGE
        if structure == COMMON:
            return self.common.read(at, length)
        if structure == ISR and not at:
            return bytes((self._take_isr(),)).ljust(length, b"\0")
        content = self._config[at : at + length] if structure == CONFIG else b""
        return content.ljust(length, b"\0")

    @bar4.writer
    def write_bar4(self, offset: int, data: bytes) -> None:
        if offset >= NOTIFY:
            if offset < NOTIFY + PAGE:
                self._kick()
        elif offset < COMMON_SIZE:
            self.common.write(offset, data)
            if offset <= DEVICE_STATUS < offset + len(data):
                self._kick()

    def _kick(self) -> None:
        if self.dma.asks_user:
            self._worker.wake()
        else:
            self._worker.kick()

    def _take_isr(self) -> int:
        with self._isr_lock:
            isr, self._isr = self._isr, 0
            self.interrupts.intx(False)
        return isr

    # Interrupts.

    def _interrupt(self, vector: int, reason: int) -> None:
        if vector != NO_VECTOR:
            self.interrupts.msix(vector)
        elif not self.common.uses_msix:
            with self._isr_lock:
                self._isr |= reason
                self.interrupts.intx(True)

    def _interrupt_again(self) -> None:
        if self.common.live:
            for queue in self.common.queues:
                if queue.enabled:
                    self._interrupt(queue.vector, QUEUE_INTERRUPT)

    # The work.

    def _work(self, may_wait: bool) -> bool:
        """Do what there is to do; see ``Worker``."""
        if self.common.reset_wanted:
            self._reset_transport()
        left = False
        if not self.dma.is_master:
            return False
        for queue in self.common.queues:
            if queue.enabled and self.common.live and self._worker.running:
                try:
                    left |= self._serve(queue, may_wait=may_wait)
                except (RingBroken, DeviceError) as problem:
                    self._break_down(problem)
        return left

    def _serve(self, queue: Virtqueue, *, may_wait: bool) -> bool:
        """Answer the requests of a queue until none waits; tell whether some are left."""
        queue.look(self.dma)
        most = BATCH if may_wait else FIRST_SHARE
        while self._worker.running and not self.common.reset_wanted:
            if not queue.waiting and not queue.arm_and_look(self.dma):
                return False
            if not most or not self._answer_some(queue, most, may_wait=may_wait):
                return True
            most = BATCH if may_wait else 0
        return bool(queue.waiting)

    def _answer_some(self, queue: Virtqueue, most: int, *, may_wait: bool) -> bool:
        """Answer up to ``most`` requests; ``False`` if the next one would have to wait."""
        done: list[tuple[int, int]] = []
        try:
            for _ in range(min(most, queue.waiting)):
                chain = queue.first(self.dma)
                written = self.answer(chain, may_wait=may_wait)
                if written is None:
                    return False
                queue.take()
                done.append((chain.head, written))
                if not self._worker.running:
                    break
        finally:  # what was answered is the driver's, whatever the next one is
            if done and queue.publish(self.dma, done):
                self._interrupt(queue.vector, QUEUE_INTERRUPT)
        return True

    def _break_down(self, problem: RingBroken | DeviceError) -> None:
        log.warning("%s needs a reset by its driver: %s", type(self).__name__, problem)
        self.common.break_down()
        self._interrupt(self.common.config_vector, CONFIG_INTERRUPT)

    # The state, while nothing is under way.

    def save_transport(self) -> bytes:
        return bytes((self._isr,)) + self.common.save() + self._saved_window()

    def transport_size(self) -> int:
        return self._transport_sizes[bool(self._saved_window())]

    @property
    def _transport_sizes(self) -> tuple[int, int]:
        """Without the place of the window, and with it."""
        least = 1 + self.common.saved_size()
        return least, least + WINDOW_SIZE

    def load_transport(self, state: bytes) -> None:
        """Take what ``save_transport`` gave; ``StateRejected`` if it cannot be this device's."""
        least, _ = self._transport_sizes
        if len(state) not in self._transport_sizes:
            raise StateRejected(f"the tail of the state has {len(state)} bytes")
        self.common.load(state[1:least])
        self._isr = state[0]
        window = state[least:].ljust(WINDOW_SIZE, b"\0")
        self.configuration.write(self._window_at, window)
        self._loaded = True

    @property
    def _window_at(self) -> int:
        return self.configuration.places[RegionWindow] + RegionWindow.PLACE

    def _saved_window(self) -> bytes:
        """Where firmware looks through the window; nothing if it never has."""
        place = self.configuration.read(self._window_at, WINDOW_SIZE)
        return place if any(place) else b""
