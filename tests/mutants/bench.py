"""Devices with one fault each, and the check that has to find it.

Theory of operation
-------------------
All are the device of devices/drilled.py, served in this process. A mutant is a function that is
given a ``Bench`` and puts one thing wrong: in the requests on their way (``ioctl``, ``read``,
``write``, ``close``), in a piece of the core (``patch``), or in the device itself (``device``).
``@mutant`` says which rule is broken, which check names it, and how many others may find it too:
few, or the checks would not tell what is wrong.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from devices.drilled import Drilled
from vfiomig import DeviceError
from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.client.connecting import connect
from vfiomig.client.local import LocalTransport
from vfiomig.core.migration import Migration, Outcome
from vfiomig.core.saving import SavingMigf
from vfiomig.core.transfer import Migf
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.fsm import ARCS, SessionKind, path
from vfiomig.memory import MemoryFault, ProcessMemory

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    import pytest

    from vfiomig import DeviceClient, State, StateReader
    from vfiomig.abi.uapi import UapiStruct

__all__ = ("MUTANTS", "Bench", "Mutant")

GET, SET, PROBE = (
    vfio.VFIO_DEVICE_FEATURE_GET,
    vfio.VFIO_DEVICE_FEATURE_SET,
    vfio.VFIO_DEVICE_FEATURE_PROBE,
)
FEATURE = vfio.VFIO_DEVICE_FEATURE
RESET = vfio.VFIO_DEVICE_RESET
SET_STATE = SET | vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
GET_STATE = GET | vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
GET_FLAGS = GET | vfio.VFIO_DEVICE_FEATURE_MIGRATION
START = SET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
STOP_LOG = SET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
REPORT = GET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
DATA_SIZE = GET | vfio.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
SAVING = SessionKind.SAVING
KNOWN = {1, 2, 6, 7, 8, 9, 12}


Call: TypeAlias = "Callable[..., int]"
SetState: TypeAlias = "Callable[[Migration, int], Outcome]"
#: Bytes of the state in STOP_COPY: magic, one record, the end and a checksum.
LENGTH = 8 + 4 + 4096 + 4 + 4


class Asked(NamedTuple):
    """The header of a feature request, wherever it lies."""

    argsz: int
    flags: int

    @property
    def number(self) -> int:
        return self.flags & 0xFFFF


@dataclass
class Bench:
    """What a mutant may put wrong, and the device that is served."""

    monkey: pytest.MonkeyPatch
    caps: str
    dialect: Dialect
    #: Each is called with what it stands before, and the arguments of that.
    ioctls: list[Call] = field(default_factory=list)
    reads: list[Call] = field(default_factory=list)
    writes: list[Call] = field(default_factory=list)
    closes: list[Callable[..., None]] = field(default_factory=list)
    device: type[Drilled] = Drilled
    opened: list[Tampered] = field(default_factory=list)

    sessions: list[Migf] = field(default_factory=list)

    def serve(self) -> Callable[[], DeviceClient]:
        made = Migf.__init__

        def make(mine: Migf, *arguments: Any) -> None:
            made(mine, *arguments)
            self.sessions.append(mine)

        self.monkey.setattr(Migf, "__init__", make)
        self.served = VfioDevice(self.device(self.caps), "mutant", self.dialect)
        return lambda: connect(Tampered(self), "mutant")

    def end(self) -> None:
        """End every session that there was: some mutants forget to."""
        for migf in self.sessions:
            migf.end()
            migf.join()

    @property
    def migration(self) -> Migration:
        return self.served.migration

    def patch(self, owner: object, name: str, new: object) -> Any:
        """Replace a piece of the core; return what was there."""
        former = getattr(owner, name)
        self.monkey.setattr(owner, name, new)
        return former

    # What happens to requests.

    def ioctl(self, tamper: Call) -> None:
        self.ioctls.append(tamper)

    def answer(self, when: Callable[[Asked], bool], result: int) -> None:
        """Answer such feature requests without asking the device."""

        def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
            asked = look(number, argument)
            if asked is not None and when(asked):
                return end(result)
            return call(on, number, argument)

        self.ioctl(tamper)

    def swap(self, when: Callable[[Asked], bool], wrong: dict[int, int]) -> None:
        """Give other errnos to such feature requests, 0 for success."""

        def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
            asked = look(number, argument)
            result = outcome(lambda: call(on, number, argument))
            return end(wrong.get(result, result) if asked and when(asked) else result)

        self.ioctl(tamper)

    def afterwards(
        self, when: Callable[[Asked], bool], change: Callable[[Payload, int], None]
    ) -> None:
        """Change what was written back; ``change`` gets the payload and the errno."""

        def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
            asked = look(number, argument)
            result = outcome(lambda: call(on, number, argument))
            if asked is not None and when(asked) and readable(argument, 16, writable=True):
                change(Payload(ctypes.addressof(argument)), result)
            return end(result)

        self.ioctl(tamper)

    def swap_number(self, target: int, wrong: dict[int, int]) -> None:
        """Give other errnos to a request by its number."""

        def tamper(call: Call, on: int, number: int, argument: UapiStruct) -> int:
            result = outcome(lambda: call(on, number, argument))
            return end(wrong.get(result, result) if number == target else result)

        self.ioctl(tamper)

    def set_state(self, replace: Callable[..., Outcome]) -> None:
        """Replace ``Migration.set_state``: gets the original, the migration and the target."""
        original = Migration.set_state
        self.monkey.setattr(
            Migration, "set_state", lambda mine, target: replace(original, mine, target)
        )

    def paths(self, wrong: dict[tuple[int, int], tuple[State, ...]]) -> None:
        """Let requests take other arcs: the states on the way and at the end."""
        arcs = {(arc.origin, arc.target): arc for arc in ARCS}

        def wrong_path(caps: int, origin: State, target: int) -> Any:
            if (origin, target) not in wrong:
                return path(caps, origin, target)
            stops = (origin, *wrong[origin, target])
            return tuple(arcs[pair] for pair in pairwise(stops))

        self.patch_module("vfiomig.core.migration", "path", wrong_path)

    def patch_module(self, module: str, name: str, new: object) -> None:
        self.monkey.setattr(f"{module}.{name}", new)


class Payload:
    """The bytes behind a feature's header, in words."""

    def __init__(self, address: int) -> None:
        self.address = address + vfio.DeviceFeature.SIZE

    def put(self, at: int, value: int, size: int = 4) -> None:
        ctypes.memmove(self.address + at, (value % (1 << 8 * size)).to_bytes(size, "little"), size)

    def get(self, at: int, size: int = 4) -> int:
        return int.from_bytes(ctypes.string_at(self.address + at, size), "little")


def look(number: int, argument: UapiStruct | None) -> Asked | None:
    """Read the header of a feature request; ``None`` if it is none, or lies in no memory."""
    if number != FEATURE or argument is None:
        return None
    try:
        header = ProcessMemory(os.getpid()).read(ctypes.addressof(argument), 8)
    except MemoryFault:
        return None
    return Asked(int.from_bytes(header[:4], "little"), int.from_bytes(header[4:], "little"))


def readable(argument: UapiStruct, size: int, *, writable: bool = False) -> bool:
    return ProcessMemory(os.getpid()).check(ctypes.addressof(argument), size, writable=writable)


def outcome(call: Callable[[], int]) -> int:
    try:
        call()
    except OSError as failure:
        return failure.errno or errno.EIO
    return 0


def end(result: int) -> int:
    """Be a system call that ends with this errno."""
    if result:
        raise OSError(result, os.strerror(result))
    return 0


class Tampered(LocalTransport):
    """One open of the mutant, with what was put into the way of requests."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        super().__init__(bench.served)
        bench.opened.append(self)

    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int:
        call: Call = super().ioctl
        for tamper in self._bench.ioctls:
            call = partial(tamper, call)
        return call(on, number, argument)

    def readinto(self, data_fd: int, buffer: memoryview) -> int:
        call: Call = super().readinto
        for tamper in self._bench.reads:
            call = partial(tamper, call)
        return call(data_fd, buffer)

    def write(self, data_fd: int, data: memoryview) -> int:
        call: Call = super().write
        for tamper in self._bench.writes:
            call = partial(tamper, call)
        return call(data_fd, data)

    def close(self, number: int) -> None:
        call: Callable[..., None] = super().close
        for tamper in self._bench.closes:
            call = partial(tamper, call)
        call(number)


@dataclass(frozen=True)
class Mutant:
    """A row: the fault, the rule that it breaks, and the check that names the rule."""

    name: str
    rule: str
    caught_by: str
    #: How many checks of the chapter may find it besides.
    others: int
    caps: str
    dialect: Dialect
    body: Callable[[Bench], None]
    #: Seconds for each check: one that hangs costs all of them.
    deadline: float
    #: What lets go of whoever hangs in the mutant.
    release: Callable[[], None]


MUTANTS: dict[str, Mutant] = {}


def mutant(
    rule: str,
    caught_by: str,
    others: int = 0,
    *,
    caps: str = "all",
    dialect: Dialect = Dialect.LANDED,
    deadline: float = 20.0,
    release: Callable[[], None] = lambda: None,
) -> Callable[[Callable[[Bench], None]], None]:
    def declare(body: Callable[[Bench], None]) -> None:
        assert body.__name__ not in MUTANTS
        MUTANTS[body.__name__] = Mutant(
            body.__name__, rule, caught_by, others, caps, dialect, body, deadline, release
        )

    return declare


def waits_at_the_end(event: threading.Event) -> Call:
    """A read on the reading thread that waits for more at the end, whatever becomes of its session."""

    def read(call: Call, data_fd: int, buffer: memoryview) -> int:
        count = call(data_fd, buffer)
        if not count and len(buffer) == 4096:
            event.wait(30)
        return count

    return read


def skip_byte(bench: Bench) -> None:
    """Drop a byte of a saving session of which some were read."""
    migf = bench.migration._migf
    if isinstance(migf, SavingMigf) and migf.moved:
        migf._view = migf._view[1:]


def spoiled(when: list[int]) -> type[Drilled]:
    """A device that loads nothing while there is something in ``when``."""

    class Spoiled(Drilled):
        def load(self, state: StateReader) -> None:
            if when:
                raise DeviceError(errno.EIO)
            super().load(state)

    return Spoiled


v6_mutant = partial(mutant, dialect=Dialect.V6)


def served_as(bench: Bench, name: str, answer: Callable[..., None]) -> None:
    from vfiomig.core import feature

    row = feature.SERVED[name]
    bench.monkey.setitem(feature.SERVED, name, row._replace(answer=answer))
