"""``vfiomig check``: whether a device keeps the protocol."""

from __future__ import annotations

import json as json_format
import logging
import signal
from contextlib import contextmanager
from pathlib import Path  # noqa: TC003 - cyclopts reads the annotation at run time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from vfiomig.abi.ioctls import Dialect  # noqa: TC001 - likewise
from vfiomig.checks import DEADLINE, Suite, choose, find
from vfiomig.checks.rules import rules
from vfiomig.cli.check_table import Progress, explain_check, explain_rule, list_checks, show
from vfiomig.cli.signals import ENDING, handled_by
from vfiomig.cli.targets import named
from vfiomig.client import target_maker
from vfiomig.errors import PrerequisiteError, SpecError
from vfiomig.models import parse_size
from vfiomig.report import as_data, as_junit, checks_as_data

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from vfiomig.checks import Check, Report

__all__ = ("check",)

FLAG = Parameter(negative=(), show_default=False)
UNSET = Parameter(show_default=False)
PATTERNS = Parameter(negative=(), show_default=False)


def check(
    target: Annotated[str, UNSET] = "",
    *,
    fd: int | None = None,
    only: Annotated[list[str] | None, PATTERNS] = None,
    skip: Annotated[list[str] | None, PATTERNS] = None,
    list: Annotated[bool, FLAG] = False,  # noqa: A002 - the option's name
    explain: Annotated[str, UNSET] = "",
    dangerous: Annotated[bool, FLAG] = False,
    dialect: Dialect | None = None,
    deadline: float = DEADLINE,
    state_limit: str = "256M",
    json: Annotated[bool, FLAG] = False,
    junit: Path | None = None,
    html: Path | None = None,
) -> int:
    """Check whether a device keeps the protocol.

    The device must be nobody else's meanwhile. It is used in every way that the protocol has, and
    left in RUNNING; what it holds is lost.

    Parameters
    ----------
    target:
        /dev/vfio/devices/vfioN, /dev/vfio/GROUP[:NAME], a PCI address, an mdev uuid, fd:N,
        vfio-user:PATH, or model:SPEC for a device of this program's own.
    fd:
        A descriptor of the device that this program was started with, instead of TARGET.
    only:
        Run these checks: an id, a chapter, or a pattern such as 'resuming.cut*'; may be repeated.
    skip:
        Leave these out.
    list:
        List the checks, and run none.
    explain:
        Tell about one check, or tell a rule such as LOAD-3, and run none.
    dangerous:
        Run what is known to hang or crash some kernels, too.
    dialect:
        Which form of the protocol a model is served in; other targets have their own.
    deadline:
        Seconds that each check may take.
    state_limit:
        Largest state that is kept to be loaded again; K, M, G are powers of 1024.
    json:
        Print one JSON document.
    junit:
        Write a report for build servers to this file.
    html:
        Write a report as one page to this file.
    """
    checks = choose(only or (), skip or ())
    if explain or list:
        _tell(explain, checks, json=json)
        return 0
    target = named("check", target, fd)
    writers = _writers({"--junit": junit, "--html": html})
    limit = _size(state_limit)
    with _interruptible() as came:
        report = _run(target, checks, dialect, deadline, limit, dangerous=dangerous)
    for path, render in writers:
        path.write_text(render(report), encoding="utf-8")
    if json:
        print(json_format.dumps(as_data(report), indent=2))
    else:
        show(report)
    return _exit_code(report, *came[:1])


def _tell(explain: str, checks: Sequence[Check], *, json: bool) -> None:
    """Tell about a check or a rule, about ``checks`` if none is named."""
    rule = rules().get(explain) if explain else None
    if explain and not rule:
        checks = [find(explain)]
    if json:
        data = {"id": explain, "rule": rule} if rule else checks_as_data(checks)
        print(json_format.dumps(data, indent=2))
    elif rule:
        explain_rule(explain)
    elif explain:
        explain_check(checks[0])
    else:
        list_checks(checks)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Let the signals of ``ENDING`` interrupt the block as Ctrl-C does; yield which of them came.

    Raises:
        SystemExit: it was interrupted before there was anything to tell.
    """
    came: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    ours = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    with handled_by(interrupt, ours):  # and no other: what is ignored stays ignored
        try:
            yield came
        except KeyboardInterrupt:
            raise SystemExit(128 + (came or [signal.SIGINT])[0]) from None


def _exit_code(report: Report, interrupt: int = signal.SIGINT) -> int:
    if report.interrupted:
        return 128 + interrupt
    if report.failed:
        return 1
    return 2 if report.lost else 0


def _run(
    target: str,
    checks: Sequence[Check],
    dialect: Dialect | None,
    deadline: float,
    state_limit: int,
    *,
    dangerous: bool,
) -> Report:
    maker = target_maker(target, dialect)
    with (
        Suite(
            maker, target, dangerous=dangerous, deadline=deadline, state_limit=state_limit
        ) as suite,
        Progress(checks) as progress,
        _unheard("vfiomig.client"),
    ):
        return suite.run(checks, progress.hear)


@contextmanager
def _unheard(name: str) -> Iterator[None]:
    """Keep warnings back that come with most checks, of what the client mends: reports tell it."""
    logger = logging.getLogger(name)
    former = logger.level
    if not logger.isEnabledFor(logging.INFO):  # and nobody wants to hear everything
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(former)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except SpecError as problem:
        raise SpecError(f"--state-limit: {problem}") from None


def _writers(files: dict[str, Path | None]) -> Sequence[tuple[Path, Callable[[Report], str]]]:
    """Find out before anything is run whether the reports can be written, and how."""
    found: Sequence[tuple[Path, Callable[[Report], str]]] = []
    for option, path in files.items():
        if path is None:
            continue
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise SpecError(f"{option} {path}: give the path of a file, in a folder that is there")
        found = [*found, (path, as_junit if option == "--junit" else _html())]
        if path.is_file() or not path.exists():
            with path.open("a", encoding="utf-8"):
                pass  # or a refusal would come when all is done, and take what was found along
    return found


def _html() -> Callable[[Report], str]:
    try:
        from vfiomig.report.html import as_html
    except ModuleNotFoundError as missing:
        raise PrerequisiteError(
            f"--html needs {missing.name}: pip install 'vfiomig[report]'"
        ) from None
    return as_html
