"""What every client must do, whatever it reaches the device by: cases, not tests.

A case is a function over open devices, and names the SPECs and dialects that it wants. Whoever
runs it opens them: tests/unit in this process and over vfio-user, tests/seccomp under a front
door, where this file is the program: ``python client_suite.py CASE TARGET...``.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import select
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import vfiomig
from vfiomig import Capability, DeviceClient, SessionError, SetStateError, State
from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.client import dirty_ranges
from vfiomig.client.local import LocalTransport
from vfiomig.client.recovery import (
    DESCRIPTOR_LOST,
    SOURCE_FAILED,
    Action,
    Outcome,
    fall_back_to,
    recover,
)
from vfiomig.client.vfio_user import VfioUserTransport
from vfiomig.errors import RequestError
from vfiomig.fsm import LEGAL_SETS, SessionKind, capability_name, path, session_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEVICES = Path(__file__).with_name("suite_devices.py")
CARD = f"{DEVICES}:Card"
BOTH = tuple(Dialect)
LANDED = (Dialect.LANDED,)
V6 = (Dialect.V6,)


@dataclass(frozen=True)
class Case:
    """A case and the devices that it is given, in this order."""

    name: str
    specs: tuple[str, ...]
    dialect: Dialect
    body: Callable[..., None]
    #: There must be an IOMMU in front of the device; behind a socket is none.
    iommu: bool = False


CASES: dict[str, Case] = {}


def case(
    *specs: str, dialects: tuple[Dialect, ...] = BOTH, name: str = "", iommu: bool = False
) -> Callable[..., None]:
    def declare(body: Callable[..., None]) -> Callable[..., None]:
        for dialect in dialects:
            full = f"{name or body.__name__}-{dialect}"
            assert full not in CASES
            CASES[full] = Case(full, specs, dialect, body, iommu)
        return body

    return declare  # type: ignore[return-value]  # a decorator


@contextmanager
def raises(number: int) -> Iterator[list[RequestError]]:
    """Expect a failure with this errno; the list holds it afterwards."""
    caught: list[RequestError] = []
    try:
        yield caught
    except RequestError as failure:
        caught.append(failure)
    assert [failure.errno for failure in caught] == [number], caught


@contextmanager
def no_free_descriptor(dev: DeviceClient) -> Iterator[None]:
    """Let every new descriptor fail with EMFILE."""
    transport = dev._transport
    if isinstance(transport, LocalTransport | VfioUserTransport):
        numbers = transport.numbers
        before, numbers.nofile = numbers.nofile, 0
        yield
        numbers.nofile = before
    else:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        yield
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def state_of(dev: DeviceClient) -> State:
    """Ask again: a type checker takes a property for something that stays."""
    return dev.state


def save(dev: DeviceClient) -> bytes:
    """Read the whole state, in reads of 1000 bytes, and leave the device in STOP."""
    session = dev.set_state(State.STOP_COPY)
    with session:
        state = b"".join(map(bytes, session.chunks(1000)))
        assert session.readinto(bytearray(1)) == 0
    dev.set_state(State.STOP)
    return state


def load(dev: DeviceClient, state: bytes) -> None:
    session = dev.set_state(State.RESUMING)
    with session:
        session.write_all(state)
        dev.set_state(State.STOP)


# What it finds.


@case(CARD, dialects=LANDED)
def a_landed_device_shows_what_it_has(dev: DeviceClient) -> None:
    assert dev.dialect is Dialect.LANDED
    assert dev.capabilities == 7
    assert state_of(dev) is State.RUNNING
    assert dev.session is None
    assert dev.data_size() == 4096 + 12
    assert dev.precopy_v2()


@case(CARD, dialects=V6)
def a_v6_device_shows_five_states_and_no_estimates(dev: DeviceClient) -> None:
    assert dev.dialect is Dialect.V6
    assert dev.capabilities == Capability.STOP_COPY
    assert state_of(dev) is State.RUNNING
    assert not dev.precopy_v2()
    with raises(errno.EINVAL):
        dev.data_size()


@case("pattern,size=4K,caps=none", dialects=LANDED)
def a_device_that_cannot_migrate_opens_and_says_so(dev: DeviceClient) -> None:
    assert dev.capabilities == 0
    assert 0 in dev.regions
    with raises(errno.ENOTTY) as caught:
        dev.set_state(State.STOP)
    (failure,) = caught
    assert isinstance(failure, SetStateError)
    assert failure.device_state is None


@case(CARD)
def looking_at_the_state_changes_nothing(dev: DeviceClient) -> None:
    for state in (State.STOP, State.STOP_COPY, State.STOP, State.RESUMING):
        session = dev.set_state(state)
        assert [dev.state, dev.state] == [state, state]
        assert dev.session is session
        if session is not None:
            session.close()
    dev.reset()
    assert state_of(dev) is State.RUNNING


def all_requests_have_the_result_of_the_table(dev: DeviceClient) -> None:
    """Every state of the set, and every request in it, sent."""
    capabilities = dev.capabilities
    for origin in State:
        arcs = path(capabilities, State.RUNNING, origin)
        if arcs is None:
            continue
        for target in (*range(9), 0x7FFFFFFF, 0xFFFFFFFF):
            dev.reset()
            with ExitStack() as stack:
                opened = dev.set_state(origin)
                if opened is not None:
                    stack.enter_context(opened)
                if origin is State.RESUMING:
                    assert opened is not None
                    opened.write_all(b"CARD\xff\xff\0\0")
                check_request(dev, origin, target, stack)


def check_request(dev: DeviceClient, origin: State, target: int, stack: ExitStack) -> None:
    arcs = path(dev.capabilities, origin, target)
    before = dev.session
    if arcs is None:
        with raises(errno.EINVAL) as caught:
            dev.set_state(target, force=True)
        (failure,) = caught
        assert isinstance(failure, SetStateError)
        assert (failure.requested, failure.device_state) == (target, origin)
        assert dev.session is None
        assert state_of(dev) is origin
        return
    session = dev.set_state(target)
    assert dev.state == target
    if session is not None and session is not before:
        stack.enter_context(session)
    assert (session.kind if session else None) is session_kind(State(target))
    assert (session is before) is (not any(arc.opens or arc.closes for arc in arcs))


for _caps in LEGAL_SETS:
    _name = capability_name(_caps)
    case(f"{CARD},caps={_name}", name=f"all_requests_{_name}")(
        all_requests_have_the_result_of_the_table
    )


# A migration.


@case(CARD, CARD)
def a_state_moves_from_one_device_to_the_other(
    source: DeviceClient, destination: DeviceClient
) -> None:
    content = bytes(range(256)) * 16
    assert source.write_region(0, 0, content) == len(content)
    state = save(source)
    load(destination, state)
    assert save(destination) == state
    assert destination.set_state(State.RUNNING) is None
    assert destination.read_region(0, 0, 4096) == content


@case(CARD, CARD, dialects=LANDED)
def a_stream_begun_in_pre_copy_goes_on_in_stop_copy(
    source: DeviceClient, destination: DeviceClient
) -> None:
    source.write_region(0, 0, b"0123456789abcdef")
    session = source.set_state(State.PRE_COPY)
    stream = bytearray()
    with session:
        assert session.precopy_info() == (4, 0, False)
        for chunk in session:
            stream += chunk
        assert stream == b"CARD"
        assert session.precopy_info() == (0, 20, False)
        for chunk in session:
            stream += chunk
        assert session.readinto(bytearray(99)) is None
        assert source.set_state(State.PRE_COPY_P2P) is session
        assert session.readinto(bytearray(99)) is None
        source.write_region(0, 0, b"written later")
        assert source.set_state(State.STOP_COPY) is session
        for chunk in session:
            stream += chunk
        assert session.readinto(bytearray(99)) == 0
        assert session.transferred == len(stream)
    assert source.set_state(State.STOP) is None
    load(destination, bytes(stream))
    assert destination.read_region(0, 0, 16) == b"written laterdef"


# Sessions.


@case(CARD)
def a_session_is_over_when_the_device_left_its_states(dev: DeviceClient) -> None:
    session = dev.set_state(State.STOP_COPY)
    with session:
        assert session.kind is SessionKind.SAVING
        assert session.readinto(bytearray(2)) == 2
        dev.set_state(State.STOP)
        assert dev.session is None
        with raises(errno.ENODEV) as caught:
            session.readinto(bytearray(2))
        assert isinstance(caught[0], SessionError)
        again = dev.set_state(State.STOP_COPY)
        with again:
            assert again is not session
            with raises(errno.ENODEV):
                session.readinto(bytearray(2))
            assert len(b"".join(map(bytes, again))) == 4096 + 12


@case(CARD)
def a_reset_ends_the_session(dev: DeviceClient) -> None:
    session = dev.set_state(State.RESUMING)
    with session:
        assert session.write(b"CARD") == 4
        dev.reset()
        assert dev.session is None
        assert state_of(dev) is State.RUNNING
        with raises(errno.ENODEV):
            session.write(b"more")


@case(f"{DEVICES}:Stuck")
def a_blocked_reader_wakes_when_its_session_ends(dev: DeviceClient) -> None:
    session = dev.set_state(State.STOP_COPY)
    caught: list[int | None] = []

    def read() -> None:
        try:
            caught.append(session.readinto(bytearray(100)))
        except SessionError as failure:
            caught.append(failure.errno)

    with session:
        assert session.readinto(bytearray(4)) == 4
        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.1)  # for the reader to be in the read that blocks; it fails in any case
        dev.set_state(State.STOP)
        reader.join(20)
        dev.write_region(1, 0, b"\1")
    assert caught == [errno.ENODEV]


@case(CARD)
def chunks_can_be_kept(dev: DeviceClient) -> None:
    session = dev.set_state(State.STOP_COPY)
    with session:
        kept = list(session.chunks(1024))
    dev.set_state(State.STOP)
    again = dev.set_state(State.STOP_COPY)
    with again:
        assert len(kept) == 5
        assert b"".join(kept) == b"".join(again)


@case(CARD)
def the_wrong_direction_and_a_closed_session_are_ebadf(dev: DeviceClient) -> None:
    session = dev.set_state(State.STOP_COPY)
    with raises(errno.EBADF):
        session.write(b"x")
    session.close()
    session.close()
    with raises(errno.EBADF):
        session.readinto(bytearray(1))
    assert state_of(dev) is State.STOP_COPY
    loading = dev.set_state(State.RESUMING)
    with loading, raises(errno.EBADF):
        loading.readinto(bytearray(1))


@case(CARD, dialects=LANDED)
def pre_copy_is_only_asked_about_while_it_lasts(dev: DeviceClient) -> None:
    with raises(errno.EINVAL):
        dev.precopy_info()
    session = dev.set_state(State.STOP_COPY)
    with session, raises(errno.EINVAL):
        dev.precopy_info()
    loading = dev.set_state(State.RESUMING)
    with loading, raises(errno.ENOTTY):
        dev.precopy_info()


# Failures.


@case(f"{CARD},caps=stop-copy+p2p,fail=stop-stop_copy:ETIMEDOUT")
def a_failure_half_way_tells_the_state_reached(dev: DeviceClient) -> None:
    with raises(errno.ETIMEDOUT) as caught:
        dev.set_state(State.STOP_COPY)
    (failure,) = caught
    assert isinstance(failure, SetStateError)
    assert (failure.requested, failure.device_state) == (State.STOP_COPY, State.STOP)
    for word in ("STOP_COPY", "ETIMEDOUT", "is in STOP:", "RUNNING", "RECOVER-4"):
        assert word in str(failure)
    assert state_of(dev) is State.STOP
    session = dev.set_state(State.STOP_COPY)
    session.close()


@case(f"{CARD},caps=stop-copy,fail=stop-stop_copy:ENOTTY", dialects=V6)
def v6_shows_a_drivers_reserved_errno_as_einval(dev: DeviceClient) -> None:
    with raises(errno.EINVAL) as caught:
        dev.set_state(State.STOP_COPY)
    assert isinstance(caught[0], SetStateError)
    assert caught[0].device_state is State.STOP


@case(f"{CARD},fail=stop-stop_copy:EIO,fatal=yes")
def only_a_reset_leads_out_of_error(dev: DeviceClient) -> None:
    with raises(errno.EIO) as caught:
        dev.set_state(State.STOP_COPY)
    assert isinstance(caught[0], SetStateError)
    assert caught[0].device_state is State.ERROR
    assert "RECOVER-10" in str(caught[0])
    assert state_of(dev) is State.ERROR
    with raises(errno.EINVAL):
        dev.set_state(State.RUNNING)
    dev.reset()
    assert state_of(dev) is State.RUNNING


@case(CARD)
def a_request_that_is_known_to_be_refused_is_not_sent(dev: DeviceClient) -> None:
    session = dev.set_state(State.STOP_COPY)
    with session:
        for target in (State.ERROR, 8, 0xFFFFFFFF, State.PRE_COPY):
            with raises(errno.EINVAL) as caught:
                dev.set_state(target)
            assert isinstance(caught[0], SetStateError)
            assert caught[0].device_state is State.STOP_COPY
        assert dev.session is session
        assert len(b"".join(map(bytes, session))) == 4096 + 12
        # Sent all the same, it is refused likewise; but then no session is trusted.
        with raises(errno.EINVAL):
            dev.set_state(State.ERROR, force=True)
        assert dev.session is None


@case(CARD)
def a_foreign_state_is_refused_by_the_write(dev: DeviceClient) -> None:
    session = dev.set_state(State.RESUMING)
    with session:
        with raises(errno.EINVAL):
            session.write_all(b"MTTY" + bytes(100))
        assert state_of(dev) is State.RESUMING
        with raises(errno.EINVAL) as caught:
            dev.set_state(State.STOP)
    assert "RECOVER-8" in str(caught[0])
    dev.reset()
    assert state_of(dev) is State.RUNNING


@case(CARD)
def a_state_that_is_cut_off_is_refused_by_the_arc(dev: DeviceClient) -> None:
    state = save(dev)
    with raises(errno.EINVAL) as caught:
        load(dev, state[:-1])
    assert isinstance(caught[0], SetStateError)
    assert caught[0].device_state is State.RESUMING
    dev.reset()


@case(CARD)
def without_a_free_descriptor_the_state_is_reached_and_the_session_lost(dev: DeviceClient) -> None:
    with no_free_descriptor(dev), raises(errno.EMFILE) as caught:
        dev.set_state(State.STOP_COPY)
    (failure,) = caught
    assert isinstance(failure, SetStateError)
    assert failure.device_state is State.STOP_COPY
    assert "RECOVER-6" in str(failure)
    assert dev.session is None
    # Asking for the state again is no way to a descriptor.
    with raises(errno.EBADF):
        dev.set_state(State.STOP_COPY)
    assert state_of(dev) is State.STOP_COPY


# Regions and DMA.


@case(CARD)
def regions_are_found_and_read_and_written(dev: DeviceClient) -> None:
    assert {index: region.size for index, region in dev.regions.items()} == {0: 4096, 7: 256}
    assert dev.read_region(7, 0, 4) == b"\xf4\x1a\xf0\x10"
    for size in (1, 2, 4, 8, 3):
        data = bytes(range(100, 100 + size))
        assert dev.write_region(0, 5, data) == size
        assert dev.read_region(0, 5, size) == data
    assert dev.read_region(0, 4090, 100) == bytes(6)
    with raises(errno.EINVAL):
        dev.read_region(3, 0, 1)
    with raises(errno.EINVAL):
        dev.read_region(0, 4096, 1)


@case(f"{DEVICES}:Ring", dialects=LANDED)
def the_log_tells_what_the_device_wrote(dev: DeviceClient) -> None:
    length = 16 * 4096
    memory = mmap.mmap(-1, length)
    dev.map(0x100000, memory)
    dev.set_bus_master(True)
    with raises(errno.EINVAL):
        dev.report_dma_logging(0x100000, length)
    assert dev.start_dma_logging([(0x100000, length)]) == 4096
    logging_before = dev.dma_logging
    with raises(errno.EINVAL):
        dev.start_dma_logging([(0x100000, length)])
    for iova in (0x100000, 0x102FF8, 0x10F000):
        dev.write_region(0, 0, iova.to_bytes(8, "little"))
    assert memory[0x2FF8:0x3008] == b"written by DMA!!"
    bitmap = dev.report_dma_logging(0x100000, length)
    assert list(dirty_ranges(bitmap, 0x100000, length)) == [
        (0x100000, 4096),
        (0x102000, 8192),
        (0x10F000, 4096),
    ]
    assert not any(dev.report_dma_logging(0x100000, length))
    dev.stop_dma_logging()
    dev.stop_dma_logging()
    assert (logging_before, dev.dma_logging) == (True, False)
    assert dev.unmap(0x100000, length) == length
    memory.close()


@case(f"{DEVICES}:Ring", dialects=LANDED, iommu=True)
def the_iommu_tells_what_the_device_wrote(dev: DeviceClient) -> None:
    length = 16 * 4096

    def ring(*addresses: int) -> None:
        for iova in addresses:
            dev.write_region(0, 0, iova.to_bytes(8, "little"))

    def dirty(page_size: int = 4096, *, clear: bool = True) -> list[tuple[int, int]]:
        bitmap = dev.report_iommu_tracking(0x100000, length, page_size, clear=clear)
        return list(dirty_ranges(bitmap, 0x100000, length, page_size))

    assert dev.iommu_dirty_tracking
    with mmap.mmap(-1, length) as memory:
        dev.map(0x100000, memory)
        dev.set_bus_master(True)
        ring(0x100000)  # by the page table that cannot track
        with raises(errno.EINVAL):
            dirty()
        dev.start_iommu_tracking()
        tracking_before = dev.iommu_tracking
        assert dirty() == []
        ring(0x100000, 0x102FF8, 0x10F000)
        assert memory[0x2FF8:0x3008] == b"written by DMA!!"
        expected = [(0x100000, 4096), (0x102000, 8192), (0x10F000, 4096)]
        assert dirty(clear=False) == expected
        assert dirty() == expected
        assert dirty() == []
        ring(0x103000)
        assert dirty(8192) == [(0x102000, 8192)]
        ring(0x104000)
        dev.start_iommu_tracking()  # anew
        assert dirty() == []
        for wrong in (0, 100):
            with raises(errno.EINVAL):
                dev.report_iommu_tracking(0x100000, wrong)
        dev.stop_iommu_tracking()
        assert (tracking_before, dev.iommu_tracking) == (True, False)
        with raises(errno.EINVAL):
            dirty()
        ring(0x105000)
        dev.start_iommu_tracking()
        assert dirty() == []
        dev.stop_iommu_tracking()
        dev.stop_iommu_tracking()
        assert dev.unmap(0x100000, length) == length


@case(f"{DEVICES}:Ring", dialects=LANDED, iommu=True)
def the_iommu_tracks_before_anything_is_mapped_and_over_a_reset(dev: DeviceClient) -> None:
    dev.stop_iommu_tracking()
    dev.start_iommu_tracking()
    with mmap.mmap(-1, 8192) as memory:
        dev.map(0x100000, memory)
        dev.set_bus_master(True)
        dev.start_dma_logging([(0x100000, 4096)])
        dev.write_region(0, 0, (0x100FF8).to_bytes(8, "little"))
        dev.reset()
        assert dev.report_dma_logging(0x100000, 8192)[0] == 1
        assert dev.report_iommu_tracking(0x100000, 8192)[0] == 3
        dev.unmap(0x100000, 8192)


@case(f"{DEVICES}:Untracked", dialects=LANDED)
def an_iommu_that_cannot_track_says_so_and_the_device_works_on(dev: DeviceClient) -> None:
    assert not dev.iommu_dirty_tracking
    with raises(errno.EOPNOTSUPP) as caught:
        dev.start_iommu_tracking()
    assert "start_dma_logging" in str(caught[0])
    assert not dev.iommu_tracking
    dev.stop_iommu_tracking()
    with mmap.mmap(-1, 4096) as memory:
        dev.map(0x100000, memory)
        with raises(errno.EOPNOTSUPP):
            dev.start_iommu_tracking()
        dev.set_bus_master(True)
        dev.write_region(0, 0, (0x100000).to_bytes(8, "little"))
        assert memory[:16] == b"written by DMA!!"
        dev.unmap(0x100000, 4096)


@case(f"{DEVICES}:Ring", dialects=LANDED)
def only_a_bus_master_does_dma(dev: DeviceClient) -> None:
    def ring() -> None:
        dev.write_region(0, 0, (0x100000).to_bytes(8, "little"))

    with mmap.mmap(-1, 4096) as memory:
        dev.map(0x100000, memory)
        with raises(errno.EFAULT):
            ring()
        dev.set_bus_master(True)
        assert dev.read_region(7, 4, 2) == b"\x06\0"
        ring()
        assert memory[:16] == b"written by DMA!!"
        memory[:16] = bytes(16)
        dev.set_bus_master(False)
        with raises(errno.EFAULT):
            ring()
        assert memory[:16] == bytes(16)
        dev.set_bus_master(True)
        dev.reset()  # which leaves the command register as it is
        ring()
        assert memory[:16] == b"written by DMA!!"
        dev.unmap(0x100000, 4096)


@case(CARD)
def a_region_that_is_not_decoded_cannot_be_reached(dev: DeviceClient) -> None:
    dev.write_region(0, 8, b"kept")
    dev.write_region(7, 4, b"\0\0")
    with raises(errno.EIO):
        dev.read_region(0, 8, 4)
    with raises(errno.EIO):
        dev.write_region(0, 8, b"lost")
    dev.write_region(7, 4, b"\x02\0")
    assert dev.read_region(0, 8, 4) == b"kept"


@case(f"{DEVICES}:Ring", dialects=LANDED)
def memory_that_cannot_be_mapped_is_refused(dev: DeviceClient) -> None:
    with mmap.mmap(-1, 8192) as memory:
        with raises(errno.EINVAL), memoryview(memory)[1:4097] as unaligned:
            dev.map(0x100000, unaligned)
        dev.map(0x100000, memory)
        with raises(errno.EEXIST):
            dev.map(0x101000, memory)
        with raises(errno.ENOENT):
            dev.unmap(0x200000, 4096)
        dev.unmap(0x100000, 8192)
    with raises(errno.EINVAL):
        dev.start_dma_logging([])


# Interrupts, and what may be mapped.


@contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    numbers = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
    try:
        yield numbers
    finally:
        for number in numbers:
            os.close(number)


def rung(number: int) -> int:
    """Return how often an eventfd was signalled since the last look; wait for a first time."""
    if not select.select([number], [], [], 10)[0]:
        return 0
    return os.eventfd_read(number)


def silent(number: int) -> bool:
    return not select.select([number], [], [], 0.05)[0]


@case(f"{DEVICES}:Bell")
def interrupts_are_found_by_index(dev: DeviceClient) -> None:
    present = dev.interrupts.present
    assert {index: info.count for index, info in present.items()} == {
        vfio.VFIO_PCI_INTX_IRQ_INDEX: 1,
        vfio.VFIO_PCI_MSIX_IRQ_INDEX: 4,
        vfio.VFIO_PCI_REQ_IRQ_INDEX: 1,
    }
    assert present[vfio.VFIO_PCI_MSIX_IRQ_INDEX].flags & vfio.VFIO_IRQ_INFO_EVENTFD
    with raises(errno.EINVAL):
        dev.interrupts.info(vfio.VFIO_PCI_NUM_IRQS)


@case(f"{DEVICES}:Bell")
def messages_ring_the_eventfds_that_were_given(dev: DeviceClient) -> None:
    msix = vfio.VFIO_PCI_MSIX_IRQ_INDEX
    with eventfds(2) as (first, third):
        dev.interrupts.enable(msix, [first, None, third])
        for vector in (0, 1, 2, 2):
            dev.write_region(0, 1, bytes([vector]))
        assert (rung(first), rung(third)) == (1, 2)
        dev.interrupts.trigger(msix, 2)
        assert rung(third) == 1
        with raises(errno.EINVAL):
            dev.interrupts.enable(msix, [first], start=4)
        with raises(errno.EINVAL):
            dev.interrupts.enable(vfio.VFIO_PCI_INTX_IRQ_INDEX, [first])
        dev.interrupts.disable(msix)
        dev.write_region(0, 1, b"\0")
        assert silent(first)
        with raises(errno.EINVAL):
            dev.interrupts.disable(msix)


@case(f"{DEVICES}:Bell")
def a_pin_that_rang_stays_masked_until_it_is_unmasked(dev: DeviceClient) -> None:
    intx = vfio.VFIO_PCI_INTX_IRQ_INDEX
    with eventfds(1) as (line,):
        dev.interrupts.enable(intx, [line])
        dev.write_region(0, 0, b"\1")
        assert rung(line) == 1
        assert silent(line)
        dev.interrupts.unmask(intx)
        assert rung(line) == 1  # its level is high still
        dev.write_region(0, 0, b"\0")
        dev.interrupts.unmask(intx)
        dev.interrupts.mask(intx)
        dev.write_region(0, 0, b"\1")
        assert silent(line)
        dev.reset()
        with raises(errno.EINVAL):
            dev.interrupts.unmask(intx)


@case(f"{DEVICES}:Bell")
def what_is_no_eventfd_rings_nothing(dev: DeviceClient) -> None:
    with open(os.devnull, "rb") as file, raises(errno.EINVAL):
        dev.interrupts.enable(vfio.VFIO_PCI_MSIX_IRQ_INDEX, [file])
    with raises(errno.ENOTTY):
        dev.interrupts.mask(vfio.VFIO_PCI_MSIX_IRQ_INDEX)


@case(f"{DEVICES}:Bell")
def the_parts_of_a_region_that_may_be_mapped_are_told(dev: DeviceClient) -> None:
    assert dev.mappable(0) == []
    assert dev.mappable(1) == [(0, 4096), (2 * 4096, 2 * 4096)]
    assert dev.mappable(7) == []


@case(f"{DEVICES}:Bell")
def what_is_mapped_is_the_devices_memory(dev: DeviceClient) -> None:
    with dev.map_region(1, 0x2000, 0x2000) as page:
        assert (len(page), page.readonly, page.contiguous) == (0x2000, False, True)
        assert dev.write_region(1, 0x2000, b"by request") == 10
        assert bytes(page[:10]) == b"by request"
        page[0x1FFE:] = b"!!"
        assert dev.read_region(1, 0x3FFE, 2) == b"!!"
        with dev.map_region(1, 0x3000, 0x1000, writable=False) as again:
            assert again.readonly
            assert bytes(again[0xFFE:]) == b"!!"
            page[0x1FFE:] = b"??"
            assert bytes(again[0xFFE:]) == b"??"


@case(f"{DEVICES}:Bell")
def what_may_not_be_mapped_is_refused(dev: DeviceClient) -> None:
    for index, offset, length in (
        (1, 0x1000, 0x1000),  # the MSI-X table
        (1, 0, 0x3000),  # in the middle of it
        (1, 0x2000, 0x3000),  # behind the end
        (1, 0x2001, 0x1000),
        (1, 0x2000, 0),
        (1, 0x2000, -1),
        (0, 0, 16),
        (7, 0, 4096),
        (3, 0, 4096),
    ):
        with raises(errno.EINVAL):
            dev.map_region(index, offset, length)


# Recovery.


def steps_of(dev: DeviceClient, trouble: RequestError) -> tuple[Outcome, list[str]]:
    told: list[str] = []
    report = recover(dev, trouble, lambda step: told.append(str(step)))
    assert told == [str(step) for step in report.steps]
    assert report.situation is not None
    assert report.situation.clause in str(report)
    return report.outcome, told


@case(f"{CARD},caps=stop-copy,fail=stop-stop_copy:EIO")
def a_source_that_cannot_save_goes_on_running(dev: DeviceClient) -> None:
    with raises(errno.EIO) as caught:
        dev.set_state(State.STOP_COPY)
    assert steps_of(dev, caught[0]) == (
        Outcome.SETTLED,
        ["read the state -> STOP", "ask for RUNNING -> RUNNING"],
    )
    assert state_of(dev) is State.RUNNING


@case(f"{CARD},caps=stop-copy,fail=stop-stop_copy:EIO+stop-running:EIO")
def a_source_that_cannot_go_on_is_reset(dev: DeviceClient) -> None:
    with raises(errno.EIO) as caught:
        dev.set_state(State.STOP_COPY)
    assert steps_of(dev, caught[0]) == (
        Outcome.RESET,
        [
            "read the state -> STOP",
            "ask for RUNNING failed with EIO -> STOP",
            "reset",
            "read the state -> RUNNING",
        ],
    )


@case(f"{CARD},caps=stop-copy,resets=1,fail=stop-stop_copy:EIO+stop-running:EIO")
def a_source_that_does_not_even_reset_is_given_up(dev: DeviceClient) -> None:
    with raises(errno.EIO) as caught:
        dev.set_state(State.STOP_COPY)
    outcome, told = steps_of(dev, caught[0])
    assert outcome is Outcome.GIVEN_UP
    assert told[-2:] == ["reset failed with EIO -> STOP", "give the device up -> STOP"]


@case(f"{CARD},caps=stop-copy,fail=stop-stop_copy:EIO,fatal=yes")
def a_device_in_error_is_reset_at_once(dev: DeviceClient) -> None:
    with raises(errno.EIO) as caught:
        dev.set_state(State.STOP_COPY)
    assert steps_of(dev, caught[0]) == (
        Outcome.RESET,
        ["read the state -> ERROR", "reset", "read the state -> RUNNING"],
    )


@case(CARD)
def a_lost_descriptor_is_replaced_by_entering_again(dev: DeviceClient) -> None:
    with no_free_descriptor(dev), raises(errno.EMFILE) as caught:
        dev.set_state(State.STOP_COPY)
    report = recover(dev, caught[0])
    assert report.situation is DESCRIPTOR_LOST[State.STOP_COPY]
    assert report.outcome is Outcome.SETTLED
    assert [step.target for step in report.steps] == [None, State.STOP, State.STOP_COPY]
    assert report.session is not None
    with report.session as session:
        assert len(b"".join(map(bytes, session))) == 4096 + 12


@case(CARD)
def a_descriptor_that_stays_lost_costs_the_migration_only(dev: DeviceClient) -> None:
    with no_free_descriptor(dev):
        with raises(errno.EMFILE) as caught:
            dev.set_state(State.STOP_COPY)
        outcome, told = steps_of(dev, caught[0])
    assert outcome is Outcome.SETTLED
    assert told[-2:] == [
        "ask for STOP_COPY failed with EMFILE -> STOP_COPY",
        "ask for RUNNING -> RUNNING",
    ]


@case(CARD)
def a_lost_descriptor_of_a_load_means_reset(dev: DeviceClient) -> None:
    with no_free_descriptor(dev), raises(errno.EMFILE) as caught:
        dev.set_state(State.RESUMING)
    assert steps_of(dev, caught[0]) == (
        Outcome.RESET,
        ["read the state -> RESUMING", "reset", "read the state -> RUNNING"],
    )


@case(CARD)
def a_failed_write_means_reset(dev: DeviceClient) -> None:
    session = dev.set_state(State.RESUMING)
    with session, raises(errno.EINVAL) as caught:
        session.write_all(b"MTTY" + bytes(100))
    outcome, told = steps_of(dev, caught[0])
    assert (outcome, told[1]) == (Outcome.RESET, "reset")


@case(CARD)
def a_load_that_was_refused_means_reset(dev: DeviceClient) -> None:
    with raises(errno.EINVAL) as caught:
        load(dev, b"CARD")
    report = recover(dev, caught[0])
    assert report.situation is not None
    assert (report.situation.clause, report.outcome) == ("RECOVER-8", Outcome.RESET)


@case(CARD)
def a_failed_read_leads_back_to_running(dev: DeviceClient) -> None:
    session = dev.set_state(State.STOP_COPY)
    session.close()
    with raises(errno.EBADF) as caught:
        session.readinto(bytearray(1))
    assert steps_of(dev, caught[0]) == (
        Outcome.SETTLED,
        ["read the state -> STOP_COPY", "ask for STOP -> STOP", "ask for RUNNING -> RUNNING"],
    )


@case(f"{CARD},caps=stop-copy,fail=stop-stop_copy:EIO")
def a_fallback_of_ones_own_is_asked_for(dev: DeviceClient) -> None:
    with raises(errno.EIO):
        dev.set_state(State.STOP_COPY)
    report = recover(dev, fall_back_to(State.STOP))
    assert (report.outcome, report.state) == (Outcome.SETTLED, State.STOP)
    report = recover(dev, fall_back_to())
    assert [step.action for step in report.steps] == [
        Action.READ_STATE,
        Action.RESET,
        Action.READ_STATE,
    ]


@case(CARD)
def a_loading_device_is_never_asked_for_another_state(dev: DeviceClient) -> None:
    session = dev.set_state(State.RESUMING)
    with session:
        report = recover(dev, SOURCE_FAILED)
    assert [step.action for step in report.steps][1] is Action.RESET
    assert report.outcome is Outcome.RESET


@case(f"{DEVICES}:Ring", dialects=LANDED)
def a_reset_ends_the_dma_log_too(dev: DeviceClient) -> None:
    dev.start_dma_logging([(0, 4096)])
    report = recover(dev, fall_back_to())
    assert report.steps[-1].action is Action.STOP_LOGGING
    assert report.state is State.RUNNING
    assert not dev.dma_logging
    with raises(errno.EINVAL):
        dev.report_dma_logging(0, 4096)


def run_case(name: str, targets: list[str]) -> None:
    """Run a case on targets that are served already."""
    with ExitStack() as stack:
        clients = [stack.enter_context(vfiomig.open(target)) for target in targets]
        CASES[name].body(*clients)


if __name__ == "__main__":
    run_case(sys.argv[1], sys.argv[2:])
    print("ok")
