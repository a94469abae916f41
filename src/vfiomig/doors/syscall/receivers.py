"""The threads that receive a program's calls, one of them at a time.

Theory of operation
===================
One thread receives, answers, and receives again: nothing is handed from thread to thread. Before
it does what may take long it passes the receiver's role on (``Turn.pass_on``) to an idle thread,
or to a new one if none is idle; when it is done it is idle itself. So calls are always received,
and there are no more threads than calls were ever under way at once.

Handing the role over costs more than most accesses of a device's registers. Where a call runs a
device's code that usually returns at once, ``Turn.if_long`` leaves the decision to a further
thread, which looks every ``LONG`` seconds while there are such calls, and passes the role on for
one that it meets twice.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.doors.syscall.notify import Listener, Notification
    from vfiomig.doors.syscall.trace import Line

__all__ = ("Receivers", "Turn")

log = logging.getLogger("vfiomig.doors.syscall")

#: How long a call may keep the role if nobody knows beforehand whether it takes long.
LONG = 0.002
#: After so many looks without such a call the looking pauses.
QUIET_LOOKS = 100


class Turn:
    """What the thread that received a call needs while it answers it."""

    __slots__ = ("_receivers", "line", "passed_on", "watched")

    def __init__(self, receivers: Receivers) -> None:
        self._receivers = receivers
        self.passed_on = False
        self.watched = False
        #: What the trace is going to say of the call.
        self.line: Line | None = None

    def pass_on(self) -> None:
        """Let another thread receive: this call may take long."""
        if not self.passed_on:
            self._receivers.pass_on(self)

    def if_long(self) -> None:
        """Have another thread receive if this call does not end soon."""
        if not self.passed_on:
            self.watched = True
            self._receivers.watch(self)


class Receivers:
    """Threads that give each call of ``listener`` to ``answer``, until the program's end."""

    def __init__(self, listener: Listener, answer: Callable[[Notification, Turn], None]) -> None:
        self._listener = listener
        self._answer = answer
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._role = threading.Semaphore(0)
        self._over = False
        self._short_of_threads = False
        self._watched: Turn | None = None
        self._watches = 0
        self._resting = True
        self._roused = threading.Event()
        self._watcher = threading.Thread(target=self._look, name="vfiomig-long", daemon=True)
        #: What ended the receiving before the program's end.
        self.failure: BaseException | None = None

    def receive_elsewhere(self) -> None:
        """Have another thread receive; start one if none is idle."""
        with self._lock:
            self._receive_elsewhere_locked()

    def pass_on(self, turn: Turn) -> None:
        """Take the role from ``turn``, unless that has happened."""
        with self._lock:
            if self._watched is turn:
                self._watched = None
            if not turn.passed_on:
                self._pass_on_locked(turn)

    def watch(self, turn: Turn) -> None:
        """Pass the role of ``turn`` on if it is still at its call in a while."""
        self._watches += 1
        self._watched = turn
        if self._resting:  # looked at after the turn is there, as the watcher does the reverse
            if self._watcher.ident is None:
                try:
                    self._watcher.start()
                except RuntimeError:
                    return  # nobody can look: the call keeps the role
            self._roused.set()

    def _pass_on_locked(self, turn: Turn) -> None:
        try:
            self._receive_elsewhere_locked()
        except RuntimeError as problem:
            # Once: it goes on like this.
            level = logging.DEBUG if self._short_of_threads else logging.WARNING
            log.log(level, "the program's calls wait for slow ones: %s", problem)
            self._short_of_threads = True
        else:
            turn.passed_on = True

    def _receive_elsewhere_locked(self) -> None:
        if self._idle:
            self._idle -= 1
            self._role.release()
            return
        # Daemons: one that is stuck in a device's hook must not hold up the exit.
        thread = threading.Thread(target=self._run, name="vfiomig-door", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _look(self) -> None:
        seen: Turn | None = None
        watches = quiet = 0
        while not self._over:
            if quiet > QUIET_LOOKS:
                self._resting = True
                if self._watched is None:
                    self._roused.wait()
                self._roused.clear()
                quiet = 0
            self._resting = False
            time.sleep(LONG)
            quiet = quiet + 1 if self._watches == watches else 0
            watches = self._watches
            turn = self._watched
            if turn is not None and turn is seen:
                self._pass_on_watched(turn)
            seen = turn

    def _pass_on_watched(self, turn: Turn) -> None:
        with self._lock:
            if self._watched is turn:  # else its call has ended meanwhile
                self._watched = None
                self._pass_on_locked(turn)

    def finish(self, deadline: float) -> bool:
        """Wait until ``deadline`` (monotonic) for the calls under way; ``False``: some still are.

        Call it when the program has ended, or its listener has been closed.
        """
        self._end()
        with self._lock:
            threads = list(self._threads)
            if self._watcher.ident is not None:
                threads.append(self._watcher)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _run(self) -> None:
        try:
            self._receive()
        except BaseException as failure:
            # Nobody would answer the program any more: ENOSYS is better than waiting for ever.
            log.exception("receiving failed; the program's further calls get ENOSYS")
            self.failure = failure
            self._listener.close()
        self._end()

    def _receive(self) -> None:
        receive = self._listener.receive
        while (call := receive()) is not None:
            turn = Turn(self)
            self._answer(call, turn)
            if turn.watched:
                with self._lock:
                    if self._watched is turn:
                        self._watched = None
            if turn.passed_on:
                with self._lock:
                    self._idle += 1
                self._role.acquire()  # until the role comes back, or the end
                if self._over:
                    return

    def _end(self) -> None:
        self._over = True
        self._roused.set()
        with self._lock:
            for _ in self._threads:
                self._role.release()
