"""VFIO_DEVICE_GET_IRQ_INFO and VFIO_DEVICE_SET_IRQS, and what they govern: a device's interrupts.

Theory of operation
-------------------
Of INTx, MSI and MSI-X at most one is enabled; the first trigger enables it, and another one is
refused until it has been disabled (TRIGGER, DATA_NONE, count 0). ERR and REQ are single eventfds
beside them. Errors and the order of checks are those of ``vfio_set_irqs_validate_and_prepare`` and
of vfio-pci (drivers/vfio/pci/vfio_pci_intrs.c): where neither action nor index has an operation
ENOTTY, what contradicts the present mode EINVAL, then the descriptor's own errors.

Two locks: ``_igate`` lets one SET_IRQS through at a time, as in the kernel, and may be held while
a thread is joined; ``_lock`` guards the state, is held for moments only, and is all that a device
needs to interrupt. A reset drops the triggers of INTx, MSI and MSI-X, which belong to the function;
ERR and REQ, by which VFIO itself speaks, stay until the last close.
"""

from __future__ import annotations

import errno
import threading
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from vfiomig.abi import pci, vfio
from vfiomig.core.intx import Intx
from vfiomig.core.messages import Messages, MsiMasks, MsixTable
from vfiomig.core.unmask import UnmaskWatcher
from vfiomig.device import Interrupts, Msi, Msix
from vfiomig.device.capabilities import find_capability

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfiomig.core.caller import Caller
    from vfiomig.core.vfio_device import VfioDeviceFile
    from vfiomig.device import ConfigurationSpace
    from vfiomig.eventfd import EventFd

__all__ = ("Irqs", "datum_size", "device_get_irq_info", "device_set_irqs")

INTX, MSI, MSIX = range(3)
ERR, REQ = vfio.VFIO_PCI_ERR_IRQ_INDEX, vfio.VFIO_PCI_REQ_IRQ_INDEX
NONE = vfio.VFIO_IRQ_SET_DATA_NONE
BOOL = vfio.VFIO_IRQ_SET_DATA_BOOL
EVENTFD = vfio.VFIO_IRQ_SET_DATA_EVENTFD
MASK = vfio.VFIO_IRQ_SET_ACTION_MASK
UNMASK = vfio.VFIO_IRQ_SET_ACTION_UNMASK
TRIGGER = vfio.VFIO_IRQ_SET_ACTION_TRIGGER
DATA_TYPES = vfio.VFIO_IRQ_SET_DATA_TYPE_MASK
ACTIONS = vfio.VFIO_IRQ_SET_ACTION_TYPE_MASK
U32_MAX = 0xFFFF_FFFF

#: Size of the datum for each interrupt.
DATA_SIZE = {NONE: 0, BOOL: 1, EVENTFD: 4}

#: Finds the eventfd behind a number of the caller's.
Find: TypeAlias = "Callable[[int], EventFd]"


class Irqs(Interrupts):
    """The interrupts of one served device."""

    def __init__(self, space: ConfigurationSpace) -> None:
        self._space = space
        msi = find_capability(space.capabilities, Msi)
        msix = find_capability(space.capabilities, Msix)
        self._counts = {
            INTX: int(space.pin > 0),
            MSI: msi.vectors if msi else 0,
            MSIX: msix.vectors if msix else 0,
            ERR: int(space.express is not None),
            REQ: 1,
        }
        self.msix_capability = msix
        self._igate = threading.Lock()
        self._lock = threading.Lock()
        self._intx = Intx(space)
        self._table = MsixTable(msix)
        self._msi_masks = MsiMasks(space)
        self._messages = {MSI: Messages(self._msi_masks), MSIX: Messages(self._table)}
        self._single: dict[int, EventFd] = {}
        #: Which of INTx, MSI and MSI-X is enabled.
        self._enabled: int | None = None

    # The device.

    def intx(self, level: bool) -> None:
        with self._lock:
            self._intx.set_level(bool(level))

    def msi(self, vector: int) -> None:
        self._send(MSI, vector)

    def msix(self, vector: int) -> None:
        self._send(MSIX, vector)

    def _send(self, index: int, vector: int) -> None:
        if not 0 <= vector < self._counts[index]:
            name = "MSI-X" if index == MSIX else "MSI"
            raise ValueError(f"{name} has {self._counts[index]} vectors here, none is {vector}")
        with self._lock:
            self._messages[index].send(vector)

    # The function's registers.

    def follow_configuration(self, at: int, length: int) -> None:
        """Act on a write to configuration space."""
        if at < pci.PCI_COMMAND + 2 and at + length > pci.PCI_COMMAND:
            with self._lock:
                self._intx.follow_command()
        register = self._msi_masks.register
        if at < register + 4 and register < at + length:
            with self._lock:
                self._messages[MSI].send_pending(range(self._counts[MSI]))

    def read_table(self, at: int, length: int) -> bytes:
        with self._lock:
            return bytes(self._table.table[at : at + length])

    def write_table(self, at: int, data: bytes) -> None:
        with self._lock:
            self._messages[MSIX].send_pending(self._table.write(at, data))

    def read_pending(self, at: int, length: int) -> bytes:
        with self._lock:
            return bytes(self._table.pending[at : at + length])

    # Life.

    def reset(self) -> None:
        """Drop the function's triggers, before the device resets; the pin is low then."""
        with self._igate:
            self._disable()
            with self._lock:
                self._intx.set_level(False)
                self._table.power_on()

    def last_close(self) -> None:
        """Drop every trigger; the level of the pin stays the device's."""
        with self._igate:
            self._disable()
            with self._lock:
                self._table.power_on()
                for index in list(self._single):
                    self._single.pop(index).close()

    def set_grows(self, on: bool) -> None:
        """Let vectors be added to those that are enabled: they come in several requests."""
        with self._lock:
            for messages in self._messages.values():
                messages.grows = on

    def first_open(self) -> None:
        """Start from a command register of power-on."""
        with self._lock:
            self._intx.follow_command()

    def _disable(self) -> None:
        """Disable what is enabled. ``_igate`` is held, ``_lock`` is not."""
        with self._lock:
            watcher = self._intx.disable()
            for messages in self._messages.values():
                messages.disable()
            self._show_enabled(None)
        if watcher is not None:
            watcher.close()

    def _show_enabled(self, index: int | None) -> None:
        """Note what is enabled, and let the capabilities tell."""
        self._enabled = index
        for kind, number, bit in (
            (Msi, MSI, pci.PCI_MSI_FLAGS_ENABLE),
            (Msix, MSIX, pci.PCI_MSIX_FLAGS_ENABLE),
        ):
            if kind in self._space.places:
                self._space.show(self._space.places[kind], bit << 16, on=index == number)

    # Requests.

    def count(self, index: int) -> int:
        return self._counts.get(index, 0)

    def set_irqs(self, header: vfio.IrqSet, data: Sequence[int], find: Find) -> None:
        """Do what a checked request asks for; ``data`` has a number for each interrupt."""
        action = header.flags & ACTIONS
        with self._igate:
            if header.index == INTX and action == MASK:
                self._intx_mask(header, data)
            elif header.index == INTX and action == UNMASK:
                self._intx_unmask(header, data, find)
            elif header.index == INTX and action == TRIGGER:
                self._intx_trigger(header, data, find)
            elif header.index in self._messages and action == TRIGGER:
                self._message_trigger(header, data, find)
            elif header.index in {ERR, REQ} and action == TRIGGER:
                self._single_trigger(header, data, find)
            else:
                raise OSError(errno.ENOTTY, "the index has no such action")

    def _require_intx(self, header: vfio.IrqSet) -> None:
        if self._enabled != INTX or header.start or header.count != 1:
            raise OSError(errno.EINVAL, "INTx is not enabled, or has no such line")

    def _intx_mask(self, header: vfio.IrqSet, data: Sequence[int]) -> None:
        self._require_intx(header)
        if header.flags & EVENTFD:
            raise OSError(errno.ENOTTY, "no eventfd masks INTx")
        if header.flags & NONE or data[0]:
            with self._lock:
                self._intx.mask()

    def _intx_unmask(self, header: vfio.IrqSet, data: Sequence[int], find: Find) -> None:
        self._require_intx(header)
        if header.flags & EVENTFD:
            self._watch_unmask(data[0], find)
        elif header.flags & NONE or data[0]:
            self._unmask()

    def _unmask(self) -> None:
        with self._lock:
            self._intx.unmask()

    def _watch_unmask(self, number: int, find: Find) -> None:
        watcher = self._intx.unmask_watcher
        if number < 0:
            self._intx.unmask_watcher = None
            if watcher is not None:
                watcher.close()
            return
        eventfd = find(number)
        if watcher is not None:
            # One that was closed makes room for the next, by which QEMU changes it under KVM.
            if not watcher.is_given_up:
                eventfd.close()
                raise OSError(errno.EBUSY, "an eventfd unmasks INTx already")
            watcher.close()
        self._intx.unmask_watcher = None
        self._intx.unmask_watcher = UnmaskWatcher(eventfd, self._unmask)

    def _intx_trigger(self, header: vfio.IrqSet, data: Sequence[int], find: Find) -> None:
        if self._enabled == INTX and not header.count and header.flags & NONE:
            self._disable()
            return
        if self._enabled not in {None, INTX} or header.start or header.count != 1:
            raise OSError(errno.EINVAL, "another kind is enabled, or INTx has no such line")
        if header.flags & EVENTFD:
            trigger = find(data[0]) if data[0] >= 0 else None
            with self._lock:
                if self._enabled == INTX:
                    self._intx.set_trigger(trigger)
                else:
                    self._show_enabled(INTX)
                    self._intx.enable(trigger)
            return
        if self._enabled != INTX:
            raise OSError(errno.EINVAL, "INTx is not enabled")
        if header.flags & NONE or data[0]:
            with self._lock:
                self._intx.signal()

    def _message_trigger(self, header: vfio.IrqSet, data: Sequence[int], find: Find) -> None:
        index, messages = header.index, self._messages[header.index]
        if self._enabled == index and not header.count and header.flags & NONE:
            self._disable()
            return
        if self._enabled not in {None, index}:
            raise OSError(errno.EINVAL, "another kind of interrupt is enabled")
        if header.flags & EVENTFD:
            self._give_block(index, header.start, data, find)
            return
        if self._enabled != index:
            raise OSError(errno.EINVAL, "the index is not enabled")
        with self._lock:
            for vector in range(header.start, header.start + header.count):
                trigger = messages.trigger(vector)
                if trigger and (header.flags & NONE or data[vector - header.start]):
                    trigger.signal()

    def _give_block(self, index: int, start: int, numbers: Sequence[int], find: Find) -> None:
        """Give vectors their eventfds, all or none; the first ones settle how many there are."""
        messages = self._messages[index]
        with self._lock:
            fresh = self._enabled is None
            if fresh:
                messages.enable(start + len(numbers))
                self._show_enabled(index)
            vector = start
            try:
                for vector, number in enumerate(numbers, start):
                    if number < 0:
                        messages.drop(vector)
                    else:
                        messages.give(vector, partial(find, number))
            except OSError:
                for given in range(start, vector):
                    messages.drop(given)
                if fresh:
                    messages.disable()
                    self._show_enabled(None)
                raise

    def _single_trigger(self, header: vfio.IrqSet, data: Sequence[int], find: Find) -> None:
        """ERR and REQ. Without data, or with a bool, what is there is tried out."""
        index, present = header.index, self._single.get(header.index)
        if header.flags & NONE and present is not None:
            if header.count:
                present.signal()
            else:
                self._single.pop(index).close()
            return
        if header.flags & NONE or not header.count:
            raise OSError(errno.EINVAL, "no eventfd is there, or none is given")
        if header.flags & BOOL:
            if data[0] and present is not None:
                present.signal()
            return
        if data[0] < -1:
            return
        given = find(data[0]) if data[0] >= 0 else None
        if present is not None:
            self._single.pop(index).close()
        if given is not None:
            self._single[index] = given


def device_get_irq_info(file: VfioDeviceFile, arg: int, caller: Caller) -> int:
    """Tell how many interrupts an index has; a device that is no PCI Express one has no ERR."""
    irqs = file.device.irqs
    asked = vfio.IrqInfo.parse(caller.read(arg, vfio.IrqInfo.SIZE))
    if asked.argsz < asked.SIZE or asked.index >= vfio.VFIO_PCI_NUM_IRQS:
        raise OSError(errno.EINVAL, "argsz or index")
    asked.count = irqs.count(asked.index)
    if asked.index == ERR and not asked.count:
        raise OSError(errno.EINVAL, "only PCI Express reports errors")
    asked.flags = vfio.VFIO_IRQ_INFO_EVENTFD
    if asked.index == INTX:
        asked.flags |= vfio.VFIO_IRQ_INFO_MASKABLE | vfio.VFIO_IRQ_INFO_AUTOMASKED
    else:
        asked.flags |= vfio.VFIO_IRQ_INFO_NORESIZE
    caller.write(arg, bytes(asked))
    return 0


def device_set_irqs(file: VfioDeviceFile, arg: int, caller: Caller) -> int:
    """Check a request and carry it out."""
    irqs = file.device.irqs
    header = vfio.IrqSet.parse(caller.read(arg, vfio.IrqSet.SIZE))
    size = datum_size(header, irqs.count(header.index))
    raw = caller.read(arg + header.SIZE, size * header.count) if size * header.count else b""
    data = [
        int.from_bytes(raw[at : at + size], "little", signed=True)
        for at in range(0, len(raw), size or 1)
    ]
    irqs.set_irqs(header, data, caller.eventfd)
    return 0


def datum_size(header: vfio.IrqSet, present: int) -> int:
    """Check all that can be checked without the data; return the size of each datum."""
    if (
        header.argsz < header.SIZE
        or header.index >= vfio.VFIO_PCI_NUM_IRQS
        or header.count >= U32_MAX - header.start
        or header.flags & ~(DATA_TYPES | ACTIONS)
    ):
        raise OSError(errno.EINVAL, "argsz, index, count or an unknown flag")
    if header.start >= present or header.start + header.count > present:
        raise OSError(errno.EINVAL, f"the index has {present} interrupts")
    size = DATA_SIZE.get(header.flags & DATA_TYPES)
    if size is None:
        raise OSError(errno.EINVAL, "not one type of data")
    if header.argsz - header.SIZE < header.count * size:
        raise OSError(errno.EINVAL, "argsz is too small for the data")
    return size
