"""The state of ``mtty`` as a stream: any ports, any damage, any foreign bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pattern_streams import Chunks, load, sealed, state_of
from vfiomig import StateRejected
from vfiomig.models import mtty_stream
from vfiomig.models.mtty import Mtty
from vfiomig.models.mtty_stream import HEADER_BYTES, PortState
from vfiomig.models.pattern import Pattern
from vfiomig.models.sealed import identity
from vfiomig.models.uart16550 import FIFO, Registers

if TYPE_CHECKING:
    from collections.abc import Callable

BYTE = st.integers(0, 255)


@st.composite
def port_states(draw: st.DrawFn) -> PortState:
    """What a port can hold."""
    fcr = draw(st.sampled_from([0x00, 0x01, 0x41, 0x89, 0xC1]))
    depth = FIFO if fcr else 1
    tx = draw(st.binary(max_size=depth))
    registers = Registers(
        ier=draw(st.integers(0, 15)),
        fcr=fcr,
        lcr=draw(BYTE),
        mcr=draw(st.integers(0, 31)),
        scr=draw(BYTE),
        dll=draw(BYTE),
        dlm=draw(BYTE),
        overrun=draw(st.sampled_from([0, 2])),
        empty=0 if tx else draw(st.integers(0, 1)),
        msr=draw(BYTE),
    )
    return PortState(registers, draw(st.binary(max_size=depth)), tx, draw(st.binary(max_size=40)))


def stream_of(*ports: PortState) -> bytes:
    return mtty_stream.pack_header(len(ports)) + b"".join(map(mtty_stream.pack_port, ports))


WHOLE = stream_of(
    PortState(Registers(ier=1, fcr=0xC1, mcr=0x0B, msr=0xB0), b"received", b"waiting", b"held"),
    PortState(Registers(empty=1), b"", b"", b""),
)


@given(port_states(), port_states(), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_a_card_takes_any_state_in_any_pieces_and_saves_the_same_bytes(
    first: PortState, second: PortState, sizes: list[int]
) -> None:
    stream, at = stream_of(first, second), 0
    pieces: list[bytes] = []
    while at < len(stream):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream[at : at + size])
        at += size
    card = Mtty()
    card.load(Chunks(pieces))
    assert state_of(card) == stream
    assert [port.state for port in card._ports] == [first, second]


@given(port_states())
def test_a_card_with_one_port_takes_the_state_of_one(port: PortState) -> None:
    card = Mtty(ports=1)
    load(card, stream_of(port))
    assert state_of(card) == stream_of(port)


def test_a_stream_cut_at_any_offset_is_refused() -> None:
    for end in range(len(WHOLE)):
        with pytest.raises(StateRejected, match="ends in its"):
            load(Mtty(), WHOLE[:end])
    load(Mtty(), WHOLE)


def test_damage_to_any_byte_is_refused() -> None:
    for at in range(len(WHOLE)):
        for bit in range(8):
            damaged = bytearray(WHOLE)
            damaged[at] ^= 1 << bit
            with pytest.raises(StateRejected):
                load(Mtty(), damaged)


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (lambda: WHOLE + b"\0", "bytes follow"),
        (lambda: stream_of(*[PortState(Registers(), b"", b"", b"")] * 3), "give ports=3"),
        (lambda: state_of(Pattern(size=40)), "no state of a device 'mtty'"),
        (
            lambda: sealed(mtty_stream.HEADER.pack(identity("pattern"), 1, 2)),
            "no state of a device 'mtty'",
        ),
        (
            lambda: sealed(mtty_stream.HEADER.pack(identity("mtty"), 2, 2)),
            "version 2",
        ),
        (
            lambda: WHOLE[:HEADER_BYTES] + sealed(mtty_stream.PORT.pack(*Registers(), 17, 0, 0)),
            "17",
        ),
        (
            lambda: stream_of(*[PortState(Registers(ier=0x80), b"", b"", b"")] * 2),
            "ier cannot be 0x80",
        ),
        (lambda: stream_of(*[PortState(Registers(), b"two", b"", b"")] * 2), "have room"),
    ],
)
def test_a_stream_of_something_else_is_refused_with_what_it_is(
    forge: Callable[[], bytes], words: str
) -> None:
    with pytest.raises(StateRejected, match=words):
        load(Mtty(), forge())


def test_a_length_that_is_a_lie_costs_no_memory() -> None:
    huge = sealed(mtty_stream.PORT.pack(*Registers(), 0, 0, 0xFFFF_FFFF))
    with pytest.raises(StateRejected, match="ends in its port's bytes"):
        load(Mtty(), WHOLE[:HEADER_BYTES], huge, bytes(1 << 20))


#: Pieces of a stream, forgeries of a port and plain noise, in any order.
fragments = st.lists(
    st.one_of(
        st.binary(max_size=80),
        st.sampled_from([WHOLE[:HEADER_BYTES], WHOLE[HEADER_BYTES:], WHOLE]),
        st.binary(min_size=mtty_stream.PORT.size, max_size=mtty_stream.PORT.size).map(sealed),
        st.builds(
            lambda registers, rx, tx: mtty_stream.pack_port(
                PortState(Registers(*registers), rx, tx, b"")
            ),
            st.lists(BYTE, min_size=10, max_size=10),
            st.binary(max_size=20),
            st.binary(max_size=20),
        ),
    ),
    max_size=5,
)


@given(st.booleans(), fragments)
def test_foreign_bytes_are_refused_or_are_a_state(begins_well: bool, parts: list[bytes]) -> None:
    card = Mtty()
    if begins_well:
        parts = [WHOLE[:HEADER_BYTES], *parts]
    try:
        card.load(Chunks(parts))
    except StateRejected:
        return
    assert state_of(card) == b"".join(parts)
