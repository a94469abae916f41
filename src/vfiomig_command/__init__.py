"""The command ``vfiomig``: what takes care of Ctrl-C before anything else is imported.

Importing the package and what its command line needs takes a tenth of a second. An interrupt in
it would show a traceback, and the interpreter goes on after one that comes in a callback of the
import system. There is nothing to tidy up yet, so the process ends at once, with the exit code of
every other interrupt. What the interpreter shows of one that comes before it gets here is its own.
"""

from __future__ import annotations

import os
import sys

_INTERRUPTED = 130
try:
    import signal  # which imports others in its turn
except KeyboardInterrupt:
    os._exit(_INTERRUPTED)

__all__ = ("main",)

_USAGE_ERROR = 2


def main() -> int:
    """Run the command line with the arguments of this process and return its exit code."""
    interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interrupts:  # and not ignored, as in the background of a shell
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    try:
        from vfiomig.cli.app import main as command_line
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "vfiomig":
            raise
        print(
            f"vfiomig: the command line needs {missing}, which is not installed: "
            "pip install 'vfiomig[cli]', or make setup in a checkout",
            file=sys.stderr,
        )
        return _USAGE_ERROR
    try:
        if interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return command_line(sys.argv[1:])
    except KeyboardInterrupt:
        return _INTERRUPTED
