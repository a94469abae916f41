"""``vfiomig serve``: a device behind a vfio-user socket."""

from __future__ import annotations

import os
import signal
import socket as sockets
import stat
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path  # noqa: TC003 - cyclopts reads the annotation at run time
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from vfiomig.cli.signals import handled_by
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.doors.tracing import open_trace
from vfiomig.doors.vfio_user import Server
from vfiomig.doors.vfio_user.compat import BEHAVIOURS, KERNEL
from vfiomig.doors.vfio_user.trace import Trace
from vfiomig.errors import SpecError
from vfiomig.models import make

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

__all__ = ("serve",)


def serve(
    spec: str,
    /,
    *,
    socket: Path | None = None,
    fd: int | None = None,
    once: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    compat: Literal["libvfio-user"] | None = None,
    trace: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,
    trace_format: Literal["text", "json"] = "text",
) -> int:
    """Serve a device over vfio-user.

    Clients are served one after the other, each of them finds the device in RUNNING, and who comes
    meanwhile waits. Ctrl-C or SIGTERM ends it, and removes the socket.

    Parameters
    ----------
    spec:
        The device: NAME[,key=value...] or path.py:Class[,key=value...]; ``vfiomig devices`` lists
        names and keys.
    socket:
        Where the socket is to be. One that a server left behind is replaced, any other is not.
    fd:
        A socket that was handed over: it listens, or is connected to the one client.
    once:
        End when the first client has left.
    compat:
        Behave in the manner of that library; docs/vfio-user.md names the differences.
    trace:
        Write a line for every request to this file; - is stderr.
    trace_format:
        Lines for people, or JSON lines.
    """
    if (socket is None) == (fd is None):
        wrong = "name a socket" if socket is None else "give --socket or --fd, not both"
        raise SpecError(f"{wrong}: vfiomig serve pattern --socket /tmp/vfio-user.sock")
    device = VfioDevice(make(spec))
    behaviour = BEHAVIOURS[compat] if compat else KERNEL
    given = None if fd is None else _inherited(fd)
    with ExitStack() as stack:
        tracer = None
        if trace is not None:
            out = sys.stderr if str(trace) == "-" else stack.enter_context(open_trace(trace))
            tracer = Trace(out, as_json=trace_format == "json")
        stack.enter_context(_ended_by_sigterm())
        server = stack.enter_context(
            Server(device, socket, sock=given, once=once, behaviour=behaviour, trace=tracer)
        )
        print(f"serving {spec} on {socket or f'descriptor {fd}'}", file=sys.stderr, flush=True)
        server.wait()
    return 0


def _inherited(number: int) -> sockets.socket:
    """Take over a socket that the caller's parent opened.

    Raises:
        SpecError: it is not open, or is none that vfio-user can be spoken over.
    """
    try:
        mode = os.fstat(number).st_mode
    except (OSError, OverflowError):
        raise SpecError(f"--fd {number}: it is not open") from None
    if stat.S_ISSOCK(mode):
        given = sockets.socket(fileno=number)
        if (given.family, given.type) == (sockets.AF_UNIX, sockets.SOCK_STREAM):
            given.set_inheritable(False)
            return given
        given.detach()  # it stays whose it is
    raise SpecError(f"--fd {number}: it is no Unix stream socket")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block in order, as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise SystemExit(128 + number)

    with handled_by(end, (signal.SIGTERM,)):
        yield
