"""The dirty log against a model that remembers every byte."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from vfiomig.iommu import DirtyLog
from vfiomig.iommu.dirty import UNIT

SPAN = 24 * UNIT
PAGE_SIZES = [UNIT << shift for shift in range(5)]


@dataclass
class Model:
    """Units of 4 KiB, cut to the range that holds them, as sets of bytes: no arithmetic."""

    ranges: list[tuple[int, int]]
    dirty: set[tuple[int, int]] = field(default_factory=set)  # (range, unit)

    def part(self, at: int, unit: int) -> range:
        start, length = self.ranges[at]
        low, high = max(start, unit * UNIT), min(start + length, (unit + 1) * UNIT)
        return range(low, high)

    def mark(self, iova: int, length: int) -> None:
        for at, (start, size) in enumerate(self.ranges):
            for byte in range(max(iova, start), min(iova + length, start + size)):
                self.dirty.add((at, byte // UNIT))

    def report(self, iova: int, length: int, page_size: int) -> set[int]:
        asked, bits = range(iova, iova + length), set()
        for key in list(self.dirty):
            part = self.part(*key)
            seen = [byte for byte in (part[0], part[-1]) if byte in asked]
            inside = range(max(part.start, asked.start), min(part.stop, asked.stop))
            if not inside:
                continue
            bits |= {(inside[0] - iova) // page_size, (inside[-1] - iova) // page_size}
            if len(seen) == 2 and inside == part:
                self.dirty.discard(key)
        return bits


@st.composite
def ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Ranges that do not overlap, made of the page size that START was asked with."""
    page = draw(st.sampled_from([1, 512, UNIT, 2 * UNIT]))
    edges = draw(st.lists(st.integers(0, SPAN // page), min_size=2, max_size=8, unique=True))
    edges = sorted(edge * page for edge in edges)
    pairs = list(zip(edges[::2], edges[1::2], strict=False))
    return [(low, high - low) for low, high in draw(st.permutations(pairs))]


PLACES = st.one_of(
    st.integers(0, SPAN),
    st.integers(0, SPAN // UNIT).map(lambda unit: unit * UNIT),
    st.integers(1, SPAN // UNIT).map(lambda unit: unit * UNIT - 1),
)
LENGTHS = st.one_of(st.integers(0, 3 * UNIT), st.sampled_from([0, 1, UNIT, UNIT + 1, SPAN]))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("mark"), PLACES, LENGTHS, st.just(0)),
        st.tuples(st.just("report"), PLACES, LENGTHS, st.sampled_from(PAGE_SIZES)),
    ),
    max_size=12,
)


class Bitmap:
    """A caller's bitmap with a guard on either side."""

    def __init__(self, size: int, content: int) -> None:
        self.memory = bytearray(b"\xa5" * 8 + bytes([content]) * size + b"\xa5" * 8)

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.memory[address : address + length])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self.memory[address : address + len(data)] = data


@settings(max_examples=250)
@given(ranges(), STEPS, st.sampled_from([0, 0x11]))
def test_a_report_has_the_bits_of_the_model_and_no_other(
    logged: list[tuple[int, int]], steps: list[tuple[str, int, int, int]], before: int
) -> None:
    log, model = DirtyLog(logged), Model(logged)
    for what, iova, length, page_size in steps:
        if what == "mark":
            log.mark(iova, length)
            model.mark(iova, length)
            continue
        size = -(-length // (page_size * 64)) * 8
        bitmap = Bitmap(size, before)
        log.report_into(iova, length, page_size, bitmap, 8)
        inside = bitmap.memory[8 : 8 + size]
        wanted = bytearray([before]) * size
        for bit in model.report(iova, length, page_size):
            wanted[bit >> 3] |= 1 << (bit & 7)
        assert inside == wanted
        assert bitmap.memory[:8] == bitmap.memory[8 + size :] == b"\xa5" * 8


@settings(max_examples=100)
@given(ranges(), STEPS)
def test_everything_that_was_written_is_told_by_the_end(
    logged: list[tuple[int, int]], steps: list[tuple[str, int, int, int]]
) -> None:
    log, written, told = DirtyLog(logged), set(), set()
    for what, iova, length, page_size in steps:
        if what == "mark":
            log.mark(iova, length)
            written |= {
                byte
                for start, size in logged
                for byte in range(max(iova, start), min(iova + length, start + size))
            }
        else:
            told |= _pages(log.report(iova, length, page_size), iova, page_size)
    told |= _pages(log.report(0, SPAN + UNIT, UNIT), 0, UNIT)
    assert {byte // UNIT for byte in written} <= told
    assert not any(log.report(0, SPAN + UNIT, UNIT))


def _pages(bitmap: bytearray, iova: int, page_size: int) -> set[int]:
    """The units that the bits of a report stand for."""
    bits = [bit for bit in range(len(bitmap) * 8) if bitmap[bit >> 3] >> (bit & 7) & 1]
    return {
        unit
        for bit in bits
        for unit in range(
            (iova + bit * page_size) // UNIT, (iova + (bit + 1) * page_size - 1) // UNIT + 1
        )
    }
