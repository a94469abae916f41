"""The verbs of ``vfiomig``, their exit codes, and what a failure looks like.

Theory of operation
-------------------
A verb is a row of ``VERBS``. Its module is imported when the verb is used or asked for help, so
``vfiomig --help`` costs the same however many verbs there are. A verb is a function with typed
keyword arguments, described by its docstring; it returns its exit code, ``None`` for 0.

Exit codes: 0 done, 1 the answer is no, 2 usage or a target or machine that will not do, 70 a bug
of ours, 128 + n for signal n. A verb may return others (``run`` passes on the program's).
An error is one line on stderr. ``VFIOMIG_DEBUG=1`` shows the traceback and every log record.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cyclopts import App, CycloptsError

from vfiomig.errors import PrerequisiteError, SpecError, TargetError, VfioMigError
from vfiomig.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    #: What else its user has to know, line by line.
    notes: tuple[str, ...] = ()


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
            "The device must be nobody else's meanwhile. It is used in every way that the",
            "protocol has, and left in RUNNING; what it holds is lost.",
            "",
            "Exit codes:",
            "  0    no check failed",
            "  1    at least one did",
            "  2    usage, or the device cannot be reached, or is lost on the way",
            "  130  Ctrl-C; what was found until then is told and written all the same",
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


def application(verbs: Sequence[Verb] = VERBS) -> App:
    """Build the command line from its table."""
    app = App(
        name="vfiomig",
        help="VFIO live migration without the hardware.",
        help_epilogue="vfiomig VERB --help shows a verb's options with examples.",
        help_format="plaintext",
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
            help=verb.summary,
            help_epilogue=_epilogue(verb),
        )
    app.register_install_completion_command(
        help="Install completion for bash, zsh or fish and load it in the shell's start file."
    )
    return app


def _epilogue(verb: Verb) -> str:
    examples = "\n  ".join(("Examples:", *verb.examples))
    return "\n".join((examples, "", *verb.notes)) if verb.notes else examples


def main(arguments: Sequence[str], verbs: Sequence[Verb] = VERBS) -> int:
    """Run one command line and return its exit code; failures become one line on stderr."""
    debug = os.environ.get("VFIOMIG_DEBUG") == "1"
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(name)s: %(message)s"
    )
    try:
        result: object = application(verbs)(arguments)
        # A reader that went away is noticed here, not by the interpreter after its last line.
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:  # the edge of the program: nothing above it could say more
        if debug:
            raise
        return _report(error)
    return result if isinstance(result, int) else _DONE


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
            return f"{error} (see {place} --help)", _USAGE
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
