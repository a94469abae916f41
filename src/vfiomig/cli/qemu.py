"""``vfiomig qemu``: a QEMU whose machine has devices written in Python."""

from __future__ import annotations

import errno
import os
import shlex
from pathlib import Path  # noqa: TC003 - cyclopts reads the annotation at run time
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from vfiomig.abi.ioctls import Dialect
from vfiomig.cli.run import serve
from vfiomig.errors import PrerequisiteError, SpecError
from vfiomig.models import make, parse_size
from vfiomig.qemu.installed import cache_folder, find_qemu
from vfiomig.qemu.machine import ACCELERATORS, Machine, for_people
from vfiomig.qemu.vfio import vfio_words

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("qemu",)

KVM: Final = "/dev/kvm"
MIB: Final = 1 << 20


def qemu(
    *extra: str,
    device: Annotated[list[str], Parameter(negative=())],
    qemu: Annotated[Path | None, Parameter(name="--qemu")] = None,
    machine: Literal["q35", "pc"] = "q35",
    accel: Literal["tcg", "kvm"] = "tcg",
    cpu: str | None = None,
    cpus: int = 1,
    memory: str = "256M",
    kernel: Path | None = None,
    initrd: Path | None = None,
    append: str | None = None,
    incoming: str | None = None,
    only_print: Annotated[bool, Parameter(name="--print", negative=(), show_default=False)] = False,
    filter: Literal["exact", "fast"] = "fast",  # noqa: A002 - the option's name
    trace: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,
    trace_format: Literal["text", "json"] = "text",
) -> int:
    """Run a QEMU with VFIO devices written in Python.

    The machine has the devices, memory that they can map, and a serial console, which is the
    terminal: Ctrl-A X ends QEMU, Ctrl-A C is its monitor. Whatever else it is to have is said in
    QEMU's words after ``--``. Without a kernel it boots from a virtio_blk device.

    Parameters
    ----------
    extra:
        More arguments for QEMU, after ``--``.
    device:
        A device: NAME[,key=value...] or path.py:Class[,key=value...]; give it once for each.
        ``vfiomig devices`` lists names and keys.
    qemu:
        This QEMU, 10.0 or later, and not the one on the PATH or in the cache folder.
    machine:
        The type of the machine.
    accel:
        How the guest's code is run: translated by QEMU, or by the processor.
    cpu:
        The processor's model, in QEMU's words; all that the accelerator has if not given.
    cpus:
        How many processors the machine has.
    memory:
        Its memory; M and G are powers of 1024. With tcg there are 8 KiB more.
    kernel:
        A Linux kernel to start, with its console on the serial port.
    initrd:
        The kernel's first file system.
    append:
        More for the kernel's command line, as one argument.
    incoming:
        Wait for a migration from this URI, or "defer" it to the monitor.
    only_print:
        Do not run it; print the command that does, for a shell.
    filter:
        As for ``vfiomig run``; QEMU reads and writes a lot, so fast is the default here.
    trace:
        Write a line for every request to this file; - is stderr.
    trace_format:
        Lines for people, or JSON lines.
    """
    program = find_qemu(qemu, cache_folder())
    _check_boot(kernel, initrd, append)
    made = Machine(
        kernel=kernel,
        initrd=initrd,
        append=append or "",
        type=machine,
        accel=ACCELERATORS[accel],
        cpu=cpu or "",
        cpus=cpus,
        memory_mib=_mebibytes(memory),
        extra=(*vfio_words(len(device)), *(("-incoming", incoming) if incoming else ()), *extra),
    )
    command = [str(program), *for_people(made)]
    if only_print:
        print(_for_a_shell(device, filter, command))
        return 0
    if accel == "kvm":
        _check_kvm()
    return serve(device, command, Dialect.LANDED, filter, trace, as_json=trace_format == "json")


def _for_a_shell(device: Sequence[str], filter_name: str, command: Sequence[str]) -> str:
    """Return the ``vfiomig run`` that does it; what it could not serve is an error here."""
    for spec in device:
        make(spec)
    devices = [word for spec in device for word in ("--device", spec)]
    return shlex.join(["vfiomig", "run", "--filter", filter_name, *devices, "--", *command])


def _check_boot(kernel: Path | None, initrd: Path | None, append: str | None) -> None:
    for option, file in (("--kernel", kernel), ("--initrd", initrd)):
        if file is not None and not file.is_file():
            raise SpecError(f"{option} {file}: there is no such file")
    if kernel is None and (initrd or append):
        given = "--initrd" if initrd else "--append"
        raise SpecError(f"{given} is for a kernel: name one with --kernel")


def _mebibytes(memory: str) -> int:
    try:
        size = parse_size(memory)
    except SpecError as problem:
        raise SpecError(f"--memory: {problem}") from None
    if not size or size % MIB:
        raise SpecError(f"--memory {memory}: give a whole number of MiB, like 256M or 1G")
    return size // MIB


def _check_kvm() -> None:
    """Refuse what QEMU would refuse in three lines, after the devices were started."""
    try:
        os.close(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as refusal:
        name = errno.errorcode.get(refusal.errno or 0, "")
        raise PrerequisiteError(
            f"{KVM} cannot be opened ({name}): use --accel tcg, or become a member of the group "
            "that owns it, on a machine that has it"
        ) from None
