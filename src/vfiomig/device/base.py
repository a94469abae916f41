"""What a device author writes: a class with a handful of hooks.

Theory of operation
-------------------
The migration state machine belongs to ``vfiomig.core``; a device only says what happens in it.
States differ for a device in two ways, and the hooks follow them:

* the *run level*: running, P2P quiescent or stopped. An arc that changes it calls the hook of
  the level that it enters: ``start``, ``quiesce`` or ``stop``.
* the *data transfer session*: an arc that opens one asks ``precopy`` or ``save`` for the bytes
  to send, or gives ``load`` a reader for those that arrive.

``step`` sees every arc before anything else happens on it. All hooks that an arc calls run one
at a time, under the device's state lock. The iterables of ``save`` and ``precopy`` and the
call of ``load`` run while the session lasts, at the pace of whoever reads or writes the
data_fd, in a thread of their own: a session never runs two of them at once, but it runs beside
region accesses and, in the pre-copy states, beside the device's own work.

A hook may raise only ``DeviceError``, whose errno reaches the caller. Any other exception is a
bug: it is logged, and the device goes to ERROR. Contracts of the states: ``enum
vfio_device_mig_state`` in include/uapi/linux/vfio.h, and docs/protocol.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias

from vfiomig.device.configuration import ConfigurationSpace
from vfiomig.device.interrupts import Interrupts
from vfiomig.device.region import BAR_NAMES, PciIdentity, Region
from vfiomig.errors import StateRejected
from vfiomig.fsm import Capability, State, require_legal

if TYPE_CHECKING:
    from vfiomig.device.capabilities import PciCapability
    from vfiomig.iommu import DmaPort

__all__ = ("Buffer", "Device", "PrecopyInfo", "SessionBody", "StateReader")

#: Bytes that a device hands out: contiguous, unchanged until the next is asked for.
Buffer: TypeAlias = bytes | bytearray | memoryview


class PrecopyInfo(NamedTuple):
    """How much pre-copy data is left to read, both estimates, in bytes.

    ``reinit`` tells that new initial data appeared (``VFIO_PRECOPY_INFO_REINIT``).
    """

    initial_bytes: int
    dirty_bytes: int
    reinit: bool = False


class StateReader(ABC):
    """The stream that ``load`` reads. Chunk sizes of the writer never show."""

    @abstractmethod
    def readinto(self, buffer: bytearray | memoryview) -> int:
        """Fill ``buffer``; fewer bytes than it holds only at the end of the stream."""

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer only at the end of the stream."""
        buffer = bytearray(size)
        filled = self.readinto(buffer)
        return bytes(memoryview(buffer)[:filled])


#: What ``migration_set_state`` returns to open a session: the bytes to send, or what loads.
SessionBody: TypeAlias = Iterable[Buffer] | Callable[[StateReader], None]


class Device:
    """A migratable PCI device; subclass it and write the hooks that it needs."""

    #: What the PCI configuration header says.
    pci: PciIdentity = PciIdentity(vendor=0x1AF4, device=0x10F0)
    #: The pin of INTx: 1 is INTA, 0 none.
    interrupt_pin: int = 0
    #: Capabilities of the PCI function, in their order in configuration space.
    pci_capabilities: tuple[PciCapability, ...] = ()
    #: What VFIO_DEVICE_FEATURE_MIGRATION reports; no bit at all: the device cannot migrate.
    capabilities: Capability = Capability.STOP_COPY
    #: Does the data_fd answer poll()? Most kernel drivers have none: "always ready".
    poll: bool = True
    #: Can the device log its own DMA writes (VFIO_DEVICE_FEATURE_DMA_LOGGING_START)?
    dma_logging: bool = True
    #: Can the IOMMU in front of it track them (IOMMU_HWPT_ALLOC_DIRTY_TRACKING)?
    iommu_dirty_tracking: bool = True
    #: Memory of the program that owns the device, by IOVA; no mapping before it is attached.
    dma: DmaPort
    #: How the device interrupts; heard by nobody while the device is not served.
    interrupts: Interrupts = Interrupts()
    #: The regions of the class, by their index.
    regions: ClassVar[dict[int, Region]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Region)}
        for name in own.keys() - BAR_NAMES.keys():
            raise TypeError(
                f"{cls.__name__}.{name}: a region's name is one of {', '.join(BAR_NAMES)}"
            )
        cls.regions = cls.regions | {region.index: region for region in own.values()}
        try:
            ConfigurationSpace(cls.pci, cls.regions, cls.interrupt_pin, cls.pci_capabilities)
        except ValueError as problem:
            raise TypeError(f"{cls.__name__}: {problem}") from problem
        if isinstance(cls.capabilities, Capability):
            cls.check_capabilities(cls.capabilities)

    @classmethod
    def check_capabilities(cls, capabilities: Capability) -> None:
        """Refuse a set that the protocol does not know or that this class cannot keep.

        Raises:
            SpecError: not one of the legal sets (and not empty).
            TypeError: PRE_COPY without a ``precopy`` of its own, or ``save`` without ``load``.
        """
        if not capabilities:
            return
        precopies = Capability.PRE_COPY in require_legal(capabilities)
        if cls.migration_set_state is not Device.migration_set_state:
            return
        if precopies and cls.precopy is Device.precopy:
            raise TypeError(
                f"{cls.__name__} has the capability PRE_COPY but no precopy(); "
                "write it, or leave PRE_COPY out"
            )
        saves, loads = cls.save is not Device.save, cls.load is not Device.load
        if saves != loads:
            has, lacks = ("save", "load") if saves else ("load", "save")
            raise TypeError(
                f"{cls.__name__} has {has}() but no {lacks}(); what one writes the other reads: "
                "write both"
            )

    @cached_property
    def configuration(self) -> ConfigurationSpace:
        """The registers of the PCI function, which outlive resets.

        A program that migrates a guest restores what a bus defines. What a vendor's capability
        lets a driver write is the device's own, and belongs into its state.
        """
        return ConfigurationSpace(self.pci, self.regions, self.interrupt_pin, self.pci_capabilities)

    # Run levels.

    def start(self) -> None:
        """Enter RUNNING (or PRE_COPY): interrupts, DMA and internal progress may go on."""

    def stop(self) -> None:
        """Enter a stopped state: from here on no DMA, no interrupt, no change of state."""

    def quiesce(self) -> None:
        """Enter a P2P state, from running or from stopped: start no DMA to other devices.

        Outstanding peer-to-peer DMA is complete when this returns; accesses by peers are still
        answered. A device without such traffic has nothing to do.
        """

    def step(self, origin: State, target: State) -> None:
        """See an arc before anything happens on it; raise ``DeviceError`` to refuse it."""

    def reset(self) -> None:
        """Return to the state after power-on. ``start`` follows unless the device ran already."""

    # Sessions.

    def save(self) -> Iterable[Buffer]:
        """Yield the device's whole state, in order; in PRE_COPY what is left of it."""
        return ()

    def precopy(self) -> Iterable[Buffer]:
        """Yield what can be sent while the device still runs.

        One iteration serves the whole session: an empty buffer says "nothing now" (the reader
        gets ENOMSG and may come back), the end says that only ``save`` has more.
        """
        return ()

    def precopy_info(self) -> PrecopyInfo | tuple[int, int] | None:
        """Estimate what ``precopy`` is still going to yield, beyond the buffer it yielded last.

        ``None``: look at the next buffer and count that.
        """
        return None

    def load(self, state: StateReader) -> None:
        """Take the state of another device; raise ``StateRejected`` to refuse it."""
        if state.read(1):
            raise StateRejected(f"{type(self).__name__} has no state to load")

    def state_size(self) -> int:
        """Estimate the bytes that are left for STOP_COPY, in any state.

        Unless overridden, ``save`` is walked and added up: override it where that costs or has
        effects.
        """
        return sum(memoryview(buffer).nbytes for buffer in self.save())

    def data_ready(self) -> None:
        """Tell whoever polls the saving data_fd that ``precopy`` has more to yield."""
        if self._on_data_ready is not None:
            self._on_data_ready()

    _on_data_ready: Callable[[], None] | None = None

    # Whole control.

    def migration_set_state(self, requested: int) -> tuple[State | None, int, SessionBody | None]:
        """Do a whole request, in place of every hook above: the seed's driver operation.

        ``requested`` is the caller's raw 32-bit number. Return the state that the device is in
        now (``None``: left unset, which V6 shows as ERROR), an errno or 0, and what to read or
        write if the request opened a session. A stream that was opened in PRE_COPY goes on in
        STOP_COPY unless that returns another one; its end is then the permanent end.
        """
        raise NotImplementedError
