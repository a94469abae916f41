"""A device served over vfio-user: the socket, and one client after the other.

Theory of operation
-------------------
One thread accepts a client, serves it until it leaves, and accepts the next; who comes meanwhile
waits in the socket's backlog. The device is one and has one user at a time, so more threads would
have nothing to do, and many servers in one process stay cheap.

A socket file is never taken from a server that lives: what connects to it is a server. A file that
nobody answers is a stale one, left by a server that was killed.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from vfiomig.core.vfio_device import VfioDevice
from vfiomig.descriptors import Fd, poll_until
from vfiomig.doors.vfio_user.compat import KERNEL
from vfiomig.doors.vfio_user.line import ClientGone
from vfiomig.doors.vfio_user.visit import Visit
from vfiomig.errors import DoorError, TargetError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from vfiomig.device import Device
    from vfiomig.doors.vfio_user.compat import Behaviour
    from vfiomig.doors.vfio_user.opened import Opened
    from vfiomig.doors.vfio_user.trace import Trace

__all__ = ("Server",)

log = logging.getLogger("vfiomig.doors.vfio_user")

#: How long the end waits for a hook of the device.
END_SECONDS = 5.0
#: Clients that may wait for their turn.
BACKLOG = 16
#: Seconds until a client is looked after again for whom there was no descriptor.
RETRY_SECONDS = 0.1
#: Length of a socket's path, with the NUL behind it.
PATH_ROOM = 108


class Server:
    """Serves ``device`` from ``with`` to the end of the block, or until ``wait`` returns."""

    def __init__(
        self,
        device: Device | VfioDevice,
        path: str | os.PathLike[str] | None = None,
        *,
        sock: socket.socket | None = None,
        once: bool = False,
        behaviour: Behaviour = KERNEL,
        trace: Trace | None = None,
    ) -> None:
        """``path`` is where the socket is to be; ``sock`` is one that listens, or is connected.

        ``sock`` is taken over with ``with``. ``once``: the first client is the last.
        ``behaviour`` is one of ``compat``.
        """
        if (path is None) == (sock is None):
            raise ValueError("give a path or a socket")
        self.served = device if isinstance(device, VfioDevice) else VfioDevice(device)
        self.path = None if path is None else os.fspath(path)
        #: How many clients have used the device.
        self.clients = 0
        self._once = once
        self._behaviour = behaviour
        self._trace = trace
        self._opened: Opened | None = None  # what a client left open
        self._given = sock
        self._socket: socket.socket
        self._wake: Fd
        self._inode: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._over = False
        self._visit: Visit | None = None
        self._failure: BaseException | None = None
        name = f"vfiomig-{self.served.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # Life.

    def __enter__(self) -> Self:
        """Listen.

        Raises:
            TargetError: the path is taken, or cannot be a socket's.
        """
        if self._given is None:
            assert self.path is not None
            self._socket = listen(self.path)
            self._inode = _inode(self.path)
        else:
            self._socket = self._given
        self._wake = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Hang up on the client that there is, and end."""
        with self._lock:
            self._over = True
            if self._visit is not None:
                self._visit.line.hang_up()
        os.eventfd_write(self._wake.fileno(), 1)
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            log.warning("a hook of %s hangs; it is given up as it is", self.served.name)
        self._socket.close()
        self._wake.close()
        if self.path is not None and _inode(self.path) == self._inode:
            with suppress(FileNotFoundError):
                os.unlink(self.path)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no further client will be served; ``False`` if that takes longer.

        Raises:
            DoorError: serving failed.
        """
        self._thread.join(timeout)
        if self._failure is not None:
            raise DoorError(f"serving failed, please report it: {self._failure!r}")
        return not self._thread.is_alive()

    # Serving.

    def _run(self) -> None:
        try:
            if not self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                self._serve(self._socket.dup())
                return
            self._socket.setblocking(False)
            while not self._over and not (self._once and self.clients):
                client = self._accept()
                if client is not None:
                    self._serve(client)
        except BaseException as failure:
            log.exception("serving %s failed", self.served.name)
            self._failure = failure
        finally:
            if self._opened is not None:
                self._opened.close()

    def _accept(self) -> socket.socket | None:
        """Wait for a client; nothing if the end came first, or the client is gone again."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        poller.poll()
        if self._over:
            return None
        try:
            client, _ = self._socket.accept()
        except OSError as failure:
            if failure.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
                log.warning("a client has to wait: %s", failure.strerror)
                poll_until(self._wake, select.POLLIN, time.monotonic() + RETRY_SECONDS)
            return None
        return client

    def _serve(self, client: socket.socket) -> None:
        """Serve one client to its end, whatever it does."""
        try:
            begun = Visit(self.served, client, self._behaviour, self._trace)
        except OSError as failure:
            log.warning("a client is turned away: %s", failure.strerror)
            client.close()
            return
        with begun as visit:
            with self._lock:
                self._visit = visit
                if self._over:
                    visit.line.hang_up()
            try:
                visit.greet(self._opened)
                if self._behaviour.stays_open:
                    self._opened = visit.opened
                self.clients += 1
                visit.serve()
            except ClientGone as gone:
                log.debug("%s: the client's visit is over: %s", self.served.name, gone)
            except Exception:
                log.exception("%s: a client is given up", self.served.name)
            finally:
                with self._lock:
                    self._visit = None


def listen(path: str) -> socket.socket:
    """Make a socket that listens at ``path``.

    Raises:
        TargetError: something is there that is no stale socket, or nothing can be there.
    """
    if len(os.fsencode(path)) >= PATH_ROOM:
        what = f"{path}: a socket's path has less than {PATH_ROOM} bytes: choose a shorter one"
        raise TargetError(errno.ENAMETOOLONG, what)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            made.bind(path)
        except OSError as failure:
            if failure.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            made.bind(path)
        made.listen(BACKLOG)
    except OSError as failure:
        made.close()
        if isinstance(failure, TargetError):
            raise
        number = failure.errno or errno.EIO
        raise TargetError(number, f"{path}: {failure.strerror}") from failure
    return made


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            what = f"{path} is there and is no socket: choose another path"
            raise TargetError(errno.EEXIST, what)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
            except BlockingIOError:
                pass  # its backlog is full, so it lives
        raise TargetError(errno.EADDRINUSE, f"{path}: another server lives there: choose another")


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
