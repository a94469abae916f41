"""``vfiomig serve`` in a process of its own."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vfiomig.descriptors import poll_until

if TYPE_CHECKING:
    from typing import Self

__all__ = ("Serving",)

PATIENCE_S = 20.0
SOURCE = Path(__file__).parent.parent / "src"


class Serving:
    """A server, as a context; at its end it has said nothing but that it serves."""

    def __init__(self, spec: str, path: Path) -> None:
        self.path = path
        self._ready = f"serving {spec} on {path}\n"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vfiomig", "serve", spec, "--socket", str(path)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._said = b""

    def __enter__(self) -> Self:
        """Wait until it takes clients."""
        deadline = time.monotonic() + PATIENCE_S
        assert self._process.stderr is not None
        descriptor = self._process.stderr.fileno()
        while not self._said.endswith(b"\n"):
            if not poll_until(descriptor, select.POLLIN, deadline):
                self._process.kill()
                break
            piece = os.read(descriptor, 4096)
            if not piece:
                break
            self._said += piece
        if self._said != self._ready.encode():
            self._end()
            raise AssertionError(f"the server says: {self._said.decode()}")
        return self

    def __exit__(self, kind: object, *failure: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        code = self._end()
        if kind is None:
            assert (code, self._said.decode()) == (128 + signal.SIGTERM, self._ready)

    def _end(self) -> int:
        _, said = self._process.communicate(timeout=PATIENCE_S)
        self._said += said
        return self._process.returncode

    @property
    def pid(self) -> int:
        return self._process.pid

    def pause(self) -> None:
        """Let it do nothing from here on."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def mapped(self, name: str) -> int:
        """Return how many bytes of files called ``name`` it has mapped."""
        maps = Path(f"/proc/{self.pid}/maps").read_text()
        found = re.findall(rf"^(\w+)-(\w+) .*{re.escape(name)}", maps, re.MULTILINE)
        return sum(int(end, 16) - int(start, 16) for start, end in found)
