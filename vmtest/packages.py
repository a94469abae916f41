"""Debian packages, resolved, downloaded, checked and unpacked into a folder.

Theory of operation
-------------------
apt does the work, with a configuration of its own: sources, lists and archives are in one
folder, and the file that says what is installed is empty. So nobody has to be root, nothing of
the machine changes, and a resolution contains every library down to the C library, whatever
this machine has. The mirror is the one that the machine's own sources name for its release, and
the machine's proxies and time limits hold, because apt reads them before the private file.

``apt-get download`` continues a file that a killed run left behind, but believes one that has
its full size already. So every archive's SHA-256, which apt has out of the signed index, is
computed here, and an archive that differs is removed.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmtest.errors import FetchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ("Archive", "Repository", "mirror_of", "parse_archives", "parse_plan", "unpack")

_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_DEADLINE_S: Final = 900

_CONFIGURATION: Final = """\
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{folder}/state";
Dir::State::lists "{folder}/lists";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Cache::archives "{folder}/archives";
APT::Architecture "amd64";
#clear APT::Architectures;
APT::Architectures {{ "amd64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Debug::NoLocking "true";
// What the machine does after its own updates is none of this folder's business.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


@dataclass(frozen=True, slots=True)
class Archive:
    """A package's file as the signed index describes it."""

    file: str
    size: int
    sha256: str


class Repository:
    """Suites of the machine's own mirror, seen by an apt that knows of nothing installed."""

    def __init__(self, folder: Path, suites: Sequence[str], release: str) -> None:
        """Prepare ``folder``; of equal packages the one in the last of ``suites`` is taken.

        ``release`` is the machine's own, which its sources name a mirror for.
        """
        for program in ("apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                raise FetchError(
                    f"{program} is not installed, so nothing can be fetched: this needs Debian; "
                    "elsewhere pass --qemu, --kernel, --modules and --busybox"
                )
        self._folder = folder
        self._suites = tuple(suites)
        self._release = release
        self._write_configuration()

    def age(self) -> float:
        """Return how many seconds ago the indices were read completely."""
        stamp = self._folder / "refreshed"
        return time.time() - stamp.stat().st_mtime if stamp.exists() else math.inf

    def refresh(self) -> None:
        """Read the mirror's indices anew."""
        # In a folder without lists, so that sources are named that this machine never read.
        lists = f"Dir::State::lists={self._folder}/lists"
        command = ["apt-get", "-o", lists, "-o", "Debug::NoLocking=1", "update", "--print-uris"]
        mirror = mirror_of(_run(command), self._release)
        if mirror is None:
            raise FetchError(
                f"no source of this machine's apt offers {self._release}: "
                "add the distribution's mirror to its sources"
            )
        options = "target=Packages"
        if Path(_KEYRING).exists():
            options += f" signed-by={_KEYRING}"
        lines = [f"deb [{options}] {mirror} {suite} main\n" for suite in self._suites]
        (self._folder / "sources.list").write_text("".join(lines))
        _run(self._command("update", "--error-on=any"))
        (self._folder / "refreshed").touch()

    def closure(self, *names: str, suite: str = "") -> list[str]:
        """Return ``names`` and all that they depend on, each as ``name=version``.

        Of equal packages the one in ``suite`` is taken, the last of the suites if none is named.
        """
        chosen = suite or self._suites[-1]
        return parse_plan(_run(self._command("-t", chosen, "-s", "install", *names)))

    def kernel_of(self, metapackage: str) -> str:
        """Return the image package that ``metapackage`` stands for, as ``name=version``."""
        plan = self.closure(metapackage)
        image = re.compile(r"linux-image-\d")
        found = next((selected for selected in plan if image.match(selected)), None)
        if found is None:
            raise FetchError(f"{metapackage} depends on no kernel image: {' '.join(plan)}")
        return found

    def download(self, selected: Sequence[str], progress: Callable[[float], None]) -> list[Path]:
        """Return the archives of ``selected``, downloading those that are not there yet."""
        archives = parse_archives(_run(self._command("--print-uris", "download", *selected)))
        into = self._folder / "archives"
        wanted = [archive for archive in archives if not _is_complete(into / archive.file, archive)]
        if wanted:
            self._download(selected, into, progress)
        for archive in wanted:
            path = into / archive.file
            if not _is_complete(path, archive):
                path.unlink(missing_ok=True)
                raise FetchError(f"{archive.file} differs from what the index says: fetch again")
        return [into / archive.file for archive in archives]

    def _write_configuration(self) -> None:
        for name in ("lists/partial", "archives/partial", "state", "cache"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()
        (self._folder / "apt.conf").write_text(_CONFIGURATION.format(folder=self._folder))

    def _command(self, *words: str) -> list[str]:
        return ["apt-get", "-c", str(self._folder / "apt.conf"), "-q", *words]

    def _download(
        self, selected: Sequence[str], into: Path, progress: Callable[[float], None]
    ) -> None:
        command = self._command("-q", "-o", "APT::Status-Fd=1", "download", *selected)
        with subprocess.Popen(
            command,
            cwd=into,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            deadline = threading.Timer(_DEADLINE_S, process.kill)
            deadline.start()
            said = []
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("dlstatus:"):
                        progress(float(line.split(":")[2]))
                    else:
                        said.append(line)
            except BaseException:
                process.kill()
                raise
            finally:
                deadline.cancel()
                deadline.join()
        if process.returncode:
            raise FetchError(_explain(command, "".join(said)))


def mirror_of(listed: str, suite: str) -> str | None:
    """Return the address that has ``suite``, from what ``apt-get update --print-uris`` lists."""
    found = re.search(rf"^'(\S+?)/dists/{re.escape(suite)}/InRelease'", listed, re.MULTILINE)
    return found[1] if found else None


def parse_plan(simulated: str) -> list[str]:
    """Return ``name=version`` of every package that ``apt-get -s install`` would install."""
    found = re.findall(r"^Inst (\S+) \((\S+) ", simulated, re.MULTILINE)
    return [f"{name}={version}" for name, version in found]


def parse_archives(listed: str) -> list[Archive]:
    """Return what ``apt-get --print-uris download`` lists."""
    rows = re.findall(r"^'\S+' (\S+) (\d+) SHA256:([0-9a-f]{64})$", listed, re.MULTILINE)
    return [Archive(file, int(size), sha256) for file, size, sha256 in rows]


def unpack(archives: Sequence[Path], root: Path) -> None:
    """Unpack ``archives`` into the new folder ``root``, where no file is setuid or setgid."""
    # Until the bits are gone, nobody else gets to the files.
    root.mkdir(mode=0o700)
    for archive in archives:
        command = ["dpkg-deb", "-x", str(archive), str(root)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
        )
        if done.returncode:
            raise FetchError(f"{archive.name} cannot be unpacked: {done.stderr.strip()}")
    for folder, _, files in os.walk(root):
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink() and path.stat().st_mode & 0o6000:
                path.chmod(path.stat().st_mode & 0o1777)
    root.chmod(0o755)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"{' '.join(command)} took longer than {_DEADLINE_S} s") from None
    if done.returncode:
        raise FetchError(_explain(command, done.stderr))
    return done.stdout


def _is_complete(path: Path, archive: Archive) -> bool:
    if not path.exists() or path.stat().st_size != archive.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == archive.sha256


def _environment() -> dict[str, str]:
    return os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def _explain(command: Sequence[str], said: str) -> str:
    errors = [line[3:].strip() for line in said.splitlines() if line.startswith("E:")]
    reason = errors[0] if errors else said.strip().rpartition("\n")[2] or "no reason given"
    if {"update", "download"} & set(command):
        return f"the packages cannot be downloaded, is there a network? apt-get says: {reason}"
    return f"{' '.join(command)} failed: {reason}"
