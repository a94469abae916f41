"""Folders for temporary files: made, removed, and swept when their owners were killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vfiomig.scratch import OWNER, ScratchFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).parents[2] / "src"
OWNER_OF_ONE = """
import sys
from vfiomig.scratch import ScratchFolder
folder = ScratchFolder("demo-")
(folder.path / "initrd").write_bytes(bytes(1 << 20))
(folder.path / "deep" / "er").mkdir(parents=True)
print(folder.path, flush=True)
sys.stdin.read()
"""
MANY = """
from vfiomig.scratch import ScratchFolder
for _ in range(200):
    with ScratchFolder() as folder:
        (folder.path / "mine").touch()
        assert (folder.path / "mine").exists()
    assert not folder.path.exists()
"""


@pytest.fixture(autouse=True)
def above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    return tmp_path


@contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER_OF_ONE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_a_folder_goes_when_it_is_closed(above: Path) -> None:
    with ScratchFolder("guest-") as folder:
        assert folder.path.parent == above
        assert folder.path.name.startswith("vfiomig-guest-")
        assert folder.path.stat().st_mode & 0o777 == 0o700
        (folder.path / "file").touch()
    folder.close()
    assert list(above.iterdir()) == []


def test_the_folder_of_a_killed_process_goes_with_the_next_one_that_is_made(above: Path) -> None:
    with owner() as (killed, left), owner() as (_, kept):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert (left / "initrd").stat().st_size == 1 << 20
        with ScratchFolder() as folder:
            assert set(above.iterdir()) == {kept, folder.path}
            assert (kept / "deep/er").is_dir()
    assert list(above.iterdir()) == [kept]  # that one was killed as well
    with ScratchFolder():
        assert not kept.exists()


def test_a_folder_that_is_not_known_for_ours_is_left_alone(above: Path) -> None:
    for name in ("vfiomig-notes", "vfiomig-empty", "other"):
        (above / name).mkdir()
    (above / "vfiomig-notes" / "mine").touch()
    (above / "vfiomig-file").touch()
    (above / "other" / OWNER).touch()
    (above / "vfiomig-link").symlink_to("other")
    (above / "vfiomig-fifo").mkdir()
    os.mkfifo(above / "vfiomig-fifo" / OWNER)  # which nobody waits for
    fcntl_locked = above / "vfiomig-locked"
    fcntl_locked.mkdir()
    with (fcntl_locked / OWNER).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {path.name for path in above.iterdir()} - {"vfiomig-fifo"}
        ScratchFolder().close()
    assert {path.name for path in above.iterdir()} >= before
    assert (above / "other" / OWNER).exists()
    assert (above / "vfiomig-notes" / "mine").exists()


def test_a_folder_of_somebody_else_is_left_alone(
    above: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = above / "vfiomig-theirs"
    theirs.mkdir()
    (theirs / OWNER).touch()
    somebody = os.geteuid() + 1
    with monkeypatch.context() as another:
        another.setattr(os, "geteuid", lambda: somebody)
        ScratchFolder().close()
    assert theirs.exists()
    ScratchFolder().close()
    assert not theirs.exists(), "it is ours again"


def test_many_that_come_and_go_remove_nothing_of_each_other(above: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", MANY]) for _ in range(4)]
    assert [process.wait(50) for process in running] == [0, 0, 0, 0]
    assert list(above.iterdir()) == []
