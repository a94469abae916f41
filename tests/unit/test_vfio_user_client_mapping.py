"""Pages of a region that a vfio-user client maps: by a descriptor that comes from a server."""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from raw_peer import REPLY, InThread, Raw, RawPeer, interrupted_when, message, raw_peer
from vfiomig.client.vfio_user.remote import Remote
from vfiomig.descriptors import Fd, create_sealed_memfd

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
REGION_INFO = 5
READ_WRITE_MMAP, CAPS = 7, 8
#: A sparse mmap capability with one area, all of the region.
SPARSE = struct.pack("<HHIIIQQ", 1, 1, 0, 1, 0, 0, 2 * PAGE)


@contextmanager
def remote() -> Iterator[tuple[Remote, RawPeer]]:
    with raw_peer() as (channel, peer):
        limits = channel.connection.limits
        assert limits is not None
        yield Remote(channel, limits), peer


def send_info(
    peer: RawPeer, *fds: Fd, offset: int = 0, caps: bytes = b"", room: int = 32, number: int = 0
) -> Raw:
    """Answer what is asked about a region, and say that there is more if there is no room."""
    asked = peer.receive()
    assert (asked.command, struct.unpack_from("<I", asked.body)[0]) == (REGION_INFO, room)
    needed = 32 + len(caps)
    body = struct.pack(
        "<IIIIQQ", needed, READ_WRITE_MMAP | CAPS * bool(caps), 2, 32 * bool(caps), 2 * PAGE, offset
    )
    reply = message(
        REGION_INFO, (body + caps)[:room], asked.msg_id, REPLY | 0x20 * bool(number), number
    )
    socket.send_fds(peer.socket, [reply], [fd.fileno() for fd in fds])
    return asked


def memory(size: int = 4 * PAGE) -> Fd:
    fd = create_sealed_memfd("region", size)
    os.pwrite(fd.fileno(), b"in the server", 3 * PAGE)
    return fd


@pytest.mark.parametrize("fds", [1, 3])
def test_pages_lie_in_the_file_at_the_regions_offset_and_theirs(fds: int) -> None:
    with remote() as (server, peer), memory() as file:
        call = InThread(lambda: server.map_region(2, PAGE, PAGE, writable=True))
        send_info(peer, *[file] * fds, offset=2 * PAGE)
        view = call.result()
        assert isinstance(view, memoryview)
        assert bytes(view[:13]) == b"in the server"
        view[:2] = b"IN"
        assert os.pread(file.fileno(), 6, 3 * PAGE) == b"IN the"


def test_the_descriptor_may_come_when_all_is_said_only() -> None:
    """As from libvfio-user, whose first answer says how much room the second one needs."""
    with remote() as (server, peer), memory() as file:
        call = InThread(lambda: server.map_region(2, PAGE, PAGE, writable=False))
        send_info(peer, offset=2 * PAGE, caps=SPARSE)
        send_info(peer, file, offset=2 * PAGE, caps=SPARSE, room=32 + len(SPARSE))
        view = call.result()
        assert isinstance(view, memoryview)
        assert view.readonly
        assert bytes(view[:13]) == b"in the server"


def no_memory() -> Fd:
    return Fd(os.eventfd(0))


def for_reading() -> Fd:
    with memory() as file:
        return Fd(os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY))


@pytest.mark.parametrize(
    ("make", "offset", "number", "says"),
    [
        (None, 0, errno.EINVAL, "passes no descriptor"),
        (memory, 3 * PAGE, errno.EINVAL, "no such part"),
        (memory, 1 << 40, errno.EINVAL, "no such part"),
        (memory, (1 << 64) - PAGE, errno.EINVAL, "no such part"),
        (memory, 100, errno.EINVAL, "Invalid argument"),
        (no_memory, 0, errno.ENODEV, "No such device"),
        (for_reading, 0, errno.EACCES, "Permission denied"),
    ],
    ids=["none", "short", "far", "overflow", "no page", "no memory", "read-only"],
)
def test_what_cannot_be_mapped_is_an_error_and_nothing_stays_open(
    make: type[Fd] | None, offset: int, number: int, says: str
) -> None:
    fds = [make()] if make is not None else []  # type: ignore[call-arg]
    with remote() as (server, peer):
        call = InThread(lambda: server.map_region(2, PAGE, PAGE, writable=True))
        send_info(peer, *fds, offset=offset)
        with pytest.raises(OSError, match=says) as failure:
            call.result()
        assert failure.value.errno == number
        for fd in fds:
            fd.close()


def test_descriptors_beside_an_error_are_closed() -> None:
    with remote() as (server, peer), memory() as file:
        call = InThread(lambda: server.map_region(2, PAGE, PAGE, writable=True))
        send_info(peer, file, number=errno.EIO)
        with pytest.raises(OSError, match="Input/output") as failure:
            call.result()
        assert failure.value.errno == errno.EIO


def test_a_descriptor_that_comes_after_ctrl_c_is_closed() -> None:
    with remote() as (server, peer), memory() as file:
        asked: list[Raw] = []
        with interrupted_when(lambda: asked.append(peer.receive())):
            server.map_region(2, PAGE, PAGE, writable=True)
        body = struct.pack("<IIIIQQ", 32, READ_WRITE_MMAP, 2, 0, 2 * PAGE, 0)
        late = message(REGION_INFO, body, asked[0].msg_id, REPLY)
        socket.send_fds(peer.socket, [late], [file.fileno()])
        call = InThread(lambda: server.map_region(2, PAGE, PAGE, writable=True))
        send_info(peer, file)
        assert isinstance(call.result(), memoryview)
