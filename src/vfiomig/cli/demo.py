"""``vfiomig demo``: one virtual device is migrated into another by an ordinary process.

With ``--qemu`` it is another demo, ``qemu_demo``.

Theory of operation
-------------------
This process serves two ``pattern`` devices of different content and starts ``demo_client`` behind
the system call door. While the door serves it from the main thread, one more thread listens to
the client's reports and draws the bar. What is told in the end is taken from the devices
themselves (``demo_account``).

The client inherits the end of a pipe, and with it a blocked SIGINT: Ctrl-C at a terminal goes to
both processes, and a client that dies somewhere in its own start would print why. Only the
listening thread hears it. It stops listening, the client's next report fails, and the client
ends as it always does: everything it had open is closed, in order.
"""

from __future__ import annotations

import json as json_format
import os
import select
import signal
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from vfiomig.abi.ioctls import Dialect
from vfiomig.cli.demo_account import DESTINATION, SOURCE, Account
from vfiomig.cli.demo_table import Bar, as_data, bytes_text, show
from vfiomig.cli.qemu_demo import demo_under_qemu, find_parts
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.descriptors import Fd
from vfiomig.doors.syscall.run import run
from vfiomig.errors import PrerequisiteError, SpecError, VfioMigError
from vfiomig.models import parse_size
from vfiomig.models.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

__all__ = ("demo",)

#: What the help calls the options that are for this.
UNDER_QEMU: Final = "Under QEMU"
CLIENT: Final = "vfiomig.cli.demo_client"
PIPE_READ: Final = 1 << 16
#: SIGINT is answered here, `run` passes the others on to the client.
ENDING: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


def demo(
    *,
    size: str | None = None,
    dialect: Dialect = Dialect.LANDED,
    dirty: str | None = None,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    qemu: Annotated[bool, Parameter(group=UNDER_QEMU, negative=(), show_default=False)] = False,
    qemu_path: Annotated[Path | None, Parameter(group=UNDER_QEMU)] = None,
    kernel: Annotated[Path | None, Parameter(group=UNDER_QEMU)] = None,
    busybox: Annotated[Path | None, Parameter(group=UNDER_QEMU)] = None,
    modules: Annotated[Path | None, Parameter(group=UNDER_QEMU)] = None,
) -> int:
    """Migrate virtual devices, and compare what arrived with what was there.

    Two devices written in Python are served through real system calls. A client process opens
    them under /dev/vfio/devices, and migrates the first into the second while the first runs. The
    last line says whether the second then held what the first did.

    With --qemu there are two unmodified QEMUs instead, and a Linux guest whose serial card, disk
    and a third device are written in Python. The guest is live-migrated while it writes to both,
    and nothing of that may be lost.

    Parameters
    ----------
    size:
        Bytes of memory of each device; K, M, G are powers of 1024 (256M; with --qemu 16M).
    dialect:
        Which form of the migration protocol is spoken. v6 knows no pre-copy, QEMU no v6.
    dirty:
        Bytes of its own memory that a running device rewrites per second (64M; with --qemu 2M).
    json:
        Print one JSON document instead of the table and the last line.
    qemu:
        Migrate a guest from one QEMU to another.
    qemu_path:
        This QEMU, 10.0 or later, and not the one on the PATH or in the cache folder.
    kernel:
        This Linux kernel for the guest, and not the one in the cache folder.
    busybox:
        The static busybox that goes with it.
    modules:
        The folder of its modules; without one it needs virtio_blk and 8250_pci built in.
    """
    if qemu:
        if dialect is not Dialect.LANDED:
            raise SpecError(f"--dialect {dialect}: QEMU speaks the landed dialect only")
        size, dirty = size or "16M", dirty or "2M"
        _pattern(size, dirty, seed=1)  # or the user would be told by a child process of ours
        parts = find_parts(qemu_path, kernel, busybox, modules)
        return demo_under_qemu(parts, parse_size(size), parse_size(dirty), json=json)
    if qemu_path or kernel or busybox or modules:
        raise SpecError("--qemu-path, --kernel, --busybox and --modules go with --qemu")
    return _demo(size or "256M", dirty or "64M", dialect, json=json)


def _demo(size: str, dirty: str, dialect: Dialect, *, json: bool) -> int:
    source = _pattern(size, dirty, seed=1)
    destination = _pattern(size, dirty, seed=2)
    account = Account(source, destination)
    devices = []
    for number, (role, device) in enumerate(((SOURCE, source), (DESTINATION, destination))):
        served = VfioDevice(device, f"vfio{number}", dialect)
        account.observe(served, role)
        devices.append(served)
    rounds = _migrate(devices, Bar(account.nbytes))
    if json:
        print(json_format.dumps(as_data(account, dialect, rounds), indent=2))
    else:
        show(account, rounds)
        print(account.verdict)
    return 0 if account.identical else 1


def _pattern(size: str, dirty: str, seed: int) -> Pattern:
    for option, text in (("--size", size), ("--dirty", dirty)):
        try:
            parse_size(text)
        except SpecError as problem:
            raise SpecError(f"{option}: {problem}") from None
    _require_memory(2 * parse_size(size))
    return Pattern(size=parse_size(size), dirty=parse_size(dirty), seed=seed)


def _require_memory(needed: int) -> None:
    """Refuse what the kernel would let begin, and kill in the middle."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    if needed > available:
        raise PrerequisiteError(
            f"two devices of that --size need {bytes_text(needed)} of memory, and"
            f" {bytes_text(available)} are available: give a smaller one"
        )


def _migrate(devices: list[VfioDevice], bar: Bar) -> int:
    """Let the client migrate; return how many rounds of pre-copy it made."""
    reports, for_client = map(Fd, os.pipe())
    # for_client is closed before the listener is waited for, which hears until nobody has it.
    with Listener(reports, bar) as listener, for_client:
        # What `run` starts inherits it: the number is an argument.
        os.set_inheritable(for_client.fileno(), True)
        code = run(devices, _client_command(for_client.fileno()))
    if listener.ended_by:
        # All that there was is gone: now it may do what it does to everybody.
        signal.raise_signal(listener.ended_by)
    if listener.rounds is None:
        raise VfioMigError(f"nothing was migrated: {listener.failure or _end_of_client(code)}")
    return listener.rounds


def _client_command(reports: int) -> list[str]:
    """How to start the client: by the same Python, which finds this package in the same way."""
    safe_path = ["-P"] if sys.flags.safe_path else []
    return [sys.executable, *safe_path, "-m", CLIENT, str(reports)]


def _end_of_client(code: int) -> str:
    if code > 128:
        return f"the client was ended by {signal.Signals(code - 128).name}"
    return f"the client ended with exit code {code}; what it says about that stands above"


class Listener:
    """Hears the client's reports, and signals, in a thread of its own until the client ends."""

    def __init__(self, reports: Fd, bar: Bar) -> None:
        """Take ``reports`` over."""
        #: The signal that this process was told to end by, 0 for none.
        self.ended_by = 0
        #: Set when the client has succeeded.
        self.rounds: int | None = None
        self.failure = ""
        self._reports = reports
        self._bar = bar
        self._stack = ExitStack()
        self._thread = threading.Thread(target=self._listen, name="vfiomig-demo-listener")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._reports)
            stack.enter_context(self._bar)
            self._signals = stack.enter_context(_signals_as_bytes())
            self._thread.start()
            stack.callback(self._thread.join)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        """Wait until no client is left that could report; close its end of the pipe before."""
        self._stack.close()

    def _listen(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        poller = select.poll()
        poller.register(self._reports, select.POLLIN)
        poller.register(self._signals, select.POLLIN)
        rest = b""
        with self._reports:  # however this ends, the client must not wait for somebody to read
            while self.ended_by != signal.SIGINT:
                ready = {number for number, _ in poller.poll()}
                if self._signals.fileno() in ready:
                    heard = os.read(self._signals.fileno(), PIPE_READ)
                    self.ended_by = next(filter(ENDING.__contains__, heard), self.ended_by)
                elif received := os.read(self._reports.fileno(), PIPE_READ):
                    *lines, rest = (rest + received).split(b"\n")
                    for line in lines:
                        self._hear(**json_format.loads(line))
                else:
                    return

    def _hear(
        self,
        phase: str = "",
        moved: int = 0,
        left: int | None = None,
        rounds: int | None = None,
        failed: str = "",
    ) -> None:
        self.rounds = rounds
        self.failure = failed
        if rounds is not None:
            self._bar.finish()
        elif not failed:
            self._bar.advance(phase, moved, left)


@contextmanager
def _signals_as_bytes() -> Iterator[Fd]:
    """Block SIGINT here and in what is started; a thread that unblocks it makes it a byte."""
    with ExitStack() as stack:
        heard, told = (stack.enter_context(Fd(end)) for end in os.pipe())
        os.set_blocking(told.fileno(), False)
        previous = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        stack.callback(signal.set_wakeup_fd, previous)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        yield heard
