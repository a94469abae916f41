"""The state of ``pattern`` as a stream: any framing, any damage, any order of changes."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pattern_streams import (
    AROUND_ONE_BLOCK,
    HEADER_BYTES,
    RECORD_BYTES,
    Chunks,
    load,
    sealed,
    state_of,
)
from vfiomig import SessionError, SetStateError, State, StateRejected
from vfiomig.client import open_device
from vfiomig.models.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 1 << 20
SMALL = 40
WHOLE = state_of(Pattern(size=SMALL, seed=3))

#: Sizes of a caller's reads or writes, used round and round.
chunk_sizes = st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=5)
small_chunk_sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=5).filter(
    lambda sizes: max(sizes) > 100  # four thousand writes of one byte show nothing more
)


def read_all(device: Pattern, sizes: Sequence[int]) -> bytes:
    parts: list[bytes] = []
    with open_device(device) as client:
        session = client.set_state(State.STOP_COPY)
        assert session is not None
        while True:
            buffer = bytearray(sizes[len(parts) % len(sizes)])
            if not (count := session.readinto(buffer)):
                return b"".join(parts)
            parts.append(bytes(buffer[:count]))


def write_all(device: Pattern, stream: bytes, sizes: Sequence[int]) -> None:
    with open_device(device) as client:
        session = client.set_state(State.RESUMING)
        assert session is not None
        rest, number = memoryview(stream), 0
        while rest:
            session.write_all(rest[: sizes[number % len(sizes)]])
            rest = rest[sizes[number % len(sizes)] :]
            number += 1
        client.set_state(State.STOP)
        assert state_of(device) == stream


@settings(max_examples=30)
@given(chunk_sizes, chunk_sizes)
def test_chunks_of_reader_and_writer_never_matter(
    read_sizes: list[int], write_sizes: list[int]
) -> None:
    big_enough = [max(size, 4096) for size in read_sizes], [max(size, 4096) for size in write_sizes]
    source, destination = Pattern(size=2 * BLOCK + 17, seed=5), Pattern(size=2 * BLOCK + 17)
    stream = read_all(source, big_enough[0])
    assert stream == state_of(source)
    write_all(destination, stream, big_enough[1])


@settings(max_examples=50)
@given(small_chunk_sizes, small_chunk_sizes)
def test_small_chunks_of_reader_and_writer_never_matter(
    read_sizes: list[int], write_sizes: list[int]
) -> None:
    assert read_all(Pattern(size=SMALL, seed=3), read_sizes) == WHOLE
    write_all(Pattern(size=SMALL), WHOLE, write_sizes)


def test_a_stream_cut_at_any_offset_is_refused() -> None:
    assert len(WHOLE) == SMALL + AROUND_ONE_BLOCK
    destination = Pattern(size=SMALL)
    for end in range(len(WHOLE)):
        with pytest.raises(StateRejected, match="ends in"):
            load(destination, WHOLE[:end])
    load(destination, WHOLE)


@given(st.integers(0, len(WHOLE) - 1))
def test_a_cut_stream_is_the_errno_of_the_arc(end: int) -> None:
    with open_device(Pattern(size=SMALL)) as client:
        session = client.set_state(State.RESUMING)
        assert session is not None
        session.write_all(WHOLE[:end])
        with pytest.raises(SetStateError) as caught:
            client.set_state(State.STOP)
        assert (caught.value.errno, caught.value.device_state) == (errno.EINVAL, State.RESUMING)


def test_damage_to_any_byte_is_refused() -> None:
    destination = Pattern(size=SMALL)
    for at in range(len(WHOLE)):
        damaged = bytearray(WHOLE)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(StateRejected):
            load(destination, damaged)
    load(destination, WHOLE)


@given(st.integers(0, len(WHOLE) - SMALL - 1), st.integers(1, 255))
def test_damage_outside_the_data_is_the_errno_of_a_write(at: int, flips: int) -> None:
    if at >= HEADER_BYTES + RECORD_BYTES:
        at += SMALL
    damaged = bytearray(WHOLE)
    damaged[at] ^= flips
    with open_device(Pattern(size=SMALL)) as client:
        session = client.set_state(State.RESUMING)
        assert session is not None
        with pytest.raises(SessionError) as caught:
            session.write_all(damaged)
        assert caught.value.errno == errno.EINVAL


@given(st.integers(0, SMALL - 1), st.integers(1, 255))
def test_damage_inside_the_data_is_the_errno_of_the_arc(at: int, flips: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[HEADER_BYTES + RECORD_BYTES + at] ^= flips
    with open_device(Pattern(size=SMALL)) as client:
        session = client.set_state(State.RESUMING)
        assert session is not None
        session.write_all(damaged)
        with pytest.raises(SetStateError) as caught:
            client.set_state(State.STOP)
        assert caught.value.errno == errno.EINVAL


#: Pieces of a stream and things that look like some, in any order.
fragments = st.lists(
    st.one_of(
        st.binary(max_size=200),
        st.sampled_from(
            [
                WHOLE[:HEADER_BYTES],
                WHOLE[HEADER_BYTES : HEADER_BYTES + RECORD_BYTES],
                WHOLE[HEADER_BYTES : HEADER_BYTES + RECORD_BYTES + SMALL],
                WHOLE[HEADER_BYTES + RECORD_BYTES + SMALL :],
            ]
        ),
        st.tuples(
            st.sampled_from([b"BLKS", b"TAIL", b"NONE"]),
            st.one_of(st.integers(0, 2), st.integers(0, (1 << 32) - 1)),
            st.one_of(st.integers(0, 2), st.integers(0, (1 << 32) - 1)),
        ).map(lambda r: sealed(r[0] + r[1].to_bytes(4, "little") + r[2].to_bytes(4, "little"))),
    ),
    max_size=6,
)


@settings(max_examples=300)
@given(st.booleans(), fragments)
def test_foreign_bytes_are_refused_or_are_a_state(begins_well: bool, parts: list[bytes]) -> None:
    device = Pattern(size=SMALL)
    if begins_well:
        parts = [WHOLE[:HEADER_BYTES], *parts]
    try:
        device.load(Chunks(parts))
    except StateRejected:
        return
    assert state_of(device) == WHOLE


#: How many pieces are rewritten before each of the buffers that pre-copy is asked for.
changes = st.lists(st.integers(0, 40), max_size=25)


@settings(max_examples=60)
@given(changes, st.sampled_from([0.0, 0.3, 1.0]))
def test_whatever_changes_in_pre_copy_arrives(rewrites: list[int], share: float) -> None:
    size = 2 * BLOCK + 100_000
    # Never started, so that it changes when it is told to and at no other time.
    source = Pattern(size=size, seed=1, dirty=1 << 30, precopy=share)
    destination = Pattern(size=size)
    stream, early = [], iter(source.precopy())
    for pieces in rewrites:
        buffer = next(early)
        as_yielded = bytes(buffer)
        for _ in range(pieces):
            source._rewrite()
        assert buffer == as_yielded
        if not buffer and not pieces:
            assert source.precopy_info() == (0, 0, False)
        stream.append(as_yielded)
    while stream and stream[-1]:
        stream.append(bytes(next(early)))  # core drains it before it asks save()
    size_told = source.state_size()
    rest = [bytes(buffer) for buffer in source.save()]
    assert size_told == sum(map(len, rest))
    load(destination, *stream, *rest)
    assert destination.digest() == source.digest()
