"""A program without a front door: it makes requests of ``core`` with memory of this process.

``Caller`` is the maker of a request, ``Program`` one program with a device open: bytes in, bytes
and errno out. ``Pages`` is memory that faults where it is told to. ``Read`` and ``Write`` are
transfers of a data_fd. ``Scripted`` is a device that notes what is asked of it and fails on
command.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, Self

from vfiomig.abi import pci, vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.checks import pages
from vfiomig.core.iommufd import Iommufd
from vfiomig.core.regions import region_offset
from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
from vfiomig.descriptors import Fd
from vfiomig.device import Device, PrecopyInfo, StateReader
from vfiomig.errors import DeviceError
from vfiomig.eventfd import EventFd
from vfiomig.fsm import Capability, State
from vfiomig.iommu import Backings, Place
from vfiomig.memory import MemoryFault, ProcessMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.core.container import Container
    from vfiomig.core.transfer import Migf
    from vfiomig.descriptors import HasFileno

PAGE = pages.PAGE
Pages = pages.Pages
DEADLINE = 10.0
LANDED, V6 = Dialect.LANDED, Dialect.V6
GET, SET, PROBE = (
    vfio.VFIO_DEVICE_FEATURE_GET,
    vfio.VFIO_DEVICE_FEATURE_SET,
    vfio.VFIO_DEVICE_FEATURE_PROBE,
)
#: The descriptor number behind which every program here has an iommufd.
IOMMUFD = 3
#: ... and something else that is open.
OTHER = 4


class Caller:
    """``core.Caller``: this process, with a table of descriptors that can be full."""

    def __init__(self) -> None:
        self._memory = ProcessMemory(os.getpid())
        self.read = self._memory.read
        self.write = self._memory.write
        self.check = self._memory.check
        self.table: dict[int, Migf] = {}
        self.iommufds: dict[int, Iommufd | None] = {IOMMUFD: Iommufd(), OTHER: None}
        self.containers: dict[int, Container] = {}
        #: Opens of devices that a group gave out.
        self.files: dict[int, VfioDeviceFile] = {}
        self.full = False
        self.waits = 0
        self.capabilities: set[int] = set()

    def memory(self, address: int, length: int, *, writable: bool, known: Backings) -> Place:
        if not self.check(address, length, writable=writable):
            raise MemoryFault(address, length)
        return Place(self._memory, address)

    def file(self, number: int) -> Fd:
        return Fd(os.dup(number))

    def capable(self, capability: int) -> bool:
        return capability in self.capabilities

    def blocks(self) -> None:
        self.waits += 1

    def return_fd(self, migf: Migf, address: int, render: Callable[[int], bytes]) -> None:
        if self.full:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        number = 10 + len(self.table)
        self.write(address, render(number))
        self.table[number] = migf

    def return_device(
        self, device: VfioDevice, open_file: Callable[[HasFileno | None], VfioDeviceFile]
    ) -> int:
        if self.full:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        number = 100 + len(self.files)
        self.files[number] = open_file(None)
        return number

    def opened(self, number: int) -> object:
        known: dict[int, object] = {**self.iommufds, **self.containers, **self.files}
        if number not in known:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return known[number]

    def eventfd(self, number: int) -> EventFd:
        return EventFd(os.dup(number))


class Transfer:
    """A read or write; from byte ``fault_at`` on the memory behind it faults."""

    def __init__(self, size: int, fault_at: int | None) -> None:
        self.size = size
        self.memory = bytearray(size)
        self.fault_at = size if fault_at is None else fault_at
        self.answers: list[int] = []
        self._answered = threading.Event()

    def within(self, view: memoryview, done: int) -> int:
        return max(0, min(len(view), self.fault_at - done))

    def finish(self, result: int) -> None:
        self.answers.append(result)
        self._answered.set()

    @property
    def waiting(self) -> bool:
        return not self._answered.is_set()

    def wait(self) -> int:
        assert self._answered.wait(DEADLINE), "the transfer was not answered"
        assert len(self.answers) == 1, "a transfer is answered once"
        return self.answers[0]


class Read(Transfer):
    def __init__(self, size: int, fault_at: int | None = None) -> None:
        super().__init__(size, fault_at)

    def move(self, view: memoryview, done: int) -> int:
        count = self.within(view, done)
        self.memory[done : done + count] = view[:count]
        return count

    @property
    def data(self) -> bytes:
        return bytes(self.memory[: max(self.wait(), 0)])


class Write(Transfer):
    def __init__(self, data: bytes, fault_at: int | None = None) -> None:
        super().__init__(len(data), fault_at)
        self.memory[:] = data

    def move(self, view: memoryview, done: int) -> int:
        count = self.within(view, done)
        view[:count] = self.memory[done : done + count]
        return count


class Answer(NamedTuple):
    """What became of a request: its errno or 0, and the caller's bytes afterwards."""

    errno: int
    data: bytes


class Reply(NamedTuple):
    """What became of a change of state."""

    errno: int
    state: int
    fd: int


class Program:
    """A program that has one device open, and bound where the dialect wants that."""

    def __init__(
        self, device: Device | None = None, dialect: Dialect = LANDED, *, bound: bool = True
    ) -> None:
        self.served = VfioDevice(Scripted() if device is None else device, dialect=dialect)
        self.dialect = dialect
        self.caller = Caller()
        self.file: VfioDeviceFile = self.served.open()
        if bound and dialect is LANDED:
            self.bind()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.release()
        for migf in self.caller.table.values():
            migf.join()

    def reopen(self) -> None:
        self.close()
        self.file = self.served.open()
        if self.dialect is LANDED:
            self.bind()

    # Requests.

    def at(self, number: int, address: int, file: VfioDeviceFile | None = None) -> int:
        """Make a request with its argument at ``address``; return its errno or 0."""
        try:
            return (file or self.file).ioctl(number, address, self.caller)
        except OSError as failure:
            return failure.errno or -1

    def ioctl(
        self, number: int, argument: bytes | UapiStruct, file: VfioDeviceFile | None = None
    ) -> Answer:
        memory = ctypes.create_string_buffer(bytes(argument))
        result = self.at(number, ctypes.addressof(memory), file)
        return Answer(result, memory.raw[: len(bytes(argument))])

    def bind(self, file: VfioDeviceFile | None = None, iommufd: int = IOMMUFD) -> Answer:
        argument = bytes(vfio.BindIommufd(argsz=16, iommufd=iommufd))[:16]
        answer = self.ioctl(vfio.VFIO_DEVICE_BIND_IOMMUFD, argument, file)
        if not answer.errno:
            self.master(file=file)
        return answer

    def master(self, *, on: bool = True, file: VfioDeviceFile | None = None) -> None:
        """Let the device do DMA, or not."""
        at = region_offset(vfio.VFIO_PCI_CONFIG_REGION_INDEX) + pci.PCI_COMMAND
        command = int.from_bytes((file or self.file).pread(at, 2), "little")
        command = command & ~pci.PCI_COMMAND_MASTER | pci.PCI_COMMAND_MASTER * on
        (file or self.file).pwrite(at, command.to_bytes(2, "little"))

    def feature(self, flags: int, payload: bytes = b"", argsz: int | None = None) -> Answer:
        """Make a VFIO_DEVICE_FEATURE request; its answer's ``data`` is the payload's."""
        header = vfio.DeviceFeature(argsz=8 + len(payload) if argsz is None else argsz, flags=flags)
        answer = self.ioctl(vfio.VFIO_DEVICE_FEATURE, bytes(header) + payload)
        assert answer.data[:8] == bytes(header), "the header is never written"
        return Answer(answer.errno, answer.data[8:])

    def set_state(self, state: int, fd: int = 77) -> Reply:
        """Request a state in the program's dialect; ``fd`` is what it stored there before."""
        if self.dialect is V6:
            asked = vfio.MigSetState(argsz=16, device_state=state, data_fd=fd)
            answer = self.ioctl(vfio.VFIO_DEVICE_MIG_SET_STATE, asked)
            told = vfio.MigSetState.parse(answer.data)
            return Reply(answer.errno, told.device_state, told.data_fd)
        payload = bytes(vfio.MigState(device_state=state, data_fd=fd))
        answer = self.feature(SET | vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, payload)
        got = vfio.MigState.parse(answer.data)
        return Reply(answer.errno, got.device_state, got.data_fd)

    def go(self, state: int) -> int:
        """Request a state that must be reached; return the descriptor that came, or -1."""
        reply = self.set_state(state)
        assert reply[:2] == (0, state), reply
        return reply.fd

    def state(self) -> State:
        """Ask where the device is: by GET, or by the request that V6 always refuses."""
        if self.dialect is V6:
            reply = self.set_state(State.ERROR)
            assert (reply.errno, reply.fd) == (errno.EINVAL, -1)
            return State(reply.state)
        answer = self.feature(GET | vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, bytes(8))
        assert answer.errno == 0
        told = vfio.MigState.parse(answer.data)
        assert told.data_fd == -1
        return State(told.device_state)

    def reset(self) -> int:
        return self.at(vfio.VFIO_DEVICE_RESET, 0)

    # Sessions.

    def start_read(self, fd: int, size: int, fault_at: int | None = None) -> Read:
        transfer = Read(size, fault_at)
        self.caller.table[fd].submit(transfer)
        return transfer

    def start_write(self, fd: int, data: bytes, fault_at: int | None = None) -> Write:
        transfer = Write(data, fault_at)
        self.caller.table[fd].submit(transfer)
        return transfer

    def read(self, fd: int, size: int) -> bytes | int:
        """Read: the bytes, or a negative errno."""
        transfer = self.start_read(fd, size)
        return transfer.wait() if transfer.wait() < 0 else transfer.data

    def write(self, fd: int, data: bytes) -> int:
        return self.start_write(fd, data).wait()

    def read_all(self, fd: int, size: int = 4096) -> bytes:
        """Read to the permanent end."""
        chunks = []
        while chunk := self.read(fd, size):
            assert isinstance(chunk, bytes), errno.errorcode[-chunk]
            chunks.append(chunk)
        return b"".join(chunks)

    def info(
        self, fd: int, flags: int = 0, argsz: int = 24, number: int = vfio.VFIO_MIG_GET_PRECOPY_INFO
    ) -> tuple[int, int, int, int]:
        """Ask for the pre-copy info: errno, flags, initial_bytes, dirty_bytes."""
        argument = vfio.PrecopyInfo(argsz=argsz, flags=flags, initial_bytes=11, dirty_bytes=22)
        result = self.info_at(fd, ctypes.addressof(argument), number)
        return result, argument.flags, argument.initial_bytes, argument.dirty_bytes

    def info_at(self, fd: int, address: int, number: int = vfio.VFIO_MIG_GET_PRECOPY_INFO) -> int:
        try:
            return self.served.data_ioctl(self.caller.table[fd], number, address, self.caller)
        except OSError as failure:
            return failure.errno or -1


class Scripted(Device):
    """Notes every hook in ``log``; ``fails`` maps a hook, or an arc of ``step``, to an error."""

    def __init__(
        self,
        capabilities: Capability = Capability(7),  # noqa: B008 - an enum member never changes
        *,
        data: bytes = b"the state",
        early: Iterable[bytes] = (),
    ) -> None:
        self.capabilities = capabilities
        self.data = data
        self.early = list(early)
        self.log: list[str] = []
        self.fails: dict[object, Exception] = {}
        self.loaded: list[bytes] = []
        self.info: PrecopyInfo | tuple[int, int] | None = None
        #: Set by a test to hold a hook; ``entered`` tells that it is there.
        self.holds: dict[str, threading.Event] = {}
        self.entered: Counter[str] = Counter()

    def note(self, hook: str, *more: object) -> None:
        self.log.append(hook)
        self.entered[hook] += 1
        if hook in self.holds:
            assert self.holds[hook].wait(DEADLINE), "the test did not let the hook go on"
        for key in (hook, *more):
            if key in self.fails:
                raise self.fails[key]

    def wait_for(self, hook: str, times: int = 1) -> None:
        wait_until(lambda: self.entered[hook] >= times)

    def start(self) -> None:
        self.note("start")

    def stop(self) -> None:
        self.note("stop")

    def quiesce(self) -> None:
        self.note("quiesce")

    def step(self, origin: State, target: State) -> None:
        self.note("step", (origin, target))

    def reset(self) -> None:
        self.note("reset")

    def save(self) -> Iterable[bytes]:
        self.note("save")
        return self.produce()

    def produce(self) -> Iterator[bytes]:
        self.note("produce")
        yield self.data

    def precopy(self) -> Iterable[bytes]:
        self.note("precopy")
        return iter(self.early)

    def precopy_info(self) -> PrecopyInfo | tuple[int, int] | None:
        self.note("precopy_info")
        return self.info

    def state_size(self) -> int:
        self.note("state_size")
        return len(self.data)

    def load(self, state: StateReader) -> None:
        self.note("load")
        self.loaded.append(state.read(1 << 20))
        self.note("loaded")


class Produces(Scripted):
    """A ``Scripted`` whose streams are generators: ``Produces(save=…, precopy=…)``."""

    def __init__(
        self,
        save: Callable[[], Iterable[bytes]] | None = None,
        precopy: Callable[[], Iterable[bytes]] | None = None,
        capabilities: Capability = Capability(7),  # noqa: B008 - as above
    ) -> None:
        super().__init__(capabilities)
        self._save = save
        self._precopy = precopy

    def save(self) -> Iterable[bytes]:
        self.note("save")
        return self._save() if self._save else ()

    def precopy(self) -> Iterable[bytes]:
        self.note("precopy")
        return self._precopy() if self._precopy else ()


class Loads(Scripted):
    """A ``Scripted`` with a ``load`` of the test's own."""

    def __init__(self, load: Callable[[StateReader], None]) -> None:
        super().__init__()
        self._load = load

    def load(self, state: StateReader) -> None:
        self.note("load")
        self._load(state)


def failing(problem: BaseException, *before: bytes) -> Callable[[], Iterator[bytes]]:
    """Make a stream that yields ``before`` and then raises."""

    def produce() -> Iterator[bytes]:
        yield from before
        raise problem

    return produce


class Gate:
    """A stream that yields ``before``, then hangs until the test lets it yield or raise ``then``."""

    def __init__(self, *before: bytes, then: bytes | BaseException = b"") -> None:
        self.before = before
        self.then = then
        self._reached = threading.Event()
        self._opened = threading.Event()
        self._closed = threading.Event()

    def __call__(self) -> Iterator[bytes]:
        try:
            yield from self.before
            self._reached.set()
            assert self._opened.wait(DEADLINE), "the test did not let the stream go on"
            if isinstance(self.then, BaseException):
                raise self.then
            yield self.then
        finally:
            self._closed.set()

    @property
    def reached(self) -> bool:
        return self._reached.is_set()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def wait(self) -> None:
        """Wait until it hangs."""
        assert self._reached.wait(DEADLINE), "nobody asked the stream for more"

    def open(self) -> None:
        self._opened.set()


def refusal(number: int, *, fatal: bool = False) -> DeviceError:
    return DeviceError(number, "as the test wants it", fatal=fatal)


def watched(migf: Migf) -> list[tuple[bool, bool]]:
    """Note whether it is ready, and dead, whenever that may have changed, as a poller does."""
    seen: list[tuple[bool, bool]] = []
    looking = threading.Lock()  # or an older look may be noted behind a newer one

    def look() -> None:
        with looking:
            seen.append((migf.ready, migf.dead))

    migf.watch(look)
    return seen


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def in_thread(call: Callable[[], object]) -> threading.Thread:
    """Run a request beside the test; the caller joins it."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread
