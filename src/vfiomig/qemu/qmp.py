"""QEMU's monitor protocol: one command at a time, and the events that come in between.

A message is a line of JSON (docs/interop/qmp-spec.rst of QEMU). Events are kept until somebody
waits for them, in their order. That QEMU has ended is all that a monitor can tell; what QEMU said
about it, and its exit code, know those who started it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vfiomig.errors import GuestEnded, GuestError, GuestTimeout
from vfiomig.qemu.lines import Lines

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence

__all__ = ("Qmp", "QmpError")

Message = dict[str, Any]


class QmpError(GuestError):
    """QEMU refuses a command; ``kind`` is its class of errors."""

    def __init__(self, command: str, error: Message) -> None:
        super().__init__(f"QEMU refuses {command}: {error.get('desc', 'no reason given')}")
        self.kind = str(error.get("class", ""))


class Qmp:
    """A monitor of one QEMU."""

    def __init__(
        self,
        socket_: socket.socket,
        *,
        timeout: float = 30,
        ended: Callable[[str], GuestEnded] | None = None,
    ) -> None:
        """Take ``socket_`` over, which QEMU serves; nothing is said before :meth:`greet`.

        ``ended`` makes the error for a QEMU that has ended, from what was asked of it.
        """
        self._ended = ended
        self._lines = Lines(socket_, "QEMU's monitor")
        self._timeout = timeout
        #: Events that nobody has taken yet.
        self.events: list[Message] = []

    def greet(self) -> None:
        """Wait until QEMU has started, and leave the mode in which it takes no commands."""
        with self._explained("before it greeted"):
            greeting = self._receive(time.monotonic() + self._timeout)
        if "QMP" not in greeting:
            raise _no_monitor(greeting)
        self.execute("qmp_capabilities")

    def execute(
        self,
        command: str,
        *,
        fds: Sequence[int] = (),
        timeout: float | None = None,
        **arguments: Any,
    ) -> Any:
        """Execute ``command`` and return its result.

        An underscore in an argument's name stands for a hyphen. ``fds`` are passed along, as
        ``getfd`` and ``add-fd`` want one.

        Raises:
            QmpError: QEMU refuses it.
            GuestEnded: with what QEMU said and its exit code, where those are known.
            GuestTimeout: it takes too long.
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        message: Message = {"execute": command}
        if arguments:
            message["arguments"] = {
                name.replace("_", "-"): value for name, value in arguments.items()
            }
        with self._explained(f"during {command}"):
            self._lines.send(json.dumps(message).encode() + b"\n", fds, timeout=self._timeout)
            return self._result(command, deadline)

    def _result(self, command: str, deadline: float) -> Any:
        while True:
            answer = self._receive(deadline)
            if "event" in answer:
                self.events.append(answer)
            elif isinstance(error := answer.get("error"), dict):
                raise QmpError(command, error)
            elif "return" in answer:
                return answer["return"]
            else:
                raise _no_monitor(answer)

    def wait_event(
        self, name: str, wanted: Callable[[Message], bool] = bool, *, timeout: float | None = None
    ) -> Message:
        """Wait for the next event ``name`` whose data is ``wanted`` and return the data.

        It and the events before it are taken. Without a condition, data of any kind will do.
        """
        limit = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        seen: Counter[str] = Counter()
        while True:
            while self.events:
                event = self.events.pop(0)
                data: Message = event.get("data", {})
                if event["event"] == name and (wanted is bool or wanted(data)):
                    return data
                seen[event["event"]] += 1
            try:
                with self._explained(f"before an event {name}"):
                    message = self._receive(deadline)
            except GuestTimeout:
                raise GuestTimeout(f"no event {name} in {limit} s; seen: {dict(seen)}") from None
            if "event" not in message:
                raise _no_monitor(message)
            self.events.append(message)

    def close(self) -> None:
        """Close it; once more is harmless."""
        self._lines.close()

    @contextmanager
    def _explained(self, when: str) -> Iterator[None]:
        """Add to the end of QEMU what is known about it elsewhere."""
        try:
            yield
        except GuestEnded as end:
            if self._ended is None:
                raise
            raise self._ended(f"QEMU ended {when}") from end

    def _receive(self, deadline: float) -> Message:
        line = self._lines.line(timeout=deadline - time.monotonic())
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise _no_monitor(line) from None
        if not isinstance(message, dict):
            raise _no_monitor(line)
        if not (
            isinstance(message.get("event", ""), str) and isinstance(message.get("data", {}), dict)
        ):
            raise _no_monitor(line)
        return message


def _no_monitor(said: object) -> GuestError:
    return GuestError(f"this is no QEMU monitor: it says {str(said)[:200]}")
