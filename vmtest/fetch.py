"""What a guest is made of, and the cache folder that has it.

Theory of operation
-------------------
Two sets of packages are fetched: QEMU with all its libraries and firmware, and what runs in the
guest (a kernel with its modules, busybox). A set is a folder in the cache. It is built under
another name and renamed when it is complete, so that whoever sees it can use it; what was
downloaded for a set that did not become complete is still there for the next try. One process
at a time builds; a second one waits and then finds the work done.

QEMU is started with the C library and the loader of its own folder. Both come out of one
resolution, so this works on every machine whose kernel runs them, and nothing of the machine's
own libraries is mixed in. The launcher script that does it is a QEMU like any other to whoever
is given its path.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from vfiomig.errors import PrerequisiteError
from vfiomig.qemu.installed import (
    GUEST_SET,
    PROGRAM,
    QEMU_SET,
    cached_guest_files,
    cached_qemu,
    find_qemu,
)
from vmtest import vmlinux
from vmtest.errors import FetchError
from vmtest.packages import Repository, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vfiomig.qemu.installed import GuestFiles

__all__ = ("choose_qemu", "fetch_guest_files", "fetch_qemu", "say")

_LOCK_DEADLINE_S: Final = 900
_LOCK_POLL_S: Final = 0.2

T = TypeVar("T")

#: Lists that were read less than this long ago, for the other set or before a failure, will do.
_FRESH_S: Final = 3600

#: Where a release's own QEMU or kernel is too old (10.0, and 6.8 for vfio's sample drivers).
_BACKPORTS: Final = {"bookworm": ("bookworm", "bookworm-backports")}

_LAUNCHER: Final = """\
#!/bin/sh
here=$(dirname -- "$(readlink -f -- "$0")")
libraries=$here/root/lib/x86_64-linux-gnu:$here/root/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$here/root/usr/lib/x86_64-linux-gnu/qemu"
exec "$here/root/{loader}" --inhibit-cache --library-path "$libraries" --argv0 "$0" \\
    "$here/root/usr/bin/qemu-system-x86_64" \\
    -L "$here/root/usr/share/qemu" -L "$here/root/usr/share/seabios" \\
    -L "$here/root/usr/lib/ipxe/qemu" "$@"
"""


def choose_qemu(given: Path | None, cache: Path) -> Path:
    """Return ``given``, or a QEMU that is there already, or else fetch one."""
    try:
        return find_qemu(given, cache)
    except PrerequisiteError:
        if given is not None:
            raise
        return fetch_qemu(cache)


def fetch_qemu(cache: Path) -> Path:
    """Return the program that starts the cache's QEMU, fetching it if it is not there."""
    return _fetched(cache, cached_qemu, _build_qemu)


def fetch_guest_files(cache: Path) -> GuestFiles:
    """Return the cache's kernel, modules and busybox, fetching them if they are not there."""
    return _fetched(cache, cached_guest_files, _build_guest_files)


def say(line: str, *, again: bool = False) -> None:
    """Report progress: to a terminal every ``again`` line over the one before, else the others."""
    if sys.stderr.isatty():
        end = "" if again else "\n"
        print(f"\r\x1b[Kvmtest: {line}", end=end, file=sys.stderr, flush=True)
    elif not again:
        print(f"vmtest: {line}", file=sys.stderr, flush=True)


def _fetched(cache: Path, look: Callable[[Path], T | None], build: Callable[[Path], None]) -> T:
    """Return what ``look`` finds in the cache, after ``build`` if it is not there."""
    there = look(cache)
    if there is None:
        with _locked(cache):
            if look(cache) is None:
                build(cache)
            there = look(cache)
    assert there is not None
    return there


def _build_qemu(cache: Path) -> None:
    repository = _repository(cache)
    archives = _download(repository, "QEMU", repository.closure("qemu-system-x86"))
    with _under_construction(cache / QEMU_SET, archives) as new:
        unpack(archives, new / "root")
        launcher = new / PROGRAM
        launcher.write_text(_LAUNCHER.format(loader=_loader_in(new / "root")))
        launcher.chmod(0o755)
        _prove(launcher)


def _build_guest_files(cache: Path) -> None:
    repository = _repository(cache)
    image = repository.kernel_of("linux-image-amd64")
    archives = _download(repository, "a kernel and busybox", [image, "busybox-static"])
    with _under_construction(cache / GUEST_SET, archives) as new:
        root = new / "root"
        unpack(archives, root)
        (compressed,) = root.glob("boot/vmlinuz-*")
        kernel = vmlinux.extract(compressed.read_bytes())
        if kernel is None:
            say("the kernel stays compressed, libzstd.so.1 is missing: guests boot more slowly")
        (new / "kernel").write_bytes(kernel or compressed.read_bytes())
        # Debian 13 merged the two folders of each kind.
        (busybox,) = [*root.glob("bin/busybox"), *root.glob("usr/bin/busybox")]
        busybox.rename(new / "busybox")
        (modules,) = [*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")]
        modules.rename(new / "modules")
        shutil.rmtree(root)


def _repository(cache: Path) -> Repository:
    suites = _suites(Path("/etc/os-release").read_text())
    repository = Repository(cache / "apt", suites)
    if repository.age() > _FRESH_S:
        say(f"reading the package lists of {' and '.join(suites)}")
        repository.refresh()
    return repository


def _suites(os_release: str) -> Sequence[str]:
    """Return the suites of this machine's release in which everything is new enough."""
    fields = dict(line.split("=", 1) for line in os_release.splitlines() if "=" in line)
    codename = fields.get("VERSION_CODENAME", "").strip('"')
    if fields.get("ID", "").strip('"') != "debian" or not codename:
        raise FetchError(
            f"packages are fetched on Debian only, and this is {fields.get('ID', 'unknown')}: "
            "put a QEMU 10.0 or later on the PATH, and pass --kernel and --busybox"
        )
    return _BACKPORTS.get(codename, (codename,))


def _download(repository: Repository, what: str, selected: Sequence[str]) -> list[Path]:
    say(f"downloading {what}: {len(selected)} packages")
    start = time.monotonic()
    archives = repository.download(
        selected, lambda percent: say(f"downloading {what}: {percent:.0f} %", again=True)
    )
    mib = sum(path.stat().st_size for path in archives) / 2**20
    say(f"downloaded {what}: {mib:.0f} MiB in {time.monotonic() - start:.1f} s")
    return archives


def _loader_in(root: Path) -> Path:
    # The link in /lib64 may be absolute and then names the machine's own.
    for place in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"):
        loader = root / place / "ld-linux-x86-64.so.2"
        if loader.exists():
            return loader.relative_to(root)
    raise FetchError(f"no ld-linux-x86-64.so.2 in {root}: remove the folder and fetch again")


def _prove(launcher: Path) -> None:
    """Refuse a QEMU that does not even say its version here."""
    done = subprocess.run(
        [launcher, "-version"], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise FetchError(f"the fetched QEMU does not run here: {done.stderr.strip()}")


@contextmanager
def _under_construction(folder: Path, archives: Sequence[Path]) -> Iterator[Path]:
    """Build ``folder`` out of ``archives`` under another name, and forget them when it is there.

    What an earlier try left is removed.
    """
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    say(f"unpacking into {folder}")
    yield new
    (new / "packages").write_text("".join(f"{archive.name}\n" for archive in archives))
    new.rename(folder)
    for archive in archives:
        archive.unlink()


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as file:
        deadline = time.monotonic() + _LOCK_DEADLINE_S
        waiting = False
        # A file lock has no descriptor to poll, so that the deadline needs a loop.
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    say(f"waiting for another process that fetches into {cache}")
                waiting = True
            if time.monotonic() > deadline:
                raise FetchError(f"{cache}/lock is held for {_LOCK_DEADLINE_S} s: who holds it?")
            time.sleep(_LOCK_POLL_S)
        yield
