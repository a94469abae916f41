"""What a guest does while it migrates: a serial stream and a block writer, and what became of it.

Theory of operation
-------------------
*The stream.* Numbered lines go into a serial port of the guest, which sends back what it gets, so
every byte passes the card twice. A limited number is on its way at a time: in a FIFO, in a socket,
in the guest. When the machine stops, the card closes the connection, with an exact account: what
the host could write is in the card, what the card has sent is here. The stream goes on at the
destination's port with the next byte, and what comes back there has to continue what came back
before. No byte is lost, doubled or moved if all comes back as it was sent.

*The writer.* It writes random blocks and notes the checksum of each when the disk has acknowledged
it; then it reads the block back, so that there is always memory that the device has just filled
by DMA. In the end every block that was noted is read from the disk and compared.
"""

from __future__ import annotations

import os
import select
import shlex
import socket
import threading
from typing import TYPE_CHECKING, Final

from vfiomig.descriptors import Fd

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    from vfiomig.qemu.guest import Guest

__all__ = (
    "SerialEcho",
    "acknowledged_blocks",
    "finish_blocks",
    "start_blocks",
    "start_echo",
    "wait_for_blocks",
)

#: A port that a guest has first opened throws away what came before.
_READY: Final = b"ready\n"
#: Bytes that are on their way at most: less than the guest's line discipline holds.
_WINDOW: Final = 1024
_CHUNK: Final = 4096
_LINE: Final = 9  # bytes
_PATIENCE_S: Final = 30.0

_ECHO: Final = "stty -F {tty} 115200 raw -echo crtscts && (echo ready; exec cat) <>{tty} >&0 2>&0 &"

_WRITER: Final = """\
i=0
refused=
while [ ! -e stop ]; do
    head -c 4096 /dev/urandom >block
    dd if=block of={disk} oflag=direct bs=4k seek=$i 2>/dev/null || refused=yes
    sha256sum <block >>acknowledged
    dd if={disk} of=back iflag=direct bs=4k skip=$i count=1 2>/dev/null || refused=yes
    cmp -s block back || echo $i >>different
    [ -z "$refused" ] || break
    i=$((i + 1))
done
echo ended >ended
"""
_READ_BACK: Final = """\
i=0
while read -r sum _; do
    dd if={disk} iflag=direct bs=4k skip=$i count=1 2>/dev/null | sha256sum
    i=$((i + 1))
done <acknowledged
"""


def start_echo(guest: Guest, tty: str) -> None:
    """Let the guest send back whatever comes at its serial port ``tty``."""
    guest.check(_ECHO.format(tty=tty))


def start_blocks(guest: Guest, disk: str) -> None:
    """Let the guest write to its disk until :func:`finish_blocks`; return when it has begun."""
    script = shlex.quote(_WRITER.format(disk=disk))
    guest.check(f"printf %s {script} >writer; sh writer >/dev/null 2>&1 &")
    wait_for_blocks(guest, 1)


def acknowledged_blocks(guest: Guest) -> int:
    """Return how many blocks the guest has noted so far."""
    return int(guest.check("wc -l <acknowledged", timeout=_PATIENCE_S))


def wait_for_blocks(guest: Guest, count: int) -> None:
    """Wait until the guest has noted so many blocks, or can write no more."""
    enough = f"[ -e ended ] || [ $(wc -l <acknowledged) -ge {count} ]"
    guest.check(f"touch acknowledged; until {enough}; do sleep 0.1; done", timeout=_PATIENCE_S)


def finish_blocks(guest: Guest, disk: str) -> tuple[int, list[int]]:
    """End the writer; return how many blocks it noted, and which of them are wrong.

    A block that the disk refused to take or to give is one of them, and the last.

    Raises:
        GuestError: the guest does not answer.
    """
    guest.check("touch stop; until [ -e ended ]; do sleep 0.1; done", timeout=_PATIENCE_S)
    noted = guest.check("cat acknowledged").split("\n")[:-1]
    found = guest.check(_READ_BACK.format(disk=disk), timeout=60).split("\n")[:-1]
    found += [""] * (len(noted) - len(found))
    wrong = [number for number, sum_ in enumerate(noted) if found[number] != sum_]
    at_once = guest.check("cat different 2>/dev/null || true").split("\n")[:-1]
    return len(noted), sorted({*wrong, *map(int, at_once)})


class SerialEcho:
    """The host's side of the stream, in a thread from the constructor to :meth:`close`."""

    def __init__(self, source: Path, destination: Path) -> None:
        """Begin at the socket ``source``; ``destination`` is there after :meth:`go_on`."""
        #: Bytes that came back as they were sent.
        self.returned = 0
        #: Bytes that were on their way when the source's port closed; None before.
        self.on_their_way: int | None = None
        #: What is wrong with the stream, in words; it ended there.
        self.failure = ""
        self._outstanding = bytearray()
        self._greeting = _READY
        self._moved = threading.Event()
        self._finishing = False
        self._closing = False
        self._ended = False
        self._news = threading.Condition()
        self._wake = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._thread = threading.Thread(
            target=self._run, args=(source, destination), name="vfiomig-echo"
        )
        self._thread.start()

    def wait(self, returned: int, *, timeout: float) -> None:
        """Wait until so much has come back, or it ended, or waits for :meth:`go_on`."""

        def enough() -> bool:
            between = self.on_their_way is not None and not self._moved.is_set()
            return self.returned >= returned or self._ended or between

        with self._news:
            self._news.wait_for(enough, timeout)

    def go_on(self) -> None:
        """Go on at the destination's port, which its card serves by now."""
        self._moved.set()

    def finish(self) -> None:
        """Send no more, and wait until all is back, or nothing comes any more; once is enough."""
        self._finishing = True
        self._end()

    def close(self) -> None:
        """End it as it is; once more is harmless."""
        if not self._wake.closed:
            self._closing = True
            self._end()
            self._wake.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _end(self) -> None:
        self._moved.set()
        os.eventfd_write(self._wake.fileno(), 1)
        self._thread.join()

    # The thread.

    @property
    def _over(self) -> bool:
        done = self._finishing and not self._outstanding
        return done or self._closing or bool(self.failure)

    def _run(self, source: Path, destination: Path) -> None:
        try:
            self._talk(source)
            if not self._over:
                self.on_their_way = len(self._outstanding)
                self._tell()
                self._moved.wait()
                self._talk(destination)
            if not self._over:
                self.failure = f"the port closed once more after byte {self.returned}"
        except OSError as problem:
            self.failure = f"a port cannot be used after byte {self.returned}: {problem.strerror}"
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()

    def _talk(self, path: Path) -> None:
        """Send and compare until the port closes or it is over."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(path))
            line.setblocking(False)
            takes = True
            while not self._over:
                sends = takes and not self._finishing and self._room > 0 and not self._greeting
                ready = self._wait(line, sends=sends)
                if ready & ~select.POLLOUT:
                    data = _receive(line)
                    if not data:
                        return
                    self._compare(data)
                    self._tell()
                if ready & select.POLLOUT:
                    takes = self._send(line)

    def _wait(self, line: socket.socket, *, sends: bool) -> int:
        poller = select.poll()
        poller.register(line, select.POLLIN | select.POLLOUT * sends)
        poller.register(self._wake, select.POLLIN)
        ready = dict(poller.poll(_PATIENCE_S * 1000))
        if not ready:
            self.failure = (
                f"nothing came back for {_PATIENCE_S:.0f} s after byte {self.returned}, "
                f"and {len(self._outstanding)} more had been sent"
            )
        if self._wake.fileno() in ready:
            os.eventfd_read(self._wake.fileno())
        return ready.get(line.fileno(), 0)

    @property
    def _room(self) -> int:
        return _WINDOW - len(self._outstanding)

    def _send(self, line: socket.socket) -> bool:
        """Send what may be on its way; tell whether the port takes more."""
        data = _stream(self.returned + len(self._outstanding), self._room)
        try:
            self._outstanding += data[: line.send(data)]
        except BlockingIOError:
            return True
        except OSError:  # it has closed: what it took before, it has
            return False
        return True

    def _compare(self, data: bytes) -> None:
        greeting = self._greeting[: len(data)]
        self._greeting = self._greeting[len(greeting) :]
        data = data.removeprefix(greeting)
        expected = bytes(self._outstanding[: len(data)])
        pairs = enumerate(zip(data, expected, strict=False))
        right = next((at for at, (came, sent) in pairs if came != sent), len(expected))
        self.returned += right
        del self._outstanding[:right]
        if right < len(data):
            wrong, sent = data[right : right + _LINE], expected[right : right + _LINE]
            self.failure = f"after byte {self.returned} {wrong!r} came back, and {sent!r} was sent"


def _receive(line: socket.socket) -> bytes:
    try:
        return line.recv(_CHUNK)
    except ConnectionResetError:
        return b""


def _stream(offset: int, size: int) -> bytes:
    """Return ``size`` bytes of the numbered lines, from ``offset`` on."""
    first, skip = divmod(offset, _LINE)
    lines = range(first, first + (skip + size) // _LINE + 1)
    return b"".join(b"%08d\n" % number for number in lines)[skip : skip + size]
