"""``vfiomig serve`` in a process of its own, and a guest whose devices are served so."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfiomig.descriptors import poll_until
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.vfio import vfio_user_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from guest_parts import GuestParts

__all__ = ("PATIENT", "Serving", "serving_all", "vfio_user_guest")

#: QEMU waits this long for a reply. A busy machine is no reason to fail.
PATIENT: dict[str, Any] = {"x_msg_timeout": 30_000}
PATIENCE_S = 20.0
SOURCE = Path(__file__).parent.parent / "src"


class Serving:
    """A server, as a context; at its end it has said nothing but that it serves."""

    def __init__(self, spec: str, path: Path, *options: str) -> None:
        self.path = path
        self._ready = f"serving {spec} on {path}\n"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vfiomig", "serve", spec, "--socket", str(path), *options],
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
        if kind is None and (code != 128 + signal.SIGTERM or self._said != self._ready.encode()):
            raise AssertionError(f"the server ended with {code} and said: {self._said.decode()}")

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


@contextmanager
def serving_all(specs: Sequence[str], folder: Path) -> Iterator[list[Serving]]:
    """Serve each of ``specs`` at a socket in ``folder``."""
    with ExitStack() as stack:
        servings = [Serving(spec, folder / f"v{at}") for at, spec in enumerate(specs)]
        yield [stack.enter_context(serving) for serving in servings]


@contextmanager
def vfio_user_guest(
    parts: GuestParts, servings: Sequence[Serving], *, shared_memory: bool = True
) -> Iterator[Guest]:
    """Boot Linux with the devices that ``servings`` have."""
    words = vfio_user_words([serving.path for serving in servings], **PATIENT)
    machine = replace(parts.machine(*words), shared_memory=shared_memory)
    with Guest(parts.qemu, machine) as guest:
        guest.wait_ready()
        yield guest
