"""A client whose server says anything at all: it fails with our errors alone, and keeps nothing."""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hypothesis import event, given
from hypothesis import strategies as st

import vfiomig
from c_style_server import HEADER, CStyleServer, Options
from client_scenario import REPLIES, STATE, scenario
from raw_peer import InThread
from vfiomig import VfioMigError
from vfiomig.abi.ioctls import Dialect
from vfiomig.client.face import DeviceClient
from vfiomig.client.vfio_user.connecting import establish
from vfiomig.descriptors import rights

#: A server that is not there any more answers in no time; this is for what goes wrong here.
SECONDS = 5.0


@cache
def recorded() -> tuple[bytes, ...]:
    """Return what a good server answers to all of the scenario."""
    replies: list[bytes] = []

    def note(command: int, reply: bytes) -> bytes:
        replies.append(reply)
        return reply

    with tempfile.TemporaryDirectory() as folder, mmap.mmap(-1, mmap.PAGESIZE) as memory:
        path = Path(folder, "device.sock")
        with (
            CStyleServer(path, STATE, Options(mangle=note)),
            vfiomig.open(f"vfio-user:{path}") as dev,
        ):
            assert scenario(dev, memory) == []
    assert len(replies) == REPLIES
    return tuple(replies)


def answer(end: socket.socket, pieces: list[bytes], descriptors: int, patience: float) -> None:
    """Answer each message with the next piece; leave when none comes, or no piece is left."""
    end.settimeout(patience)
    with suppress(OSError), open(os.devnull, "rb") as file:
        for piece in pieces:
            header, fds, _, _ = socket.recv_fds(end, HEADER.size, 8, socket.MSG_WAITALL)
            for fd in fds:
                os.close(fd)
            if len(header) < HEADER.size:
                return
            size = HEADER.unpack(header)[2] - HEADER.size
            if size and not end.recv(size, socket.MSG_WAITALL):
                return
            if piece:
                end.sendmsg([piece], rights([file.fileno()] * descriptors))


def run(pieces: list[bytes], descriptors: int = 0, patience: float = 0.05) -> list[VfioMigError]:
    """Be a server that says these things; return what failed for its client."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            answer(theirs, pieces, descriptors, patience)

    server = InThread(serve)
    try:
        transport = establish(ours, "the fuzzer", SECONDS)
        with (
            mmap.mmap(-1, mmap.PAGESIZE) as memory,
            DeviceClient(transport, "the fuzzer", Dialect.LANDED) as dev,
        ):
            return scenario(dev, memory)
    except VfioMigError as error:
        return [error]
    finally:
        server.result()


def test_what_was_recorded_can_be_replayed() -> None:
    """Or the mutations below would all end at the first message."""
    assert run(list(recorded()), patience=SECONDS) == []


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_any_bytes_at_all(pieces: list[bytes]) -> None:
    assert len(run(pieces)) == 1


numbers = st.sampled_from([0, 1, 15, 16, 0x20, 0x21, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF])


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Draw a message whose header may be anything, of a body of its own length."""
    body = draw(st.binary(max_size=64))
    msg_id, command = draw(st.integers(0, 60)), draw(st.integers(0, 20))
    size = draw(st.one_of(st.just(HEADER.size + len(body)), numbers))
    return HEADER.pack(msg_id, command, size, draw(numbers), draw(numbers)) + body


class Edit(NamedTuple):
    """A change of one piece: how, at which byte, and with what."""

    how: str
    piece: int
    where: int
    what: bytes


HOW = ("overwrite", "cut", "insert", "leave out", "repeat", "shorten", "append")
edits = st.builds(
    Edit,
    how=st.sampled_from(HOW),
    piece=st.integers(0, REPLIES - 1),
    where=st.integers(0, 60),
    what=st.one_of(messages(), st.binary(min_size=1, max_size=8)),
)


def changed(pieces: list[bytes], edit: Edit) -> list[bytes]:
    at = min(edit.piece, len(pieces) - 1)
    before, piece, after = pieces[:at], pieces[at], pieces[at + 1 :]
    where = min(edit.where, len(piece))
    shorter = HEADER.size + min(where, max(len(piece) - HEADER.size, 0))
    replaced = {
        "overwrite": [piece[:where] + edit.what + piece[where + len(edit.what) :]],
        "cut": [piece[:where]],
        "insert": [edit.what + piece],
        "leave out": [b""],
        "repeat": [piece + piece],
        "shorten": [piece[:4] + shorter.to_bytes(4, "little") + piece[8:shorter]],
        "append": [piece + edit.what],
    }
    return before + replaced[edit.how] + after


@given(st.lists(edits, min_size=1, max_size=3), st.sampled_from([0, 0, 1, 3]))
def test_a_good_server_that_goes_wrong(edited: list[Edit], descriptors: int) -> None:
    pieces = list(recorded())
    for edit in edited:
        pieces = changed(pieces, edit)
    failed = run(pieces, descriptors)
    event("harmless" if not failed else type(failed[0]).__name__)
