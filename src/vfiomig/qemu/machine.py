"""The arguments of a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ("DEBUG_EXIT_PORT", "DEFAULT_ACCEL", "Machine", "arguments")

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
