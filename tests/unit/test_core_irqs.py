"""GET_IRQ_INFO and SET_IRQS: every index, action and kind of data, in the kernel's order of checks.

Clauses: VFIO_DEVICE_SET_IRQS in include/uapi/linux/vfio.h; the order of checks and the errno are
those of ``vfio_set_irqs_validate_and_prepare`` and of vfio-pci's ``vfio_pci_set_irqs_ioctl``.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from in_process import Pages, Program, wait_until
from pci_card import EXPRESS, Card
from pci_card import MSI as MSI_AT
from pci_card import MSIX as MSIX_AT
from vfiomig.abi import vfio
from vfiomig.core.regions import region_offset
from vfiomig.device import Device, Interrupts, Msi
from vfiomig.errors import DeviceError
from vfiomig.fsm import State

if TYPE_CHECKING:
    from collections.abc import Iterator

INTX, MSI, MSIX, ERR, REQ = range(5)
NONE, BOOL, EVENTFD = 1, 2, 4
MASK, UNMASK, TRIGGER = 8, 16, 32
COUNTS = {INTX: 1, MSI: 4, MSIX: 70, ERR: 1, REQ: 1}
CONFIG = region_offset(7)
TABLE = region_offset(2) + 0x100
PENDING = region_offset(2) + 0x800


class Host(Program):
    """A program with a ``Card`` and eventfds for its interrupts."""

    def __init__(self, device: Device | None = None) -> None:
        super().__init__(Card() if device is None else device)
        self.eventfds: list[int] = []

    def close(self) -> None:
        super().close()
        for eventfd in self.eventfds:
            os.close(eventfd)
        self.eventfds.clear()

    def eventfd(self, value: int = 0) -> int:
        self.eventfds.append(os.eventfd(value, os.EFD_NONBLOCK))
        return self.eventfds[-1]

    def set_irqs(
        self,
        index: int,
        flags: int,
        data: list[int] | None = None,
        start: int = 0,
        count: int | None = None,
    ) -> int:
        kind = {BOOL: "B", EVENTFD: "i"}.get(flags & 7, "")
        raw = struct.pack(f"={len(data or ())}{kind}", *data or ()) if kind else b""
        header = vfio.IrqSet(
            argsz=20 + len(raw),
            flags=flags,
            index=index,
            start=start,
            count=len(data or ()) if count is None else count,
        )
        return self.ioctl(vfio.VFIO_DEVICE_SET_IRQS, bytes(header) + raw).errno

    def enable(self, index: int, count: int = 1) -> list[int]:
        eventfds = [self.eventfd() for _ in range(count)]
        assert self.set_irqs(index, EVENTFD | TRIGGER, eventfds) == 0
        return eventfds

    def disable(self, index: int) -> int:
        return self.set_irqs(index, NONE | TRIGGER, count=0)

    @property
    def interrupts(self) -> Interrupts:
        return self.served.device.interrupts

    def enabled_bits(self) -> tuple[int, int]:
        """The enable bits of MSI and MSI-X as configuration space shows them."""
        msi = self.file.pread(CONFIG + MSI_AT + 2, 1)[0] & 1
        return msi, self.file.pread(CONFIG + MSIX_AT + 3, 1)[0] >> 7


def signals(eventfd: int) -> int:
    """How often it was signalled since the last look."""
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


# GET_IRQ_INFO.


def irq_info(program: Program, index: int, argsz: int = 16) -> tuple[int, int, int]:
    asked = vfio.IrqInfo(argsz=argsz, index=index, flags=0x77, count=0x77)
    answer = program.ioctl(vfio.VFIO_DEVICE_GET_IRQ_INFO, asked)
    told = vfio.IrqInfo.parse(answer.data)
    assert (told.argsz, told.index) == (argsz, index)
    return answer.errno, told.flags, told.count


@pytest.mark.parametrize(
    ("index", "flags", "count"), [(0, 7, 1), (1, 9, 4), (2, 9, 70), (3, 9, 1), (4, 9, 1)]
)
def test_each_index_tells_its_kind_and_count(
    host: Host, index: int, flags: int, count: int
) -> None:
    assert irq_info(host, index) == (0, flags, count)
    assert irq_info(host, index, argsz=4096) == (0, flags, count)


def test_a_device_without_interrupts_still_has_the_request_of_vfio() -> None:
    with Program() as program:
        assert irq_info(program, INTX) == (0, 7, 0)
        assert irq_info(program, MSI) == (0, 9, 0)
        assert irq_info(program, MSIX) == (0, 9, 0)
        assert irq_info(program, ERR) == (errno.EINVAL, 0x77, 0x77)
        assert irq_info(program, REQ) == (0, 9, 1)


def test_get_irq_info_checks_its_argument(host: Host) -> None:
    assert irq_info(host, 0, argsz=15)[0] == errno.EINVAL
    assert irq_info(host, 5)[0] == errno.EINVAL
    with Pages("rw", "") as pages:
        assert host.at(vfio.VFIO_DEVICE_GET_IRQ_INFO, pages.page(1) - 15) == errno.EFAULT


# SET_IRQS: the checks that come before everything else.


@pytest.mark.parametrize(
    ("argsz", "flags", "index", "start", "count"),
    [
        (19, NONE | TRIGGER, INTX, 0, 1),
        (20, NONE | TRIGGER, 5, 0, 0),
        (20, NONE | TRIGGER, 0xFFFF_FFFF, 0, 0),
        (20, NONE | TRIGGER, INTX, 0, 0xFFFF_FFFF),
        (20, NONE | TRIGGER, INTX, 1, 0xFFFF_FFFE),
        (20, NONE | TRIGGER | 64, INTX, 0, 1),
        (20, 1 << 31 | NONE | TRIGGER, INTX, 0, 1),
        (20, NONE | TRIGGER, INTX, 1, 0),  # start is no interrupt, whatever count is
        (20, NONE | TRIGGER, INTX, 0, 2),
        (20, NONE | TRIGGER, MSIX, 69, 2),
        (20, TRIGGER, INTX, 0, 1),
        (20, NONE | BOOL | TRIGGER, INTX, 0, 1),
        (20, NONE | BOOL | EVENTFD | TRIGGER, INTX, 0, 1),
        (20, BOOL | TRIGGER, INTX, 0, 1),
        (23, EVENTFD | TRIGGER, INTX, 0, 1),
        (27, EVENTFD | TRIGGER, MSI, 0, 2),
    ],
)
def test_a_contradictory_header_is_einval(
    host: Host, argsz: int, flags: int, index: int, start: int, count: int
) -> None:
    header = vfio.IrqSet(argsz=argsz, flags=flags, index=index, start=start, count=count)
    argument = bytes(header) + bytes(64)
    assert host.ioctl(vfio.VFIO_DEVICE_SET_IRQS, argument) == (errno.EINVAL, argument)


def test_an_index_without_interrupts_takes_nothing() -> None:
    with Host(Device()) as host:
        for index in (INTX, MSI, MSIX, ERR):
            assert host.set_irqs(index, NONE | TRIGGER, count=0) == errno.EINVAL
        assert host.set_irqs(REQ, EVENTFD | TRIGGER, [host.eventfd()]) == 0


def test_memory_that_cannot_be_read_is_efault(host: Host) -> None:
    header = vfio.IrqSet(argsz=28, flags=EVENTFD | TRIGGER, index=MSI, count=2)
    with Pages("rw", "") as pages:
        at = pages.page(1) - 24
        host.caller.write(at, bytes(header) + bytes(4))
        assert host.at(vfio.VFIO_DEVICE_SET_IRQS, at) == errno.EFAULT
        assert host.at(vfio.VFIO_DEVICE_SET_IRQS, pages.page(1) - 19) == errno.EFAULT
        # Data that is not asked for is not touched.
        header = vfio.IrqSet(argsz=28, flags=NONE | TRIGGER, index=MSI, count=2)
        host.caller.write(pages.page(1) - 20, bytes(header))
        assert host.at(vfio.VFIO_DEVICE_SET_IRQS, pages.page(1) - 20) == errno.EINVAL


#: The answer to one interrupt with true or a good eventfd, by index, action and data: what comes
#: while nothing is enabled, and what while that very index is.
NOT_ENABLED_IS = {
    **{(INTX, action, data): errno.EINVAL for action in (MASK, UNMASK) for data in (1, 2, 4)},
    **{(index, TRIGGER, data): errno.EINVAL for index in (INTX, MSI, MSIX) for data in (1, 2)},
    **{(index, TRIGGER, EVENTFD): 0 for index in (INTX, MSI, MSIX, ERR, REQ)},
    (ERR, TRIGGER, NONE): errno.EINVAL,
    (REQ, TRIGGER, NONE): errno.EINVAL,
    (ERR, TRIGGER, BOOL): 0,
    (REQ, TRIGGER, BOOL): 0,
}
ENABLED_IS = {
    **{(INTX, action, data): 0 for action in (MASK, UNMASK) for data in (1, 2)},
    (INTX, MASK, EVENTFD): errno.ENOTTY,
    (INTX, UNMASK, EVENTFD): 0,
    **{(index, TRIGGER, data): 0 for index in range(5) for data in (1, 2, 4)},
}
ACTIONS = (0, MASK, UNMASK, TRIGGER, MASK | UNMASK, MASK | TRIGGER, MASK | UNMASK | TRIGGER)
MATRIX = list(itertools.product(range(5), ACTIONS, (NONE, BOOL, EVENTFD)))


@pytest.mark.parametrize(("index", "action", "data"), MATRIX)
@pytest.mark.parametrize("enabled", [False, True])
def test_every_index_action_and_data(
    host: Host, index: int, action: int, data: int, enabled: bool
) -> None:
    if enabled:
        host.enable(index)
    expected = (ENABLED_IS if enabled else NOT_ENABLED_IS).get((index, action, data), errno.ENOTTY)
    datum = {NONE: None, BOOL: [1], EVENTFD: [host.eventfd()]}[data]
    assert host.set_irqs(index, data | action, datum, count=1) == expected


@pytest.mark.parametrize(("index", "other"), list(itertools.permutations((INTX, MSI, MSIX), 2)))
def test_one_kind_is_enabled_at_a_time(host: Host, index: int, other: int) -> None:
    host.enable(index)
    assert host.set_irqs(other, EVENTFD | TRIGGER, [host.eventfd()]) == errno.EINVAL
    assert host.set_irqs(other, EVENTFD | TRIGGER, [-1]) == errno.EINVAL
    assert host.set_irqs(other, NONE | TRIGGER, count=1) == errno.EINVAL
    assert host.disable(other) == errno.EINVAL
    assert host.disable(index) == 0
    assert host.disable(index) == errno.EINVAL, "nothing is enabled any more"
    host.enable(other)


@pytest.mark.parametrize(("index", "action"), [(index, TRIGGER) for index in range(5)])
def test_a_descriptor_that_is_no_eventfd_is_refused(host: Host, index: int, action: int) -> None:
    reader, writer = os.pipe()
    try:
        assert host.set_irqs(index, EVENTFD | action, [reader]) == errno.EINVAL
    finally:
        os.close(reader)
        os.close(writer)
    assert host.set_irqs(index, EVENTFD | action, [reader]) == errno.EBADF
    assert host.enabled_bits() == (0, 0)
    if index < ERR:
        assert host.disable(index) == errno.EINVAL, "a failure enables nothing"


# INTx.


def test_the_pin_interrupts_once_until_it_is_unmasked(host: Host) -> None:
    (eventfd,) = host.enable(INTX)
    host.interrupts.intx(True)
    host.interrupts.intx(True)
    assert signals(eventfd) == 1
    host.interrupts.intx(False)
    host.interrupts.intx(True)
    assert signals(eventfd) == 0, "masked by itself"
    assert host.set_irqs(INTX, NONE | UNMASK, count=1) == 0
    assert signals(eventfd) == 1, "the level is high still"
    host.interrupts.intx(False)
    assert host.set_irqs(INTX, NONE | UNMASK, count=1) == 0
    assert signals(eventfd) == 0
    host.interrupts.intx(True)
    assert signals(eventfd) == 1


def test_a_level_from_before_interrupts_when_intx_is_enabled(host: Host) -> None:
    host.interrupts.intx(True)
    (eventfd,) = host.enable(INTX)
    assert signals(eventfd) == 1
    assert host.disable(INTX) == 0
    (eventfd,) = host.enable(INTX)
    assert signals(eventfd) == 1


def test_a_masked_pin_remembers_its_level(host: Host) -> None:
    (eventfd,) = host.enable(INTX)
    assert host.set_irqs(INTX, NONE | MASK, count=1) == 0
    host.interrupts.intx(True)
    assert signals(eventfd) == 0
    assert host.set_irqs(INTX, BOOL | UNMASK, [0]) == 0
    assert signals(eventfd) == 0, "false: nothing is done"
    assert host.set_irqs(INTX, BOOL | UNMASK, [1]) == 0
    assert signals(eventfd) == 1
    host.interrupts.intx(False)
    assert host.set_irqs(INTX, NONE | UNMASK, count=1) == 0
    assert host.set_irqs(INTX, BOOL | MASK, [0]) == 0
    host.interrupts.intx(True)
    assert signals(eventfd) == 1, "false: it was not masked"


def test_an_eventfd_unmasks_without_a_request(host: Host) -> None:
    (eventfd,) = host.enable(INTX)
    unmask = host.eventfd()
    assert host.set_irqs(INTX, EVENTFD | UNMASK, [unmask]) == 0
    host.interrupts.intx(True)
    for _ in range(5):
        wait_until(lambda: select.select([eventfd], [], [], 0)[0])
        assert signals(eventfd) == 1
        os.eventfd_write(unmask, 1)
    wait_until(lambda: signals(eventfd) == 1)
    host.interrupts.intx(False)
    other = host.eventfd()
    assert host.set_irqs(INTX, EVENTFD | UNMASK, [other]) == errno.EBUSY
    assert host.set_irqs(INTX, EVENTFD | UNMASK, [-1]) == 0
    assert not [one for one in threading.enumerate() if one.name == "vfiomig-unmask"]
    os.eventfd_write(unmask, 1)
    assert host.set_irqs(INTX, EVENTFD | UNMASK, [-1]) == 0, "taking none away is no error"
    host.interrupts.intx(True)
    assert signals(eventfd) == 0, "it was masked by the last interrupt, and nobody unmasked it"
    assert host.set_irqs(INTX, EVENTFD | UNMASK, [other]) == 0


def test_an_unmask_eventfd_that_was_signalled_before_counts(host: Host) -> None:
    (eventfd,) = host.enable(INTX)
    host.interrupts.intx(True)
    assert signals(eventfd) == 1
    assert host.set_irqs(INTX, EVENTFD | UNMASK, [host.eventfd(1)]) == 0
    wait_until(lambda: signals(eventfd) == 1)


@pytest.mark.parametrize("how", ["disable", "reset", "close"])
def test_the_watcher_of_the_unmask_eventfd_ends_with_intx(host: Host, how: str) -> None:
    host.enable(INTX)
    assert host.set_irqs(INTX, EVENTFD | UNMASK, [host.eventfd()]) == 0
    assert [one for one in threading.enumerate() if one.name == "vfiomig-unmask"]
    {"disable": lambda: host.disable(INTX), "reset": host.reset, "close": host.close}[how]()
    assert not [one for one in threading.enumerate() if one.name == "vfiomig-unmask"]


def test_the_trigger_of_intx_can_be_exchanged_and_taken_away(host: Host) -> None:
    (first,) = host.enable(INTX)
    host.interrupts.intx(True)
    second = host.eventfd()
    assert host.set_irqs(INTX, EVENTFD | TRIGGER, [second]) == 0
    assert (signals(first), signals(second)) == (1, 0), "masked stays masked"
    assert host.set_irqs(INTX, NONE | UNMASK, count=1) == 0
    assert (signals(first), signals(second)) == (0, 1)
    assert host.set_irqs(INTX, EVENTFD | TRIGGER, [-1]) == 0
    assert host.set_irqs(INTX, NONE | UNMASK, count=1) == 0, "INTx itself stays enabled"
    assert host.set_irqs(INTX, NONE | TRIGGER, count=1) == 0
    assert (signals(first), signals(second)) == (0, 0)
    assert host.set_irqs(INTX, EVENTFD | TRIGGER, [first]) == 0
    assert signals(first) == 0, "it interrupted into the void and is masked"


def test_a_program_may_try_its_trigger_out(host: Host) -> None:
    (eventfd,) = host.enable(INTX)
    assert host.set_irqs(INTX, NONE | TRIGGER, count=1) == 0
    assert host.set_irqs(INTX, BOOL | TRIGGER, [1]) == 0
    assert host.set_irqs(INTX, BOOL | TRIGGER, [0]) == 0
    assert signals(eventfd) == 2
    host.interrupts.intx(True)
    assert signals(eventfd) == 1, "trying out masks nothing"


def test_the_command_register_masks_and_unmasks_the_pin(host: Host) -> None:
    (eventfd,) = host.enable(INTX)
    host.file.pwrite(CONFIG + 5, b"\x04")
    host.interrupts.intx(True)
    assert host.set_irqs(INTX, NONE | UNMASK, count=1) == 0
    assert host.set_irqs(INTX, NONE | TRIGGER, count=1) == 0
    assert signals(eventfd) == 0
    host.file.pwrite(CONFIG + 4, b"\0\0\0\0")
    assert signals(eventfd) == 1
    host.file.pwrite(CONFIG + 4, b"\0\0")
    assert signals(eventfd) == 0, "it was not set, so nothing is cleared"


def test_a_pin_that_is_disabled_by_the_command_register_starts_masked(host: Host) -> None:
    host.file.pwrite(CONFIG + 5, b"\x04")
    host.interrupts.intx(True)
    (eventfd,) = host.enable(INTX)
    assert signals(eventfd) == 0
    host.file.pwrite(CONFIG + 5, b"\0")
    assert signals(eventfd) == 1


def test_the_status_register_shows_the_pin(host: Host) -> None:
    host.interrupts.intx(True)
    assert host.file.pread(CONFIG + 6, 2) == b"\x18\x02"
    host.interrupts.intx(False)
    assert host.file.pread(CONFIG + 6, 2) == b"\x10\x02"


# MSI and MSI-X.


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_each_vector_signals_its_own_eventfd(host: Host, index: int) -> None:
    send = {MSI: host.interrupts.msi, MSIX: host.interrupts.msix}[index]
    send(0)
    eventfds = host.enable(index, 3)
    assert host.enabled_bits() == ((1, 0) if index == MSI else (0, 1))
    send(1)
    send(1)
    send(2)
    assert [signals(one) for one in eventfds] == [0, 2, 1]
    send(3)
    assert [signals(one) for one in eventfds] == [0, 0, 0], "not enabled, dropped"
    assert host.disable(index) == 0
    send(1)
    assert [signals(one) for one in eventfds] == [0, 0, 0]
    assert host.enabled_bits() == (0, 0)


def test_the_other_kind_is_dropped(host: Host) -> None:
    (eventfd,) = host.enable(MSI)
    host.interrupts.msix(0)
    host.interrupts.intx(True)
    assert signals(eventfd) == 0


@pytest.mark.parametrize("vector", [-1, 4, 70])
def test_a_vector_that_the_device_never_had_is_its_bug(host: Host, vector: int) -> None:
    with pytest.raises(ValueError, match="MSI has 4 vectors here"):
        host.interrupts.msi(vector)


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_vectors_are_given_and_cleared_one_by_one(host: Host, index: int) -> None:
    send = {MSI: host.interrupts.msi, MSIX: host.interrupts.msix}[index]
    first, _, third = host.enable(index, 3)
    assert host.set_irqs(index, EVENTFD | TRIGGER, [-1], start=1) == 0
    send(1)
    other = host.eventfd()
    assert host.set_irqs(index, EVENTFD | TRIGGER, [other, -1], start=1) == 0
    send(0)
    send(1)
    send(2)
    assert (signals(first), signals(other), signals(third)) == (1, 1, 0)


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_how_many_vectors_there_are_is_settled_by_the_first(host: Host, index: int) -> None:
    (eventfd,) = host.enable(index)
    assert host.set_irqs(index, EVENTFD | TRIGGER, [host.eventfd()], start=1) == errno.EINVAL
    assert host.set_irqs(index, EVENTFD | TRIGGER, [-1], start=1) == 0, "there is none to clear"
    assert host.set_irqs(index, NONE | TRIGGER, count=3) == 0
    assert signals(eventfd) == 1


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_enabling_may_leave_vectors_out(host: Host, index: int) -> None:
    eventfd = host.eventfd()
    assert host.set_irqs(index, EVENTFD | TRIGGER, [-1, -1]) == 0
    assert 1 in host.enabled_bits()
    assert host.set_irqs(index, EVENTFD | TRIGGER, [eventfd], start=1) == 0
    assert host.set_irqs(index, BOOL | TRIGGER, [1, 1]) == 0
    assert host.set_irqs(index, BOOL | TRIGGER, [1, 0]) == 0
    assert signals(eventfd) == 1
    assert host.disable(index) == 0
    assert host.set_irqs(index, EVENTFD | TRIGGER, [eventfd], start=3) == 0
    assert host.set_irqs(index, NONE | TRIGGER, start=3, count=1) == 0
    assert signals(eventfd) == 1


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_enabling_no_vector_at_all_fails_as_its_allocation_does(host: Host, index: int) -> None:
    assert host.set_irqs(index, EVENTFD | TRIGGER, []) == errno.ERANGE
    assert host.enabled_bits() == (0, 0)
    assert host.set_irqs(index, EVENTFD | TRIGGER, [], start=1) == 0
    assert 1 in host.enabled_bits()


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_a_block_is_given_whole_or_not_at_all(host: Host, index: int) -> None:
    good = host.eventfd()
    assert host.set_irqs(index, EVENTFD | TRIGGER, [good, 10_000]) == errno.EBADF
    assert host.enabled_bits() == (0, 0)
    first, second, third = host.enable(index, 3)
    assert host.set_irqs(index, EVENTFD | TRIGGER, [good, 10_000]) == errno.EBADF
    assert host.set_irqs(index, NONE | TRIGGER, count=3) == 0
    assert [signals(one) for one in (good, first, second, third)] == [0, 0, 0, 1]


def test_a_masked_msi_waits_for_its_mask_to_be_cleared(host: Host) -> None:
    first, second = host.enable(MSI, 2)
    mask, pending = CONFIG + MSI_AT + 16, CONFIG + MSI_AT + 20
    host.file.pwrite(mask, b"\x02")
    host.interrupts.msi(0)
    host.interrupts.msi(1)
    host.interrupts.msi(1)
    assert (signals(first), signals(second)) == (1, 0)
    assert host.file.pread(pending, 4) == b"\x02\0\0\0"
    host.file.pwrite(mask, b"\x03")
    assert signals(second) == 0
    host.file.pwrite(mask, b"\0")
    assert (signals(first), signals(second)) == (0, 1)
    assert host.file.pread(pending, 4) == bytes(4)


def test_without_mask_bits_no_msi_is_masked() -> None:
    class Plain(Device):
        pci_capabilities = (Msi(vectors=1),)

    with Host(Plain()) as host:
        (eventfd,) = host.enable(MSI)
        host.file.pwrite(CONFIG + 0x50, b"\xff" * 8)  # behind the capability
        host.interrupts.msi(0)
        assert signals(eventfd) == 1


def entry(vector: int) -> int:
    return TABLE + 16 * vector


def test_the_msix_table_is_masked_until_a_vector_is_served(host: Host) -> None:
    assert host.file.pread(entry(0), 32) == (bytes(12) + b"\1\0\0\0") * 2
    host.enable(MSIX)
    assert host.file.pread(entry(0), 32) == bytes(28) + b"\1\0\0\0"
    assert host.set_irqs(MSIX, EVENTFD | TRIGGER, [-1]) == 0
    assert host.file.pread(entry(0) + 12, 4) == b"\1\0\0\0"


def test_a_masked_msix_vector_sets_its_pending_bit_and_fires_at_unmask(host: Host) -> None:
    eventfds = host.enable(MSIX, 70)
    host.file.pwrite(entry(69) + 12, b"\1")
    host.interrupts.msix(69)
    host.interrupts.msix(69)
    host.interrupts.msix(3)
    assert (signals(eventfds[69]), signals(eventfds[3])) == (0, 1)
    assert host.file.pread(PENDING, 16) == bytes(8) + b"\x20" + bytes(7)
    host.file.pwrite(entry(69) + 12, b"\0\0\0\0")
    assert signals(eventfds[69]) == 1
    assert host.file.pread(PENDING, 16) == bytes(16)
    host.interrupts.msix(69)
    assert signals(eventfds[69]) == 1


def test_a_pending_vector_whose_eventfd_is_exchanged_is_not_lost(host: Host) -> None:
    (first,) = host.enable(MSIX)
    host.file.pwrite(entry(0) + 12, b"\1")
    host.interrupts.msix(0)
    second = host.eventfd()
    assert host.set_irqs(MSIX, EVENTFD | TRIGGER, [second]) == 0
    assert (signals(first), signals(second)) == (0, 1)


def test_the_table_keeps_what_is_writable_and_the_pending_bits_nothing(host: Host) -> None:
    host.file.pwrite(entry(1), b"\xff" * 16)
    assert host.file.pread(entry(1), 16) == b"\xfc" + b"\xff" * 11 + b"\1\0\0\0"
    host.file.pwrite(entry(1) + 13, b"\xff" * 3)
    assert host.file.pread(entry(1) + 12, 4) == b"\1\0\0\0"
    assert host.file.pread(entry(2), 16) == bytes(12) + b"\1\0\0\0"
    assert host.file.pwrite(PENDING, b"\xff" * 16) == 16
    assert host.file.pread(PENDING, 16) == bytes(16)


def test_the_devices_own_handlers_never_see_the_msix_structures(host: Host) -> None:
    device = host.served.device
    assert isinstance(device, Card)
    end = 0x100 + 70 * 16
    data = host.file.pread(region_offset(2) + 0xF8, end - 0xF8 + 8)
    assert data[:8] == data[-8:] == b"\xee" * 8
    assert data[8:24] == bytes(12) + b"\1\0\0\0"
    host.file.pwrite(region_offset(2) + 0x7FC, bytes(range(24)))
    assert device.accesses == [
        (0xF8, 8),
        (end, 8),
        (0x7FC, bytes(range(4))),
        (0x810, bytes(range(20, 24))),
    ]


def test_enabling_in_configuration_space_enables_nothing(host: Host) -> None:
    host.file.pwrite(CONFIG + MSI_AT + 2, b"\x01\0")
    host.file.pwrite(CONFIG + MSIX_AT + 2, b"\0\xc0")
    assert host.enabled_bits() == (0, 0)
    assert host.disable(MSI) == host.disable(MSIX) == errno.EINVAL


# ERR and REQ.


@pytest.mark.parametrize("index", [ERR, REQ])
def test_err_and_req_have_an_eventfd_that_can_be_tried_exchanged_and_taken_away(
    host: Host, index: int
) -> None:
    (first,) = host.enable(index)
    assert host.set_irqs(index, NONE | TRIGGER, count=1) == 0
    assert host.set_irqs(index, BOOL | TRIGGER, [1]) == 0
    assert host.set_irqs(index, BOOL | TRIGGER, [0]) == 0
    assert signals(first) == 2
    second = host.eventfd()
    assert host.set_irqs(index, EVENTFD | TRIGGER, [second]) == 0
    assert host.set_irqs(index, EVENTFD | TRIGGER, [-2]) == 0, "neither a number nor -1"
    assert host.set_irqs(index, NONE | TRIGGER, count=1) == 0
    assert (signals(first), signals(second)) == (0, 1)
    assert host.set_irqs(index, EVENTFD | TRIGGER, [-1]) == 0
    assert host.disable(index) == errno.EINVAL
    assert host.set_irqs(index, BOOL | TRIGGER, [1]) == 0
    host.enable(index)
    assert host.disable(index) == 0


@pytest.mark.parametrize("index", [ERR, REQ])
@pytest.mark.parametrize("data", [BOOL, EVENTFD])
def test_err_and_req_want_the_data_that_is_announced(host: Host, index: int, data: int) -> None:
    assert host.set_irqs(index, data | TRIGGER, []) == errno.EINVAL


def test_err_and_req_stand_beside_the_functions_interrupts(host: Host) -> None:
    (err,), (req,), (msi,) = host.enable(ERR), host.enable(REQ), host.enable(MSI)
    for index in (ERR, REQ, MSI):
        assert host.set_irqs(index, NONE | TRIGGER, count=1) == 0
    assert (signals(err), signals(req), signals(msi)) == (1, 1, 1)


# Life.


@pytest.mark.parametrize("index", [INTX, MSI, MSIX])
@pytest.mark.parametrize("how", ["RESET", "FLR"])
def test_a_reset_drops_the_functions_triggers(host: Host, index: int, how: str) -> None:
    (req,), (eventfd,) = host.enable(REQ), host.enable(index)
    reset_by(host, how)
    host.interrupts.intx(True)
    host.interrupts.msi(0)
    host.interrupts.msix(0)
    assert signals(eventfd) == 0
    assert host.enabled_bits() == (0, 0)
    assert host.disable(index) == errno.EINVAL
    assert host.set_irqs(REQ, NONE | TRIGGER, count=1) == 0
    assert signals(req) == 1, "the request belongs to VFIO, not to the function"


def reset_by(host: Host, how: str) -> None:
    device = host.served.device
    assert isinstance(device, Card)
    before = device.resets
    if how == "RESET":
        assert host.reset() == 0
    else:
        assert host.file.pwrite(CONFIG + EXPRESS + 8, b"\x10\xa8") == 2
        assert host.file.pread(CONFIG + EXPRESS + 8, 2) == b"\x10\x28"
    assert device.resets == before + 1


@pytest.mark.parametrize("how", ["RESET", "FLR"])
def test_a_reset_lowers_the_pin_and_clears_the_msix_table(host: Host, how: str) -> None:
    host.interrupts.intx(True)
    host.file.pwrite(entry(0), b"\x10")
    reset_by(host, how)
    assert host.file.pread(CONFIG + 6, 2) == b"\x10\x02"
    assert host.file.pread(entry(0), 1) == b"\0"
    (eventfd,) = host.enable(INTX)
    assert signals(eventfd) == 0


@pytest.mark.parametrize("how", ["RESET", "FLR"])
def test_a_reset_leads_to_running_and_leaves_configuration_space(host: Host, how: str) -> None:
    host.file.pwrite(CONFIG + 0x14, b"\0\0\x12\x34")
    host.go(State.RESUMING)
    waits = host.caller.waits
    reset_by(host, how)
    assert host.state() is State.RUNNING
    assert host.file.pread(CONFIG + 0x14, 4) == b"\0\0\x12\x34"
    assert host.caller.waits > waits or how == "FLR"


def test_flr_passes_the_receivers_role_on_before_the_device_resets(host: Host) -> None:
    device = host.served.device
    assert isinstance(device, Card)
    seen: list[int] = []
    host.file.pwrite(CONFIG + EXPRESS + 9, b"\x80", lambda: seen.append(device.resets))
    assert (seen, device.resets) == ([0], 1)
    host.file.pwrite(CONFIG + EXPRESS + 9, b"\x00", lambda: seen.append(device.resets))
    assert (seen, device.resets) == ([0], 1)


def test_flr_of_a_device_that_refuses_tells_nobody(host: Host) -> None:
    device = host.served.device
    assert isinstance(device, Card)
    device.refuses = DeviceError(errno.EIO)
    assert host.file.pwrite(CONFIG + EXPRESS + 9, b"\x80") == 1
    assert host.reset() == errno.EIO


def test_the_last_close_drops_every_trigger_and_configuration_space_starts_anew(
    host: Host,
) -> None:
    eventfds = [*host.enable(ERR), *host.enable(REQ), *host.enable(MSIX)]
    host.file.pwrite(CONFIG + 4, b"\x07\x04")
    host.file.release()
    host.interrupts.msix(0)
    host.file = host.served.open()
    host.bind()
    assert host.enabled_bits() == (0, 0)
    assert host.file.pread(CONFIG + 4, 2) == b"\x07\0"
    for index in (ERR, REQ, MSIX):
        assert host.set_irqs(index, NONE | TRIGGER, count=1) == errno.EINVAL
    assert [signals(one) for one in eventfds] == [0, 0, 0]
    host.interrupts.intx(True)
    assert signals(host.enable(INTX)[0]) == 1, "INTx is not disabled by the last user's command"


def test_the_level_of_the_pin_outlives_the_last_close(host: Host) -> None:
    host.interrupts.intx(True)
    host.file.release()
    host.file = host.served.open()
    host.bind()
    assert signals(host.enable(INTX)[0]) == 1


def test_interrupts_are_dropped_quietly_where_nobody_serves_the_device() -> None:
    device = Card()
    device.interrupts.intx(True)
    device.interrupts.msi(0)
    device.interrupts.msix(0)


def test_a_program_that_lets_its_counter_run_full_holds_nobody_up(host: Host) -> None:
    full = os.eventfd((1 << 32) - 1, 0)  # blocking, as QEMU's are not
    try:
        os.eventfd_write(full, (1 << 64) - (1 << 32) - 1)
        assert host.set_irqs(MSI, EVENTFD | TRIGGER, [full]) == 0
        host.interrupts.msi(0)
        assert os.eventfd_read(full) == (1 << 64) - 1, "as the kernel leaves it"
    finally:
        os.close(full)


def test_devices_may_interrupt_from_many_threads(host: Host) -> None:
    (eventfd,) = host.enable(MSI)

    def interrupt() -> None:
        for _ in range(500):
            host.interrupts.msi(0)

    threads = [threading.Thread(target=interrupt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert signals(eventfd) == 2000
