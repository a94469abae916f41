"""The checks of ``vfiomig check`` for other people's tests.

::

    from vfiomig.testing import check_device, device_maker

    def test_my_device_keeps_the_protocol():
        check_device(device_maker(MyDevice()))

A maker is a function that opens the same device anew and returns its ``DeviceClient``:
``device_maker`` makes one for a device in this process, ``target_maker`` for a TARGET such as
/dev/vfio/devices/vfio0, and a function of one's own does as well. With pytest,
``pytest --vfiomig-target TARGET`` runs every check as a test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiomig.checks import DEADLINE, Check, Levers, Report, Result, Subject, Suite, Verdict, choose
from vfiomig.checks.stream import STATE_LIMIT
from vfiomig.client import Maker, device_maker, target_maker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = (
    "Check",
    "Levers",
    "Maker",
    "Report",
    "Result",
    "Subject",
    "Verdict",
    "check_device",
    "device_maker",
    "evidence_of",
    "target_maker",
)


def check_device(
    maker: Maker,
    *,
    only: Iterable[str] = (),
    skip: Iterable[str] = (),
    levers: Levers = Levers(),  # noqa: B008 - immutable
    dangerous: bool = False,
    deadline: float = DEADLINE,
    state_limit: int = STATE_LIMIT,
    hear: Callable[[Check | Result], None] = lambda _: None,
) -> Report:
    """Run the checks on a device; what it holds is lost.

    Raises:
        AssertionError: a check failed; the message has the evidence of each. Or the device was
            lost on the way.
        TargetError: the device cannot be opened.
        KeyboardInterrupt: the user interrupted it; the device was left in RUNNING.
    """
    checks = choose(tuple(only), tuple(skip))
    with Suite(
        maker, levers=levers, dangerous=dangerous, deadline=deadline, state_limit=state_limit
    ) as suite:
        report = suite.run(checks, hear)
    if report.interrupted:
        raise KeyboardInterrupt
    if report.failed:
        found = "\n\n".join(map(evidence_of, report.failed))
        raise AssertionError(f"{report.target} does not keep the protocol:\n\n{found}")
    if report.lost:
        raise AssertionError(f"{report.target} was lost: {report.lost}")
    return report


def evidence_of(result: Result) -> str:
    """Tell a result with its evidence, in a few lines."""
    return "\n".join(
        (
            f"{result.verdict}: {result.check.id}",
            f"  {result.check.sentence}",
            f"  clause: {result.check.clause}",
            f"  did: {result.did}",
            f"  expected: {result.expected}",
            f"  saw: {result.saw}",
        )
    )
