"""The migration state of one device, and the only place that changes it.

Theory of operation
-------------------
One lock, ``_state_lock``, is held while arcs are taken; ``fsm.path`` says which. An arc that
fails ends the request where it is: nothing is rolled back, the caller is told the state reached.

Reset and hook failures can come from any thread, also while the lock is held for a long arc or
from inside a session's own code. They leave a note and go on; whoever holds the lock carries the
note out before letting go of it (*deferred reset*). A request that races with a reset may
therefore succeed, with a descriptor, and find the device in RUNNING and the descriptor dead. The
lock is never held while a caller's memory is touched, nor while a session's code is waited for,
but for the verdict of ``load``.

A failure in a session's code is the device's only as long as that session is the current one:
what comes from the code of an older one, which may hang and fail much later, is merely logged.

Contracts: ``enum vfio_device_mig_state`` in include/uapi/linux/vfio.h; docs/protocol.md, "reset".
"""

from __future__ import annotations

import errno
import logging
import operator
import threading
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vfiomig.core.resuming import ResumingMigf
from vfiomig.core.saving import SavingMigf
from vfiomig.core.transfer import as_errno
from vfiomig.device import Device, PrecopyInfo, SessionBody
from vfiomig.errors import DeviceError
from vfiomig.fsm import PRE_COPY_GROUP, Arc, Capability, SessionKind, State, path, session_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.core.transfer import Migf

__all__ = ("ArcEvent", "Migration", "Outcome", "as_u64")

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
    """One arc that was taken or failed, on the way to the state that was ``requested``.

    ``nbytes`` is what its session had moved so far.
    """

    device: str
    requested: State
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


def as_u64(number: int) -> int:
    """Fit an estimate into the 64 bits that carry it."""
    return max(0, min(operator.index(number), (1 << 64) - 1))


def _estimate(answer: PrecopyInfo | tuple[int, int] | None) -> PrecopyInfo | None:
    if answer is None:
        return None
    initial_bytes, dirty_bytes, reinit = PrecopyInfo(*answer)
    return PrecopyInfo(as_u64(initial_bytes), as_u64(dirty_bytes), bool(reinit))


def _answer(
    answer: tuple[State | None, int, SessionBody | None],
) -> tuple[State | None, int, SessionBody | None]:
    """Check what a device with whole control says; a ``ValueError`` is its bug."""
    final, failure, body = answer
    return None if final is None else State(final), failure and as_errno(failure), body


def _tell(hear: Callable[[], None] | None) -> None:
    if hear is not None:
        hear()


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
        # Weakly: a device with gigabytes of state must go when its last user forgets it, not
        # when the garbage collector finds a cycle.
        told = weakref.WeakMethod(self._data_ready)
        device._on_data_ready = lambda: _tell(told())

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
                failure = self._take_arc_locked(arc, State(requested))
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
            size, failure = self._call("state_size", lambda: as_u64(self.device.state_size()))
        finally:
            self._unlock()
        if size is None:
            raise OSError(failure, "state_size()")
        return size

    def precopy_info(self, migf: Migf) -> PrecopyInfo | None:
        """Ask the device what it will yet yield; ``None`` if it leaves that to a look.

        Raises:
            OSError: EINVAL outside the pre-copy states, ENODEV if ``migf`` is not the current
                session any more, or the device's errno.
        """
        self._state_lock.acquire()
        try:
            if self._state not in PRE_COPY_GROUP:
                raise OSError(errno.EINVAL, f"the device is in {self._state.name}")
            if migf.dead:
                raise OSError(errno.ENODEV, "the session is over")
            estimate, failure = self._call(
                "precopy_info", lambda: _estimate(self.device.precopy_info())
            )
        finally:
            self._unlock()
        if failure:
            raise OSError(failure, "precopy_info()")
        return estimate

    def beside(self, hook: str, call: Callable[[], T]) -> T:
        """Run a hook that belongs to no arc, such as a region's, without the state lock."""
        try:
            return call()
        except DeviceError as refusal:
            if refusal.fatal:
                self.fail()
            raise OSError(as_errno(refusal.errno or 0), f"{hook}: {refusal}") from refusal
        except Exception as bug:
            log.exception("%s: %s raised; the device goes to ERROR", self.name, hook)
            self.fail()
            raise OSError(errno.EIO, f"{hook} has a bug") from bug

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
            if self._state is State.ERROR:
                self._call("reset", self.device.reset)  # nobody has it, so nobody else could
            self._state = State.RUNNING
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
            self._forget_failures()
        finally:
            self._unlock()

    def fail(self, migf: Migf | None = None) -> None:
        """Note that the device cannot go on: ERROR, from where only a reset leads back.

        ``migf`` is the session whose code failed, if it was one's.
        """
        with self._notes_lock:
            if migf is not None and migf is not self._migf:
                return
            self._error_noted = True
            free = self._state_lock.acquire(blocking=False)
        if free:
            self._unlock()

    # Arcs.

    def _take_arc_locked(self, arc: Arc, requested: State) -> int:
        """Take one arc; return its errno. The state changes only if it succeeds, or to ERROR."""
        started = time.monotonic()
        moved = self._migf.moved if self._migf is not None else 0
        failure = self._step_locked(arc)
        if not failure:
            self._state = arc.target
        event = ArcEvent(self.name, requested, arc, time.monotonic() - started, failure, moved)
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
            hook, produce = ("precopy", device.precopy) if early else ("save", device.save)
            source, failure = self._call(hook, lambda: iter(produce()))
            if source is None:
                return failure
            self._open_locked(SavingMigf(self.name, source, self.fail, precopy=early))
        elif arc.target is State.STOP_COPY:
            assert isinstance(self._migf, SavingMigf)
            rest, failure = self._call("save", lambda: iter(device.save()))
            if rest is None:
                return failure
            self._migf.stop_copy(rest)
        return 0

    def _hand_over_locked(self, requested: int) -> Outcome:
        """Let a device do the whole request itself, and draw the consequences."""
        answer, failure = self._call(
            "migration_set_state", lambda: _answer(self.device.migration_set_state(requested))
        )
        if answer is None:
            return Outcome(self._state, failure, None)
        final, failure, body = answer
        reached = State.ERROR if final is None else final
        self._follow_locked(reached)
        if failure or body is None:
            return Outcome(final, failure, None)
        if reached != requested or session_kind(reached) is None:
            log.error("%s: a session before its state is reached: dropped", self.name)
            return Outcome(final, errno.EINVAL, None)
        migf, failure = self._call(
            "migration_set_state", lambda: self._open_body_locked(reached, body)
        )
        return Outcome(self._state, failure, migf)

    def _follow_locked(self, reached: State) -> None:
        """Do to the session what follows from the state that a device went to by itself."""
        if session_kind(reached) is not session_kind(self._state):
            self._end_session_locked()
        elif reached is State.STOP_COPY and self._state in PRE_COPY_GROUP:
            assert isinstance(self._migf, SavingMigf | None)
            if self._migf is not None:
                self._migf.stop_copy(None)
        self._state = reached

    def _open_body_locked(self, reached: State, body: SessionBody) -> Migf:
        self._end_session_locked()
        if reached is State.RESUMING:
            if not callable(body):
                raise TypeError(f"RESUMING wants what loads, not {body!r}")
            return self._open_locked(ResumingMigf(self.name, body, self.fail))
        if callable(body):
            raise TypeError(f"{reached.name} wants the bytes to send, not {body!r}")
        early = reached in PRE_COPY_GROUP
        return self._open_locked(SavingMigf(self.name, iter(body), self.fail, precopy=early))

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
        self._forget_failures()
        _, failure = self._call("reset", self.device.reset)
        if failure:
            if session_kind(self._state) is not None:
                self._enter_error_locked()  # its session is gone, so it cannot stay
            return failure
        if RUN_LEVEL.get(self._state) != "start":
            _, failure = self._call("start", self.device.start)
        if failure:
            self._enter_error_locked()  # blank and not running is none of the states
        else:
            self._state = State.RUNNING
        return failure

    def _forget_failures(self) -> None:
        """Drop the note of a failure that came before a reset: that is what the reset mended."""
        with self._notes_lock:
            self._error_noted = False

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
            failure, fatal = as_errno(refusal.errno or 0), refusal.fatal
        except Exception:
            log.exception("%s: %s() raised; the device goes to ERROR", self.name, hook)
            failure, fatal = errno.EIO, True
        if fatal:
            self._enter_error_locked()
        return None, failure
