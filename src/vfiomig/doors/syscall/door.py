"""The door: answers a program's stopped calls, and keeps track of what it has open.

Theory of operation
===================
Calls are received by threads in turns (receivers.py); what each call means is said in calls.py
and pathcalls.py. Most are answered at once. One that may take long (an arc, a reset, a hook of
the device) passes the receiver's role on first, so that the program's other calls are always
received; a read or write that must wait stays with its session and is answered from there.

A further thread keeps house: it notices last closes while the program is quiet, follows the
program's copies of data_fds, and looks after calls that are held. While a call is held the
program's thread cannot run its signal handlers, and nothing but its /proc entry tells that a
signal is waiting; so while calls are held, and only then, those entries are looked at, and a
held call that has moved nothing gives way to a signal (held.py).

The order of a program's calls is kept where it shows: a close is noticed before any later call
is answered, because the queue of closes is drained first (``settle``).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import resource
import select
import threading
import time
from typing import TYPE_CHECKING

from vfiomig.abi.ioctls import FdKind
from vfiomig.core.container import Container
from vfiomig.core.group import Group
from vfiomig.core.iommufd import Iommufd
from vfiomig.core.regions import memory_size
from vfiomig.descriptors import Fd, create_sealed_memfd
from vfiomig.doors.syscall.answers import CARRY_ON, HELD
from vfiomig.doors.syscall.calls import Calls
from vfiomig.doors.syscall.closing import Closing
from vfiomig.doors.syscall.held import HeldCalls
from vfiomig.doors.syscall.lastclose import LastClose
from vfiomig.doors.syscall.notify import CallerGone
from vfiomig.doors.syscall.opened import (
    ContainerOpen,
    DataOpen,
    DeviceOpen,
    GroupOpen,
    IommufdOpen,
    Opened,
    PathOpen,
    Table,
    link_of,
)
from vfiomig.doors.syscall.pathcalls import PathCalls
from vfiomig.doors.syscall.paths import DevTree
from vfiomig.doors.syscall.readiness import DataPipe
from vfiomig.doors.syscall.receivers import Receivers, Turn
from vfiomig.doors.syscall.standin import StandIn
from vfiomig.doors.syscall.sysfs import SysTree
from vfiomig.doors.syscall.transfer import CallTransfer
from vfiomig.errors import DoorError, PrerequisiteError
from vfiomig.fsm import SessionKind
from vfiomig.memory import ProcessGone, ProcessMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from vfiomig.core.transfer import Migf
    from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile
    from vfiomig.descriptors import HasFileno
    from vfiomig.doors.syscall.answers import Handler
    from vfiomig.doors.syscall.caller import SyscallCaller
    from vfiomig.doors.syscall.notify import Listener, Notification
    from vfiomig.doors.syscall.trace import Trace

__all__ = ("Door",)

log = logging.getLogger("vfiomig.doors.syscall")

#: How long the end waits for hooks of devices, all in all.
END_SECONDS = 5.0
#: How often held calls are looked at.
HELD_SECONDS = 0.02
#: Requests are told from each other by these in the trace.
KINDS = {
    DeviceOpen: FdKind.DEVICE,
    GroupOpen: FdKind.GROUP,
    ContainerOpen: FdKind.CONTAINER,
    IommufdOpen: FdKind.IOMMUFD,
    DataOpen: FdKind.DATA,
}

_placeholders = itertools.count()


class Door:
    """Serves ``devices`` to the program behind a listener, from ``start`` to the exit.

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
        #: The group of each device; its address is the only one on a bus of its own.
        self.groups = [
            Group(device, f"0000:{bus:02x}:00.0") for bus, device in enumerate(devices, start=1)
        ]
        self._listener: Listener
        self.table = Table(self._refused)
        self.closing = Closing()
        self.tree = DevTree([device.name for device in devices])
        self.sysfs = SysTree(self.groups, self.tree)
        self.stand_in = StandIn(self.tree.fill, self.sysfs.fill)
        self._trace = trace
        self._first_data_fd = first_data_fd
        self._choosing_fd = threading.Lock()
        self._calls = Calls(self)
        self._held = HeldCalls()
        self._receivers: Receivers | None = None
        self._keeper = threading.Thread(target=self._keep_house, name="vfiomig-keeper", daemon=True)
        self._keeper_looks = False
        self._over = False
        self._said: set[str] = set()
        self._draining = threading.Lock()
        self._last_close: LastClose[Opened] = LastClose()
        self._memfds: dict[Opened, Fd] = {}
        self._wake = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        # epoll, not poll: a poll under way would keep a pipe end open that is closed meanwhile,
        # and the program would not see the hang-up.
        self._work = select.epoll()
        self._work.register(self._wake, select.EPOLLIN)
        self._work.register(self._last_close.fileno(), select.EPOLLIN)

    # Life.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give everything up; call it when the program has ended or its listener is closed."""
        deadline = time.monotonic() + END_SECONDS
        idle = self._receivers is None or self._receivers.finish(deadline)
        if self._keeper.ident is not None:
            self._over = True
            os.eventfd_write(self._wake.fileno(), 1)
            self._keeper.join()
        if not self._close_all(deadline) or not idle:
            log.warning("a hook of a device hangs; the device is given up as it is")
        self._last_close.close()
        self._wake.close()
        self._work.close()
        self.stand_in.close()

    def start(self, listener: Listener) -> None:
        """Have calls answered from here on, until no process is left that could make one."""
        self._listener = listener
        self._receivers = Receivers(listener, self._answer)
        self._keeper.start()
        self._receivers.receive_elsewhere()

    def check(self) -> None:
        """Raise ``DoorError`` if the program was not served to its end."""
        failure = self._receivers.failure if self._receivers is not None else None
        if failure is not None:
            raise DoorError(f"receiving failed, please report it: {failure!r}") from failure

    def _close_all(self, deadline: float) -> bool:
        """Close what is open still; ``False`` if that takes longer."""
        self._notice_closes()
        for opened in self.table.all():
            self._forget(opened)
        closer = self._close_elsewhere()
        if closer is not None:
            closer.join(max(0.0, deadline - time.monotonic()))
        return closer is None or not closer.is_alive()

    # Answering.

    def _answer(self, call: Notification, turn: Turn) -> None:
        listener = self._listener
        if self._trace is not None:
            turn.line = self._trace.begin(call)
        try:
            result = self._calls.answer(call, turn)
            if result is CARRY_ON:
                listener.carry_on(call.id)
            elif result is not HELD:
                self.trace_end(turn, result)
                listener.reply(call.id, result)
        except (ProcessGone, CallerGone):
            log.debug("thread %d died while its call was being answered", call.tid)
        except OSError as failure:
            number = failure.errno or errno.EIO
            self.trace_end(turn, -number)
            listener.fail(call.id, number)
        except PrerequisiteError as problem:
            self.say_once(str(problem))
            listener.fail(call.id, errno.EIO)
        except Exception:
            log.exception("a call could not be answered: %r gets EIO", call)
            listener.fail(call.id, errno.EIO)

    def trace_end(self, turn: Turn, result: int) -> None:
        if self._trace is not None and turn.line is not None:
            self._trace.end(turn.line, result)

    def trace_request(self, turn: Turn, opened: Opened, caller: SyscallCaller) -> None:
        if turn.line is not None:
            turn.line.about_request(opened.label, KINDS[type(opened)], caller)

    def say_once(self, message: str) -> None:
        """Log what stays as it is, and would be said of every call."""
        if message not in self._said:
            self._said.add(message)
            log.error("%s", message)

    def _refused(self, tid: int) -> None:
        try:
            ProcessMemory(tid).read(0, 1)  # what keeps us from its descriptors is in the way here
        except PrerequisiteError as problem:
            self.say_once(str(problem))
        except OSError:
            log.debug("thread %d does not show its descriptors", tid)

    # Opening.

    def path_calls(self) -> dict[int, Handler]:
        return PathCalls(self).handlers()

    def open_device(self, number: int, flags: int) -> Fd:
        """Open a device once more; the descriptor is for the program."""
        return self._open_device(number, self.devices[number].open, flags)

    def _open_device(
        self, number: int, open_file: Callable[[HasFileno | None], VfioDeviceFile], flags: int
    ) -> Fd:
        device = self.devices[number]
        memfd = self._create_memfd(device.name, memory_size(device.device))
        try:
            opened = DeviceOpen(number, open_file(memfd), flags)
        except BaseException:
            memfd.close()
            raise
        try:
            return self._place_on(memfd, opened, flags)
        except BaseException:
            opened.close()
            raise

    def open_iommu(self, flags: int) -> Fd:
        return self._place(IommufdOpen(Iommufd(), flags), "iommu", flags)

    def open_path(self, path: str) -> Fd:
        """Open a path without opening what is there (O_PATH)."""
        return self._place(PathOpen(path), "path", os.O_RDONLY)

    def open_container(self, flags: int) -> Fd:
        return self._place(ContainerOpen(Container(), flags), "container", flags)

    def open_group(self, number: int, flags: int) -> Fd:
        """Open the group of a device: EBUSY if it is open, or the device in use otherwise."""
        group = self.groups[number]
        group.open()
        opened = GroupOpen(number, group, flags)
        try:
            return self._place(opened, opened.label, flags)
        except BaseException:
            group.leave()
            raise

    def give(self, call: Notification, fd: Fd, *, cloexec: bool, turn: Turn) -> None:
        """Put a descriptor into the caller's table and answer the call with its number.

        Ours is closed in between: the program's close is the last one from the moment on when it
        knows the number.
        """
        number = self._listener.add_fd(call.id, fd, cloexec=cloexec)
        fd.close()
        self.trace_end(turn, number)
        self._listener.reply(call.id, number)

    def _place(self, opened: Opened, name: str, flags: int) -> Fd:
        """Make a file that stands for ``opened`` until its last copy is closed."""
        return self._place_on(self._create_memfd(name, 0), opened, flags)

    def _create_memfd(self, name: str, size: int) -> Fd:
        # The name makes the file's link, by which it is known, unlike any other.
        return create_sealed_memfd(f"vfiomig-{name}.{os.getpid()}.{next(_placeholders)}", size)

    def _place_on(self, memfd: Fd, opened: Opened, flags: int) -> Fd:
        """Let ``memfd``, which is taken over, stand for ``opened``."""
        try:
            fd = self._last_close.open(memfd, flags, opened)
        except BaseException:
            memfd.close()
            raise
        self._memfds[opened] = memfd
        self.table.add(link_of(fd), opened)
        return fd

    def install(self, call: Notification, migf: Migf) -> int:
        """Put a data_fd for ``migf`` into the caller's table; return its number there."""
        number = self._number_of(migf.name)
        device = self.devices[number]
        saving = migf.kind is SessionKind.SAVING
        opened = DataOpen(number, device, migf, Table.mark(number, saving=saving))
        if device.device.poll:
            opened.pipe = DataPipe(migf, self._work)
            fd = opened.pipe.program_end
            self.table.add(link_of(fd), opened)
            opened.pipe.follow(opened.mark, lambda: self.table.retire(opened))
        else:
            fd = self._place(opened, opened.label, os.O_RDONLY if saving else os.O_WRONLY)
        with fd:
            return self._add_fd(call, fd)

    def install_device(
        self,
        call: Notification,
        device: VfioDevice,
        open_file: Callable[[HasFileno | None], VfioDeviceFile],
    ) -> int:
        """Put an open of a device into the caller's table; return its number there."""
        with self._open_device(self._number_of(device.name), open_file, os.O_RDWR) as fd:
            return self._listener.add_fd(call.id, fd, cloexec=True)

    def _number_of(self, name: str) -> int:
        return next(n for n, device in enumerate(self.devices) if device.name == name)

    def _add_fd(self, call: Notification, fd: Fd) -> int:
        if self._first_data_fd is None:
            return self._listener.add_fd(call.id, fd, cloexec=True)
        with self._choosing_fd:
            limit = resource.prlimit(call.tid, resource.RLIMIT_NOFILE)[0]
            for number in range(self._first_data_fd, limit):
                if not os.path.lexists(f"/proc/{call.tid}/fd/{number}"):
                    return self._listener.add_fd(call.id, fd, newfd=number, cloexec=True)
        raise OSError(errno.EMFILE, "no number is free for a data_fd")

    # Data.

    def submit(
        self, opened: DataOpen, call: Notification, turn: Turn, segments: list[tuple[int, int]]
    ) -> None:
        """Hand a read or write to its session, which answers the call now or later."""
        listener = self._listener
        answers: list[int] = []

        def answer(result: int) -> None:
            answers.append(result)
            self.trace_end(turn, result)
            if result >= 0:
                listener.reply(call.id, result)
            else:
                listener.fail(call.id, -result)
            self._held.discard(transfer)

        saving = opened.migf.kind is SessionKind.SAVING
        transfer = CallTransfer(call, segments, to_program=saving, answer=answer)
        opened.migf.submit(transfer)
        if not answers:
            self._held.add(transfer, opened.migf, lambda: listener.valid(call.id))
            if answers:
                self._held.discard(transfer)
            elif not self._keeper_looks:
                os.eventfd_write(self._wake.fileno(), 1)

    # Closing.

    def settle(self, turn: Turn, number: int | None) -> None:
        """Act on the last closes so far, of device ``number`` (``None``: of all)."""
        self._notice_closes()
        if self.closing:
            self.closing.finish(number, turn.pass_on)

    def _notice_closes(self) -> None:
        # Whoever finds the queue empty must find the closes noted, so both is one step.
        with self._draining:
            for opened in self._last_close.drain():
                self._forget(opened)

    def _forget(self, opened: Opened) -> None:
        self.table.remove(opened)
        memfd = self._memfds.pop(opened, None)
        if memfd is not None:
            self._last_close.forget(memfd)
            memfd.close()
        if isinstance(opened, DeviceOpen | GroupOpen):
            self.closing.note(opened)
        elif isinstance(opened, DataOpen) and opened.pipe is not None:
            opened.pipe.close()

    # Keeping house.

    def _keep_house(self) -> None:
        seen = 0
        while not self._over:
            # Where reads wait again and again, waking this thread each time would cost more than
            # looking for a while after the last one.
            self._keeper_looks = seen != self._held.added
            looks = self._keeper_looks or bool(self._held) or not self._last_close.settled
            seen = self._held.added
            self._work.poll(HELD_SECONDS if looks else None)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake.fileno())
            self._notice_closes()
            if self.closing.waiting:
                self._close_elsewhere()  # one that is slow must not keep signals waiting
            for opened in self.table.all():
                if isinstance(opened, DataOpen) and opened.pipe and opened.pipe.abandoned():
                    self._forget(opened)
            self._held.look()

    def _close_elsewhere(self) -> threading.Thread | None:
        """Carry closes out in a thread, as they may take long; at once if there can be none."""
        closer = threading.Thread(target=self.closing.finish, args=(None,), daemon=True)
        try:
            closer.start()
        except RuntimeError:
            self.closing.finish(None)
            return None
        return closer
