"""A running program under a filter: its end, its signals, its orphans."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vfiomig.descriptors import Fd, poll_until
from vfiomig.doors.syscall.heir import resign

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType
    from typing import Self

    from vfiomig.descriptors import HasFileno
    from vfiomig.doors.syscall.notify import Listener

__all__ = ("Program", "relaying_signals")

REAP_INTERVAL = 1.0
LAST_ORPHANS_TIMEOUT = 1.0

# Programs of this process that are not collected yet: no other may take them for its orphans.
_uncollected: set[int] = set()


class Program:
    """A program started by :func:`vfiomig.doors.syscall.launch.launch`; its owner closes it."""

    def __init__(self, pid: int, pidfd: Fd, listener: Listener) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.listener = listener
        #: 128 + n if signal n ended it; ``None`` until :meth:`wait` has seen the end.
        self.exit_code: int | None = None
        self._collecting = threading.Lock()
        _uncollected.add(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def wait(self, deadline: float | None = None) -> int:
        """Wait for the program's end and return its exit code.

        Its descendants may live on, and are served as before.

        Raises:
            TimeoutError: ``deadline`` (monotonic) came first; the program goes on.

        """
        if self.exit_code is None:
            self._await(self.pidfd, select.POLLIN, deadline)
        with self._collecting:
            if self.exit_code is None:
                _, status = os.waitpid(self.pid, 0)
                code = os.waitstatus_to_exitcode(status)
                self.exit_code = code if code >= 0 else 128 - code
                _uncollected.discard(self.pid)
        self.reap_orphans()
        return self.exit_code

    def wait_for_descendants(self, deadline: float | None = None) -> None:
        """Wait, after the program's own end, for that of the last process that came from it.

        The receivers end then. On kernels before 6.11 they do so only if orphans are collected,
        which happens here.

        Raises:
            TimeoutError: ``deadline`` (monotonic) came first; they go on.

        """
        if not self.listener.ended:
            self._await(self.listener, select.POLLHUP, deadline)

    def _await(self, fd: HasFileno, event: int, deadline: float | None) -> None:
        """Wait for ``event``, and collect orphans meanwhile."""
        while True:
            pause = time.monotonic() + REAP_INTERVAL
            turn = pause if deadline is None else min(pause, deadline)
            if poll_until(fd, event & select.POLLIN, turn) & event:
                return
            self.reap_orphans()
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"process {self.pid}, or what came from it, still runs")

    def send_signal(self, number: int) -> bool:
        """Send a signal; ``False`` if the program has ended."""
        try:
            signal.pidfd_send_signal(self.pidfd.fileno(), number)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        """Kill the program if it still runs, collect it, and give the listener up.

        Descendants that live on get ENOSYS for every call that the filter stops.
        """
        if self.pidfd.closed:
            return
        if self.exit_code is None:
            self.send_signal(signal.SIGKILL)
            self.wait()
        if self.listener.ended:
            # All descendants are on their way out; the last of them come to this process now.
            deadline = time.monotonic() + LAST_ORPHANS_TIMEOUT
            while self.reap_orphans(deadline):
                pass
        self.listener.close()
        self.pidfd.close()
        resign()

    def reap_orphans(self, deadline: float | None = None) -> int:
        """Collect ended descendants that were left to this process; return how many.

        With ``deadline`` (monotonic) also those that end until then. This process may have other
        children, which belong to others: ours have more seccomp filters than this process.
        """
        own_filters = _status_number("self", "Seccomp_filters")
        reaped = 0
        for pid in list(_children()):
            if pid in _uncollected or _status_number(pid, "Seccomp_filters") <= own_filters:
                continue
            if deadline is not None:
                _await_end(pid, deadline)
            with suppress(ChildProcessError):
                reaped += os.waitpid(pid, os.WNOHANG)[0] == pid
        return reaped


@contextmanager
def relaying_signals(program: Program) -> Iterator[None]:
    """Let ``program`` decide about signals while it runs; for the main thread.

    The terminal sends SIGINT and SIGQUIT to the program as well: here they do nothing. SIGTERM
    and SIGHUP, sent to this process alone, are passed on. What is ignored stays ignored.
    """

    def ignore(_number: int, _frame: FrameType | None) -> None:
        pass

    def pass_on(number: int, _frame: FrameType | None) -> None:
        program.send_signal(number)

    handlers = {
        signal.SIGINT: ignore,
        signal.SIGQUIT: ignore,
        signal.SIGTERM: pass_on,
        signal.SIGHUP: pass_on,
    }
    before = {}
    try:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _await_end(pid: int, deadline: float) -> None:
    with suppress(OSError), Fd(os.pidfd_open(pid)) as pidfd:  # it is gone, or no descriptor is left
        poll_until(pidfd, select.POLLIN, deadline)


def _children() -> Iterator[int]:
    """Children of this process, whichever of its threads they are listed under."""
    with suppress(OSError):  # no descriptor is left: there will be another time
        for listing in Path("/proc/self/task").glob("*/children"):
            with suppress(OSError):  # a thread that just ended
                yield from map(int, listing.read_text(encoding="ascii").split())


def _status_number(pid: int | str, name: str) -> int:
    """A number in /proc/PID/status, -1 if the process or the line is not there."""
    with suppress(OSError), Path(f"/proc/{pid}/status").open(encoding="utf-8") as status:
        for line in status:
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return -1
