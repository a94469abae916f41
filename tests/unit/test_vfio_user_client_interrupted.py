"""Ctrl-C at every place of a request where Python lets a signal in."""

from __future__ import annotations

import queue
import socket
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest

from in_process import wait_until
from raw_peer import DEADLINE, ERROR, REPLY, InThread, Raw, RawPeer, message, raw_peer
from vfiomig.client.vfio_user import channel as channel_module
from vfiomig.client.vfio_user import stream as stream_module
from vfiomig.errors import RequestError
from vfiomig.wire.layouts import DMA_ACCESS, REGION_ACCESS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from vfiomig.client.vfio_user.channel import Channel
    from vfiomig.wire import Reply

REGION_READ, DMA_READ = 9, 11
SIZE = 20_000
#: Seconds for a reply: who waits so long hangs, and the test says so much earlier.
LONG = 1000.0
WATCHED = (channel_module.__file__, stream_module.__file__, threading.__file__)
#: CPython looks for signals when a function begins, and after a call of one that is written in C.
LOOKS = {"call", "c_return"}


class Interrupting:
    """Raises KeyboardInterrupt at the ``place``-th such place, as a profiler."""

    def __init__(self, place: int) -> None:
        self._left = place

    @property
    def pressed(self) -> bool:
        return not self._left

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if self._left and event in LOOKS and frame.f_code.co_filename in WATCHED:
            self._left -= 1
            if not self._left:
                raise KeyboardInterrupt


@contextmanager
def interrupted_at(place: int) -> Iterator[Interrupting]:
    former, interrupting = sys.getprofile(), Interrupting(place)
    sys.setprofile(interrupting)
    try:
        with suppress(KeyboardInterrupt):
            yield interrupting
            assert not interrupting.pressed, "the interruption was lost"
    finally:
        sys.setprofile(former)


def read(channel: Channel) -> None:
    buffer = bytearray(SIZE)

    def parse(reply: Reply) -> None:
        assert reply.data_size == SIZE

    head = REGION_ACCESS.pack(0, 0, SIZE)
    channel.call(parse, REGION_READ, head, into=memoryview(buffer))
    assert buffer == b"x" * SIZE


class Beside:
    """Another thread that reads: it waits for its turn when the reply to the first read comes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._over = threading.Event()
        self._thread = InThread(self._read)

    def _read(self) -> None:
        wait_until(lambda: self._channel._receiver or self._over.is_set())
        works_or_says_why_not(self._channel)

    def _waits(self) -> bool:
        frame = sys._current_frames().get(self._thread.ident or 0)
        return frame is not None and frame.f_code is channel_module._comes.__code__

    def wait(self) -> None:
        wait_until(lambda: self._waits() or self._over.is_set())

    def end(self) -> None:
        self._over.set()
        self._thread.result()


def serve(peer: RawPeer, answers: queue.Queue[Raw], beside: Beside | None) -> None:
    """Reply to reads, and pass answers on, until the client leaves."""
    with suppress(OSError):
        while peer.socket.recv(1, socket.MSG_PEEK):
            came = peer.receive()
            if came.flags & REPLY:
                answers.put(came)
                continue
            if beside is not None:
                beside.wait()
            peer.reply(came, came.body + b"x" * SIZE)


def works_or_says_why_not(channel: Channel) -> bool:
    with suppress(RequestError):
        read(channel)
        return True
    assert "when this program was interrupted" in channel.lost
    return False


@pytest.mark.parametrize(
    ("attended", "accompanied"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_wherever_ctrl_c_comes_no_request_hangs(attended: bool, accompanied: bool) -> None:
    place, alive = 1, 0
    while True:
        answers: queue.Queue[Raw] = queue.Queue()
        with raw_peer(LONG) as (channel, peer):
            if attended:
                channel.attend()
            beside = Beside(channel) if accompanied else None
            serving = InThread(partial(serve, peer, answers, beside))
            with interrupted_at(place) as interrupting:
                read(channel)
            if beside is not None:
                beside.end()
            assert channel._lock.acquire(timeout=DEADLINE), "nobody lets go of the lock"
            channel._lock.release()
            if InThread(lambda channel=channel: works_or_says_why_not(channel)).result():  # type: ignore[misc]
                alive += 1
                if attended:
                    peer.send(message(DMA_READ, DMA_ACCESS.pack(0, 16)))
                    assert answers.get(timeout=DEADLINE).flags == REPLY | ERROR
        serving.result()
        if not interrupting.pressed:
            break
        place += 1
    assert 30 < alive < place
