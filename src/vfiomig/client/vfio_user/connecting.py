"""From a socket's path to a device: connect, agree on a version, look at what is there.

Every way in which this fails says what to do next.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import stat
import struct
import threading
import time
from typing import TYPE_CHECKING

from vfiomig.client.vfio_user import facts, running
from vfiomig.client.vfio_user.channel import Channel
from vfiomig.client.vfio_user.remote import Remote
from vfiomig.client.vfio_user.stream import Stream
from vfiomig.client.vfio_user.transport import VfioUserTransport
from vfiomig.errors import TargetError, WireError
from vfiomig.wire import Capabilities, ClientConnection, Reply

if TYPE_CHECKING:
    from vfiomig.wire import Limits

__all__ = ("OURS", "TIMEOUT", "connect", "establish", "greet")

#: Seconds for a reply. A change of state may take long: a device stops, or checks all it was given.
TIMEOUT = 300.0
#: Seconds for a server to take the connection and to agree on a version, at most.
GREETING = 10.0

OURS = Capabilities(
    max_msg_fds=8,
    max_data_xfer_size=16 << 20,
    mig_stream=1,
    migration_pgsize=mmap.PAGESIZE,  # libvfio-user wants the page size of the machine
    pgsizes=mmap.PAGESIZE,
    max_dma_maps=65535,
)

START = "start one: vfiomig serve SPEC --socket {path}"
ADVICE = {
    errno.ENOENT: f"there is no such socket; {START}",
    errno.ENOTDIR: f"there is no such socket; {START}",
    errno.ENOTSOCK: "this is no socket; name the one that the server was given",
    errno.ECONNREFUSED: f"nobody serves there, a server that is gone has left it; {START}",
    errno.EPROTOTYPE: "this socket is no stream socket, so there is no vfio-user server behind it",
    errno.EACCES: "this user may not write to the socket, or not reach it: chown or chmod it",
    errno.EPERM: "this user may not write to the socket, or not reach it: chown or chmod it",
    errno.EAGAIN: "others wait there already; a server has one client at a time",
    errno.ENAMETOOLONG: "the path is too long for a socket's name (107 bytes); use a shorter one, "
    "relative to the working directory for example",
}
SILENT = (
    "it does not answer: a server has one client at a time, so end the other one; or it is no "
    "vfio-user server, or hangs: start it again"
)
NO_SERVER = "this is no vfio-user server, or one of a version that is not known here"


def connect(
    path: str, timeout: float | None = None, whole_state: list[memoryview] | None = None
) -> VfioUserTransport:
    """Connect to the server at ``path``; ``timeout`` is for each reply, in seconds.

    ``whole_state`` holds a state that an earlier connection has kept, or will hold one.

    Raises:
        TargetError: with the errno, and what to do.
    """
    timeout = TIMEOUT if timeout is None else min(threading.TIMEOUT_MAX, timeout)
    try:
        connected = _connect(path, min(timeout, GREETING))
    except OSError as failure:
        number = failure.errno or errno.EIO
        advice = ADVICE.get(number, failure.strerror or "").format(path=path)
        raise _refused(path, number, advice) from None
    return establish(connected, path, timeout, whole_state)


def establish(
    connected: socket.socket,
    path: str,
    timeout: float,
    whole_state: list[memoryview] | None = None,
) -> VfioUserTransport:
    """Take a connection over: agree on a version, and find out what is there; see ``connect``."""
    stream, connection = Stream(connected), ClientConnection(OURS)
    try:
        limits = greet(path, stream, connection, time.monotonic() + min(timeout, GREETING))
    except BaseException:
        for fd in connection.close():
            os.close(fd)
        stream.close()
        raise
    channel = Channel(stream, connection, path, timeout)
    try:
        remote = Remote(channel, limits, whole_state)
        running.begin(remote)
        return VfioUserTransport(remote, facts.gather(remote))
    except OSError as failure:
        channel.close()
        raise _refused(path, failure.errno or errno.EIO, failure.strerror or "") from None
    except BaseException:
        channel.close()
        raise


def _connect(path: str, patience: float) -> socket.socket:
    if len(os.fsencode(path)) > 107:  # sun_path, with its NUL
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A full backlog is waited for by the kernel: a socket without waiting is refused at once.
        seconds, rest = divmod(patience, 1)
        wait = struct.pack("@ll", int(seconds), int(rest * 1_000_000))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        connected.connect(path)
    except BaseException:
        connected.close()
        raise
    return connected


def greet(path: str, stream: Stream, connection: ClientConnection, deadline: float) -> Limits:
    """Agree on a version."""
    try:
        proposal = connection.propose_version()
        if not stream.send(proposal.buffers, ()):
            raise TimeoutError
        while (answer := connection.next()) is None:
            stream.wait_readable(deadline)
            if not stream.receive(connection):
                raise ConnectionResetError
        assert isinstance(answer, Reply)  # requests come after it
        for fd in answer.fds:
            os.close(fd)
        return connection.accept_version(answer)
    except TimeoutError:
        raise _refused(path, errno.ETIMEDOUT, SILENT) from None
    except WireError as error:
        raise _refused(path, errno.EPROTO, f"{error.strerror}; {NO_SERVER}") from None
    except OSError:
        what = "it ended the connection instead of agreeing on a version"
        raise _refused(path, errno.ECONNRESET, f"{what}; {NO_SERVER}") from None


def _refused(path: str, number: int, advice: str) -> TargetError:
    word = errno.errorcode.get(number, str(number))
    return TargetError(number, f"vfio-user:{path} cannot be opened: {word}; {advice}")
