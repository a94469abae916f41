"""The command line: ``python -m vmtest fetch`` and ``python -m vmtest boot -- COMMAND``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from vfiomig.errors import SpecError, VfioMigError
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.initrd import DEFAULT_MODULES, build_initrd
from vfiomig.qemu.installed import VFIO_USER_QEMU, GuestFiles, cache_folder
from vfiomig.qemu.machine import DEFAULT_ACCEL, Machine
from vmtest.fetch import choose_qemu, fetch_guest_files, fetch_lspci, say
from vmtest.mtty import fetch_mtty

#: As env, nice and their like: no exit status of the command itself.
_OWN_FAILURE: Final = 125


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vmtest", description="Guests for tests.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--qemu", type=Path, help="this QEMU, 10.0 or later")
    fetch = verbs.add_parser(
        "fetch",
        parents=[shared],
        help="download what is missing and say where it is",
        description="Download QEMU (unless one on the PATH will do), a newer one that is a "
        "vfio-user client, a kernel, busybox and lspci into $VFIOMIG_CACHE, "
        "$XDG_CACHE_HOME/vfiomig or ~/.cache/vfiomig.",
    )
    fetch.add_argument(
        "--demo", action="store_true", help="no more than make demo-qemu needs, which is less"
    )
    boot = verbs.add_parser(
        "boot",
        parents=[shared],
        help="run a command in a guest and end with its exit status",
        description="Boot a guest, run COMMAND in its shell, and end with its exit status; "
        f"{_OWN_FAILURE} says that it could not be run.",
    )
    boot.add_argument("--kernel", type=Path, help="this kernel instead of a fetched one")
    boot.add_argument("--modules", type=Path, help="its folder of modules")
    boot.add_argument("--busybox", type=Path, help="this static busybox instead of a fetched one")
    boot.add_argument("--module", action="append", default=[], help="load this one too")
    boot.add_argument("--machine", default="q35", help="QEMU's machine type")
    boot.add_argument("--accel", default=DEFAULT_ACCEL, help="QEMU's accelerator")
    boot.add_argument("--memory", type=int, default=256, metavar="MIB")
    boot.add_argument("--device", action="append", default=[], help="a device, as QEMU takes it")
    boot.add_argument("--qemu-arg", action="append", default=[], help="a word for QEMU, at the end")
    boot.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="for COMMAND")
    boot.add_argument("command", nargs="+", metavar="COMMAND")
    return parser


def _fetch(options: argparse.Namespace) -> int:
    cache = cache_folder()
    print(f"qemu {choose_qemu(options.qemu, cache)}")
    files = fetch_guest_files(cache)
    print(f"kernel {files.kernel}\nmodules {files.modules}\nbusybox {files.busybox}")
    if not options.demo:
        print(f"qemu for vfio-user {choose_qemu(None, cache, VFIO_USER_QEMU)}")
        print(f"lspci {fetch_lspci(cache)}")
        for flavour, guest in fetch_mtty(cache).items():
            print(f"mtty by {flavour}: kernel {guest.kernel}, modules {guest.modules}")
    return 0


def _boot(options: argparse.Namespace) -> int:
    cache = cache_folder()
    qemu = choose_qemu(options.qemu, cache)
    files = _files(options, cache)
    devices = [word for device in options.device for word in ("-device", device)]
    with tempfile.TemporaryDirectory(prefix="vmtest-") as folder:
        initrd = Path(folder, "initrd")
        initrd.write_bytes(build_initrd(files, [*DEFAULT_MODULES, *options.module]))
        machine = Machine(
            kernel=files.kernel,
            initrd=initrd,
            type=options.machine,
            accel=options.accel,
            memory_mib=options.memory,
            extra=(*devices, *options.qemu_arg),
        )
        start = time.monotonic()
        with Guest(qemu, machine) as guest:
            guest.wait_ready()
            say(f"booted after {time.monotonic() - start:.1f} s")
            outcome = guest.run(" ".join(options.command), timeout=options.timeout)
            guest.power_off(outcome.status)
    sys.stdout.buffer.write(outcome.output)
    sys.stdout.flush()
    return outcome.status


def _files(options: argparse.Namespace, cache: Path) -> GuestFiles:
    if options.kernel and options.busybox:
        return GuestFiles(options.kernel, options.busybox, options.modules)
    if options.kernel or options.busybox or options.modules:
        raise SpecError("--kernel and --busybox go together, --modules with them")
    return fetch_guest_files(cache)


def main() -> int:
    """Run one verb and return the exit code."""
    options = _parser().parse_args()
    try:
        return _fetch(options) if options.verb == "fetch" else _boot(options)
    except VfioMigError as error:
        say(str(error))
        return 2 if options.verb == "fetch" else _OWN_FAILURE
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
