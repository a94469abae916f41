"""Regions by themselves: their memory, their handlers, and how an access is split."""

from __future__ import annotations

import pytest

from vfiomig.device import Device, Region
from vfiomig.device.region import bus_accesses


class Card(Device):
    bar0 = Region(size=16)
    bar1 = Region(size=64)

    def __init__(self) -> None:
        self.log: list[tuple[int, bytes]] = []

    @bar1.reader
    def read_bar1(self, offset: int, length: int) -> bytes:
        return bytes([offset]) * length

    @bar1.writer
    def write_bar1(self, offset: int, data: bytes) -> None:
        self.log.append((offset, data))


@pytest.mark.parametrize("size", [0, 1, 8, 15, 17, 48, -16, 4095])
def test_a_size_is_a_power_of_two_from_16_on(size: int) -> None:
    with pytest.raises(ValueError, match="a power of two from 16 on"):
        Region(size=size)


def test_each_device_has_memory_of_its_own() -> None:
    first, second = Card(), Card()
    first.bar0[0] = 7
    assert (first.bar0[0], second.bar0[0]) == (7, 0)
    assert first.bar0 is first.bar0
    assert isinstance(Card.bar0, Region)


def test_plain_memory_is_read_and_written() -> None:
    card = Card()
    Card.bar0.write(card, 3, b"abc")
    assert Card.bar0.read(card, 2, 5) == b"\0abc\0"
    assert isinstance(Card.bar0.read(card, 2, 5), bytes)


def test_a_subclass_may_override_a_handler() -> None:
    class Other(Card):
        def read_bar1(self, offset: int, length: int) -> bytes:
            return b"z" * length

    assert Card.bar1.read(Card(), 2, 2) == b"\2\2"
    assert Card.bar1.read(Other(), 2, 2) == b"zz"


def test_a_write_arrives_in_pieces_that_together_are_the_whole() -> None:
    card = Card()
    Card.bar1.write(card, 1, bytes(range(20)))
    assert [offset for offset, _ in card.log] == [1, 2, 4, 8, 16, 20]
    assert b"".join(data for _, data in card.log) == bytes(range(20))


@pytest.mark.parametrize("offset", range(17))
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 8, 9, 16, 33])
def test_accesses_are_naturally_aligned_in_order_and_as_large_as_can_be(
    offset: int, length: int
) -> None:
    pieces = list(bus_accesses(offset, length))
    covered = [at + byte for at, size in pieces for byte in range(size)]
    assert covered == list(range(offset, offset + length))
    for at, size in pieces:
        assert size in {1, 2, 4, 8}
        assert at % size == 0
        twice_as_much = size * 2 <= 8 and at % (size * 2) == 0 and at + size * 2 <= offset + length
        assert not twice_as_much
