"""The migration state of one device, and the only place that changes it.

Theory of operation
-------------------
One lock, ``_state_lock``, is held while arcs are taken; ``fsm.path`` says which. An arc that
fails ends the request where it is: nothing is rolled back, the caller is told the state reached.

Reset and hook failures can come from any thread, also while the lock is held for a long arc or
from inside a session's own code. They leave a note and go on; whoever holds the lock carries the
note out before letting go of it (*deferred reset*). A request that races with a reset may
therefore succeed, with a descriptor, and find the device in RUNNING and the descriptor dead. The
lock is never held while a caller's memory is touched.

Contracts: ``enum vfio_device_mig_state`` in include/uapi/linux/vfio.h; docs/protocol.md, "reset".
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vfiomig.core.resuming import ResumingMigf
from vfiomig.core.saving import SavingMigf
from vfiomig.device import Device, SessionBody
from vfiomig.errors import DeviceError
from vfiomig.fsm import PRE_COPY_GROUP, Arc, Capability, SessionKind, State, path, session_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.core.transfer import Migf

__all__ = ("ArcEvent", "Migration", "Outcome")

log = logging.getLogger("vfiomig.core")
T = TypeVar("T")

#: Hook of the run level that a state belongs to.
RUN_LEVEL = {
    State.RUNNING: "start",
    State.PRE_COPY: "start",
    State.RUNNING_P2P: "quiesce",
    State.PRE_COPY_P2P: "quiesce",
    State.STOP: "stop",
    State.STOP_COPY: "stop",
    State.RESUMING: "stop",
}


@dataclass(frozen=True, slots=True)
class ArcEvent:
    """One arc that was taken or failed. ``nbytes`` is what its session had moved so far."""

    device: str
    arc: Arc
    seconds: float
    errno: int
    nbytes: int

    def __str__(self) -> str:
        failure = f" failed with {errno.errorcode.get(self.errno, self.errno)}"
        return f"{self.arc}{failure if self.errno else ''}"


class Outcome(NamedTuple):
    """What became of a request. ``final_state`` is ``None`` if the device left it unset."""

    final_state: State | None
    errno: int
    migf: Migf | None


class Migration:
    """The state machine of ``device``; ``capabilities`` are those that callers are shown."""

    def __init__(self, device: Device, name: str, capabilities: Capability) -> None:
        self.device = device
        self.name = name
        self.capabilities = capabilities
        self.observers: list[Callable[[ArcEvent], None]] = []
        self.precopy_v2 = False
        self._state = State.RUNNING
        self._migf: Migf | None = None
        self._over: list[Migf] = []  # ended, their threads perhaps not
        self._state_lock = threading.Lock()
        self._notes_lock = threading.Lock()
        self._reset_noted = False
        self._error_noted = False
        self._controls = type(device).migration_set_state is not Device.migration_set_state
        device._on_data_ready = self._data_ready

    # What callers ask.

    def state(self, blocks: Callable[[], None] = lambda: None) -> State:
        """Return the state, after any arc that is under way; ``blocks`` is called before a wait."""
        if not self._state_lock.acquire(blocking=False):
            blocks()
            self._state_lock.acquire()
        try:
            return self._state
        finally:
            self._unlock()

    def set_state(self, requested: int) -> Outcome:
        """Carry out a request for a state, as far as it goes."""
        self._state_lock.acquire()
        try:
            if self._controls:
                return self._hand_over_locked(requested)
            arcs = path(self.capabilities, self._state, requested)
            if arcs is None:
                return Outcome(self._state, errno.EINVAL, None)
            opened: Migf | None = None
            for arc in arcs:
                failure = self._take_arc_locked(arc)
                if failure:
                    return Outcome(self._state, failure, None)
                opened = self._migf if arc.opens else None
            return Outcome(self._state, 0, opened)
        finally:
            self._unlock()

    def state_size(self) -> int:
        """Ask the device for its ``stop_copy_length``; its errno is the caller's."""
        self._state_lock.acquire()
        try:
            size = self.ask_locked("state_size", self.device.state_size)
        finally:
            self._unlock()
        return max(0, min(size or 0, (1 << 64) - 1))

    def while_in_precopy(self, question: Callable[[], T]) -> T:
        """Answer ``question`` under the state lock; EINVAL outside the pre-copy states."""
        self._state_lock.acquire()
        try:
            if self._state not in PRE_COPY_GROUP:
                raise OSError(errno.EINVAL, f"the device is in {self._state.name}")
            return question()
        finally:
            self._unlock()

    def ask_locked(self, hook: str, call: Callable[[], T]) -> T | None:
        """Run a hook that only informs; the errno of its failure is raised."""
        answer, failure = self._call(hook, call)
        if failure:
            raise OSError(failure, f"{hook}()")
        return answer

    def reset(self) -> int:
        """Reset the device, or have whoever is busy with it do that; return an errno or 0."""
        if not self._state_lock.acquire(blocking=False):
            with self._notes_lock:
                self._reset_noted = True
                free = self._state_lock.acquire(blocking=False)
            if free:
                self._unlock()
            return 0
        try:
            return self._reset_locked()
        finally:
            self._unlock()

    def first_open(self) -> int:
        """Begin a device's life with a user: it runs from here on. Return an errno or 0."""
        self._state_lock.acquire()
        try:
            _, failure = self._call("start", self.device.start)
            return failure
        finally:
            self._unlock()

    def last_close(self) -> None:
        """Forget what belonged to the last user: the next open finds RUNNING.

        A device that was left in any other state is reset, the only way out of every state.
        A device without a user does not run.
        """
        self._state_lock.acquire()
        try:
            self._end_session_locked()
            self._join_sessions_locked()
            level = RUN_LEVEL.get(self._state)
            if self._state is not State.RUNNING:
                self._call("reset", self.device.reset)
            if level != "stop":
                self._call("stop", self.device.stop)
            self._state = State.RUNNING
            self.precopy_v2 = False
        finally:
            self._unlock()

    def fail(self) -> None:
        """Note that the device cannot go on: ERROR, from where only a reset leads back."""
        with self._notes_lock:
            self._error_noted = True
            free = self._state_lock.acquire(blocking=False)
        if free:
            self._unlock()

    # Arcs.

    def _take_arc_locked(self, arc: Arc) -> int:
        """Take one arc; return its errno. The state changes only if it succeeds, or to ERROR."""
        started = time.monotonic()
        moved = self._migf.moved if self._migf is not None else 0
        failure = self._step_locked(arc)
        if not failure:
            self._state = arc.target
        event = ArcEvent(self.name, arc, time.monotonic() - started, failure, moved)
        for observer in self.observers:
            observer(event)
        return failure

    def _step_locked(self, arc: Arc) -> int:
        _, failure = self._call("step", lambda: self.device.step(arc.origin, arc.target))
        if failure:
            return failure
        if arc.closes is SessionKind.RESUMING:
            assert isinstance(self._migf, ResumingMigf)
            _, failure = self._call("load", self._migf.verdict)
            if failure:
                return failure
        leaves, enters = RUN_LEVEL[arc.origin], RUN_LEVEL[arc.target]
        if leaves != enters:
            _, failure = self._call(enters, getattr(self.device, enters))
            if failure:
                return failure
        if arc.closes:
            self._end_session_locked()
        failure = self._prepare_session_locked(arc)
        if failure and leaves != enters and self._state is not State.ERROR:
            # The device has left its run level already: put it back, or it is in no state at all.
            _, stuck = self._call(leaves, getattr(self.device, leaves))
            if stuck:
                self._enter_error_locked()
        return failure

    def _prepare_session_locked(self, arc: Arc) -> int:
        """Open the session of an arc, or move it on to STOP_COPY."""
        device = self.device
        if arc.opens is SessionKind.RESUMING:
            self._open_locked(ResumingMigf(self.name, device.load, self.fail))
        elif arc.opens is SessionKind.SAVING:
            early = arc.target in PRE_COPY_GROUP
            source, failure = self._call("save", device.precopy if early else device.save)
            if failure or source is None:
                return failure or errno.EIO
            self._open_locked(SavingMigf(self.name, source, self.fail, precopy=early))
        elif arc.target is State.STOP_COPY:
            assert isinstance(self._migf, SavingMigf)
            rest, failure = self._call("save", device.save)
            if failure or rest is None:
                return failure or errno.EIO
            self._migf.stop_copy(rest)
        return 0

    def _hand_over_locked(self, requested: int) -> Outcome:
        """Let a device do the whole request itself, and draw the consequences."""
        answer, failure = self._call(
            "migration_set_state", lambda: self.device.migration_set_state(requested)
        )
        if failure or answer is None:
            return Outcome(self._state, failure or errno.EIO, None)
        final, failure, body = answer
        reached = State.ERROR if final is None else State(final)
        if session_kind(reached) is not session_kind(self._state):
            self._end_session_locked()
        self._state = reached
        if failure or body is None:
            return Outcome(None if final is None else reached, failure, None)
        if reached != requested or session_kind(reached) is None:
            log.error("%s: a session before its state is reached: dropped", self.name)
            return Outcome(None if final is None else reached, errno.EINVAL, None)
        return Outcome(reached, 0, self._open_body_locked(reached, body))

    def _open_body_locked(self, reached: State, body: SessionBody) -> Migf:
        self._end_session_locked()
        if callable(body):
            return self._open_locked(ResumingMigf(self.name, body, self.fail))
        early = reached in PRE_COPY_GROUP
        return self._open_locked(SavingMigf(self.name, body, self.fail, precopy=early))

    # Sessions, ERROR and reset.

    def _open_locked(self, migf: Migf) -> Migf:
        self._join_sessions_locked()
        self._migf = migf
        return migf

    def _end_session_locked(self) -> None:
        if self._migf is not None:
            self._migf.end()
            self._over.append(self._migf)
            self._migf = None

    def _join_sessions_locked(self) -> None:
        for migf in self._over:
            migf.join()
        self._over.clear()

    def _enter_error_locked(self) -> None:
        self._end_session_locked()
        self._state = State.ERROR

    def _reset_locked(self) -> int:
        """Do a reset: sessions die, the device is as after power-on and running."""
        self._end_session_locked()
        self._join_sessions_locked()
        _, failure = self._call("reset", self.device.reset)
        if not failure and RUN_LEVEL.get(self._state) != "start":
            _, failure = self._call("start", self.device.start)
        if not failure:
            self._state = State.RUNNING
        elif session_kind(self._state) is not None:
            self._enter_error_locked()  # its session is gone, so it cannot stay
        return failure

    def _unlock(self) -> None:
        """Let go of the state, after carrying out what others left for whoever holds it."""
        while True:
            with self._notes_lock:
                failed, self._error_noted = self._error_noted, False
                reset, self._reset_noted = self._reset_noted, False
                if not failed and not reset:
                    self._state_lock.release()
                    return
            if failed:
                self._enter_error_locked()
            if reset and self._reset_locked():
                self._enter_error_locked()  # the caller of RESET has been told that it worked

    def _data_ready(self) -> None:
        migf = self._migf
        if isinstance(migf, SavingMigf):
            migf.data_ready()

    def _call(self, hook: str, call: Callable[[], T]) -> tuple[T | None, int]:
        """Run a hook under the state lock; return its answer and 0, or its errno."""
        try:
            return call(), 0
        except DeviceError as refusal:
            log.debug("%s: %s() refused: %s", self.name, hook, refusal)
            failure, fatal = refusal.errno or errno.EIO, refusal.fatal
        except Exception:
            log.exception("%s: %s() raised; the device goes to ERROR", self.name, hook)
            failure, fatal = errno.EIO, True
        if fatal:
            self._enter_error_locked()
        return None, failure
