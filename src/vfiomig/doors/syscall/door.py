"""The door: receives a program's stopped calls, and keeps track of what it has open.

Theory of operation
===================
One thread receives at a time. It answers most calls itself, at once. A call that may take long
(an arc, a reset, a hook of the device) makes it pass the receiver's role on to another thread
first (``Turn.pass_on``), so that the program's other calls are always received; a read or write
that must wait stays with its session and is answered from there.

A further thread keeps house: it notices last closes while the program is quiet, follows the
program's copies of data_fds, and looks after calls that are held. While a call is held the
program's thread cannot run its signal handlers, and nothing but its /proc entry tells that a
signal is waiting; so while calls are held, and only then, those entries are looked at, and a
held call that has moved nothing gives way to a signal that has a handler.

The order of a program's calls is kept where it shows: a close is noticed before any later call
is answered, because the queue of closes is drained first (``settle``).
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import select
import threading
from typing import TYPE_CHECKING

from vfiomig.abi.ioctls import FdKind
from vfiomig.core.iommufd import Iommufd
from vfiomig.descriptors import Fd
from vfiomig.doors.syscall.answers import CARRY_ON, HELD
from vfiomig.doors.syscall.calls import Calls
from vfiomig.doors.syscall.held import HeldCalls
from vfiomig.doors.syscall.notify import CallerGone
from vfiomig.doors.syscall.opened import DataOpen, DeviceOpen, IommufdOpen, Opened, Table, inode_of
from vfiomig.doors.syscall.pathcalls import PathCalls
from vfiomig.doors.syscall.paths import DevTree
from vfiomig.doors.syscall.placeholder import Placeholders
from vfiomig.doors.syscall.readiness import DataPipe
from vfiomig.doors.syscall.transfer import CallTransfer
from vfiomig.fsm import SessionKind
from vfiomig.memory import ProcessGone

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from vfiomig.core.transfer import Migf
    from vfiomig.core.vfio_device import VfioDevice
    from vfiomig.doors.syscall.answers import Handler
    from vfiomig.doors.syscall.caller import SyscallCaller
    from vfiomig.doors.syscall.notify import Listener, Notification
    from vfiomig.doors.syscall.trace import Trace
    from vfiomig.memory import ProcessMemory

__all__ = ("Door", "Turn")

log = logging.getLogger("vfiomig.doors.syscall")

JOIN_SECONDS = 5.0
#: How often held calls are looked at.
HELD_SECONDS = 0.02


class Turn:
    """What the thread that received a call needs while it answers it."""

    __slots__ = ("_door", "passed_on", "traced")

    def __init__(self, door: Door) -> None:
        self._door = door
        self.passed_on = False
        self.traced: list[str] | None = None

    def pass_on(self) -> None:
        """Let another thread receive: this call may take long."""
        if not self.passed_on:
            self.passed_on = True
            self._door.receive_elsewhere()

    def request(
        self, opened: Opened, number: int, call: Notification, caller: SyscallCaller
    ) -> None:
        if self.traced is not None:
            self.traced.extend(self._door.describe_request(opened, number, call, caller))

    def access(self, opened: Opened, name: str, call: Notification) -> None:
        if self.traced is not None:
            self.traced.extend((opened.label, f"{name}({call.args[2]})"))


class Door:
    """Serves ``devices`` to the program behind a listener, from ``serve`` to its end.

    ``first_data_fd``: numbers from which data_fds are put into the program's table (the fast
    filter); ``None``: wherever there is room.
    """

    def __init__(
        self,
        devices: Sequence[VfioDevice],
        *,
        first_data_fd: int | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.devices = list(devices)
        self.table = Table()
        self.trace = trace
        self._first_data_fd = first_data_fd
        self._placeholders: Placeholders[Opened] = Placeholders()
        self._tree = DevTree([device.name for device in devices])
        self._paths = PathCalls(self, self._tree)
        self._calls = Calls(self)
        self._held = HeldCalls()
        self._over_sessions: dict[tuple[str, SessionKind], DataOpen] = {}
        self._listener: Listener | None = None
        self._settling = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._threads_lock = threading.Lock()
        self._idle = 0
        self._role = threading.Semaphore(0)
        self._over = threading.Event()
        self._wake = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    # Life.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._release_everything()
        self._placeholders.close()
        self._wake.close()
        self._tree.__exit__(kind, error, trace)

    def serve(self, listener: Listener) -> None:
        """Answer calls until no process is left that could make one."""
        self._listener = listener
        keeper = threading.Thread(target=self._keep_house, name="vfiomig-door-keeper")
        keeper.start()
        try:
            self._receive_all()
        finally:
            self._over.set()
            self._wake_keeper()
            with self._threads_lock:
                threads = [*self._threads, keeper]
            for _ in threads:
                self._role.release()
            for thread in threads:
                thread.join(JOIN_SECONDS)
                if thread.is_alive():
                    log.warning("a call is still being answered: a hook of a device hangs")
            self.settle(Turn(self))

    # Receiving.

    def receive_elsewhere(self) -> None:
        """Have another thread receive; start one if none is idle."""
        with self._threads_lock:
            if self._idle:
                self._idle -= 1
                self._role.release()
                return
            thread = threading.Thread(target=self._receive_all, name="vfiomig-door", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _receive_all(self) -> None:
        assert self._listener is not None
        receive = self._listener.receive
        while (call := receive()) is not None:
            turn = Turn(self)
            self._answer(call, turn)
            if turn.passed_on:
                with self._threads_lock:
                    self._idle += 1
                self._role.acquire()  # until the role comes back, or the end
                if self._over.is_set():
                    return
        self._over.set()
        with self._threads_lock:
            for _ in self._threads:
                self._role.release()

    def _answer(self, call: Notification, turn: Turn) -> None:
        listener = self._listener
        assert listener is not None
        if self.trace is not None:
            self.trace.begin(turn)
        try:
            result = self._calls.answer(call, turn)
            if result is CARRY_ON:
                listener.carry_on(call.id)
                return
            if result is HELD:
                return
            self._trace_end(call, turn, result)
            listener.reply(call.id, result)
        except (ProcessGone, CallerGone):
            log.debug("thread %d died while its call was being answered", call.tid)
        except OSError as failure:
            number = failure.errno or errno.EIO
            self._trace_end(call, turn, -number)
            listener.fail(call.id, number)
        except Exception:
            log.exception("a call could not be answered: %r gets EIO", call)
            listener.fail(call.id, errno.EIO)

    def _trace_end(self, call: Notification, turn: Turn, result: int) -> None:
        if self.trace is not None and turn.traced:
            self.trace.end(call, turn.traced, result)

    def describe_request(
        self, opened: Opened, number: int, call: Notification, caller: SyscallCaller
    ) -> tuple[str, str]:
        assert self.trace is not None
        return opened.label, self.trace.request(KINDS[type(opened)], number, call, caller)

    # Opening.

    def path_calls(self) -> dict[int, Handler]:
        return self._paths.handlers()

    def open_device(self, number: int, flags: int) -> Fd:
        """Open a device once more; the descriptor is for the program."""
        device = self.devices[number]
        opened = DeviceOpen(number, device.open())
        return self._place(opened, f"vfiomig-{device.name}", flags)

    def open_iommu(self, flags: int) -> Fd:
        return self._place(IommufdOpen(Iommufd()), "vfiomig-iommu", flags)

    def give(self, call: Notification, fd: Fd, *, cloexec: bool, turn: Turn) -> None:
        """Put a descriptor into the caller's table and answer the call with its number."""
        assert self._listener is not None
        number = self._listener.add_fd(call.id, fd, cloexec=cloexec, send=True)
        self._trace_end(call, turn, number)

    def _place(self, opened: Opened, name: str, flags: int) -> Fd:
        fd = self._placeholders.create(opened, name, flags=flags)
        self.table.add(inode_of(fd.fileno()), opened)
        return fd

    def install(self, call: Notification, migf: Migf) -> int:
        """Put a data_fd for ``migf`` into the caller's table; return its number there."""
        device = next(d for d in self.devices if d.name == migf.name)
        opened = DataOpen(device, migf)
        saving = migf.kind is SessionKind.SAVING
        if device.device.poll:
            opened.pipe = DataPipe(migf)
            fd = opened.pipe.program_end
            self.table.add(inode_of(fd.fileno()), opened)
        else:
            fd = self._place(opened, "vfiomig-data", os.O_RDONLY if saving else os.O_WRONLY)
        try:
            return self._add_fd(call, fd)
        finally:
            fd.close()
            self._wake_keeper()

    def _add_fd(self, call: Notification, fd: Fd) -> int:
        assert self._listener is not None
        if self._first_data_fd is None:
            return self._listener.add_fd(call.id, fd, cloexec=True)
        limit = resource.prlimit(call.tid, resource.RLIMIT_NOFILE)[0]
        for number in range(self._first_data_fd, limit):
            if not os.path.lexists(f"/proc/{call.tid}/fd/{number}"):
                return self._listener.add_fd(call.id, fd, newfd=number, cloexec=True)
        raise OSError(errno.EMFILE, "no number is free for a data_fd")

    # Data.

    def submit(
        self,
        opened: DataOpen,
        call: Notification,
        turn: Turn,
        memory: ProcessMemory,
        segments: list[tuple[int, int]],
    ) -> None:
        """Hand a read or write to its session, which answers the call now or later."""
        listener = self._listener
        assert listener is not None
        answered: list[int] = []

        def answer(result: int) -> None:

            answered.append(result)
            self._trace_end(call, turn, result)
            if result >= 0:
                listener.reply(call.id, result)
            else:
                listener.fail(call.id, -result)
            self._held.discard(transfer)

        transfer = CallTransfer(
            memory,
            segments,
            to_program=opened.migf.kind is SessionKind.SAVING,
            answer=answer,
        )
        opened.migf.submit(transfer)
        if not answered:
            self._held.add(transfer, opened.migf, lambda: listener.valid(call.id))
            if answered:
                self._held.discard(transfer)
            self._wake_keeper()

    # Closing.

    def settle(self, turn: Turn) -> None:
        """Act on every last close of the program so far."""
        if not self._settling.acquire(blocking=False):
            turn.pass_on()
            self._settling.acquire()
        try:
            gone = self._placeholders.drain()
            if gone:
                turn.pass_on()
            for opened in gone:
                self._closed(opened)
        finally:
            self._settling.release()

    def _closed(self, opened: Opened) -> None:
        self.table.remove(opened)
        if isinstance(opened, DeviceOpen):
            opened.file.release()
        elif isinstance(opened, DataOpen) and opened.pipe is not None:
            opened.pipe.close()

    def _release_everything(self) -> None:
        for opened in self.table.all():
            self._closed(opened)

    # Keeping house.

    def _wake_keeper(self) -> None:
        os.eventfd_write(self._wake.fileno(), 1)

    def _keep_house(self) -> None:
        while not self._over.is_set():
            ready = self._wait_for_work()
            if self._wake.fileno() in ready:
                os.eventfd_read(self._wake.fileno())
            self.settle(KeeperTurn(self))
            for opened in self.table.all():
                if isinstance(opened, DataOpen) and opened.pipe is not None:
                    self._keep_data(opened, opened.pipe)
            self._held.look()

    def _keep_data(self, opened: DataOpen, pipe: DataPipe) -> None:
        if opened.migf.dead:
            # Nobody can tell any more when the program closes it, and all that are over answer
            # alike: one that stands for all keeps the memory of long runs bounded.
            key = opened.device.name, opened.migf.kind
            self.table.replace(opened, self._over_sessions.setdefault(key, opened))
            pipe.close()
        elif pipe.abandoned():
            self._closed(opened)

    def _wait_for_work(self) -> set[int]:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(self._placeholders.fileno(), select.POLLIN)
        for opened in self.table.all():
            if isinstance(opened, DataOpen) and opened.pipe is not None:
                watched = opened.pipe.watched()
                if watched is not None:
                    poller.register(watched, 0)
        return {fd for fd, _ in poller.poll(HELD_SECONDS * 1000 if self._held else None)}


class KeeperTurn(Turn):
    """The keeper does not receive, so it has no role to pass on."""

    __slots__ = ()

    def pass_on(self) -> None:
        return


KINDS = {DeviceOpen: FdKind.DEVICE, IommufdOpen: FdKind.IOMMUFD, DataOpen: FdKind.DATA}
