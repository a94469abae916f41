"""A program that starts QEMU and plugs devices into it while it runs, as libvirt would.

``vfiomig run --device SPEC -- python plugger.py CONTROL qemu ARGS...`` puts both behind one door.
CONTROL is an inherited socket with a line of JSON for each command, answered by one line:

``{"hand_over": PATH, "name": NAME}``    open PATH and give the descriptor to QEMU (getfd)
``{"execute": COMMAND, "arguments": {}}``  on the monitor that knows the names of descriptors

The exit code is QEMU's.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any, Final

from vfiomig.errors import GuestEnded, GuestError
from vfiomig.qemu.lines import Lines
from vfiomig.qemu.qmp import Qmp

__all__ = ("PLUGGER", "Plugger")

#: In front of CONTROL and QEMU's words.
PLUGGER: Final = (sys.executable, __file__)
_LIFETIME_S: Final = 600


class Plugger:
    """The end of CONTROL at which commands are given."""

    def __init__(self, control: socket.socket) -> None:
        """Take ``control`` over."""
        self._lines = Lines(control, "the plugger")

    def hand_over(self, path: str, name: str) -> None:
        """Have a file opened behind the door, and its descriptor known to QEMU as ``name``."""
        self._command(hand_over=path, name=name)

    def execute(self, command: str, **arguments: Any) -> Any:
        """Execute a command of QEMU's that names a descriptor; an underscore is a hyphen."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._command(execute=command, arguments=words)

    def close(self) -> None:
        self._lines.close()

    def _command(self, **command: Any) -> Any:
        self._lines.send(json.dumps(command).encode() + b"\n")
        answer = json.loads(self._lines.line())
        if "error" in answer:
            raise GuestError(answer["error"])
        return answer["return"]


def main() -> int:
    control = Lines(socket.socket(fileno=int(sys.argv[1])), "whoever commands")
    monitor, monitor_there = socket.socketpair()
    with monitor_there:
        os.set_inheritable(monitor_there.fileno(), True)
        words = ["-chardev", f"socket,id=plugger,fd={monitor_there.fileno()}"]
        words += ["-qmp", "chardev:plugger"]
        # With the descriptors that vfiomig run put in place of {dev0} and {iommu}.
        qemu = subprocess.Popen([*sys.argv[2:], *words], close_fds=False)
    threading.Thread(target=_serve, args=(control, Qmp(monitor)), daemon=True).start()
    code = qemu.wait()
    return code if code >= 0 else 128 - code


def _serve(control: Lines, qmp: Qmp) -> None:
    try:
        qmp.greet()
        while True:
            answer = _answer(qmp, json.loads(control.line(timeout=_LIFETIME_S)))
            control.send(json.dumps(answer).encode() + b"\n")
    except GuestEnded:  # either end has gone
        return


def _answer(qmp: Qmp, command: dict[str, Any]) -> dict[str, Any]:
    try:
        if "execute" in command:
            return {"return": qmp.execute(command["execute"], **command["arguments"])}
        fd = os.open(command["hand_over"], os.O_RDWR | os.O_CLOEXEC)
        try:
            return {"return": qmp.execute("getfd", fds=[fd], fdname=command["name"])}
        finally:
            os.close(fd)
    except GuestEnded:
        raise
    except (GuestError, OSError) as failure:
        return {"error": str(failure)}


if __name__ == "__main__":
    sys.exit(main())
