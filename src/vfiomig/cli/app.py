"""The verbs of ``vfiomig``, their exit codes, and what a failure looks like.

Theory of operation
-------------------
A verb is a row of ``VERBS``. Its module is imported when the verb is used or asked for help, so
``vfiomig --help`` costs the same however many verbs there are. A verb is a function with typed
keyword arguments, described by its docstring; it returns its exit code, ``None`` for 0.

Exit codes: 0 done, 1 the answer is no, 2 usage or a target or machine that will not do, 70 a bug
of ours, 128 + n for signal n. A verb may return others (``run`` passes on the program's).
An error is one line on stderr. ``VFIOMIG_DEBUG=1`` shows the traceback and every log record.

Nothing is taken for granted about the standard streams: one that is closed is /dev/null, so that
no file of ours gets its number; a character that stdout cannot encode is a ``?``; and a reader who
goes away ends us as SIGPIPE would, also while rich prints, which would exit with 1, our "no".
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cyclopts import App, CycloptsError, MissingArgumentError, UnusedCliTokensError

from vfiomig.errors import PrerequisiteError, SpecError, TargetError, VfioMigError
from vfiomig.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ("VERBS", "Verb", "application", "main")

_DONE: Final = 0
_NO: Final = 1
_USAGE: Final = 2
_BUG: Final = 70


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb: its name, where its function is, and what ``--help`` says."""

    name: str
    target: str
    summary: str
    examples: tuple[str, ...]
    #: What it ends with, but for what every verb does.
    exits: tuple[str, ...] = ("0: done",)


RUN_EXITS: Final = (
    "the program's own: it ended by itself",
    "128 + n: signal n ended it",
    "125: the devices could not be served",
    "126, 127: the program cannot be executed, was not found",
)
#: What every verb may end with, where it says nothing else about the number.
COMMON_EXITS: Final = (
    "2: usage, or a target or a machine that will not do",
    "70: a bug of vfiomig",
    "128 + n: signal n",
)

VERBS: Final = (
    Verb(
        "demo",
        "vfiomig.cli.demo:demo",
        "Migrate virtual devices, and compare what arrived with what was there.",
        (
            "vfiomig demo",
            "vfiomig demo --size 1G --dirty 200M",
            "vfiomig demo --dialect v6 --json",
            "vfiomig demo --qemu",
        ),
        ("0: identical, or with --qemu verified", "1: not so, or it broke off"),
    ),
    Verb(
        "info",
        "vfiomig.cli.info:info",
        "Show what a device is and can do.",
        (
            "vfiomig info /dev/vfio/devices/vfio0",
            "vfiomig info model:virtio_blk,size=64M",
            "vfiomig info --fd 3 3<>/dev/vfio/devices/vfio0",
            "vfiomig info model:counter --dialect v6 --json",
        ),
    ),
    Verb(
        "check",
        "vfiomig.cli.check:check",
        "Check whether a device keeps the protocol.",
        (
            "vfiomig check /dev/vfio/devices/vfio0",
            "vfiomig check model:pattern,size=1M --html report.html",
            "vfiomig check model:counter --only sessions --only 'resuming.cut*' --json",
            "vfiomig check --fd 3 3<>/dev/vfio/devices/vfio0",
            "vfiomig check --explain states.stop-copy-to-pre-copy",
        ),
        (
            "0: no check failed",
            "1: at least one did",
            "2: usage, or the device cannot be reached, or is lost on the way",
            "130, 143: Ctrl-C or SIGTERM; what was found until then is told and written",
        ),
    ),
    Verb(
        "devices",
        "vfiomig.cli.devices:devices",
        "List the ready devices and their keys.",
        (
            "vfiomig devices",
            "vfiomig devices pattern",
            "vfiomig devices examples/template.py:Template --json",
        ),
    ),
    Verb(
        "run",
        "vfiomig.cli.run:run",
        "Run a program with VFIO devices written in Python.",
        (
            "vfiomig run --device pattern -- ls -l /dev/vfio/devices",
            "vfiomig run --device pattern,size=1G --device pattern,size=1G -- ./my-vmm",
            "vfiomig run --device counter --trace - -- ./my-client {dev0} {iommu}",
        ),
        RUN_EXITS,
    ),
    Verb(
        "qemu",
        "vfiomig.cli.qemu:qemu",
        "Run a QEMU with VFIO devices written in Python.",
        (
            "vfiomig qemu --device virtio_blk,path=disk.img --memory 1G",
            "vfiomig qemu --device mtty --device pattern --kernel vmlinuz --initrd initrd",
            "vfiomig qemu --device pattern --incoming unix:/tmp/link --print",
            "vfiomig qemu --device virtio_blk --accel kvm -- -device virtio-rng-pci",
        ),
        RUN_EXITS,
    ),
    Verb(
        "serve",
        "vfiomig.cli.serve:serve",
        "Serve a device over a vfio-user socket.",
        (
            "vfiomig serve pattern,size=1G --socket /tmp/vfio-user.sock",
            "vfiomig serve virtio_blk,size=64M --socket /tmp/disk.sock --once",
            "vfiomig serve counter --fd 3",
        ),
        ("0: the client of --once has left", "130, 143: Ctrl-C or SIGTERM ended it"),
    ),
    Verb(
        "draw",
        "vfiomig.cli.draw:draw",
        "Draw the state machine of a capability set.",
        (
            "vfiomig draw",
            "vfiomig draw --caps stop-copy+p2p --format mermaid",
            "vfiomig draw --json",
        ),
    ),
)


def application(verbs: Sequence[Verb] = VERBS, used: str = "") -> App:
    """Build the command line from its table.

    The verb that is ``used`` is described by its docstring, the others by a line, unimported.
    """
    app = App(
        name="vfiomig",
        help="VFIO live migration without the hardware.",
        help_epilogue="vfiomig VERB --help shows a verb's options with examples.",
        help_format="markdown",
        version=VERSION,
        # Errors, exit codes and Ctrl-C are decided in main(), for cyclopts' and ours alike.
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for verb in verbs:
        app.command(
            verb.target,
            name=verb.name,
            **({} if verb.name == used else {"help": verb.summary}),
            help_epilogue=_epilogue(verb),
        )
    app.register_install_completion_command(
        help="Install completion for bash, zsh or fish and load it in the shell's start file."
    )
    return app


def _epilogue(verb: Verb) -> str:
    said = {line.partition(":")[0] for line in verb.exits}
    common = (line for line in COMMON_EXITS if line.partition(":")[0] not in said)
    return "\n".join(
        ("Examples:", *_items(verb.examples), "", "Exit codes:", *_items((*verb.exits, *common)))
    )


def _items(lines: Iterable[str]) -> Iterator[str]:
    return (f"- {line}" for line in lines)


def main(arguments: Sequence[str], verbs: Sequence[Verb] = VERBS) -> int:
    """Run one command line and return its exit code; failures become one line on stderr."""
    debug = os.environ.get("VFIOMIG_DEBUG") == "1"
    _prepare_streams()
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(name)s: %(message)s"
    )
    try:
        result: object = application(verbs, *arguments[:1])(arguments)
        # A reader that went away is noticed here, not by the interpreter after its last line.
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # by rich, which has closed stdout
            return 128 + signal.SIGPIPE
        raise
    except Exception as error:  # the edge of the program: nothing above it could say more
        if debug:
            raise
        return _report(error)
    return result if isinstance(result, int) else _DONE


def _prepare_streams() -> None:
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)  # the lowest number that is free
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _report(error: Exception) -> int:
    """Say in one line what went wrong and return the exit code that goes with it."""
    if isinstance(error, BrokenPipeError) and not isinstance(error, VfioMigError):
        # Whatever else is written to stdout goes nowhere, so that the interpreter's own flush
        # at exit has nothing to complain about.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    message, code = _explain(error)
    print(f"vfiomig: {' '.join(message.split())}", file=sys.stderr)
    return code


def _explain(error: Exception) -> tuple[str, int]:
    match error:
        case CycloptsError():
            place = " ".join(("vfiomig", *(error.command_chain or ())))
            said = str(error)
            if isinstance(error, MissingArgumentError) and error.argument and not error.keyword:
                said = f"{error.argument.name} is missing"
            if isinstance(error, UnusedCliTokensError):
                said = f"too many arguments: {' '.join(error.unused_tokens or ())}"
            return f"{said} (see {place} --help)", _USAGE
        case SpecError() | TargetError() | PrerequisiteError():
            return _text(error), _USAGE
        case VfioMigError():
            return _text(error), _NO
        case OSError():
            return _text(error), _USAGE
        case _:
            bug = f"{type(error).__name__}: {error}"
            return f"this is a bug: {bug} (VFIOMIG_DEBUG=1 shows where; please report it)", _BUG


def _text(error: Exception) -> str:
    """Return the sentence of an error, an errno by its name and not by its number."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    name = errno.errorcode.get(error.errno, str(error.errno))
    about = f"{error.filename}: " if error.filename else ""
    said = f"{about}{error.strerror}"
    return said if name in said else f"{said} ({name})"
