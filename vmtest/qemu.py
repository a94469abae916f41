"""Which QEMU, and the arguments of a machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmtest.errors import VmtestError
from vmtest.fetch import fetch_qemu

__all__ = ("DEBUG_EXIT_PORT", "DEFAULT_ACCEL", "Machine", "arguments", "choose_qemu", "version_of")

_PROGRAM: Final = "qemu-system-x86_64"
#: The first with everything that a migratable vfio-pci device on a passed descriptor needs.
_OLDEST: Final = (10, 0)

DEFAULT_ACCEL: Final = "tcg,thread=multi"

#: Where guest-init.sh writes the exit status.
DEBUG_EXIT_PORT: Final = 0xF4

# No mitigations: nobody attacks this guest. More serial lines than the four that are set up by
# default, for cards under test. On a panic the machine goes down at once. The check of the timer
# counts its interrupts against the processor's speed; where QEMU gets little time it fails, and
# the guest goes on with a timer that may not tick.
_APPEND: Final = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check 8250.nr_uarts=8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine; everything but its kernel has a value that will do.

    Without a kernel it goes as far as its firmware. ``extra`` are words that QEMU's command line
    ends with, devices for instance. With ``incoming`` it waits for a migration.
    """

    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
    type: str = "q35"
    accel: str = DEFAULT_ACCEL
    cpu: str = "max"
    cpus: int = 1
    memory_mib: int = 256
    extra: tuple[str, ...] = ()
    incoming: bool = False


def choose_qemu(given: Path | None, cache: Path) -> Path:
    """Return the QEMU to use: ``given``, or one on the PATH that is new enough, or the cache's."""
    if given is not None:
        version = version_of(given)
        if version < _OLDEST:
            raise VmtestError(
                f"{given} is QEMU {version[0]}.{version[1]}: 10.0 or later is needed, "
                "python -m vmtest fetch has one"
            )
        return given
    found = shutil.which(_PROGRAM)
    if found is not None and version_of(Path(found)) >= _OLDEST:
        return Path(found)
    return fetch_qemu(cache)


def version_of(qemu: Path) -> tuple[int, int]:
    """Return the major and minor version that ``qemu`` says it has."""
    try:
        done = subprocess.run(
            [qemu, "-version"], capture_output=True, text=True, timeout=60, check=False
        )
    except OSError as error:
        raise VmtestError(f"{qemu} cannot be started: {error.strerror}") from None
    found = re.search(r"^QEMU emulator version (\d+)\.(\d+)", done.stdout)
    if found is None:
        said = (done.stdout + done.stderr).strip()
        raise VmtestError(f"{qemu} does not say that it is a QEMU, but: {said[:200]}")
    return int(found[1]), int(found[2])


def arguments(machine: Machine, *, monitor: int, folder: Path) -> list[str]:
    """Return QEMU's arguments for ``machine``.

    Its monitor is the inherited socket ``monitor``. Its serial ports are in ``folder``: what the
    first one says goes to the file ``console``, the second one's to ``shell``, which hears
    what is written to the FIFO ``commands``.
    """
    console, shell, commands = (
        _escaped(folder / name) for name in ("console", "shell", "commands")
    )
    words = [
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-accel", machine.accel, "-cpu", machine.cpu, "-smp", str(machine.cpus)),
        # Memory that another process can map.
        *("-object", f"memory-backend-memfd,id=ram,size={machine.memory_mib}M,share=on"),
        *("-machine", f"{machine.type},memory-backend=ram", "-m", f"{machine.memory_mib}M"),
        *("-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"),
        *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
        *("-chardev", f"file,id=shell,path={shell},input-path={commands}"),
        *("-serial", "chardev:shell"),
        *("-device", f"isa-debug-exit,iobase={DEBUG_EXIT_PORT},iosize=4"),
    ]
    if machine.kernel is not None:
        words += ["-kernel", str(machine.kernel), "-append", f"{_APPEND} {machine.append}".strip()]
    if machine.initrd is not None:
        words += ["-initrd", str(machine.initrd)]
    if machine.incoming:
        words += ["-incoming", "defer"]
    return [*words, *machine.extra]


def _escaped(path: Path) -> str:
    """Return ``path`` as a value in a list of options, where a comma is written twice."""
    return str(path).replace(",", ",,")
