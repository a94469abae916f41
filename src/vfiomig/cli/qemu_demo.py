"""``vfiomig demo --qemu``: two unmodified QEMUs migrate a guest with its devices while it works.

Theory of operation
-------------------
This process starts both QEMUs, each behind a ``qemu_demo_machine`` that serves its devices and
reports their arcs. It talks to the guest's shell and to both monitors, and it is the other end of
the guest's serial stream. Nothing that is told in the end is taken from a claim: the digests are
those of the devices on both sides, the stream is compared here byte for byte, and the blocks are
read from the disk of the destination.

Everything that was started ends with this process, however that ends. SIGTERM and SIGHUP unwind
it as Ctrl-C does, so that nothing is left in the folder for temporary files either; what SIGKILL
leaves there, the next start of anything removes.
"""

from __future__ import annotations

import json as json_format
import os
import select
import signal
import sys
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from vfiomig.cli.demo_table import Bar
from vfiomig.cli.qemu_demo_account import DESTINATION, SOURCE, Account
from vfiomig.cli.qemu_demo_table import Stages, as_data, show
from vfiomig.cli.signals import ENDING, handled_by
from vfiomig.descriptors import Fd
from vfiomig.errors import GuestEnded, GuestError, GuestTimeout, PrerequisiteError, SpecError
from vfiomig.fsm import State
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.initrd import build_initrd
from vfiomig.qemu.installed import GuestFiles, cache_folder, cached_guest_files, find_qemu
from vfiomig.qemu.machine import Machine
from vfiomig.qemu.migration import migrate
from vfiomig.qemu.vfio import vfio_words
from vfiomig.qemu.workload import (
    SerialEcho,
    acknowledged_blocks,
    finish_blocks,
    start_blocks,
    start_echo,
    wait_for_blocks,
)
from vfiomig.scratch import ScratchFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType
    from typing import Self


__all__ = ("Parts", "demo_under_qemu", "find_parts")

DOOR: Final = "vfiomig.cli.qemu_demo_machine"
NAMES: Final = ("mtty", "virtio_blk", "pattern")
#: Where the stock drivers of the guest put the first two.
TTY: Final = "/dev/ttyS4"
DISK: Final = "/dev/vda"

#: How much the guest has to do before the migration, and after it.
WORK_BYTES: Final = 4096
WORK_BLOCKS: Final = 15
PATIENCE_S: Final = 60.0
#: sockaddr_un has room for so many bytes, and a zero behind them.
SOCKET_PATH: Final = 107
PIPE_READ: Final = 1 << 16
#: A program that was killed takes its supervisor along in a moment.
END_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What the two machines are made of."""

    qemu: Path
    files: GuestFiles


def find_parts(
    qemu: Path | None, kernel: Path | None, busybox: Path | None, modules: Path | None
) -> Parts:
    """Find what is given, or in the cache.

    Raises:
        PrerequisiteError: something is not there; the message says how to get it.
    """
    cache = cache_folder()
    if bool(kernel) != bool(busybox) or (modules and not kernel):
        raise SpecError("--kernel and --busybox go together, and --modules with them")
    program = find_qemu(qemu, cache)
    if kernel and busybox:
        for option, path in (("kernel", kernel), ("busybox", busybox), ("modules", modules)):
            if path is not None and not path.exists():
                raise SpecError(f"--{option} {path}: there is no such file")
        return Parts(program, GuestFiles(kernel, busybox, modules))
    files = cached_guest_files(cache)
    if files is None:
        raise PrerequisiteError(
            f"there are no kernel and busybox for the guest in {cache}: make demo-qemu, in a "
            "checkout of vfiomig, fetches them; or name some with --kernel and --busybox"
        )
    return Parts(program, files)


def specs_of(side: str, port: Path, size: int, dirty: int) -> list[str]:
    """Return the SPECs of one side's devices; what they hold at power-on differs."""
    return [
        f"mtty,ports=1,port0=socket:{port}",
        "virtio_blk,size=64M",
        f"pattern,size={size},dirty={dirty},seed={1 if side == SOURCE else 2}",
    ]


def demo_under_qemu(parts: Parts, size: int, dirty: int, *, json: bool) -> int:
    """Boot, migrate while the guest works, check everything, and tell; return the exit code.

    Raises:
        GuestError: a machine does not boot or does not migrate, so there is nothing to check.
    """
    account = Account(NAMES)
    with Bar() as bar, _unwinding_signals(), ExitStack() as stack:
        folder = stack.enter_context(ScratchFolder("demo-")).path
        ports = _ports_in(folder)
        specs = {side: specs_of(side, ports[side], size, dirty) for side in ports}
        pair = Pair(parts, specs, account, Stages(bar), stack)
        try:
            pair.boot(folder)
            pair.work(ports)
            pair.migrate(f"unix:{folder}/link")
            pair.check()
        except GuestError as problem:
            pair.explain(problem)
    if json:
        print(json_format.dumps(as_data(account, str(parts.qemu)), indent=2))
    else:
        show(account)
    return 1 if account.lost else 0


def _ports_in(folder: Path) -> dict[str, Path]:
    """Return where each side's serial card listens."""
    ports = {side: folder / f"{side}.port" for side in (SOURCE, DESTINATION)}
    if max(len(os.fsencode(port)) for port in ports.values()) > SOCKET_PATH:
        raise PrerequisiteError(
            f"{folder} is too long for the address of a socket: name a shorter folder for "
            "temporary files in TMPDIR, such as /tmp"
        )
    return ports


class Pair:
    """Both machines and what they are watched by, on a stack that ends them."""

    def __init__(
        self,
        parts: Parts,
        specs: dict[str, list[str]],
        account: Account,
        stages: Stages,
        stack: ExitStack,
    ) -> None:
        self._parts = parts
        self._specs = specs
        self._account = account
        self._stages = stages
        self._stack = stack
        self._guests: dict[str, Guest] = {}
        self._echo: SerialEcho | None = None
        self._listener = stack.enter_context(Listener(self._hear))

    def boot(self, folder: Path) -> None:
        self._stages.begin("two QEMUs start")
        initrd = folder / "initrd"
        initrd.write_bytes(build_initrd(self._parts.files))
        for side in self._specs:
            self._guests[side] = self._stack.enter_context(self._start(side, initrd))
        self._stages.begin("the guest boots")
        self._guests[SOURCE].wait_ready()

    def _start(self, side: str, initrd: Path) -> Guest:
        specs = self._specs[side]
        machine = Machine(
            kernel=self._parts.files.kernel,
            initrd=initrd,
            extra=tuple(vfio_words(len(specs))),
            incoming=side == DESTINATION,
        )
        safe_path = ["-P"] if sys.flags.safe_path else []
        with self._listener.writer(side) as reports:
            number = reports.fileno()
            launcher = [sys.executable, *safe_path, "-m", DOOR, str(number), *specs, "--"]
            return Guest(self._parts.qemu, machine, launcher=launcher, pass_fds=[number])

    def work(self, ports: dict[str, Path]) -> None:
        self._stages.begin("the guest works")
        source = self._guests[SOURCE]
        start_echo(source, TTY)
        start_blocks(source, DISK)
        self._echo = self._stack.enter_context(SerialEcho(ports[SOURCE], ports[DESTINATION]))
        self._let_work(SOURCE, 0)

    def migrate(self, uri: str) -> None:
        self._stages.begin("pre-copy")
        self._account.begin()
        self._account.qemu = migrate(
            self._guests[SOURCE].qmp,
            self._guests[DESTINATION].qmp,
            uri,
            timeout=PATIENCE_S,
            watch=self._stages.watch,
        )
        self._account.end(PATIENCE_S)

    def check(self) -> None:
        """Let the guest work on, and see what became of its work: failures are the verdict."""
        assert self._echo is not None
        work, destination = self._account.work, self._guests[DESTINATION]
        self._stages.begin("the guest works on")
        try:
            work.blocks = work.blocks_before = acknowledged_blocks(destination)
            self._let_work(DESTINATION, work.blocks_before)
            self._stages.begin("everything is checked")
            self._echo.finish()
            work.blocks, work.wrong_blocks = finish_blocks(destination, DISK)
        except GuestTimeout:
            work.problems.append("the blocks, the guest does not answer on the destination")
            self._echo.finish()
        work.serial_bytes = self._echo.returned
        work.serial_on_their_way = self._echo.on_their_way or 0
        if self._echo.failure:
            work.problems.append(f"the serial stream, {self._echo.failure}")
        self._stages.finish()

    def _let_work(self, side: str, blocks: int) -> None:
        """Wait until the guest has done more than ``blocks``, and the stream has gone on."""
        assert self._echo is not None
        bytes_ = self._echo.returned + WORK_BYTES
        wait_for_blocks(self._guests[side], blocks + WORK_BLOCKS)
        self._echo.wait(bytes_, timeout=PATIENCE_S)

    def _hear(self, side: str, report: dict[str, Any]) -> None:
        """Called by the listener's thread."""
        one = self._account.hear(side, report)
        runs = one.arc.target is State.RUNNING and not one.failure
        if side == DESTINATION and one.device == NAMES[0] and runs and self._echo is not None:
            self._echo.go_on()

    def explain(self, problem: GuestError) -> NoReturn:
        """Raise what there is to say: that a QEMU is gone says more than who noticed it how."""
        stage = self._stages.now
        for side, guest in self._guests.items():
            try:
                code = guest.wait(timeout=END_S)
            except GuestTimeout:
                continue
            # The program's own end by a signal, or that of the process in front of it.
            number = code - 128 if code > 128 else -code
            how = signal.Signals(number).name if number > 0 else f"exit code {code}"
            said = f": {guest.said.strip()}" if guest.said.strip() else ""
            raise GuestEnded(
                f"{stage}: the {side}'s QEMU ended ({how}), nothing was verified{said}"
            ) from problem
        raise GuestError(f"{stage}: {problem}; nothing was verified") from problem


class Listener:
    """Hears the reports of both sides in a thread of its own."""

    def __init__(self, hear: Callable[[str, dict[str, Any]], None]) -> None:
        """``hear`` is called with a side and what it reports."""
        self._hear = hear
        self._readers: dict[int, str] = {}
        self._writers: dict[str, Fd] = {}
        self._stack = ExitStack()
        self._thread = threading.Thread(target=self._listen, name="vfiomig-demo-listener")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._over = stack.enter_context(Fd(os.eventfd(0, os.EFD_CLOEXEC)))
            for side in (SOURCE, DESTINATION):
                reader, writer = (stack.enter_context(Fd(end)) for end in os.pipe())
                self._readers[reader.fileno()] = side
                self._writers[side] = writer
            self._thread.start()
            stack.callback(self._thread.join)
            stack.callback(os.eventfd_write, self._over.fileno(), 1)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def writer(self, side: str) -> Fd:
        """Return the end for a side's process, for the caller to close."""
        return self._writers[side]

    def _listen(self) -> None:
        poller = select.poll()
        for number in (*self._readers, self._over.fileno()):
            poller.register(number, select.POLLIN)
        rest = dict.fromkeys(self._readers, b"")
        while True:
            ready = {number for number, _ in poller.poll()}
            if self._over.fileno() in ready:
                return
            for number in ready:
                received = os.read(number, PIPE_READ)
                if not received:
                    poller.unregister(number)
                *lines, rest[number] = (rest[number] + received).split(b"\n")
                for line in lines:
                    self._hear(self._readers[number], json_format.loads(line))


class _Told(BaseException):
    """A signal told this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _unwinding_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind what is on the stack, and end the process then."""

    def unwind(number: int, _frame: FrameType | None) -> None:
        for other in ENDING:
            signal.signal(other, signal.SIG_IGN)  # the first one is enough
        raise _Told(number)

    told = 0
    with handled_by(unwind, ENDING):
        try:
            yield
        except _Told as ending:
            told = ending.number
    if told:
        signal.raise_signal(told)
        raise KeyboardInterrupt  # somebody ignores it; what it was told to do is gone
