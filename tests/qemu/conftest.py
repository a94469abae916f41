"""What the tests with real guests share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest_parts import GuestParts
from vmtest.fetch import cache_folder, fetch_guest_files
from vmtest.initrd import build_initrd
from vmtest.qemu import choose_qemu

if TYPE_CHECKING:
    from collections.abc import Sequence

#: For a test that does not say it itself; guests are slow when the machine has much to do.
TIMEOUT_S = 180


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> GuestParts:
    """Fetched by `make test-qemu` before the tests; a run without it fetches here."""
    cache = cache_folder()
    files = fetch_guest_files(cache)
    initrd = tmp_path_factory.mktemp("guest") / "initrd"
    initrd.write_bytes(build_initrd(files))
    return GuestParts(choose_qemu(None, cache), files.kernel, initrd)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
