"""docs/vfio-user.md says of servers what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from vfiomig.doors.vfio_user import line
from vfiomig.doors.vfio_user.compat import DIFFERENCES, KERNEL

PAGE = (Path(__file__).parents[2] / "docs/vfio-user.md").read_text()


def test_the_page_names_every_difference_and_no_other() -> None:
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert rows[1:] == [tuple(row) for row in DIFFERENCES]


def test_the_page_tells_the_limits_that_there_are() -> None:
    ours = KERNEL.capabilities
    assert ours.max_data_xfer_size is not None
    for sentence in (
        f"does not answer one within {line.DMA_SECONDS:g} seconds",
        f"does not read its replies, for {line.STALLED:g} seconds",
        f"messages of up to {ours.max_data_xfer_size >> 20} MiB",
        f"up to {ours.max_dma_maps} mappings",
    ):
        assert sentence in PAGE
