"""Any sequence of requests, failing hooks, reads, writes, resets and closes, against a model.

The model is the matrix of the state machine and, for each arc, the hooks that it calls; the
program under test is driven in either dialect, with any capability set.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from in_process import V6, Program, Scripted, refusal
from vfiomig.abi.ioctls import Dialect
from vfiomig.fsm import (
    LEGAL_SETS,
    PRE_COPY_GROUP,
    SAVING_GROUP,
    Arc,
    Capability,
    SessionKind,
    State,
    matrix,
    next_state,
    session_kind,
)

HOOKS = ["start", "stop", "quiesce", "step", "save", "precopy", "loaded", "reset"]
#: Beside those that core alone may say in V6.
ERRNOS = [errno.EIO, errno.EBUSY, errno.EINVAL, errno.ENODEV, errno.ENOSPC, errno.ETIMEDOUT, 1]
QUIESCED = {State.RUNNING_P2P, State.PRE_COPY_P2P}


def level(state: State) -> str:
    if state in QUIESCED:
        return "quiesce"
    return "start" if state in {State.RUNNING, State.PRE_COPY} else "stop"


@dataclass
class Model:
    """What the device and its session have to be."""

    caps: Capability
    fails: dict[str, tuple[int, bool]] = field(default_factory=dict)
    state: State = State.RUNNING
    load_failure: tuple[int, bool] | None = None

    def request(self, requested: int) -> int:
        """Walk the matrix one arc at a time; return the errno."""
        table = matrix(self.caps)
        if requested not in table[self.state] or table[self.state][State(requested)] is None:
            return errno.EINVAL
        while self.state != requested:
            step = next_state(self.caps, self.state, requested)
            assert step is not None
            failure = self.arc(self.state, step)
            if failure:
                return failure
            self.state = step
        return 0

    def arc(self, origin: State, target: State) -> int:
        arc = Arc(origin, target)
        for hook in self.hooks(arc):
            failure = self.hook(hook)
            if not failure:
                continue
            moved = hook in {"save", "precopy"} and level(origin) != level(target)
            if moved and self.state is not State.ERROR and self.hook(level(origin)):
                self.state = State.ERROR
            return failure
        return 0

    def hooks(self, arc: Arc) -> list[str]:
        hooks = ["step"]
        if arc.origin is State.RESUMING:
            hooks.append("loaded")
        if level(arc.origin) != level(arc.target):
            hooks.append(level(arc.target))
        if arc.target is State.STOP_COPY:
            hooks.append("save")
        elif arc.target in PRE_COPY_GROUP and arc.origin not in SAVING_GROUP:
            hooks.append("precopy")
        return hooks

    def hook(self, name: str) -> int:
        """Call a hook; return its errno."""
        number, fatal = self.fails.get(name, (0, False))
        if name == "loaded":
            self.load_failure = self.load_failure or ((number, fatal) if number else None)
            number, fatal = self.load_failure or (0, False)
        if fatal:
            self.state = State.ERROR
        return number

    def reset(self) -> int:
        before = self.state
        failure = self.hook("reset")
        if failure:
            if session_kind(before) is not None:
                self.state = State.ERROR
        elif before is State.ERROR or level(before) != "start":
            failure = self.hook("start")
            if failure:
                self.state = State.ERROR
        if not failure:
            self.state = State.RUNNING
        return failure


class CoreMachine(RuleBasedStateMachine):
    @initialize(caps=st.sampled_from(LEGAL_SETS), dialect=st.sampled_from(Dialect))
    def open(self, caps: Capability, dialect: Dialect) -> None:
        self.device = Scripted(caps, early=[b"early", b"", b"more"])
        self.program = Program(self.device, dialect)
        self.model = Model(Capability.STOP_COPY if dialect is V6 else caps)
        self.fd = -1  # of the current session

    def teardown(self) -> None:
        if hasattr(self, "program"):
            self.program.close()

    @rule(requested=st.sampled_from([*map(int, State), 8, 255, 1 << 31, (1 << 32) - 1]))
    def set_state(self, requested: int) -> None:
        before = self.model.state
        wanted = self.model.request(requested)
        reply = self.program.set_state(requested)
        told = self.model.state if self.program.dialect is V6 else requested
        assert (reply.errno, reply.state) == (wanted, told)
        opened = not wanted and before != self.model.state and self.opens(before)
        assert (reply.fd != -1) is opened
        self.follow(before, reply.fd)

    def opens(self, before: State) -> bool:
        kind = session_kind(self.model.state)
        return kind is not None and kind is not session_kind(before)

    def follow(self, before: State, fd: int) -> None:
        """Note what became of the session."""
        if fd != -1:
            self.fd = fd
            self.model.load_failure = None
        elif session_kind(self.model.state) is not session_kind(before):
            self.fd = -1

    @rule(
        hook=st.sampled_from(HOOKS),
        number=st.sampled_from(ERRNOS),
        fatal=st.sampled_from([0, 0, 1]),
    )
    def let_a_hook_fail(self, hook: str, number: int, fatal: int) -> None:
        self.device.fails[hook] = refusal(number, fatal=bool(fatal))
        self.model.fails[hook] = (number, bool(fatal))

    @rule()
    @precondition(lambda self: self.model.fails)
    def let_hooks_work(self) -> None:
        self.device.fails.clear()
        self.model.fails.clear()

    @rule()
    def reset(self) -> None:
        wanted = self.model.reset()
        assert self.program.reset() == wanted
        self.fd = -1

    @rule(fatal=st.booleans())
    @precondition(lambda self: self.model.state is not State.ERROR)
    def ask_for_the_size(self, *, fatal: bool) -> None:
        if self.program.dialect is V6:
            return
        payload = self.program.feature(0x10009, bytes(8))
        assert payload == (0, len(self.device.data).to_bytes(8, "little"))

    @rule()
    def close_and_reopen(self) -> None:
        self.program.close()
        self.let_hooks_work()
        self.program.reopen()
        self.model.state = State.RUNNING
        self.fd = -1

    @rule(size=st.integers(0, 12))
    @precondition(lambda self: self.fd != -1)
    def use_the_session(self, size: int) -> None:
        if self.program.caller.table[self.fd].kind is SessionKind.RESUMING:
            failed = self.model.load_failure is not None
            assert self.program.write(self.fd, bytes(size)) == (-errno.ENODEV if failed else size)
            return
        result = self.program.read(self.fd, size)
        if isinstance(result, int):
            assert result == -errno.ENOMSG
            assert self.model.state in PRE_COPY_GROUP

    @invariant()
    def the_state_is_the_models(self) -> None:
        if hasattr(self, "program"):
            assert self.program.state() is self.model.state

    @invariant()
    def only_the_current_session_is_alive(self) -> None:
        if not hasattr(self, "program"):
            return
        table = self.program.caller.table
        alive = [fd for fd, migf in table.items() if not migf.dead]
        failed = self.model.load_failure is not None
        assert alive == ([] if self.fd == -1 or failed else [self.fd])
        assert (self.fd != -1) is (session_kind(self.model.state) is not None)
        for fd in table.keys() - {self.fd}:
            saving = table[fd].kind is SessionKind.SAVING
            result = self.program.read(fd, 1) if saving else self.program.write(fd, b"x")
            assert result == -errno.ENODEV


def test_core_does_what_the_matrix_says_whatever_fails() -> None:
    run_state_machine_as_test(
        CoreMachine,
        settings=settings(max_examples=120, stateful_step_count=40),
    )
