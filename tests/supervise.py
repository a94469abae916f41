"""Running a program under the filter in a test: compile, launch, serve, collect."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vfiomig.doors.syscall.filter import exact_filter
from vfiomig.doors.syscall.launch import launch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vfiomig.doors.syscall.notify import Listener, Notification
    from vfiomig.doors.syscall.program import Program

    Handler = Callable[[Listener, Notification], bool]

__all__ = ("Outcome", "Served", "carry_on", "compile_c", "run_served", "state_of")

PATIENCE = 20.0


def compile_c(source: str, folder: Path, name: str = "client") -> str:
    """Compile a C program; warnings are errors."""
    file = folder / f"{name}.c"
    file.write_text(source, encoding="utf-8")
    binary = folder / name
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-Werror", "-pthread", "-o", binary, file], check=True, timeout=60
    )
    return str(binary)


def state_of(pid: int) -> str:
    """The letter that the kernel has for the state of a process, or "gone"."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def carry_on(_listener: Listener, _call: Notification) -> bool:
    """Serve nothing."""
    return False


@dataclass
class Outcome:
    """How a program ended and what it wrote to its standard output."""

    code: int
    output: str


class Served:
    """A program whose calls go to ``handle``; what it does not serve, the kernel does."""

    def __init__(
        self,
        argv: Sequence[str],
        handle: Handler = carry_on,
        *,
        program: bytes | None = None,
        env: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
        keep_open: Sequence[int] = (),
        receivers: int = 1,
        poll_first: bool | None = None,
    ) -> None:
        self._handle = handle
        self._reader, writer = os.pipe()
        self.failure: BaseException | None = None

        def prepare_output() -> None:
            os.dup2(writer, 1)
            if prepare is not None:
                prepare()

        try:
            self.program: Program = launch(
                argv,
                dict(os.environ) if env is None else env,
                exact_filter() if program is None else program,
                prepare=prepare_output,
                keep_open=keep_open,
            )
        except BaseException:
            os.close(self._reader)
            raise
        finally:
            os.close(writer)
        self.listener = self.program.listener
        if poll_first is not None:
            self.listener._poll_first = poll_first
        self._receivers = [threading.Thread(target=self._receive) for _ in range(receivers)]
        for receiver in self._receivers:
            receiver.start()

    def finish(self) -> Outcome:
        """Wait for the program and all that came from it."""
        deadline = time.monotonic() + PATIENCE
        try:
            code = self.program.wait(deadline)
            self.program.wait_for_descendants(deadline)
        except TimeoutError:
            self.program.send_signal(signal.SIGKILL)
            raise
        finally:
            for receiver in self._receivers:
                receiver.join(PATIENCE)
            self.program.close()
            with os.fdopen(self._reader) as output:
                text = output.read()
        if self.failure is not None:
            raise self.failure
        return Outcome(code, text)

    def _receive(self) -> None:
        while (call := self.listener.receive()) is not None:
            try:
                served = self._handle(self.listener, call)
            except BaseException as error:  # noqa: BLE001 - raised again by finish()
                self.failure = error
                served = False
            if not served:
                self.listener.carry_on(call.id)


def run_served(argv: Sequence[str], handle: Handler = carry_on, **how: object) -> Outcome:
    """Launch, serve and wait."""
    return Served(argv, handle, **how).finish()  # type: ignore[arg-type]  # Served checks them
