"""Every request for a state from every state: a check for each pair, computed from the arcs.

What has to come of a request (its errno, the state afterwards, whether a descriptor came, whether
the session from before goes on) follows from the path of arcs between the two, for the set of
capabilities that the device has. In RESUMING the device has been given its own state where it is
to be left.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Final

from vfiomig.checks.check import Chapter
from vfiomig.checks.dangers import BLOCKED_PAIR, STALE_WRITE
from vfiomig.checks.evidence import Inapplicable, errno_text, state_text
from vfiomig.client.transport import NO_FD
from vfiomig.fsm import (
    ARCS,
    PRE_COPY_GROUP,
    Capability,
    SessionKind,
    State,
    path,
    required,
    session_kind,
)

if TYPE_CHECKING:
    from vfiomig.checks.check import Columns
    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER", "OUT_OF_RANGE")

CHAPTER = Chapter(
    "states",
    "Every request for a state from every state, and for numbers that are none.",
    {"section": "enum vfio_device_mig_state"},
)

#: Numbers that are no state: the count of states, one more, and the largest.
OUT_OF_RANGE: Final = (8, 9, 0xFFFF_FFFF)
LACKING: Final = "On a device that lacks the target it is EINVAL."

#: Arcs of devices that lack states between; all others are those of the full set, in their order.
SHORTER: Final = {
    (State.RUNNING, State.STOP): "ARC-16",
    (State.STOP, State.RUNNING): "ARC-17",
    (State.PRE_COPY, State.STOP_COPY): "ARC-18",
}
RULES: Final = SHORTER | {
    (arc.origin, arc.target): f"ARC-{number}" for number, arc in enumerate(ARCS, 1)
}


def rule_of(origin: State, target: State) -> str:
    """The rule that says what comes of a pair."""
    if origin is State.ERROR:
        return "ERROR-3"
    if target is State.ERROR:
        return "ERROR-1"
    if origin is State.STOP_COPY and target in PRE_COPY_GROUP:
        return "PATH-4"
    return "NEXT-6" if origin is target else RULES.get((origin, target), "PATH-1")


def rules_of(origin: State, target: State) -> list[str]:
    """All that a pair rests on: what comes of it, and for which devices."""
    rules = [rule_of(origin, target)]
    if (origin, target) in SHORTER:
        rules.append("PATH-1")  # where the states between are there
    if (origin, target) == (State.PRE_COPY, State.STOP_COPY):
        rules.append("PATH-3")
    if _needs(target) & ~_needs(origin) and not rules[0].startswith("ERROR"):
        rules.append("CAP-3")
    return rules


def check_pair(origin: State, target: State, subject: Subject) -> None:
    """Bring a device to ``origin``, ask for ``target``, and compare everything that follows."""
    if origin is not State.ERROR and origin not in subject.states:
        raise Inapplicable(f"the device has no state {origin.name}")
    arcs = path(subject.caps, origin, target)
    old = subject.loaded() if origin is State.RESUMING and arcs else subject.enter(origin)
    reply = subject.request(target)
    new = subject.given(reply)
    lives = None if old == NO_FD else _session_lives(subject, origin, old)
    subject.cell = _cell(subject, reply.errno, new, lives)
    expect_errno(subject, origin, target, reply.errno, refused=arcs is None)
    if reply.errno:
        subject.expect_state(origin)
        closed = False
    else:
        assert arcs is not None
        subject.expect_state(target)
        opens = any(arc.opens for arc in arcs)
        subject.evidence.expect_that(
            f"a data_fd with {target.name}",
            (new != NO_FD) is opens,
            _came(opens),
            _came(new != NO_FD),
        )
        closed = any(arc.closes for arc in arcs)
    if lives is not None:
        subject.evidence.expect_that(
            f"the session of {origin.name}", lives is not closed, _life(not closed), _life(lives)
        )


def expect_errno(
    subject: Subject, origin: State, target: State, got: int, *, refused: bool
) -> None:
    what = f"{origin.name} -> {target.name}"
    if not refused:
        subject.evidence.expect_errno(what, got, 0)
        return
    known = {}
    if origin is State.ERROR:
        known[errno.EIO] = "ERROR-3"
        if subject.is_v6 and target is State.ERROR:
            known[0] = "SET-V6-14"
    subject.evidence.expect_errno(what, got, errno.EINVAL, known=known)


def check_out_of_range(origin: State, subject: Subject) -> None:
    """Ask for numbers that are no state; none of them changes anything."""
    if origin is not State.ERROR and origin not in subject.states:
        raise Inapplicable(f"the device has no state {origin.name}")
    old = subject.enter(origin)
    known = {errno.EIO: "ERROR-3"} if origin is State.ERROR else None
    cells = []
    for target in OUT_OF_RANGE:
        reply = subject.request(target)
        cells.append(errno_text(reply.errno))
        subject.cell = " ".join(dict.fromkeys(cells))
        what = f"{origin.name} -> {state_text(target)}"
        subject.evidence.expect_errno(what, reply.errno, errno.EINVAL, known=known)
        subject.expect_state(origin)
    if old != NO_FD and (lives := _session_lives(subject, origin, old)) is not None:
        subject.cell += " =" if lives else " x"
        what = f"the session of {origin.name}"
        subject.evidence.expect_that(what, lives, _life(True), _life(lives))


def _session_lives(subject: Subject, origin: State, data_fd: int) -> bool | None:
    """Tell whether a session is alive; ``None`` where it is not safe to try."""
    if origin is State.RESUMING and not subject.may(STALE_WRITE):
        return None
    subject.evidence.step(f"try the data_fd of {origin.name}")
    return subject.lives(data_fd)


def _cell(subject: Subject, result: int, new: int, lives: bool | None) -> str:
    marks = [errno_text(result) if result else "ok"]
    if new != NO_FD:
        # The wrong direction moves no byte.
        reads = subject.raw.read(new, bytearray(1)) != -errno.EBADF
        marks.append("+r" if reads else "+w")
    if lives is not None:
        marks.append("=" if lives else "x")
    return " ".join(marks)


def _came(comes: bool) -> str:
    return "a new one" if comes else "none"


def _life(lives: bool) -> str:
    return "alive" if lives else "over (ENODEV)"


def _needs(state: State) -> Capability:
    """The capabilities without which a device has no such state."""
    return Capability(0) if state is State.ERROR else required(state)


def _sentence(origin: State, target: State) -> str:
    arcs = path(Capability(7), origin, target)
    if arcs is None:
        return f"A request for {target.name} in {origin.name} is refused with EINVAL."
    if origin is target:
        return f"A request for {target.name} in {origin.name} succeeds and has no effect."
    marks = ""
    if any(arc.opens for arc in arcs):
        kind = session_kind(target)
        marks = f", with a data_fd to {'read' if kind is SessionKind.SAVING else 'write'}"
    return f"{origin.name} leads to {target.name}{marks}."


def _declare() -> None:
    for origin in State:
        for target in State:
            blocked = rule_of(origin, target) == "PATH-4"
            row: Columns = {"needs": _needs(origin), "pair": (origin, target)}
            if blocked:
                row["danger"] = BLOCKED_PAIR
            rules = rules_of(origin, target)
            CHAPTER.add(
                f"{origin.name}-to-{target.name}".lower(),
                _sentence(origin, target),
                rules,
                partial(check_pair, origin, target),
                "" if blocked or "CAP-3" not in rules else LACKING,
                **row,
            )
        CHAPTER.add(
            f"{origin.name}-to-none".lower(),
            f"A request for a number that is no state, in {origin.name}, is refused with EINVAL.",
            ("NEXT-5", "SET-LANDED-12"),
            partial(check_out_of_range, origin),
            f"The numbers are {', '.join(map(hex, OUT_OF_RANGE))}, compared unsigned.",
            needs=_needs(origin),
            pair=(origin, OUT_OF_RANGE[0]),
        )


_declare()
