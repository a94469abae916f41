"""What a guest is made of, and the cache folder that has it.

Theory of operation
-------------------
Sets of packages are fetched: a QEMU with all its libraries and firmware, a newer one that is a
vfio-user client, what runs in the guest (a kernel with its modules, busybox), and lspci for the
guest. A set is a folder in the cache. It is built under
another name and renamed when it is complete, so that whoever sees it can use it; what was
downloaded for a set that did not become complete is still there for the next try. One process
at a time builds; a second one waits and then finds the work done.

QEMU is started with the C library and the loader of its own folder. Both come out of one
resolution, so this works on every machine whose kernel runs them, and nothing of the machine's
own libraries is mixed in. The launcher script that does it is a QEMU like any other to whoever
is given its path. In the same way lspci runs in a guest, which has no libraries at all.
"""

from __future__ import annotations

import fcntl
import re
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
    MIGRATING_QEMU,
    PROGRAM,
    VFIO_USER_QEMU,
    cached_guest_files,
    cached_qemu,
    find_qemu,
)
from vmtest import vmlinux
from vmtest.errors import FetchError
from vmtest.packages import Repository, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vfiomig.qemu.installed import GuestFiles, QemuSet

__all__ = ("choose_qemu", "fetch_guest_files", "fetch_lspci", "fetch_qemu", "lspci_files", "say")

_LOCK_DEADLINE_S: Final = 900
_LOCK_POLL_S: Final = 0.2

T = TypeVar("T")

#: Lists that were read less than this long ago, for the other set or before a failure, will do.
_FRESH_S: Final = 3600

#: Where a release's own QEMU or kernel is too old (10.0, and 6.8 for vfio's sample drivers).
_BACKPORTS: Final = {"bookworm": ("bookworm", "bookworm-backports")}
#: What another release than the machine's has to be.
_OTHER_SUITES: Final = {VFIO_USER_QEMU: ("trixie", "trixie-backports")}

#: The file of a set that names its packages.
_LISTING: Final = "packages"

_LIBRARIES: Final = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
_LOADER: Final = "ld-linux-x86-64.so.2"
#: What a QEMU's packages have for people, and no program reads.
_UNREAD: Final = ("doc", "info", "locale", "man")

#: lspci, the loader and the libraries, all in one folder.
_LSPCI_SET: Final = "lspci-1"
_LSPCI: Final = "lspci.program"
_LSPCI_LAUNCHER: Final = f"""\
#!/bin/sh
exec /bin/{_LOADER} --library-path /bin /bin/{_LSPCI} "$@"
"""

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


def choose_qemu(given: Path | None, cache: Path, which: QemuSet = MIGRATING_QEMU) -> Path:
    """Return ``given``, or a QEMU that is there already, or else fetch one."""
    try:
        return find_qemu(given, cache, which)
    except PrerequisiteError:
        if given is not None:
            raise
        return fetch_qemu(cache, which)


def fetch_qemu(cache: Path, which: QemuSet = MIGRATING_QEMU) -> Path:
    """Return the program that starts the cache's QEMU, fetching it if it is not there."""
    return _fetched(
        cache,
        lambda cache: cached_qemu(cache, which),
        lambda cache: _build_qemu(cache, which),
    )


def fetch_guest_files(cache: Path) -> GuestFiles:
    """Return the cache's kernel, modules and busybox, fetching them if they are not there."""
    return _fetched(cache, cached_guest_files, _build_guest_files)


def fetch_lspci(cache: Path) -> Path:
    """Return the cache's folder with lspci and its libraries, fetching it if it is not there."""

    def look(cache: Path) -> Path | None:
        folder = cache / _LSPCI_SET
        return folder if folder.exists() else None

    return _fetched(cache, look, _build_lspci)


def lspci_files(folder: Path) -> dict[str, bytes]:
    """Return what a guest's initrd needs to have lspci, by path."""
    files = {f"bin/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
    del files[f"bin/{_LISTING}"]
    return files | {"bin/lspci": _LSPCI_LAUNCHER.encode()}


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


def _build_qemu(cache: Path, which: QemuSet) -> None:
    suites = _OTHER_SUITES.get(which)
    repository = _repository(cache, suites)
    what = f"QEMU of {suites[-1]}" if suites else "QEMU"
    archives = _download(repository, what, repository.closure("qemu-system-x86"))
    with _under_construction(cache / which.folder, archives) as new:
        root = new / "root"
        unpack(archives, root)
        for unread in _UNREAD:
            shutil.rmtree(root / "usr/share" / unread, ignore_errors=True)
        launcher = new / PROGRAM
        launcher.write_text(_LAUNCHER.format(loader=_loader_in(root).relative_to(root)))
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


def _build_lspci(cache: Path) -> None:
    repository = _repository(cache)
    archives = _download(repository, "lspci", repository.closure("pciutils"))
    with _under_construction(cache / _LSPCI_SET, archives) as new:
        root = new / "root"
        unpack(archives, root)
        loader = _loader_in(root)
        for path in (loader, *_libraries_of(root / "usr/bin/lspci", loader, root)):
            shutil.copyfile(path, new / path.name)
        (root / "usr/bin/lspci").rename(new / _LSPCI)
        shutil.rmtree(root)


def _repository(cache: Path, suites: Sequence[str] | None = None) -> Repository:
    """Return the machine's own suites, or ``suites`` of the mirror that it has these from."""
    release = _release(Path("/etc/os-release").read_text())
    folder = "apt" if suites is None else f"apt-{suites[0]}"
    suites = _suites(release) if suites is None else suites
    repository = Repository(cache / folder, suites, release)
    if repository.age() > _FRESH_S:
        say(f"reading the package lists of {' and '.join(suites)}")
        repository.refresh()
    return repository


def _release(os_release: str) -> str:
    fields = dict(line.split("=", 1) for line in os_release.splitlines() if "=" in line)
    codename = fields.get("VERSION_CODENAME", "").strip('"')
    if fields.get("ID", "").strip('"') != "debian" or not codename:
        raise FetchError(
            f"packages are fetched on Debian only, and this is {fields.get('ID', 'unknown')}: "
            "put a QEMU 11.0 or later on the PATH, and pass --kernel and --busybox"
        )
    return codename


def _suites(release: str) -> Sequence[str]:
    """Return the suites of this machine's release in which everything is new enough."""
    return _BACKPORTS.get(release, (release,))


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
    for place in _LIBRARIES:
        loader = root / place / _LOADER
        if loader.exists():
            return loader
    raise FetchError(f"no {_LOADER} in {root}: remove the folder and fetch again")


def _libraries_of(program: Path, loader: Path, root: Path) -> list[Path]:
    """Return what the loader would load for a program, all of it in ``root``."""
    places = ":".join(str(root / place) for place in _LIBRARIES)
    options = ["--inhibit-cache", "--library-path", places, "--list"]
    command = [str(loader), *options, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = [Path(path) for path in re.findall(r" => (\S+) \(0x", done.stdout)]
    if done.returncode or not all(path.is_relative_to(root) for path in found):
        raise FetchError(f"{program.name} lacks a library: {(done.stdout + done.stderr).strip()}")
    return found


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
    (new / _LISTING).write_text("".join(f"{archive.name}\n" for archive in archives))
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
