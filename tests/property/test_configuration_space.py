"""Whatever is written to configuration space, read-only bits stay and sizing tells the truth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pci_card import Card, space_of
from vfiomig.device import ConfigurationSpace, PciIdentity, Region

#: Found by writing ones and zeros to a fresh space, bit by bit independent of each other.
FRESH = space_of(Card).read(0, 4096)


def writable_bits() -> bytes:
    ones, zeros = space_of(Card), space_of(Card)
    ones.write(0, b"\xff" * 4096)
    zeros.write(0, bytes(4096))
    pairs = zip(ones.read(0, 4096), zeros.read(0, 4096), strict=True)
    found = bytearray(one ^ zero for one, zero in pairs)
    found[0x4A] |= 0x70  # of more messages than there are a write of ones gets fewer
    return bytes(found)


MASK = writable_bits()

accesses = st.integers(0, 4095).flatmap(
    lambda at: st.tuples(st.just(at), st.binary(min_size=1, max_size=min(16, 4096 - at)))
)
near_registers = st.integers(0, 0xC0).flatmap(
    lambda at: st.tuples(st.just(at), st.binary(min_size=1, max_size=16))
)


@given(st.lists(accesses | near_registers, max_size=30))
def test_writes_never_change_a_read_only_bit(writes: list[tuple[int, bytes]]) -> None:
    space = space_of(Card)
    for at, data in writes:
        space.write(at, data)
    after = space.read(0, 4096)
    for fresh, now, mask in zip(FRESH, after, MASK, strict=True):
        assert fresh & ~mask == now & ~mask


@given(near_registers, near_registers)
def test_a_write_elsewhere_does_not_change_what_was_written(
    first: tuple[int, bytes], second: tuple[int, bytes]
) -> None:
    space = space_of(Card)
    space.write(*first)
    before = space.read(0, 4096)
    space.write(*second)
    at, data = second
    after = space.read(0, 4096)
    assert after[:at] == before[:at]
    assert after[at + len(data) :] == before[at + len(data) :]


@st.composite
def regions(draw: st.DrawFn) -> dict[int, Region]:
    """Regions of any kind, one behind the other."""
    made: dict[int, Region] = {}
    index = 0
    while index < 6:
        kind = draw(st.sampled_from(["none", "io", "memory", "memory 64"]))
        bits64 = kind == "memory 64" and index < 5
        if kind != "none":
            low = 2 if kind == "io" else 4
            size = 1 << draw(st.integers(low, 8 if kind == "io" else 40 if bits64 else 31))
            prefetchable = draw(st.booleans()) and kind != "io"
            made[index] = Region(size, io=kind == "io", bits64=bits64, prefetchable=prefetchable)
        index += 2 if bits64 else 1
    return made


@given(regions(), st.integers(0, (1 << 64) - 1))
def test_sizing_and_addresses_work_for_every_region(declared: dict[int, Region], at: int) -> None:
    space = ConfigurationSpace(PciIdentity(1, 2), declared)
    for index, region in declared.items():
        register, width = 0x10 + 4 * index, 8 if region.bits64 else 4
        flags = 3 if region.io else 0xF
        limit = 1 << 8 * width
        kind = space.register(register, width) & flags
        space.write(register, b"\xff" * width)
        size = -(space.register(register, width) & ~flags) % limit
        assert size == region.size
        space.write(register, (at % limit).to_bytes(width, "little"))
        address = at % limit & -region.size
        assert space.register(register, width) == address | kind
        assert kind == region.io | region.bits64 << 2 | region.prefetchable << 3
