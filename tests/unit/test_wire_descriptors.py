"""Descriptors belong to the message that they were sent with, and none gets lost.

Over real sockets, since what the kernel hands over with which bytes is what matters.
"""

from __future__ import annotations

import array
import errno
import itertools
import os
import socket
import struct
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from vfiomig.abi import vfio
from vfiomig.errors import WireError
from vfiomig.wire import Request, ServerConnection, requests
from wire_peers import ALL, REPLY, agreed, message

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfiomig.wire import Connection, Reply

DMA_MAP, GET_INFO, GET_REGION_INFO, SET_IRQS, WRITE, RESET = 2, 4, 5, 8, 10, 13
MAP = struct.pack("<IIQQQ", 32, 3, 0, 0x1000, 0x1000)
ROOM = socket.CMSG_SPACE(64 * 4)


@dataclass
class Peer:
    """Sends, receives for ``connection``, and closes whatever comes."""

    connection: Connection
    near: socket.socket
    far: socket.socket
    files: list[int]
    #: Which files came with which message; strays and leftovers stand under ``None``.
    came: dict[int | None, list[int]] = field(default_factory=dict)
    messages: list[Request | Reply] = field(default_factory=list)

    def send(self, data: bytes, *which: int) -> None:
        rights = array.array("i", [self.files[n] for n in which])
        anc = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if which else []
        assert self.near.sendmsg([data], anc) == len(data)

    def receive(self, at_most: int = 1 << 20, room: int = ROOM) -> None:
        """Receive until nothing is there."""
        while True:
            try:
                count, anc, flags, _ = self.far.recvmsg_into(
                    [self.connection.buffer()[:at_most]], room, socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return
            fds = array.array("i")
            for _, _, data in anc:
                fds.frombytes(data[: len(data) // 4 * 4])
            lost = bool(flags & socket.MSG_CTRUNC)
            self._take(None, self.connection.received(count, list(fds), lost=lost))
            while (found := self.connection.next()) is not None:
                self.messages.append(found)
                self._take(found.msg_id, found.fds)

    def _take(self, owner: int | None, fds: Sequence[int]) -> None:
        for fd in fds:
            which = [os.fstat(one).st_ino for one in self.files].index(os.fstat(fd).st_ino)
            self.came.setdefault(owner, []).append(which)
            os.close(fd)

    def end(self) -> None:
        self._take(None, self.connection.close())


@contextmanager
def peer(connection: Connection | None = None, files: int = 20) -> Iterator[Peer]:
    with ExitStack() as stack:
        near, far = (stack.enter_context(one) for one in socket.socketpair())
        fds = [os.memfd_create(str(n)) for n in range(files)]
        for fd in fds:
            stack.callback(os.close, fd)
        yield Peer(connection or agreed()[1], near, far, fds)


def map_one(msg_id: int) -> bytes:
    return message(msg_id, DMA_MAP, MAP)


@pytest.mark.parametrize("at_most", [1, 7, 47, 48, 49, 100, 1 << 20])
@pytest.mark.parametrize("with_fd", list(itertools.product((False, True), repeat=4)))
def test_pipelined_messages_keep_their_descriptors(with_fd: tuple[bool, ...], at_most: int) -> None:
    with peer() as p:
        for n, has in enumerate(with_fd):
            p.send(map_one(n), *[n] * has)
        p.receive(at_most)
        assert p.came == {n: [n] for n, has in enumerate(with_fd) if has}
        assert [one.msg_id for one in p.messages] == [0, 1, 2, 3]


@pytest.mark.parametrize("at_most", [1, 1 << 20])
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_descriptors_with_any_part_of_a_message_belong_to_it(early: bool, at_most: int) -> None:
    text = map_one(1)
    for at in range(1, len(text)):
        with peer() as p:
            p.send(map_one(0))
            p.send(text[:at], *[5] * early)
            p.send(text[at:], *[6] * (not early))
            p.send(map_one(2), 7)
            p.receive(at_most)
            assert p.came == {1: [5 if early else 6], 2: [7]}, at


def test_descriptors_with_several_parts_are_one_messages() -> None:
    with peer() as p:
        text = map_one(3)
        for at in range(0, len(text), 16):
            p.send(text[at : at + 16], at // 16)
            p.receive()
        assert p.came == {3: [0, 1, 2]}


def test_sixteen_eventfds_come_in_order() -> None:
    irqs = vfio.IrqSet(argsz=20, flags=0x24, index=2, count=16)
    with peer() as p:
        p.send(message(1, SET_IRQS, bytes(irqs)), *range(16))
        p.receive()
        assert p.came == {1: list(range(16))}
        assert p.messages[0].refusal is None


def test_a_message_in_many_reads_is_moved_and_keeps_its_descriptors() -> None:
    # The first messages fill the buffer up to the middle of the one with descriptors.
    irqs = bytes(vfio.IrqSet(argsz=20, flags=0x24, index=2, count=2)) + bytes(6000)
    with peer() as p:
        p.send(b"".join(message(n, RESET) for n in range(250)))
        p.send(message(999, SET_IRQS, irqs)[:200], 3, 4)
        p.receive()
        p.send(message(999, SET_IRQS, irqs)[200:])
        p.receive()
        assert p.came == {999: [3, 4]}
        assert len(p.messages) == 251


# Not wanted, too many, lost.


@pytest.mark.parametrize("command", [GET_INFO, GET_REGION_INFO, RESET, WRITE, 14])
def test_a_request_that_takes_no_descriptors_is_refused_with_them(command: int) -> None:
    with peer() as p:
        p.send(message(1, command, bytes(32)), 0, 1)
        p.send(map_one(2), 2)
        p.receive()
        assert p.came == {1: [0, 1], 2: [2]}
        assert [one.refusal and one.refusal.errno for one in p.messages] == [errno.EINVAL, None]


def test_a_request_that_is_too_short_gives_its_descriptors_back() -> None:
    with peer() as p:
        p.send(message(1, DMA_MAP, MAP[:-1]), 0)
        p.receive()
        assert p.came == {1: [0]}


def test_a_request_with_more_descriptors_than_agreed_is_refused_with_them() -> None:
    with peer() as p:
        p.send(map_one(1), *range(17))
        p.send(map_one(2), *range(16))
        p.receive()
        assert p.came == {1: list(range(17)), 2: list(range(16))}
        refusals = [one.refusal for one in p.messages]
        assert refusals[0] is not None
        assert "17 descriptors" in str(refusals[0])
        assert refusals[1] is None


def test_descriptors_that_the_kernel_dropped_make_their_message_emfile() -> None:
    with peer() as p:
        p.send(map_one(1))
        p.send(map_one(2), 0, 1, 2, 3)
        p.receive(room=socket.CMSG_LEN(2 * 4))
        assert p.came == {2: [0, 1]}
        assert p.messages[0].refusal is None
        refusal = p.messages[1].refusal
        assert isinstance(refusal, WireError)
        assert refusal.errno == errno.EMFILE
        assert isinstance(p.messages[1], Request)
        with pytest.raises(WireError):
            requests.dma_map_untrusted(p.messages[1])


def test_descriptors_with_every_byte_do_not_fill_the_table_of_the_receiver() -> None:
    server = agreed()[1]
    head = message(1, 16, bytes(3000))  # DEVICE_FEATURE
    kept: set[int] = set()
    for at, byte in enumerate(head):
        server.buffer()[0] = byte
        fds = range(at * 253, (at + 1) * 253)
        kept |= set(fds) - set(server.received(1, fds))
        assert len(kept) <= 1024
        if at + 1 < len(head):
            assert server.next() is None
    request = server.next()
    assert isinstance(request, Request)
    assert set(request.fds) == kept
    assert request.refusal is not None
    assert request.refusal.errno == errno.EMFILE
    # What comes behind it is not affected.
    mapping = map_one(2)
    server.buffer()[: len(mapping)] = mapping
    assert list(server.received(len(mapping), [7])) == []
    request = server.next()
    assert isinstance(request, Request)
    assert (request.fds, request.refusal) == ([7], None)


def test_a_reply_may_have_descriptors_and_loses_none() -> None:
    client = agreed()[0]
    first, second = (client.request(GET_REGION_INFO, bytes(32)).msg_id for _ in range(2))
    with peer(client) as p:
        p.send(message(first, GET_REGION_INFO, bytes(32), REPLY), 4)
        p.send(message(second, GET_REGION_INFO, bytes(32), REPLY), 5, 6)
        p.receive(room=socket.CMSG_LEN(4))
        assert p.came == {first: [4], second: [5]}
        assert [one.refusal and one.refusal.errno for one in p.messages] == [None, errno.EMFILE]


# The end in the middle.


@pytest.mark.parametrize("sent", [1, 15, 16, 47])
def test_descriptors_of_a_message_that_never_ends_come_back_at_the_end(sent: int) -> None:
    with peer() as p:
        p.send(map_one(1)[:sent], 8)
        p.receive()
        assert p.came == {}
        assert not p.connection.between_messages
        p.end()
        assert p.came == {None: [8]}
        p.end()
        assert p.came == {None: [8]}


def test_descriptors_of_a_message_that_ends_the_connection_come_back_at_the_end() -> None:
    with peer() as p:
        p.send(map_one(1), 0)
        p.send(struct.pack("<HHIII", 2, DMA_MAP, 15, 0, 0), 9)
        with pytest.raises(WireError):
            p.receive()
        p.end()
        assert p.came == {1: [0], None: [9]}


def test_descriptors_of_the_first_message_come_back_if_it_is_not_version() -> None:
    with peer(ServerConnection(ALL)) as p:
        p.send(map_one(1), 2)
        with pytest.raises(WireError):
            p.receive()
        p.end()
        assert p.came == {None: [2]}


def test_version_with_descriptors_is_refused_for_good() -> None:
    server = ServerConnection(ALL)
    with peer(server) as p:
        p.send(message(1, 1, b"\0\0\2\0"), 2)
        p.receive()
        assert p.came == {1: [2]}
        assert isinstance(p.messages[0], Request)
        with pytest.raises(WireError):
            server.answer_version(p.messages[0])
        assert server.farewell
        assert server.limits is None


def test_descriptors_amid_what_is_stepped_over_come_back_at_once() -> None:
    with peer() as p:
        text = message(1, 14, bytes(9000))
        p.send(text[:5000], 0)
        p.receive()
        p.send(text[5000:8000], 1)
        p.send(text[8000:])
        p.send(map_one(2), 3)
        p.receive()
        assert p.came == {1: [0], None: [1], 2: [3]}


def test_descriptors_amid_data_that_nobody_took_come_back_at_once() -> None:
    with peer() as p:
        text = message(1, WRITE, struct.pack("<QII", 0, 0, 9000) + bytes(9000))
        p.send(text[:5000])
        p.receive()
        p.send(text[5000:], 1)
        p.send(map_one(2), 3)
        p.receive()
        assert p.came == {None: [1], 2: [3]}
