"""The device under a check: requests that are noted, and the state to begin and end in.

Theory of operation
-------------------
Every method makes raw requests and notes them as steps. Some only prepare: ``go`` and what is
built on it raise ``Unrun`` when the device does not do what they need, since that is the subject
of another check. So one broken rule fails the checks about it, and not everything behind it.

``begin`` brings the device to RUNNING, by a reset, which is the way out of every state; a device
that cannot be reset is asked. ``end`` closes the descriptors that came up and leaves the device
in RUNNING for whoever is next.
"""

from __future__ import annotations

import errno
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

from vfiomig.abi.ioctls import Dialect
from vfiomig.checks.beside import Beside
from vfiomig.checks.evidence import (
    Evidence,
    Gone,
    Inapplicable,
    Unrun,
    errno_text,
    state_text,
    transfer_text,
)
from vfiomig.checks.facts import no_descriptor_left
from vfiomig.checks.stream import CHUNK, StateTooLong, Stream, first_difference, flaw
from vfiomig.client.transport import NO_FD
from vfiomig.fsm import Capability, SessionKind, State, session_kind, states_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfiomig.checks.check import Levers
    from vfiomig.checks.dangers import Danger
    from vfiomig.checks.facts import Facts
    from vfiomig.checks.raw import Raw, Reply
    from vfiomig.checks.target import Target
    from vfiomig.client import DeviceClient

__all__ = ("Subject",)

R = TypeVar("R")

#: How often a race is tried: each time may end in either order.
ROUNDS = 12
#: How long a thread is waited for that has seen as well that the time is up.
LAST_SECONDS = 0.2
#: The step of a query.
ASK = "ask for the state"
WITHOUT_ERROR = "no request brings a device to ERROR, and it refused a foreign state without"
#: Bytes that are no device's state.
FOREIGN = bytes(range(256)) * 16


class Subject:
    """One target while one check runs on it."""

    def __init__(
        self,
        target: Target,
        facts: Facts,
        levers: Levers,
        *,
        deadline: float,
        state_limit: int,
        dangerous: bool = False,
    ) -> None:
        self._target = target
        #: Whether it was given up: who still runs it has nothing to do with the device any more.
        self.given_up = False
        self.facts = facts
        self.levers = levers
        self.evidence = Evidence()
        #: When the check has to be over, of ``time.monotonic``.
        self.deadline = deadline
        self._state_limit = state_limit
        self._dangerous = dangerous
        self._after = "the state"
        #: What the state matrix shows of the check.
        self.cell = ""
        self._data_fds: dict[int, SessionKind | None] = {}
        #: With that by which each makes its requests.
        self._beside: list[tuple[Beside[object], Raw]] = []

    # What is where.

    @property
    def target(self) -> Target:
        """What is checked; ``Gone`` for a check that was given up, whatever it hangs in."""
        if self.given_up:
            raise Gone("it was closed meanwhile")
        return self._target

    @property
    def client(self) -> DeviceClient:
        return self.target.client

    @property
    def raw(self) -> Raw:
        return self.target.raw

    @property
    def is_v6(self) -> bool:
        return self.facts.dialect is Dialect.V6

    @property
    def states(self) -> tuple[State, ...]:
        """The states that the device has."""
        return states_of(self.caps)

    @property
    def caps(self) -> Capability:
        """The capability set whose arcs hold; V6 has the arcs of the smallest."""
        return Capability.STOP_COPY if self.is_v6 else self.facts.capabilities

    @property
    def session_states(self) -> tuple[State, ...]:
        """Those in which a session is open."""
        return tuple(state for state in self.states if session_kind(state) is not None)

    def may(self, danger: Danger) -> bool:
        """Tell whether something dangerous may be done."""
        return self._dangerous or not danger.threatens(self.facts)

    # States.

    def request(self, target: int) -> Reply:
        """Ask for a state and note what came."""
        step = self.evidence.step(f"SET {state_text(target)}")
        reply = self.raw.set_state(target)
        data_fd = self.adopt(reply, target)
        came = "" if data_fd == NO_FD else f", data_fd {data_fd}"
        self.evidence.outcome(step, errno_text(reply.errno) + came)
        return reply

    def adopt(self, reply: Reply, target: int) -> int:
        """Note the data_fd that came with an answer, to be closed with the check; return it."""
        data_fd = self.given(reply)
        if data_fd != NO_FD:
            known = 0 <= target < len(State)
            self._data_fds[data_fd] = session_kind(State(target)) if known else None
        return data_fd

    def given(self, reply: Reply) -> int:
        """Return the data_fd that came with an answer, ``NO_FD`` if none did."""
        is_new = not reply.errno and reply.data_fd >= 0 and reply.data_fd not in self.target.taken
        return reply.data_fd if is_new else NO_FD

    def expect_given(self, reply: Reply) -> int:
        """Return the data_fd that came with an answer; ``Broken`` if none did."""
        data_fd = self.given(reply)
        self.evidence.expect_that(
            "data_fd", data_fd != NO_FD, "a new descriptor", str(reply.data_fd)
        )
        return data_fd

    def go(self, *states: State) -> int:
        """Bring the device from state to state; return the descriptor that the last one gave."""
        data_fd = NO_FD
        for state in states:
            reply = self.request(state)
            if reply.errno:
                raise Unrun(f"the device did not get to {state.name}: {errno_text(reply.errno)}")
            data_fd = self.given(reply)
        return data_fd

    def session(self, *states: State) -> int:
        """Bring the device to a state with a session; return its descriptor."""
        data_fd = self.go(*states)
        if data_fd == NO_FD:
            raise Unrun(f"no data_fd came with {states[-1].name}")
        return data_fd

    def enter(self, state: State) -> int:
        """Bring the device from RUNNING to a state; in RESUMING nothing is written.

        Return the descriptor of the session that is open there, ``NO_FD`` if none is.
        """
        if state is State.ERROR:
            self.enter_error()
            return NO_FD
        if session_kind(state) is not None:
            return self.session(state)
        self.go(state)
        return NO_FD

    def enter_error(self) -> None:
        """Bring the device to ERROR by the author's lever, or with a state that it refuses."""
        if self.target.keeps_out_of_error:
            raise Inapplicable(WITHOUT_ERROR)
        step = self.evidence.step("bring the device to ERROR")
        if self.levers.enter_error is not None:
            self.levers.enter_error(self)
        else:
            data_fd = self.session(State.RESUMING)
            self.raw.write(data_fd, FOREIGN)
            self.raw.set_state(State.STOP)
        state = self.state()
        self.evidence.outcome(step, state_text(state))
        if state != State.ERROR:
            self.target.keeps_out_of_error = True
            raise Inapplicable(WITHOUT_ERROR)

    def state(self) -> int:
        """Ask where the device is; ``Broken`` if it does not tell."""
        reply = self.raw.get_state()
        if reply.errno:
            self.evidence.expect_errno("the query of the state", reply.errno, 0)
        return reply.device_state

    def expect_state(self, *wanted: int, known: dict[int, str] | None = None) -> None:
        """Ask where the device is, and compare; it is told after what that is."""
        first, *others = wanted
        last = self.evidence.last_step.partition(" -> ")[0]
        if last != ASK:
            self._after = f"the state (after {last})"
        self.evidence.step(ASK)
        self.evidence.expect_state(self._after, self.state(), first, *others, known=known)

    @property
    def mended(self) -> list[str]:
        """What an open or a reset did not do by itself, and the client did for it."""
        return list(self.client.mended)

    def reset(self) -> int:
        step = self.evidence.step("RESET")
        result = self.raw.reset()
        self.evidence.outcome(step, errno_text(result))
        return result

    # Sessions.

    def read(self, data_fd: int, size: int) -> tuple[int, bytes]:
        """Read once; return the count, or a negative errno, and the bytes."""
        buffer = bytearray(size)
        step = self.evidence.step(f"read {size}")
        count = self.raw.read(data_fd, buffer)
        self.evidence.outcome(step, transfer_text(count))
        return count, bytes(buffer[: max(count, 0)])

    def write(self, data_fd: int, data: bytes | memoryview) -> int:
        step = self.evidence.step(f"write {len(data)}")
        count = self.raw.write(data_fd, data)
        self.evidence.outcome(step, transfer_text(count))
        return count

    def read_on(self, data_fd: int, into: Stream, size: int = CHUNK) -> int:
        """Read until nothing comes; return the last result: 0, or a negative errno."""
        step = self.evidence.step("read to the end")
        before = into.size
        try:
            while (count := into.take(lambda room: self.raw.read(data_fd, room[:size]))) > 0:
                self.need_time()
        except StateTooLong as trouble:
            raise Unrun(f"{trouble}: raise the limit (--state-limit)") from None
        self.evidence.outcome(step, f"{into.size - before} bytes, then {transfer_text(count)}")
        return count

    def new_stream(self, *, kept: bool = True) -> Stream:
        return Stream(self._state_limit, kept=kept)

    def drain(self, data_fd: int) -> memoryview:
        """Read a saving session to its permanent end."""
        if self.target.too_long:
            raise Unrun(self.target.too_long)  # it takes its time to find that out
        stream = self.new_stream()
        try:
            last = self.read_on(data_fd, stream)
        except Unrun as trouble:
            if stream.size > self._state_limit:
                self.target.too_long = str(trouble)
            raise
        if last:
            raise Unrun(f"the state cannot be read: {errno_text(-last)}")
        return stream.view()

    def saved(self) -> memoryview:
        """The device's own state, saved once in the life of its target; it is stopped by that."""
        if self.target.saved is None:
            step = self.evidence.step("save the device's own state")
            data_fd = self.session(State.STOP_COPY)
            state = self.drain(data_fd)
            self.target.keep(state)
            self.evidence.outcome(step, f"{len(state)} bytes")
            self.go(State.STOP)
            return state
        return self.target.saved

    def some_state(self) -> memoryview:
        """The device's own state, which is not empty."""
        state = self.saved()
        if not state:
            raise Inapplicable("the device's state is empty")
        return state

    def write_all(self, data_fd: int, *parts: bytes | memoryview) -> int:
        """Write everything; return 0, or the errno that came instead."""
        step = self.evidence.step(f"write all {sum(map(len, parts))}")
        before = 0
        for part in parts:
            view, done = memoryview(part), 0
            while done < len(view):
                self.need_time()
                count = self.raw.write(data_fd, view[done : done + CHUNK])
                if count <= 0:
                    self.evidence.outcome(step, f"{transfer_text(count)} at {before + done}")
                    return -count or errno.EIO
                done += count
            before += done
        return 0

    def stopped_state(self) -> memoryview:
        """Save the device in STOP, where nothing changes it, and leave it there."""
        self.go(State.STOP)
        state = self.drain(self.session(State.STOP_COPY))
        self.go(State.STOP)
        if not state:
            raise Inapplicable("the device's state is empty")
        return state

    def read_some(self, data_fd: int, state: memoryview, most: int = 32) -> bytes:
        """Read a little of ``state``, and not all of it if that can be avoided."""
        return self.read(data_fd, max(1, min(most, len(state) // 2)))[1]

    def expect_start_of(self, state: memoryview, what: str, *pieces: bytes) -> None:
        """Compare what reads brought with the start of ``stopped_state``; see ``flaw``."""
        found = flaw(state, pieces)
        if found:
            self.need_saves_alike()
        wanted = f"{sum(map(len, pieces))} bytes as saved before"
        self.evidence.expect_that(what, not found, wanted, found or wanted)

    def need_saves_alike(self) -> None:
        """Raise ``Inapplicable`` on a device that puts something of the moment into its stream."""
        self.stopped_state()  # whatever is left of an earlier session
        first, second = self.stopped_state(), self.stopped_state()
        if first_difference(first, second) is not None:
            raise Inapplicable("two saves of the stopped device differ")

    def loaded(self) -> int:
        """Bring the device to RESUMING and give it its own state; return the descriptor."""
        state = self.saved()
        data_fd = self.session(State.RESUMING)
        if failure := self.write_all(data_fd, state):
            raise Unrun(f"the device does not take its own state: {errno_text(failure)}")
        return data_fd

    def expect_taken(self, state: memoryview, what: str = "its own state") -> None:
        """Load a state that is the device's own; ``Broken`` if it is not taken."""
        failure = self.write_all(self.session(State.RESUMING), state)
        self.evidence.expect_errno(f"writes of {what}", failure, 0)
        left = self.request(State.STOP).errno
        self.evidence.expect_errno(f"RESUMING -> STOP with {what}", left, 0)

    def lives(self, data_fd: int) -> bool:
        """Tell whether a session is alive; a byte may move, and nothing else is done with it."""
        if self._data_fds.get(data_fd) is SessionKind.RESUMING:
            result = self.raw.write(data_fd, b"\0")
        else:
            result = self.raw.read(data_fd, bytearray(1))
        return result != -errno.ENODEV

    def close_fd(self, data_fd: int) -> None:
        self.evidence.step(f"close data_fd {data_fd}")
        self._data_fds.pop(data_fd, None)
        self.raw.close(data_fd)

    def close_all(self) -> None:
        """Close every descriptor that came."""
        for data_fd in tuple(self._data_fds):
            self.raw.close(data_fd)
        self._data_fds.clear()

    @contextmanager
    def without_descriptors(self) -> Iterator[None]:
        """Let every new descriptor fail with EMFILE while the block runs."""
        self.evidence.step("leave no free descriptor")
        with ExitStack() as stack:
            try:
                stack.enter_context(no_descriptor_left(self.raw.transport))
            except (OSError, ValueError) as refusal:
                raise Unrun(f"the limit on descriptors cannot be set: {refusal}") from None
            yield

    def precopy_end(self, data_fd: int, into: Stream) -> int:
        """Read a pre-copy session to its temporary end; return how it was told.

        A device whose state changes faster than it is read has none.
        """
        try:
            return self.read_on(data_fd, into)
        except Unrun:
            raise Inapplicable("more pre-copy data comes as fast as it is read") from None

    # Two at a time.

    def read_on_beside(self, data_fd: int) -> Beside[int]:
        """Read on and on in a thread until that fails; it returns the result that is no count.

        When this returns the thread is at the end of the state, or has read much of it, or sleeps
        in a read.
        """
        self.evidence.step("read on and on in a thread")
        raw = self.raw  # of this open, also when it is closed meanwhile
        total, is_there = 0, threading.Event()

        def read_on() -> int:
            nonlocal total
            buffer = bytearray(4096)
            while (count := raw.read(data_fd, buffer)) >= 0:
                total += count
                if not count or total > CHUNK:
                    is_there.set()
                self.check_deadline()
            return count

        reader = self.beside(read_on)
        reader.under_way(is_there)
        return reader

    def rounds(self) -> Iterator[None]:
        """Try a race again and again, less often on a device that takes its time."""
        enough = self.left / 2
        for _ in range(ROUNDS):
            yield
            if self.left < enough:
                return

    def beside(self, call: Callable[[], R]) -> Beside[R]:
        """Run ``call`` in a thread; it is over when the check is."""
        started = Beside(call, self)
        self._beside.append((started, self.raw))  # type: ignore[arg-type]  # whatever it returns
        return started

    @property
    def left(self) -> float:
        """Seconds until the check has to be over."""
        return self.deadline - time.monotonic()

    def check_deadline(self) -> None:
        if self.left <= 0:
            self.evidence.still_under_way(self.evidence.last_step)

    def need_time(self) -> None:
        """Raise ``Unrun`` when the time is up while bytes move, at a pace that is no rule's."""
        if self.left <= 0:
            raise Unrun("bytes still come and go when its time is up: give it more (--deadline)")

    # The two ends of a check.

    def begin(self) -> None:
        """Bring the device to RUNNING, as new; ``Stuck`` if nothing does that."""
        self.target.bring_to_running()

    def end(self) -> None:
        """Close what is open, and leave the device in RUNNING if that can be done."""
        if self.target.is_open:
            self.close_all()
            if self.facts.capabilities:
                self.target.leave_running()
        for thread, raw in self._beside:
            if not thread.wait(at_least=LAST_SECONDS):
                self.target.part_with(raw)

    def reopen(self) -> None:
        """Close the device and open it again; ``Broken`` if it cannot be opened."""
        step = self.evidence.step("close the device and open it again")
        try:
            self.target.reopen()
        except Unrun as reason:
            self.evidence.outcome(step, str(reason))
            self.evidence.expect_that("opening it again", False, "success", str(reason))

    def forget_descriptors(self) -> None:
        """After the device was closed: the numbers belong to nobody."""
        self._data_fds.clear()
