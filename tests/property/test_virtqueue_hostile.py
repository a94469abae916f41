"""Whatever a driver puts into its rings, the device answers, fails or asks for a reset."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from vfiomig.models.virtio_blk import VirtioBlk
from virtio_driver import (
    BASE,
    EVENT_IDX,
    FEATURES_OK,
    INDIRECT,
    IOERR,
    MEMORY,
    NEEDS_RESET,
    OK,
    UNSUPP,
    VERSION_1,
    Bench,
    Driver,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

SIZE = 8
DISK = 64 << 10
FEATURES = (VERSION_1, VERSION_1 | INDIRECT, VERSION_1 | EVENT_IDX | INDIRECT)


class Entry(NamedTuple):
    """A descriptor; ``kind`` and ``sector`` are put where it leads, as a header."""

    address: int
    length: int
    flags: int
    following: int
    kind: int
    sector: int


def addresses() -> SearchStrategy[int]:
    inside = st.integers(0, MEMORY // 4096 - 1).map(lambda page: BASE + page * 4096)
    edges = st.sampled_from([BASE + MEMORY - 8, BASE - 8, BASE + 0x1000, 0, (1 << 64) - 1])
    return st.one_of(inside, inside, edges)


ENTRIES = st.builds(
    Entry,
    addresses(),
    st.one_of(st.sampled_from([0, 1, 16, 16, 32, 48, 512, 4096]), st.integers(0, (1 << 32) - 1)),
    st.one_of(st.sampled_from([0, 1, 2, 3, 4]), st.integers(0, 7)),
    st.integers(0, SIZE),
    st.sampled_from([0, 1, 4, 8, 99]),
    st.one_of(st.integers(0, 200), st.integers(0, (1 << 64) - 1)),
)


@settings(max_examples=300)
@given(
    entries=st.lists(ENTRIES, min_size=SIZE, max_size=SIZE),
    heads=st.lists(st.integers(0, SIZE), min_size=1, max_size=SIZE),
    extra=st.sampled_from([0, 0, 0, 1, 9, 0x8000]),
    features=st.sampled_from(FEATURES),
)
def test_rings_of_any_content_have_only_the_outcomes_that_are_told(
    entries: list[Entry], heads: list[int], extra: int, features: int
) -> None:
    with Bench(VirtioBlk(size=DISK)) as bench:
        driver = Driver(bench, bench.guest)
        driver.start(features=features, size=SIZE)
        for number, entry in enumerate(entries):
            at = entry.address - BASE
            if 0x8000 <= at <= MEMORY - 16:
                driver.pack(at, "IIQ", entry.kind, 0, entry.sector)
            driver.describe(driver.table, number, *entry[:4])
        for head in heads:
            driver.offer_head(head)
        driver.pack(driver.avail + 2, "H", (driver.next_avail + extra) & 0xFFFF)
        driver.kick(always=True)
        bench.device.quiesce()
        queue = bench.device.common.queues[0]
        broken = bool(driver.status & NEEDS_RESET)
        assert broken or queue.next_avail == queue.next_used == len(heads)
        assert queue.next_used <= len(heads) + extra
        # Whatever was done: the next driver finds a working disk.
        bench.device.start()
        driver.start(size=SIZE)
        driver.write(3, b"w" * 512)
        assert driver.read(3, 512) == b"w" * 512


@settings(max_examples=200)
@given(
    kind=st.one_of(st.sampled_from([0, 1, 4, 8]), st.integers(0, (1 << 32) - 1)),
    sector=st.one_of(st.integers(0, 130), st.integers(0, (1 << 64) - 1)),
    length=st.one_of(st.integers(0, 9).map(lambda n: n * 512), st.integers(0, 8192)),
    out=st.booleans(),
    parts=st.integers(1, 3),
    indirect=st.booleans(),
)
def test_a_well_formed_request_gets_the_status_that_it_deserves(
    kind: int, sector: int, length: int, out: bool, parts: int, indirect: bool
) -> None:
    with Bench(VirtioBlk(size=DISK)) as bench:
        driver = Driver(bench, bench.guest)
        driver.start()
        length -= length % parts
        data = b"d" * length if out else b""
        request = driver.build(kind, sector, data, length, parts=parts, indirect=indirect)
        driver.run(request)
        moved = length if (kind == 1) == out else 0
        fits = moved % 512 == 0 and sector * 512 + moved <= DISK
        known = {0: OK if fits else IOERR, 1: OK if fits else IOERR, 4: OK, 8: OK}
        assert request.status == known.get(kind, UNSUPP)


@settings(max_examples=200)
@given(
    writes=st.lists(
        st.tuples(st.integers(0, 0x3FFF), st.binary(min_size=1, max_size=8)), max_size=30
    )
)
def test_registers_of_any_content_leave_a_device_that_can_be_reset(
    writes: list[tuple[int, bytes]],
) -> None:
    with Bench(VirtioBlk(size=DISK)) as bench:
        driver = Driver(bench, bench.guest)
        for offset, data in writes:
            driver.bar.write(offset, data)
            driver.bar.read(offset, len(data))
        driver.start()
        assert driver.status & FEATURES_OK
        driver.write(0, struct.pack("<Q", 7) * 64)
