"""The eight device states, the capability sets that decide which of them exist, and sessions.

Theory of operation
-------------------
Numbers are those of ``enum vfio_device_mig_state`` and of the ``VFIO_MIGRATION_*`` bits in
``include/uapi/linux/vfio.h``; the first five states came with the patch "vfio: Define device
migration protocol v2", P2P and PRE_COPY were added later as options. A device reports its
capability bits once, and the set decides which states it has: a state exists when all the bits
that it requires are in the set. STOP_COPY is what makes a device migratable at all, so only the
four sets that hold it mean anything.

A data transfer session belongs to a group of states, not to one state: PRE_COPY, PRE_COPY_P2P
and STOP_COPY share one saving session and one data_fd, RESUMING has a loading session of its
own. Everything about opening and closing descriptors follows from ``session_kind``.
"""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from vfiomig.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = (
    "FULLY_RUNNING",
    "LEGAL_SETS",
    "PRE_COPY_GROUP",
    "SAVING_GROUP",
    "Capability",
    "SessionKind",
    "State",
    "capability_name",
    "parse_capabilities",
    "require_legal",
    "required",
    "session_kind",
    "states_of",
)


class State(enum.IntEnum):
    """``enum vfio_device_mig_state``."""

    #: The device has failed. It cannot be requested, and only a reset leads out, to RUNNING.
    ERROR = 0
    #: Quiescent: no DMA, no interrupts, and internal state does not change.
    STOP = 1
    #: Fully operational. Every device is here after open and after reset.
    RUNNING = 2
    #: Quiescent as in STOP; the data_fd delivers the state up to a permanent end of file.
    STOP_COPY = 3
    #: Quiescent; the data_fd takes a state. Leaving to STOP says that the data is complete.
    RESUMING = 4
    #: Running, but starts no peer-to-peer DMA; still accepts that of its peers.
    RUNNING_P2P = 5
    #: Running while the data_fd delivers state early; what changes later is tracked.
    PRE_COPY = 6
    #: PRE_COPY that starts no peer-to-peer DMA, as RUNNING_P2P.
    PRE_COPY_P2P = 7

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return int(self).__format__(spec) if spec else self.name


class Capability(enum.IntFlag):
    """The ``VFIO_MIGRATION_*`` bits that ``VFIO_DEVICE_FEATURE_MIGRATION`` answers."""

    #: STOP, RUNNING, STOP_COPY and RESUMING: every migratable device has these.
    STOP_COPY = 1
    #: RUNNING_P2P, and PRE_COPY_P2P where there is PRE_COPY.
    P2P = 2
    #: PRE_COPY.
    PRE_COPY = 4


class SessionKind(enum.Enum):
    """The direction of a data transfer session, seen from the device."""

    #: The data_fd is read from.
    SAVING = "saving"
    #: The data_fd is written to.
    RESUMING = "resuming"


#: The capability sets that mean something, smallest first.
LEGAL_SETS: Final[tuple[Capability, ...]] = (
    Capability.STOP_COPY,
    Capability.STOP_COPY | Capability.P2P,
    Capability.STOP_COPY | Capability.PRE_COPY,
    Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY,
)

#: The states that offer data before the device stops.
PRE_COPY_GROUP: Final = frozenset({State.PRE_COPY, State.PRE_COPY_P2P})

#: The states that share one saving session and its data_fd.
SAVING_GROUP: Final = PRE_COPY_GROUP | {State.STOP_COPY}

#: What a device without P2P is in where one with P2P would hold back its peer-to-peer DMA.
FULLY_RUNNING: Final[Mapping[State, State]] = MappingProxyType(
    {State.RUNNING_P2P: State.RUNNING, State.PRE_COPY_P2P: State.PRE_COPY}
)

_REQUIRED: Final[Mapping[State, Capability]] = MappingProxyType(
    {
        # More bits than anyone can report: ERROR is in no set, as in the kernel's own table.
        State.ERROR: Capability(0xFFFF_FFFF),
        State.STOP: Capability.STOP_COPY,
        State.RUNNING: Capability.STOP_COPY,
        State.STOP_COPY: Capability.STOP_COPY,
        State.RESUMING: Capability.STOP_COPY,
        State.RUNNING_P2P: Capability.STOP_COPY | Capability.P2P,
        State.PRE_COPY: Capability.STOP_COPY | Capability.PRE_COPY,
        State.PRE_COPY_P2P: Capability.STOP_COPY | Capability.P2P | Capability.PRE_COPY,
    }
)

_WORDS: Final[Mapping[str, Capability]] = MappingProxyType(
    {
        "stop-copy": Capability.STOP_COPY,
        "p2p": Capability.P2P,
        "pre-copy": Capability.PRE_COPY,
    }
)


_KNOWN: Final = int(LEGAL_SETS[-1])


def capability_name(caps: int) -> str:
    """Name a set the way that ``parse_capabilities`` reads it: ``stop-copy+p2p``."""
    words = [word for word, bit in _WORDS.items() if caps & bit]
    unknown = int(caps) & ~_KNOWN
    if unknown:
        words.append(hex(unknown))
    return "+".join(words) or "none"


_LEGAL_NAMES: Final = ", ".join(capability_name(caps) for caps in LEGAL_SETS)


def require_legal(caps: int) -> Capability:
    """Return ``caps`` as a ``Capability``, or raise ``SpecError`` that names the legal sets."""
    if caps not in LEGAL_SETS:
        raise SpecError(
            f"capability set {capability_name(caps)} ({caps}) means nothing;"
            f" choose one of {_LEGAL_NAMES}"
        )
    return Capability(caps)


def parse_capabilities(text: str) -> Capability:
    """Read ``stop-copy+p2p+pre-copy``, in any order, or ``all``."""
    if text.strip() == "all":
        return LEGAL_SETS[-1]
    caps = Capability(0)
    for word in text.split("+"):
        bit = _WORDS.get(word.strip())
        if bit is None:
            raise SpecError(
                f"unknown capability {word.strip()!r} in {text!r};"
                f" choose one of {_LEGAL_NAMES}, or all"
            )
        caps |= bit
    return require_legal(caps)


def required(state: State) -> Capability:
    """Return the bits that a set must hold for ``state`` to exist; none has those of ERROR."""
    return _REQUIRED[state]


def states_of(caps: int) -> tuple[State, ...]:
    """Return the states that a device with ``caps`` has, in number order, without ERROR."""
    legal = require_legal(caps)
    return tuple(state for state in State if required(state) in legal)


def session_kind(state: State) -> SessionKind | None:
    """Return the kind of data transfer session that is open in ``state``, if one is."""
    if state in SAVING_GROUP:
        return SessionKind.SAVING
    return SessionKind.RESUMING if state is State.RESUMING else None
