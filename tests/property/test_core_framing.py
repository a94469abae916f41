"""Where one read or write ends and the next begins means nothing, on either side of a stream."""

from __future__ import annotations

import errno
from itertools import cycle
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from in_process import Loads, Produces, Program
from vfiomig.fsm import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig.device import StateReader

CHUNKS = st.lists(st.binary(max_size=40), max_size=12)
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=6)
#: Sizes of reads, or of a load's reads: some of them are 0.
ODD_SIZES = SIZES.map(lambda sizes: [0, *sizes])
FAULTS = st.lists(st.none() | st.integers(0, 30), min_size=1, max_size=5)


@settings(max_examples=150)
@given(early=CHUNKS, late=CHUNKS, sizes=ODD_SIZES, faults=FAULTS, switch=st.integers(0, 6))
def test_any_reader_gets_the_bytes_of_any_author(
    early: list[bytes],
    late: list[bytes],
    sizes: list[int],
    faults: list[int | None],
    switch: int,
) -> None:
    # An empty buffer of precopy is the temporary end; on the way into STOP_COPY it is its last.
    device = Produces(lambda: late, lambda: [chunk for chunk in early if chunk])
    got = bytearray()
    with Program(device) as program:
        fd = program.go(State.PRE_COPY)
        turns = zip(cycle(sizes), cycle([*faults, None]), strict=False)
        for number, (size, fault) in enumerate(turns):
            if number == switch:
                program.go(State.STOP_COPY)
            read = program.start_read(fd, size, fault)
            result = read.wait()
            if result < 0:
                assert result in {-errno.ENOMSG, -errno.EFAULT}
                assert result != -errno.ENOMSG or number < switch
                assert result != -errno.EFAULT or fault == 0
            elif not result and size and fault != 0:
                assert number >= switch, "the end is permanent only in STOP_COPY"
                break
            got += read.data
    assert bytes(got) == b"".join(early) + b"".join(late)


@settings(max_examples=150)
@given(stream=st.binary(max_size=300), writes=ODD_SIZES, wanted=ODD_SIZES, faults=FAULTS)
def test_any_load_gets_the_bytes_of_any_writer(
    stream: bytes, writes: list[int], wanted: list[int], faults: list[int | None]
) -> None:
    pieces: list[tuple[int, bytes]] = []

    def load(state: StateReader) -> None:
        for size in cycle(wanted):
            piece = state.read(size)
            pieces.append((size, piece))
            if len(piece) < size:
                return

    with Program(Loads(load)) as program:
        fd = program.go(State.RESUMING)
        done = 0
        for size, fault in zip(cycle(writes), cycle([*faults, None]), strict=False):
            if done == len(stream):
                break
            chunk = stream[done : done + size]
            result = program.start_write(fd, chunk, fault).wait()
            assert result == (min(len(chunk), len(chunk) if fault is None else fault)) or (
                fault == 0 and result == -errno.EFAULT
            )
            done += max(result, 0)
        program.go(State.STOP)
    assert b"".join(piece for _, piece in pieces) == stream
    assert all(len(piece) == size for size, piece in pieces[:-1])


@settings(max_examples=40)
@given(chunks=CHUNKS, reads=SIZES, writes=SIZES)
def test_what_one_device_saves_another_loads_however_it_is_cut(
    chunks: list[bytes], reads: list[int], writes: list[int]
) -> None:
    loaded: list[bytes] = []
    with (
        Program(Produces(lambda: iter(chunks))) as source,
        Program(Loads(lambda state: loaded.append(state.read(1 << 16)))) as target,
    ):
        stream = b"".join(_read_all(source, source.go(State.STOP_COPY), reads))
        fd, done = target.go(State.RESUMING), 0
        for size in cycle(writes):
            if done == len(stream):
                break
            done += target.write(fd, stream[done : done + size])
        target.go(State.RUNNING)
    assert loaded == [b"".join(chunks)]


def _read_all(program: Program, fd: int, sizes: list[int]) -> Iterator[bytes]:
    for size in cycle(sizes):
        chunk = program.read(fd, size)
        assert isinstance(chunk, bytes)
        if not chunk:
            return
        yield chunk
