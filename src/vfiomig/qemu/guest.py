"""A QEMU process with a shell in it.

Theory of operation
-------------------
QEMU's monitor is a socket that it inherits, so there is nothing to connect to, and its end of
file says at once that QEMU does not start. The serial ports are files in a folder that goes away
with the guest, and soon after its owner if that is killed. The console, on the first one, is for reading when something went wrong.

On the second serial port a shell reads commands (guest-init.sh). Each command runs in a shell
of its own; a line with a number that the command cannot know tells where its output ends and
what its exit status was. After a live migration the same shell is at the destination's second port.

The process is in a session of its own and is killed as a group, with a launcher that it may
have in front of it. It also dies with the thread that started it.
"""

from __future__ import annotations

import os
import secrets
import select
import shlex
import signal
import socket
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vfiomig.errors import GuestEnded, GuestError, GuestTimeout, PrerequisiteError
from vfiomig.qemu.machine import arguments
from vfiomig.qemu.qmp import Qmp
from vfiomig.qemu.terminal import Terminal
from vfiomig.scratch import ScratchFolder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from vfiomig.qemu.machine import Machine

__all__ = ("Guest", "Outcome")

_END_TIMEOUT_S: Final = 10
#: Of what QEMU and the console said, in errors: enough for a panic with its trace.
_TAIL: Final = 6000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command in the guest wrote, its errors included, and its exit status."""

    status: int
    output: bytes


class Guest:
    """A machine that runs from the constructor to :meth:`close`."""

    def __init__(
        self,
        qemu: Path,
        machine: Machine,
        *,
        launcher: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start ``machine``, behind the words of a ``launcher`` if one is given.

        The launcher must pass on the descriptors that it inherits and QEMU's exit status.
        ``pass_fds`` are inherited too, under their numbers.
        """
        self._scratch = ScratchFolder("guest-")
        folder = self._scratch.path
        self._console = folder / "console"
        self._said = folder / "qemu"
        self._process: subprocess.Popen[bytes] | None = None
        monitor, monitor_there = socket.socketpair()
        #: QEMU's monitor.
        self.qmp = Qmp(monitor, ended=self._ended)
        #: The guest's second serial port, where its shell is.
        self.shell = Terminal(folder / "shell", folder / "commands", "the guest's shell")
        try:
            with monitor_there, self._said.open("wb") as said:
                words = arguments(machine, monitor=monitor_there.fileno(), folder=folder)
                self._process = _start(
                    [*launcher, str(qemu), *words],
                    said.fileno(),
                    (monitor_there.fileno(), *pass_fds),
                )
            self.shell.attach(self._process.pid)
            self.qmp.greet()
        except GuestEnded:
            failure = self._ended("QEMU does not start")
            self.close()
            raise failure from None
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process that was started: QEMU, or its launcher."""
        assert self._process is not None
        return self._process.pid

    @property
    def console(self) -> str:
        """What the console said so far."""
        return _text_of(self._console)

    @property
    def said(self) -> str:
        """What QEMU and its launcher said so far, on stdout and stderr."""
        return _text_of(self._said)

    def wait_ready(self, *, timeout: float = 60) -> None:
        """Wait until the guest's shell takes commands."""
        try:
            self.shell.expect(rb"vfiomig: ready\n", timeout=timeout)
        except GuestEnded:
            raise self._ended("the guest does not boot") from None
        except GuestTimeout:
            raise GuestTimeout(
                f"the guest has not booted after {timeout} s; its console: {self.console[-_TAIL:]}"
            ) from None

    def run(self, command: str, *, timeout: float = 30) -> Outcome:
        """Run ``command`` in a shell of its own and return what it wrote and its exit status."""
        end = f"vfiomig-{secrets.token_hex(8)}"
        words = f"sh -c {shlex.quote(command)} </dev/null 2>&1; echo {end} $?\n"
        try:
            self.shell.send(words.encode())
            output, found = self.shell.take(rb"%s (\d+)\n" % end.encode(), timeout=timeout)
        except GuestEnded:
            raise self._ended(f"the guest ended during {command!r}") from None
        except GuestTimeout:
            raise GuestTimeout(
                f"{command!r} took longer than {timeout} s; the console: {self.console[-_TAIL:]}"
            ) from None
        return Outcome(int(found[1]), output)

    def check(self, command: str, *, timeout: float = 30) -> str:
        """Run ``command`` and return what it wrote; an exit status other than 0 is an error."""
        outcome = self.run(command, timeout=timeout)
        text = outcome.output.decode(errors="replace")
        if outcome.status:
            raise GuestError(f"{command!r} in the guest ended with {outcome.status}: {text}")
        return text

    def power_off(self, status: int = 0) -> int:
        """End the guest's shell with ``status``, and return the one that comes out at the end.

        The way out of the guest carries 7 bits; a greater status becomes 127.
        """
        self.shell.send(f"exit {status}\n".encode())
        code = self.wait()
        # isa-debug-exit: the value that was written, twice, and one.
        if code < 0 or not code % 2:
            raise self._ended("the guest was to end with a status, and")
        return code >> 1

    def wait(self, *, timeout: float = 30) -> int:
        """Wait for QEMU's end and return its exit code, or the launcher's."""
        assert self._process is not None
        if self._process.returncode is None:
            if not _has_ended(self.pid, timeout):
                raise GuestTimeout(f"QEMU (process {self.pid}) still runs after {timeout} s")
            self.kill()
        return self._process.wait()

    def kill(self) -> None:
        """Kill QEMU and its launcher as a power failure would."""
        if self._signal_group(signal.SIGKILL):
            assert self._process is not None
            self._process.wait(_END_TIMEOUT_S)

    def close(self) -> None:
        """End QEMU, by asking first, and remove every trace; once more is harmless."""
        if self._signal_group(signal.SIGTERM):
            _has_ended(self.pid, _END_TIMEOUT_S)
        self.kill()
        self.qmp.close()
        self.shell.close()
        self._scratch.close()

    def _signal_group(self, number: signal.Signals) -> bool:
        """Signal everything that was started; False when that is over and waited for.

        Who was waited for may have given the number of its group to somebody else. So it is
        waited for last, after a signal to whatever it left in its group.
        """
        if self._process is None or self._process.returncode is not None:
            return False
        os.killpg(self._process.pid, number)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ended(self, what: str) -> GuestEnded:
        """Return the error for a QEMU that has gone, with all that it left to say."""
        try:
            code = f"exit code {self.wait(timeout=_END_TIMEOUT_S)}"
        except GuestTimeout:
            code = "it still runs"
        return GuestEnded(f"{what}: {code}\n{self.said[-_TAIL:]}{self.console[-_TAIL:]}".rstrip())


def _start(command: list[str], said: int, fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    # Arranged by a program, because Python code between fork and exec may meet a lock that
    # another thread of this process holds.
    dies_with_us = ["setpriv", "--pdeathsig", "KILL", "--"]
    try:
        return subprocess.Popen(
            [*dies_with_us, *command],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            pass_fds=fds,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise PrerequisiteError("setpriv is not installed: apt install util-linux") from None


def _has_ended(pid: int, timeout: float) -> bool:
    """Wait for the end of a child without taking its exit code."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    finally:
        os.close(pidfd)


def _text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
