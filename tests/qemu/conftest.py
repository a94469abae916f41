"""What the tests with real guests share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest_parts import GuestParts
from vfiomig.qemu.initrd import DEFAULT_MODULES, build_initrd
from vfiomig.qemu.installed import VFIO_USER_QEMU, cache_folder
from vmtest.fetch import choose_qemu, fetch_guest_files, fetch_lspci, lspci_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SOURCE = Path(__file__).parents[2] / "src"
#: For a test that does not say it itself; guests are slow when the machine has much to do.
TIMEOUT_S = 180


@pytest.fixture(scope="session", autouse=True)
def _find_this_package() -> Iterator[None]:
    """Let what is started import from this checkout."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(SOURCE))
        environment.setenv("PYTHONDONTWRITEBYTECODE", "1")
        yield


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> GuestParts:
    """Fetched by `make test-qemu` before the tests; a run without it fetches here."""
    cache = cache_folder()
    files = fetch_guest_files(cache)
    initrd = tmp_path_factory.mktemp("guest") / "initrd"
    initrd.write_bytes(build_initrd(files))
    return GuestParts(choose_qemu(None, cache), files.kernel, initrd, files)


@pytest.fixture(scope="session")
def vfio_user_parts(tmp_path_factory: pytest.TempPathFactory) -> GuestParts:
    """Those with a QEMU that is a vfio-user client; the guest has lspci."""
    cache = cache_folder()
    files = fetch_guest_files(cache)
    initrd = tmp_path_factory.mktemp("guest") / "initrd"
    initrd.write_bytes(build_initrd(files, DEFAULT_MODULES, lspci_files(fetch_lspci(cache))))
    return GuestParts(choose_qemu(None, cache, VFIO_USER_QEMU), files.kernel, initrd, files)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
