"""``DeviceClient``: one face for every device, however it is reached and whatever it speaks.

Theory of operation
-------------------
The client keeps no state machine of its own. It remembers two things: the capability set, which
never changes, and the session that its last request left open. A session is new exactly when a
data_fd came back; it lives on while the device stays in the same group of states; after a failed
request it is forgotten, because an arc on the way may have ended it (docs/protocol.md,
RECOVER-2). Everything else is asked of the device.

Two requests are refused here instead of being sent: a target that the device is known not to have,
because some drivers stop the device before they refuse (FAULT-25), and STOP_COPY to a pre-copy
state, on which some kernels loop for ever (FAULT-1). The error is the one that the device would
give, and nothing has happened, so the session is kept. ``force`` sends them all the same.
"""

from __future__ import annotations

import errno
import warnings
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

from vfiomig.abi import pci, vfio
from vfiomig.client import diagnosis, dma
from vfiomig.client.dialects import Answer, known, state_requests
from vfiomig.client.irqs import Interrupts
from vfiomig.client.regions import mappable_areas
from vfiomig.client.requests import GET, SET, Requests, failed
from vfiomig.client.session import Session
from vfiomig.client.situations import failed_change
from vfiomig.client.transport import NO_FD
from vfiomig.errors import RequestError, SessionError, SetStateError
from vfiomig.fsm import (
    LEGAL_SETS,
    PRE_COPY_GROUP,
    Capability,
    State,
    capability_name,
    session_kind,
    states_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from _typeshed import WriteableBuffer

    from vfiomig.abi.ioctls import Dialect
    from vfiomig.client.transport import Transport
    from vfiomig.device import PrecopyInfo

__all__ = ("DeviceClient",)

#: Requests for these give a session or fail.
StateWithSession: TypeAlias = Literal[
    State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY, State.RESUMING
]


class DeviceClient:
    """An open device. Close it, or use it in a ``with`` block."""

    def __init__(
        self,
        transport: Transport,
        name: str,
        dialect: Dialect,
        memory: dma.DeviceMemory | None = None,
    ) -> None:
        """Take over ``transport``, whose device is ready for requests, and what it reaches by DMA."""
        self.name = name
        self.dialect = dialect
        self._transport = transport
        self._requests = Requests(transport, name)
        self._states = state_requests(self._requests, dialect)
        self._session: Session | None = None
        self._open_sessions: set[Session] = set()
        if memory is None:
            memory = dma.AddressSpace(self._requests, None, bound=True)
        self._memory = memory
        #: What an open or a reset did not do by itself, in sentences; it was done for it.
        self.mended: list[str] = []
        #: How the device interrupts this client.
        self.interrupts = Interrupts(self._requests)
        #: Whether this client started the device's DMA log and has not stopped it.
        self.dma_logging = False
        self._closed = False

    @property
    def about(self) -> Mapping[str, str | int | bool]:
        """How the device is reached: ``by`` what, and what was negotiated there."""
        return self._transport.about

    def has_feature(self, index: int, operations: int = 0) -> bool:
        """Tell whether the device answers a PROBE of this feature and its GET or SET."""
        try:
            self._requests.probe(index, operations)
        except OSError:
            return False
        return True

    # States.

    @cached_property
    def capabilities(self) -> Capability:
        """What VFIO_DEVICE_FEATURE_MIGRATION reports, read once; none: it cannot migrate."""
        answer = vfio.FeatureMigration()
        try:
            self._requests.feature(vfio.VFIO_DEVICE_FEATURE_MIGRATION, GET, answer)
        except OSError as failure:
            if failure.errno == errno.ENOTTY:
                return Capability(0)
            raise self._failed("the query of its capabilities", failure) from None
        return Capability(answer.flags)

    @property
    def state(self) -> State:
        """Where the device is now.

        Raises:
            RequestError: the device does not tell, or names a state that is not known here
                (EPROTO).
        """
        try:
            number = self._states.query()
        except OSError as failure:
            raise self._failed("the query of its state", failure) from None
        state = known(number)
        if state is None:
            raise RequestError(
                errno.EPROTO,
                f"{self.name} is in state {number}, which this version does not know; "
                "reset it, or use a newer version",
            )
        return state

    @property
    def session(self) -> Session | None:
        """The session that the last change of state opened or kept."""
        return self._session

    @overload
    def set_state(self, target: StateWithSession, *, force: bool = False) -> Session: ...
    @overload
    def set_state(self, target: int, *, force: bool = False) -> Session | None: ...
    def set_state(self, target: int, *, force: bool = False) -> Session | None:
        """Ask for a state; return its session, ``None`` for a state without one.

        A move inside the saving group returns the session that is open already. The caller
        closes sessions; what is left open, ``close`` closes.

        Raises:
            SetStateError: with the errno and the state in which the device is now. The session
                is forgotten, unless the request was refused here without being sent.
            SessionError: the device was in that state before, and this client does not know the
                session (EBADF); no request gives a data_fd twice.
        """
        if not force:
            self._refuse_known(target)
        answer = self._ask(target)
        if answer.errno:
            self._session = None
            raise self._set_state_error(answer, target)
        return self._follow(target, answer.data_fd)

    def _ask(self, target: int) -> Answer:
        while True:
            answer = self._states.ask(target)
            if answer.errno != errno.EINTR:
                return answer
            # Asking again is harmless, unless the change has happened: then a new session would
            # be answered like a request for the current state, without a data_fd.
            if answer.device_state == target:
                return answer

    @cached_property
    def _targets(self) -> tuple[State, ...]:
        """The states of the device; none if its capability set means nothing here."""
        return states_of(self.capabilities) if self.capabilities in LEGAL_SETS else ()

    def _refuse_known(self, target: int) -> None:
        if not self._targets:
            return
        refused = target not in self._targets
        if target in PRE_COPY_GROUP and not refused:
            refused = self.state is State.STOP_COPY
        if refused:
            answer = Answer(errno.EINVAL, device_state=self.state)
            raise self._set_state_error(answer, target)

    def _follow(self, target: int, data_fd: int) -> Session | None:
        """Find the session after a change that succeeded."""
        state = known(target)
        kind = session_kind(state) if state is not None else None
        if data_fd != NO_FD and kind is None:
            self._transport.close(data_fd)  # no state without a session gives one out
        elif data_fd != NO_FD:
            assert kind is not None
            self._session = Session(self._requests, data_fd, kind, self._open_sessions.discard)
            self._open_sessions.add(self._session)
        if self._session is not None and self._session.kind is not kind:
            self._session = None
        if self._session is not None:
            self._session.in_precopy = state in PRE_COPY_GROUP
        elif state is not None and kind is not None:
            raise SessionError(
                errno.EBADF,
                f"{self.name} was in {state.name} before, and its data_fd is given out once only; "
                "leave the state and enter it again, or reset it if that is RESUMING",
            )
        return self._session

    def reset(self) -> None:
        """Reset the device: it is blank, in RUNNING, and its sessions are over.

        A reset that meets another thread's request is carried out by that one, when it ends.

        Raises:
            RequestError: EINVAL if it has no reset, EAGAIN if it is locked for another one.
        """
        self._session = None
        try:
            self._requests.on_device(vfio.VFIO_DEVICE_RESET)
        except OSError as failure:
            raise self._failed("VFIO_DEVICE_RESET", failure) from None

    # Estimates.

    def data_size(self) -> int:
        """Return the estimated bytes of a complete stop-copy, in whatever state.

        Raises:
            RequestError: ENOTTY or EINVAL where this is not known, as everywhere in V6.
        """
        answer = vfio.MigDataSize()
        try:
            self._requests.feature(vfio.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, GET, answer)
        except OSError as failure:
            raise self._failed("the query of its data size", failure) from None
        return answer.stop_copy_length

    def precopy_v2(self) -> bool:
        """Ask to be told of new initial data (REINIT); ``False`` where that is not known.

        It holds until the device is closed.
        """
        try:
            self._requests.feature(vfio.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, SET)
        except OSError as failure:
            if failure.errno in {errno.EINVAL, errno.ENOTTY}:
                return False
            raise self._failed("the opt-in to REINIT", failure) from None
        self._requests.precopy_v2 = True
        return True

    def precopy_info(self) -> PrecopyInfo:
        """Ask the open session what is left before STOP_COPY; see ``Session.precopy_info``."""
        if self._session is None:
            raise RequestError(
                errno.EINVAL, f"{self.name} has no session to ask; ask for PRE_COPY first"
            )
        return self._session.precopy_info()

    # Regions.

    @cached_property
    def regions(self) -> dict[int, vfio.RegionInfo]:
        """The regions that the device has, by index."""
        info = vfio.DeviceInfo(argsz=vfio.DeviceInfo.SIZE)
        try:
            self._requests.on_device(vfio.VFIO_DEVICE_GET_INFO, info)
        except OSError as failure:
            raise self._failed("VFIO_DEVICE_GET_INFO", failure) from None
        found = {}
        for index in range(info.num_regions):
            try:
                region = self.region_info(index)
            except RequestError as refusal:
                if refusal.errno != errno.EINVAL:
                    raise
                continue  # VGA, where there is none
            if region.size:
                found[index] = region
        return found

    def region_info(self, index: int) -> vfio.RegionInfo:
        """Ask about one region; a region that the device lacks has no size, or is EINVAL."""
        region = vfio.RegionInfo(argsz=vfio.RegionInfo.SIZE, index=index)
        try:
            self._requests.on_device(vfio.VFIO_DEVICE_GET_REGION_INFO, region)
        except OSError as failure:
            raise self._failed(f"VFIO_DEVICE_GET_REGION_INFO of {index}", failure) from None
        return region

    def mappable(self, index: int) -> list[tuple[int, int]]:
        """Return the (offset, size) of each part of a region that may be mapped."""
        try:
            return mappable_areas(self._requests, self.region_info(index))
        except OSError as failure:
            raise self._failed(f"VFIO_DEVICE_GET_REGION_INFO of {index}", failure) from None

    def map_region(
        self, index: int, offset: int, length: int, *, writable: bool = True
    ) -> memoryview:
        """Map pages of a region that ``mappable`` names: memory that is the device's as well.

        They are mapped as long as anybody has the view or a slice of it. A device behind a
        descriptor stays open as long (docs/protocol.md, CLOSE-3).

        Raises:
            RequestError: EINVAL, these are not pages that may be mapped.
        """
        try:
            return self._transport.map(self._place(index, offset), length, writable=writable)
        except OSError as failure:
            raise self._failed(f"mapping region {index} at {offset:#x}", failure) from None

    def read_region(self, index: int, offset: int, length: int) -> bytes:
        """Read from a region in one access; fewer bytes at its end."""
        try:
            return self._transport.pread(self._place(index, offset), length)
        except OSError as failure:
            raise self._failed(f"a read of region {index} at {offset:#x}", failure) from None

    def write_region(self, index: int, offset: int, data: bytes) -> int:
        """Write to a region in one access; return how many bytes it took."""
        try:
            return self._transport.pwrite(self._place(index, offset), data)
        except OSError as failure:
            raise self._failed(f"a write to region {index} at {offset:#x}", failure) from None

    def _place(self, index: int, offset: int) -> int:
        region = self.regions.get(index)
        if region is None:
            has = ", ".join(map(str, self.regions))
            raise RequestError(
                errno.EINVAL, f"{self.name} has no region {index}; it has {has or 'none'}"
            )
        return region.offset + offset

    # DMA.

    def set_bus_master(self, on: bool) -> None:
        """Let the device do DMA, or not: the bit is off when a device is opened."""
        at = self._place(vfio.VFIO_PCI_CONFIG_REGION_INDEX, pci.PCI_COMMAND)
        try:
            command = int.from_bytes(self._transport.pread(at, 2), "little")
            command = command & ~pci.PCI_COMMAND_MASTER | pci.PCI_COMMAND_MASTER * on
            self._transport.pwrite(at, command.to_bytes(2, "little"))
        except OSError as failure:
            raise self._failed("an access to its command register", failure) from None

    def map(self, iova: int, memory: WriteableBuffer) -> None:
        """Let the device reach ``memory``, which begins and ends at a page, such as an ``mmap``.

        It does so once it is bus master: see ``set_bus_master``.
        The memory is held until ``unmap`` or ``close``: it cannot be closed or resized before.
        """
        try:
            self._memory.map(iova, memory)
        except OSError as failure:
            refused = self._failed(f"mapping memory at IOVA {iova:#x}", failure)
            raise diagnosis.with_advice(refused, diagnosis.MAP) from None

    def unmap(self, iova: int, length: int) -> int:
        """Take the mappings inside a range away; return their bytes.

        Raises:
            RequestError: ENOENT if there are none; EINVAL or ENOENT if one would be cut.
        """
        try:
            return self._memory.unmap(iova, length)
        except OSError as failure:
            raise self._failed(f"unmapping IOVA {iova:#x}", failure) from None

    def start_dma_logging(
        self, ranges: Sequence[tuple[int, int]], page_size: int = dma.PAGE
    ) -> int:
        """Log the device's writes to (iova, length) ranges; return the page size in use.

        Raises:
            RequestError: ENOTTY if the device has no log.
        """
        try:
            page_size = dma.start_logging(self._requests, ranges, page_size)
        except OSError as failure:
            raise self._failed("starting its DMA log", failure) from None
        self.dma_logging = True
        return page_size

    def stop_dma_logging(self) -> None:
        """Stop the log; one that was not started is no error."""
        try:
            dma.stop_logging(self._requests)
        except OSError as failure:
            raise self._failed("stopping its DMA log", failure) from None
        self.dma_logging = False

    def report_dma_logging(self, iova: int, length: int, page_size: int = dma.PAGE) -> bytearray:
        """Return the bitmap of what was written, which ``dirty_ranges`` reads, and forget it.

        Raises:
            RequestError: after any, all of the memory counts as dirty.
        """
        try:
            return dma.report_logging(self._requests, iova, length, page_size)
        except OSError as failure:
            raise self._failed("the report of its DMA log", failure) from None

    @cached_property
    def iommu_dirty_tracking(self) -> bool:
        """Whether the IOMMU in front of the device can track its writes.

        IOMMU_GET_HW_INFO tells. A container can always be asked, and calls all that is mapped
        dirty if it cannot know better.
        """
        try:
            return self._memory.can_track()
        except OSError as failure:
            raise self._failed("the query of its IOMMU", failure) from None

    @property
    def iommu_tracking(self) -> bool:
        """Whether this client has the IOMMU track the device's writes."""
        return self._memory.tracking

    def start_iommu_tracking(self) -> None:
        """Have the IOMMU track the device's writes, anew if it does already.

        Raises:
            RequestError: EOPNOTSUPP if it cannot, or there is none.
        """
        try:
            self._memory.start_tracking()
        except OSError as failure:
            raise self._failed("tracking its writes in the IOMMU", failure) from None

    def stop_iommu_tracking(self) -> None:
        """Stop tracking; one that was not started is no error."""
        try:
            self._memory.stop_tracking()
        except OSError as failure:
            raise self._failed("ending the IOMMU's tracking", failure) from None

    def report_iommu_tracking(
        self, iova: int, length: int, page_size: int = dma.PAGE, *, clear: bool = True
    ) -> bytearray:
        """Return the bitmap of what was written, which ``dirty_ranges`` reads.

        The range consists of pages. It ends at the first that is not mapped; what was unmapped
        is forgotten, and so is what was told, unless not ``clear``.

        Raises:
            RequestError: after any, all of the memory counts as dirty.
        """
        try:
            return self._memory.report_tracking(iova, length, page_size, clear=clear)
        except OSError as failure:
            raise self._failed("the report of the IOMMU's tracking", failure) from None

    # Failures and the end.

    def _set_state_error(self, answer: Answer, target: int) -> SetStateError:
        state, goal = answer.device_state, known(target)
        number = errno.errorcode.get(answer.errno, str(answer.errno))
        where = state.name if state is not None else "an unknown state"
        message = (
            f"{self.name}: the request for {goal.name if goal else target} failed with {number}"
            f"{answer.reason}; the device is in {where}: {self._advice(answer, target)}"
        )
        return SetStateError(answer.errno, target, state, message)

    def _advice(self, answer: Answer, target: int) -> str:
        if answer.errno == errno.ENOTTY and not self.capabilities:
            return diagnosis.why_no_migration(self.about)
        if self._targets and target not in self._targets:
            names = ", ".join(state.name for state in self._targets)
            return f"with {capability_name(self.capabilities)} it can go to {names}"
        if answer.device_state is State.STOP_COPY and target in PRE_COPY_GROUP:
            return "ask for RUNNING in between"
        situation = failed_change(answer.errno, target, answer.device_state, self.dialect)
        return f"{situation.advice} (docs/protocol.md, {situation.clause})"

    def _failed(self, what: str, failure: OSError) -> RequestError:
        return failed(self.name, what, failure)

    def close(self) -> None:
        """Close what is open: the device, its sessions, its iommufd. Once more is harmless."""
        if self._closed:
            return
        self._closed = True
        self._session = None
        # The device first: that ends the sessions and wakes whoever is blocked in one.
        self._transport.close(self._transport.device)
        for session in tuple(self._open_sessions):
            session.close()
        if self._transport.iommufd != NO_FD:
            self._transport.close(self._transport.iommufd)
        self._memory.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        return f"<DeviceClient of {self.name}, {self.dialect}{', closed' * self._closed}>"
