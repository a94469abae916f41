"""tools/environment.sh: makes .venv, installs a lock by its hashes, links the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A wheel is a zip with three files of metadata.
WHEEL = {
    "gadget.py": "",
    "gadget-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: gadget\nVersion: 1.0\n",
    "gadget-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "gadget-1.0.dist-info/RECORD": (
        "gadget.py,,\ngadget-1.0.dist-info/METADATA,,\n"
        "gadget-1.0.dist-info/WHEEL,,\ngadget-1.0.dist-info/RECORD,,\n"
    ),
}


class Checkout:
    """A checkout with its own .venv and a folder of wheels as its index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        shutil.copytree(ROOT / "tools", folder / "tools")
        shutil.copytree(ROOT / "src", folder / "src")
        wheel = self.wheels / "gadget-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in WHEEL.items():
                archive.writestr(name, text)
        self.digest = hashlib.sha256(wheel.read_bytes()).hexdigest()

    def install(self, requirement: str, **pip: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "lock.txt").write_text(requirement + "\n")
        settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "1"}
        return self.run("sh", "tools/environment.sh", "lock.txt", **settings | pip)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "PYTHON": sys.executable} | environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Return a checkout, its path with a space, into which one lock was installed."""
    made = Checkout(tmp_path_factory.mktemp("a checkout"))
    done = made.install(
        f"gadget==1.0 --hash=sha256:{made.digest}",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=made.wheels.as_uri(),
    )
    assert done.returncode == 0, done.stderr
    return made


def test_a_lock_is_installed_and_the_checkout_linked(checkout: Checkout) -> None:
    program = "import gadget, vfiomig.version; print(vfiomig.version.__file__)"
    done = checkout.run(".venv/bin/python", "-c", program)
    assert done.stdout.strip() == str(checkout.folder / "src/vfiomig/version.py")


def test_without_the_cli_extra_the_command_says_in_one_line_how_to_get_it(
    checkout: Checkout,
) -> None:
    done = checkout.run(".venv/bin/vfiomig", "draw")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "needs cyclopts, which is not installed: pip install 'vfiomig[cli]'" in line


def test_the_command_starts_from_anywhere_and_through_a_symbolic_link(
    checkout: Checkout, tmp_path: Path
) -> None:
    # A module of the same name in the folder that the user stands in must not be taken.
    (tmp_path / "vfiomig.py").write_text("raise SystemExit(77)")
    link = tmp_path / "link"
    link.symlink_to(checkout.folder / ".venv/bin/vfiomig")
    done = subprocess.run([link], cwd=tmp_path, capture_output=True, timeout=100, check=False)
    assert done.returncode == 2
    assert b"vfiomig[cli]" in done.stderr


def test_a_checkout_can_be_moved(checkout: Checkout) -> None:
    elsewhere = checkout.folder.rename(checkout.folder.with_name("moved here"))
    try:
        command = [elsewhere / ".venv/bin/vfiomig"]
        done = subprocess.run(command, capture_output=True, timeout=100, check=False)
    finally:
        elsewhere.rename(checkout.folder)
    assert b"vfiomig[cli]" in done.stderr


def test_a_package_with_another_hash_is_refused(checkout: Checkout) -> None:
    wrong = "0" * 64
    checkout.run(".venv/bin/python", "-m", "pip", "uninstall", "--yes", "gadget")
    done = checkout.install(
        f"gadget==1.0 --hash=sha256:{wrong}",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=checkout.wheels.as_uri(),
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "differs from the one that lock.txt pins" in line
    assert wrong in (checkout.folder / ".venv/pip.log").read_text()


def test_no_index_is_one_line_that_says_what_to_do(checkout: Checkout) -> None:
    # Port 9 on this machine: nobody listens there.
    done = checkout.install(
        f"absent==1.0 --hash=sha256:{checkout.digest}", PIP_INDEX_URL="http://127.0.0.1:9/simple"
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no package index can be reached" in line
    assert "PIP_INDEX_URL" in line
    assert "127.0.0.1" in (checkout.folder / ".venv/pip.log").read_text()


def test_an_index_without_the_release_is_one_line_too(checkout: Checkout) -> None:
    done = checkout.install(
        f"absent==1.0 --hash=sha256:{checkout.digest}",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=checkout.wheels.as_uri(),
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "lacks a release that lock.txt pins" in line


def test_a_half_made_environment_is_made_again(tmp_path: Path) -> None:
    half = Checkout(tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/nonexistent/python3.11")
    done = half.install(
        f"gadget==1.0 --hash=sha256:{half.digest}",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=half.wheels.as_uri(),
    )
    assert done.returncode == 0, done.stderr
    assert "making .venv" in done.stdout
    assert half.run(".venv/bin/python", "-c", "import gadget").returncode == 0
