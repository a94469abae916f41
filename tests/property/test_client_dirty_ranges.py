"""The ranges of a bitmap are exactly its bits."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from vfiomig.client import dirty_ranges


@given(
    pages=st.integers(0, 200),
    dirty=st.sets(st.integers(0, 199)),
    page_shift=st.integers(12, 21),
    cut=st.integers(0, 4095),
)
def test_the_ranges_cover_the_dirty_pages_and_nothing_else(
    pages: int, dirty: set[int], page_shift: int, cut: int
) -> None:
    page, iova = 1 << page_shift, 1 << 32
    length = max(0, pages * page - cut)  # the report may end inside its last page
    bitmap = bytearray(-(-pages // 64) * 8)
    for number in dirty:
        if number < pages:
            bitmap[number >> 3] |= 1 << (number & 7)
    ranges = list(dirty_ranges(bitmap, iova, length, page))
    covered = {
        number
        for start, size in ranges
        for number in range((start - iova) // page, -(-(start + size - iova) // page))
    }
    assert covered == {number for number in dirty if number * page < length}
    assert all(start % page == 0 and size > 0 for start, size in ranges)
    assert all(a + size < b for (a, size), (b, _) in pairwise(ranges))
    assert all(start + size <= iova + length for start, size in ranges)
