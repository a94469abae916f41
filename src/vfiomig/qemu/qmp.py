"""QEMU's monitor protocol: one command at a time, and the events that come in between.

A message is a line of JSON (docs/interop/qmp-spec.rst of QEMU). Events are kept until somebody
waits for them, in their order.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from vfiomig.errors import GuestError, GuestTimeout
from vfiomig.qemu.lines import Lines

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

__all__ = ("Qmp", "QmpError")

Message = dict[str, Any]


class QmpError(GuestError):
    """QEMU refuses a command; ``kind`` is its class of errors."""

    def __init__(self, command: str, error: Message) -> None:
        super().__init__(f"QEMU refuses {command}: {error.get('desc', 'no reason given')}")
        self.kind = str(error.get("class", ""))


class Qmp:
    """A monitor of one QEMU."""

    def __init__(self, socket_: socket.socket, *, timeout: float = 30) -> None:
        """Take ``socket_`` over, which QEMU serves; nothing is said before :meth:`greet`."""
        self._lines = Lines(socket_, "QEMU's monitor")
        self._timeout = timeout
        #: Events that nobody has taken yet.
        self.events: list[Message] = []

    def greet(self) -> None:
        """Wait until QEMU has started, and leave the mode in which it takes no commands."""
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
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        message: Message = {"execute": command}
        if arguments:
            message["arguments"] = {
                name.replace("_", "-"): value for name, value in arguments.items()
            }
        self._lines.send(json.dumps(message).encode() + b"\n", fds, timeout=self._timeout)
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
        seen = []
        while True:
            while self.events:
                event = self.events.pop(0)
                data: Message = event.get("data", {})
                if event["event"] == name and (wanted is bool or wanted(data)):
                    return data
                seen.append(event["event"])
            try:
                message = self._receive(deadline)
            except GuestTimeout:
                raise GuestTimeout(f"no event {name} in {limit} s; seen: {seen}") from None
            if "event" not in message:
                raise _no_monitor(message)
            self.events.append(message)

    def close(self) -> None:
        """Close it; once more is harmless."""
        self._lines.close()

    def _receive(self, deadline: float) -> Message:
        line = self._lines.line(timeout=deadline - time.monotonic())
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise _no_monitor(line) from None
        if not isinstance(message, dict) or not isinstance(message.get("data", {}), dict):
            raise _no_monitor(line)
        return message


def _no_monitor(said: object) -> GuestError:
    return GuestError(f"this is no QEMU monitor: it says {str(said)[:200]}")
