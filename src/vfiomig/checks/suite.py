"""The runner: one check after the other on one target, none of which can hold up the next.

Theory of operation
-------------------
Each check runs in a thread of its own, with a deadline. One that is not over by then has failed,
with the step that it hangs in; its client is closed, which wakes whoever is blocked in a read, and
the next check gets a new one. A check during which the device goes away has failed too. If the
device does not come back at all, or nothing brings it to RUNNING any more, it is lost: every later
check says so instead of being run.

A server outside the kernel may keep RESUMING over a reset, and let nobody leave it who has not
loaded a whole state. So such a server's device is saved before the first check, while that can be
done, and its clients have the state at hand. No other device sees that.

A check ends with the device in RUNNING wherever that can be done: see ``subject``. So does a run
that its user interrupts, after which the report tells what was found until then.
"""

from __future__ import annotations

import errno
import logging
import resource
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vfiomig.checks.check import Levers
from vfiomig.checks.evidence import END_IN_TIME, Broken, Gone, Inapplicable, Stuck, Unrun, Verdict
from vfiomig.checks.stream import STATE_LIMIT
from vfiomig.checks.subject import Subject
from vfiomig.checks.target import Hung, Target, in_time
from vfiomig.errors import RequestError, SpecError, TargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from vfiomig.checks.check import Check
    from vfiomig.checks.facts import Facts
    from vfiomig.client import Maker

__all__ = ("DEADLINE", "Report", "Result", "Suite")

log = logging.getLogger("vfiomig.checks")

#: What a result says when a check itself, or a lever of the device, does not work.
BUG = "the check itself failed; please report it"
INTERRUPTED = "the run was interrupted"
#: Seconds that a check may take.
DEADLINE = 20.0


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a check, with its evidence."""

    check: Check
    verdict: Verdict
    did: str
    expected: str
    saw: str
    seconds: float = 0.0
    #: What the state matrix shows of it: "ok +r x".
    cell: str = ""


class Report(NamedTuple):
    """What came of all of them."""

    target: str
    facts: Facts
    results: Sequence[Result]
    #: Why later checks could not run; nothing if the device was there to the end.
    lost: str = ""
    #: Whether the user ended the run before its end.
    interrupted: bool = False

    @property
    def summary(self) -> dict[Verdict, int]:
        """How many there are of each verdict."""
        counts = Counter(result.verdict for result in self.results)
        return {verdict: counts[verdict] for verdict in Verdict}

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.verdict is Verdict.FAIL]


class Suite:
    """Checks a device. Use it in a ``with`` block."""

    def __init__(
        self,
        maker: Maker,
        target: str = "",
        *,
        levers: Levers = Levers(),  # noqa: B008 - immutable
        dangerous: bool = False,
        deadline: float = DEADLINE,
        state_limit: int = STATE_LIMIT,
    ) -> None:
        """``maker`` opens the device anew each time; ``target`` is what reports call it.

        Raises:
            SpecError: ``deadline`` is no time in which anything can be done.
            TargetError: it cannot be opened, or does not tell what it is.
        """
        if not 0 < deadline < threading.TIMEOUT_MAX:
            raise SpecError(f"a deadline of {deadline:g} s: give seconds, more than 0")
        self.dangerous = dangerous
        self._levers = levers
        self._deadline = deadline
        self._state_limit = state_limit
        self._target = Target(maker, deadline)
        self._descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
        #: Why no check can run any more.
        self.lost = ""
        self._tried_to_save = False
        #: Whether the user has interrupted a check.
        self.interrupted = False
        try:
            self.facts = self._target.open()
        except BaseException as problem:
            self._target.close()
            if isinstance(problem, Hung):
                late = (
                    f"{target} cannot be opened: no answer in {deadline:g} s; see the kernel's log"
                )
                raise TargetError(errno.ETIMEDOUT, late) from None
            if isinstance(problem, RequestError) and not isinstance(problem, TargetError):
                # It is there, and tells nothing: to whoever wants to check it, the same.
                raise TargetError(problem.errno or errno.EIO, str(problem.strerror)) from None
            raise
        self.name = target or self.facts.name

    def run(
        self, checks: Sequence[Check], hear: Callable[[Check | Result], None] = lambda _: None
    ) -> Report:
        """Run checks; ``hear`` is told each one that begins, and what came of it.

        Ctrl-C ends the run, and the report says of which checks it did so.
        """
        results: list[Result] = []
        try:
            for check in checks:
                hear(check)
                results.append(self.run_check(check))
                hear(results[-1])
                if self.interrupted:
                    break
        except KeyboardInterrupt:  # between two checks
            self.interrupted = True
        if self.interrupted:
            left = checks[len(results) :]
            results += [Result(check, Verdict.NOT_RUN, "", "", INTERRUPTED) for check in left]
        with suppress(KeyboardInterrupt):  # once more: it is let go of as it is
            self.leave_running()
        return Report(self.name, self.facts, results, self.lost, self.interrupted)

    def leave_running(self) -> None:
        """Leave the device in RUNNING, or say that it is not."""
        self._open_if_closed()
        if self.lost:
            log.warning("%s is left as it is: %s", self.name, self.lost)
        elif self.facts.capabilities:
            with suppress(Gone, Hung):
                if not in_time(self._target.leave_running, self._deadline):
                    log.warning("%s is not in RUNNING, and nothing brings it there", self.name)

    def run_check(self, check: Check) -> Result:
        """Run one check. After Ctrl-C it was not run, and ``interrupted`` is set."""
        reason = check.why_inapplicable(self.facts)
        if reason:
            return Result(check, Verdict.NOT_APPLICABLE, "", "", reason)
        self._open_if_closed()
        if not check.as_it_is:
            self._save_once()
        reason = self.lost or self._why_unrun(check)
        if reason:
            return Result(check, Verdict.NOT_RUN, "", "", reason)
        started = time.monotonic()
        subject = self._new_subject()
        verdict, expected, saw = self._judge(check, subject)
        seconds = time.monotonic() - started
        return Result(check, verdict, subject.evidence.did, expected, saw, seconds, subject.cell)

    def _new_subject(self) -> Subject:
        return Subject(
            self._target,
            self.facts,
            self._levers,
            deadline=time.monotonic() + self._deadline,
            state_limit=self._state_limit,
            dangerous=self.dangerous,
        )

    def _save_once(self) -> None:
        """Save the device of a server that may keep states; whether it can is a check's business."""
        may_matter = self.facts.may_keep_states and self.facts.capabilities
        if self.lost or self._tried_to_save or not may_matter:
            return
        self._tried_to_save = True
        subject = self._new_subject()
        try:
            in_time(lambda: _save(subject), self._deadline + 1)
        except (Hung, Gone, KeyboardInterrupt) as end:
            subject.given_up = True
            self._target.abandon()
            if isinstance(end, KeyboardInterrupt):
                raise
        except (Broken, Inapplicable, RequestError, Stuck, Unrun) as reason:
            log.warning("%s was not saved beforehand: %s", self.name, reason)
        self._open_if_closed()

    def _why_unrun(self, check: Check) -> str:
        danger = check.danger
        if danger is not None and danger.threatens(self.facts) and not self.dangerous:
            return f"{danger.what} ({danger.rule}): --dangerous runs it all the same"
        if check.lever and getattr(self._levers, check.lever) is None:
            return f"nothing here makes the device do it: see vfiomig.testing, {check.lever}"
        return ""

    def _judge(self, check: Check, subject: Subject) -> tuple[Verdict, str, str]:
        """Run a check in time; return its verdict, what it expected and what it saw."""
        evidence = subject.evidence
        try:
            in_time(lambda: _carry_out(check, subject), self._deadline + 1)
        except (Hung, Gone, KeyboardInterrupt) as end:
            return self._cut_short(subject, end)
        except Stuck as reason:
            self.lost = str(reason)
            return Verdict.NOT_RUN, "", self.lost
        except Broken:
            return Verdict.FAIL, *evidence.first_difference
        except Inapplicable as reason:
            return Verdict.NOT_APPLICABLE, "", str(reason)
        except Unrun as reason:
            return Verdict.NOT_RUN, "", str(reason)
        except RequestError as refusal:
            return Verdict.NOT_RUN, "", f"what it needs is refused: {refusal.strerror}"
        except Exception as bug:  # boundary: levers, and transports that are their author's
            log.exception("%s", check.id)
            return Verdict.NOT_RUN, "", f"{BUG}: {type(bug).__name__}: {bug}"
        if evidence.deviations:
            sides = zip(*evidence.deviations, strict=True)
            expected, saw = ("; ".join(dict.fromkeys(side)) for side in sides)
            return Verdict.DEVIATES, expected, saw
        return Verdict.PASS, evidence.expected, evidence.saw

    def _cut_short(self, subject: Subject, end: BaseException) -> tuple[Verdict, str, str]:
        """Close the device beside a check that may still use it, and judge that one."""
        step = subject.evidence.last_step
        subject.given_up = True
        resource.setrlimit(resource.RLIMIT_NOFILE, self._descriptors)  # it may hang without any
        self._target.abandon()
        if isinstance(end, Hung):
            return Verdict.FAIL, END_IN_TIME, f"still under way after {self._deadline:g} s: {step}"
        if isinstance(end, Gone):
            return Verdict.FAIL, "a device that answers", f"{end}; under way: {step}"
        self.interrupted = True
        return Verdict.NOT_RUN, "", f"{INTERRUPTED}; under way: {step}"

    def _open_if_closed(self) -> None:
        if self._target.is_open or self.lost:
            return
        try:
            self._target.reopen()
        except Unrun as reason:
            self.lost = f"an earlier check has lost the device: {reason}"

    def close(self) -> None:
        """Close the device."""
        self._target.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _carry_out(check: Check, subject: Subject) -> None:
    """Run the body of a check between the two ends that every check has."""
    if subject.facts.capabilities and not check.as_it_is:
        subject.begin()
    try:
        check.body(subject)
    finally:
        subject.end()


def _save(subject: Subject) -> None:
    """Save the device, and bring it back to RUNNING."""
    try:
        subject.begin()
        subject.saved()
    finally:
        subject.end()
