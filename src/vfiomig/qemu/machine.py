"""The arguments of a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ("ACCELERATORS", "DEBUG_EXIT_PORT", "DEFAULT_ACCEL", "Machine", "arguments", "for_people")

#: What the names of accelerators stand for in QEMU's words.
ACCELERATORS: Final = {"tcg": "tcg,thread=multi", "kvm": "kvm"}
DEFAULT_ACCEL: Final = ACCELERATORS["tcg"]

#: An emulated machine has so much more memory than asked for. A QEMU 10.0 collects the dirty bits
#: of a memory that is a multiple of 64 pages in words, and forgets to make its processors report
#: their next writes if all pages among these bits were still to be sent: what is written to them
#: after they were sent is lost, and the guest goes on with memory of different times. It happens
#: where QEMU looks often, as it does while devices have more to send than its memory. Bits of other
#: sizes it collects page by page, and rightly. QEMU rounds sizes to 8 KiB.
_ODD_KIB: Final = 8

#: Where guest-init.sh writes the exit status.
DEBUG_EXIT_PORT: Final = 0xF4

_CONSOLE: Final = "console=ttyS0"
# No mitigations: nobody attacks this guest. More serial lines than the four that are set up by
# default, for cards under test. On a panic the machine goes down at once. The check of the timer
# counts its interrupts against the processor's speed; where QEMU gets little time it fails, and
# the guest goes on with a timer that may not tick.
_APPEND: Final = f"{_CONSOLE} quiet panic=-1 mitigations=off no_timer_check 8250.nr_uarts=8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine; everything but its kernel has a value that will do.

    Without a kernel it goes as far as its firmware. ``append`` is more for the kernel's command
    line. ``extra`` are words that QEMU's command line ends with, devices for instance. With
    ``incoming`` it waits for a migration, and for its monitor to say from where.
    """

    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
    type: str = "q35"
    accel: str = DEFAULT_ACCEL
    #: "" is all that the accelerator has, as far as it works everywhere.
    cpu: str = ""
    cpus: int = 1
    memory_mib: int = 256
    #: Whether another process can map the memory.
    shared_memory: bool = True
    extra: tuple[str, ...] = ()
    incoming: bool = False


def arguments(machine: Machine, *, monitor: int, folder: Path) -> list[str]:
    """Return QEMU's arguments for a ``machine`` that a program talks to.

    Its monitor is the inherited socket ``monitor``. Its serial ports are in ``folder``: what the
    first one says goes to the file ``console``, the second one's to ``shell``, which hears
    what is written to the FIFO ``commands``.
    """
    console, shell, commands = (
        _escaped(folder / name) for name in ("console", "shell", "commands")
    )
    return [
        *_machine_words(machine, _APPEND),
        "-no-reboot",
        *("-chardev", f"socket,id=monitor,fd={monitor}", "-qmp", "chardev:monitor"),
        *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
        *("-chardev", f"file,id=shell,path={shell},input-path={commands}"),
        *("-serial", "chardev:shell"),
        *("-device", f"isa-debug-exit,iobase={DEBUG_EXIT_PORT},iosize=4"),
        *machine.extra,
    ]


def for_people(machine: Machine) -> list[str]:
    """Return QEMU's arguments for a ``machine`` whose console is the terminal.

    The firmware speaks on the serial port too, because there is no screen (graphics=off).
    """
    console = ("-machine", "graphics=off", "-serial", "mon:stdio")
    return [*_machine_words(machine, _CONSOLE), *console, *machine.extra]


def _machine_words(machine: Machine, command_line: str) -> list[str]:
    words = [
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-accel", machine.accel, "-cpu", machine.cpu or _default_cpu(machine.accel)),
        *("-smp", str(machine.cpus), "-m", _memory_size(machine)),
        *("-object", _memory(machine)),
        *("-machine", f"{machine.type},memory-backend=ram"),
    ]
    if machine.kernel is not None:
        append = f"{command_line} {machine.append}".strip()
        words += ["-kernel", str(machine.kernel), "-append", append]
    if machine.initrd is not None:
        words += ["-initrd", str(machine.initrd)]
    if machine.incoming:
        words += ["-incoming", "defer"]
    return words


def _memory_size(machine: Machine) -> str:
    if machine.accel.startswith("tcg"):
        return f"{(machine.memory_mib << 10) + _ODD_KIB}K"
    return f"{machine.memory_mib}M"


def _memory(machine: Machine) -> str:
    size = f"id=ram,size={_memory_size(machine)}"
    if machine.shared_memory:
        return f"memory-backend-memfd,{size},share=on"
    return f"memory-backend-ram,{size}"


def _default_cpu(accel: str) -> str:
    # With it QEMU sets MSR_IA32_ARCH_CAPABILITIES, which KVM under another hypervisor, or on
    # processors of AMD, may refuse: QEMU then aborts at its start.
    return "max,-arch-capabilities" if accel.startswith("kvm") else "max"


def _escaped(path: Path) -> str:
    """Return ``path`` as a value in a list of options, where a comma is written twice."""
    return str(path).replace(",", ",,")
