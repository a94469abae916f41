"""The common configuration of a virtio PCI device: what the driver has negotiated and set up.

Theory of operation
-------------------
``CommonConfiguration`` is ``struct virtio_pci_common_cfg`` with what stands behind it. A write of
any width is laid over the registers as they read, and every register that it touches is set to
what it then holds. A driver that does not keep to the order of the specification is not helped:
features stay as they are after FEATURES_OK, a queue's registers after it is enabled, status bits
are never cleared, and the device is not ``live`` before DRIVER_OK follows FEATURES_OK.

A write of 0 to the status asks for a reset. That is carried out by whoever does the device's work
(``reset``), between two requests; until then the old status is read, and the driver waits for 0.
Where the status is 0 already the driver waits for nothing: no request can be under way then, and
the reset is carried out at once, or it would undo what the driver sets up meanwhile.
See "Common configuration structure layout" in the VIRTIO specification, version 1.2.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Final

from vfiomig.errors import StateRejected
from vfiomig.models.virtqueue import NO_VECTOR, Virtqueue

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = (
    "COMMON_SIZE",
    "DEVICE_STATUS",
    "VIRTIO_F_ACCESS_PLATFORM",
    "VIRTIO_F_EVENT_IDX",
    "VIRTIO_F_INDIRECT_DESC",
    "VIRTIO_F_VERSION_1",
    "CommonConfiguration",
)

VIRTIO_F_INDIRECT_DESC: Final = 1 << 28
VIRTIO_F_EVENT_IDX: Final = 1 << 29
VIRTIO_F_VERSION_1: Final = 1 << 32
VIRTIO_F_ACCESS_PLATFORM: Final = 1 << 33

DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 64
FAILED: Final = 128
#: The bits that a driver sets.
DRIVERS_BITS: Final = 1 | 2 | DRIVER_OK | FEATURES_OK | FAILED

#: Every register in its order: offset, width, name.
REGISTERS: Final = (
    (0, 4, "device_feature_select"),
    (4, 4, "device_feature"),
    (8, 4, "driver_feature_select"),
    (12, 4, "driver_feature"),
    (16, 2, "config_msix_vector"),
    (18, 2, "num_queues"),
    (20, 1, "device_status"),
    (21, 1, "config_generation"),
    (22, 2, "queue_select"),
    (24, 2, "queue_size"),
    (26, 2, "queue_msix_vector"),
    (28, 2, "queue_enable"),
    (30, 2, "queue_notify_off"),
    (32, 8, "queue_desc"),
    (40, 8, "queue_driver"),
    (48, 8, "queue_device"),
)
LAYOUT: Final = struct.Struct("<4I2H2B5H3Q")
COMMON_SIZE: Final = LAYOUT.size
DEVICE_STATUS: Final = 20

# The state: what the driver chose, then each queue.
STATE: Final = struct.Struct("<QIIBBHHH")
QUEUE_STATE: Final = struct.Struct("<HHHHH3Q")


class CommonConfiguration:
    """The registers of a device that offers ``offered`` and has queues of these sizes."""

    def __init__(self, offered: int, queue_sizes: Sequence[int]) -> None:
        self.offered = offered
        self.queues = [Virtqueue(size) for size in queue_sizes]
        #: One vector for changes of the configuration, one per queue.
        self.vectors = 1 + len(self.queues)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Return to a device that no driver has touched."""
        with self._lock:
            self._reset_locked()

    def _reset_locked(self) -> None:
        self.features = 0
        self.status = 0
        self.reset_wanted = False
        self.config_vector = NO_VECTOR
        self._device_select = self._driver_select = self._queue_select = 0
        for queue in self.queues:
            queue.reset()

    @property
    def live(self) -> bool:
        """Whether the driver has said that requests may be processed, and nothing broke since."""
        return self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK

    @property
    def uses_msix(self) -> bool:
        """Whether the driver routes interrupts by vectors, as it may while MSI-X is enabled."""
        vectors = [self.config_vector, *(queue.vector for queue in self.queues)]
        return any(vector != NO_VECTOR for vector in vectors)

    def break_down(self) -> None:
        """Tell the driver that only a reset helps."""
        with self._lock:
            self.status |= NEEDS_RESET

    # The registers.

    def read(self, offset: int, length: int) -> bytes:
        return self._image()[offset : offset + length].ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        with self._lock:
            image = bytearray(self._image())
            end = min(offset + len(data), COMMON_SIZE)
            image[offset:end] = data[: max(0, end - offset)]
            for at, width, name in REGISTERS:
                if at < end and at + width > offset:
                    self._set(name, int.from_bytes(image[at : at + width], "little"))

    def _image(self) -> bytes:
        queue = self._selected()
        queue_registers = (0,) * 7
        if queue is not None:
            addresses = queue.descriptors, queue.driver, queue.device
            queue_registers = (
                queue.size, queue.vector, queue.enabled, self._queue_select, *addresses
            )  # fmt: skip
        return LAYOUT.pack(
            self._device_select,
            _word(self.offered, self._device_select),
            self._driver_select,
            _word(self.features, self._driver_select),
            self.config_vector,
            len(self.queues),
            self.status,
            0,  # config_generation: what a device says of itself never changes here
            self._queue_select,
            *queue_registers,
        )

    def _selected(self) -> Virtqueue | None:
        return self.queues[self._queue_select] if self._queue_select < len(self.queues) else None

    def _set(self, name: str, value: int) -> None:
        """Set one register; those that are read-only are not."""
        match name:
            case "device_feature_select":
                self._device_select = value
            case "driver_feature_select":
                self._driver_select = value
            case "driver_feature":
                self._set_features(value)
            case "config_msix_vector":
                self.config_vector = self._vector(value)
            case "device_status":
                self._set_status(value)
            case "queue_select":
                self._queue_select = value
            case _:
                queue = self._selected()
                if queue is not None:
                    self._set_of_queue(queue, name, value)

    def _set_features(self, value: int) -> None:
        if self.status & FEATURES_OK or self._driver_select > 1:
            return
        shift = 32 * self._driver_select
        self.features = self.features & ~(0xFFFF_FFFF << shift) | value << shift

    def _set_status(self, value: int) -> None:
        if not value:
            if self.status:
                self.reset_wanted = True
            else:
                self._reset_locked()
            return
        value = (value & DRIVERS_BITS) | self.status
        if value & ~self.status & FEATURES_OK:
            if self.features & ~self.offered or not self.features & VIRTIO_F_VERSION_1:
                value &= ~FEATURES_OK  # the driver reads back that the set is refused
            self._settle_features()
        if not value & FEATURES_OK:
            value &= ~DRIVER_OK
        self.status = value

    def _settle_features(self) -> None:
        for queue in self.queues:
            queue.event_idx = bool(self.features & VIRTIO_F_EVENT_IDX)
            queue.indirect = bool(self.features & VIRTIO_F_INDIRECT_DESC)

    def _set_of_queue(self, queue: Virtqueue, name: str, value: int) -> None:
        if name == "queue_msix_vector":
            queue.vector = self._vector(value)
        if queue.enabled:
            return
        match name:
            case "queue_size":
                queue.size = value
            case "queue_enable":
                negotiated = self.status & FEATURES_OK
                queue.enabled = bool(negotiated and value == 1 and queue.well_formed)
            case "queue_desc":
                queue.descriptors = value
            case "queue_driver":
                queue.driver = value
            case "queue_device":
                queue.device = value

    def _vector(self, value: int) -> int:
        return value if value < self.vectors else NO_VECTOR

    # The state.

    def save(self) -> bytes:
        """Return all of it, while no request is under way."""
        parts = [
            STATE.pack(
                self.features, self._device_select, self._driver_select, self.status,
                self.reset_wanted, self.config_vector, self._queue_select, len(self.queues),
            )
        ]  # fmt: skip
        parts += [
            QUEUE_STATE.pack(
                queue.size, queue.vector, queue.enabled, queue.next_avail, queue.next_used,
                queue.descriptors, queue.driver, queue.device,
            )
            for queue in self.queues
        ]  # fmt: skip
        return b"".join(parts)

    def saved_size(self) -> int:
        return STATE.size + len(self.queues) * QUEUE_STATE.size

    def load(self, state: bytes) -> None:
        """Take what ``save`` of such a device gave, of ``saved_size`` bytes.

        Raises:
            StateRejected: this device could not have got there.
        """
        self.reset()
        features, *rest, vector, selected, count = STATE.unpack_from(state)
        queues = list(QUEUE_STATE.iter_unpack(state[STATE.size :]))
        if count != len(self.queues):
            raise StateRejected(f"the state has {count} queues, this device {len(self.queues)}")
        if features & ~self.offered and rest[2] & FEATURES_OK:
            unknown = features & ~self.offered
            raise StateRejected(f"the driver uses features {unknown:#x} that this device lacks")
        with self._lock:
            self.features = features
            self._device_select, self._driver_select, self.status, wanted = rest
            self.reset_wanted = bool(wanted)
            self.config_vector, self._queue_select = self._vector(vector), selected
            self._settle_features()
            for queue, values in zip(self.queues, queues, strict=True):
                _load_queue(queue, values)
                queue.vector = self._vector(queue.vector)
                if self.live and queue.next_avail != queue.next_used:
                    taken = (queue.next_avail - queue.next_used) & 0xFFFF
                    raise StateRejected(f"the state has {taken} requests taken and not answered")


def _load_queue(queue: Virtqueue, values: tuple[int, ...]) -> None:
    queue.size, queue.vector, enabled, queue.next_avail, queue.next_used, *addresses = values
    queue.descriptors, queue.driver, queue.device = addresses
    queue.enabled = bool(enabled)
    if queue.enabled and not queue.well_formed:
        raise StateRejected(f"the state enables a queue of size {queue.size} at {addresses}")


def _word(features: int, select: int) -> int:
    """Feature bits 32 * ``select`` and up; there are 64."""
    return features >> 32 * select & 0xFFFF_FFFF if select < 2 else 0
