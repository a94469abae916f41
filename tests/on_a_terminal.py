"""A command on a terminal of its own, as a person has it, and who is left when it has ended."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("Terminal", "nobody_is_left_in")

PATIENCE = 60.0


class Terminal:
    """A pty of 80 columns whose session is led by a command; what comes out of it is kept."""

    def __init__(self, command: Sequence[str], *, stdout: int | None = None) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        # A terminal becomes that of a new session when it is opened in it.
        script = 'exec "$@" <>"$0"'
        self.process = subprocess.Popen(
            ["sh", "-c", script, os.ttyname(slave), *command],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env=os.environ | {"TERM": "xterm"},
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def read_until(self, pattern: str) -> None:
        """Read until ``pattern`` is there, or everything is closed."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.text):
            ready, _, _ = select.select([self.master], [], [], deadline - time.monotonic())
            assert ready, f"{pattern} did not come; so far: {self.text}"
            try:
                self.text += os.read(self.master, 1 << 16).decode(errors="replace")
            except OSError:  # EIO: nobody has the other side any more
                return

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        self.read_until(r"(?!)")
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        os.close(self.master)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def nobody_is_left_in(session: int) -> bool:
    """Whether every process of a session has ended, in a moment at most."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(session_of(Path("/proc", name)) == session for name in os.listdir("/proc")):
            return True
        time.sleep(0.01)
    return False


def session_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except (OSError, IndexError):
        return -1
