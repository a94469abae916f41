"""The device at the other end of a connection: what can be asked of it, as calls.

One message each, and nothing decided but this: a change of state, a query of the state and a
reset come one at a time, and a transfer of device state is sent only while none of them is under
way, so that it means the session that its caller means (sessions.py). ``order`` is the lock for
it; ``_locked`` methods are for whoever holds it.
"""

from __future__ import annotations

import errno
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from vfiomig.abi import vfio, vfio_user
from vfiomig.client.regions import map_file
from vfiomig.client.requests import GET, SET
from vfiomig.client.vfio_user.channel import done
from vfiomig.client.vfio_user.sessions import DataFd, Sessions
from vfiomig.core.regions import region_offset
from vfiomig.errors import RequestError, WireError
from vfiomig.fsm import PRE_COPY_GROUP, Capability, SessionKind, State
from vfiomig.wire import replies, requests
from vfiomig.wire.layouts import MIG_DATA, REGION_ACCESS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfiomig.client.vfio_user.channel import Channel
    from vfiomig.descriptors import Fd
    from vfiomig.wire import Limits, Reply
    from vfiomig.wire.replies import RegionReply

__all__ = ("REGION_LIMIT", "STOPPED", "Remote")

DATA_READ, DATA_WRITE = vfio_user.VFIO_USER_MIG_DATA_READ, vfio_user.VFIO_USER_MIG_DATA_WRITE
DEVICE_STATE = vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
#: More regions than any device has: who claims more wants to keep its client busy.
MOST_REGIONS = 256
#: What lies between the places of two regions in a descriptor, and so the longest one.
REGION_LIMIT = region_offset(1) - region_offset(0)
#: Room for what is said about a region: capabilities of more areas than any device has.
REGION_INFO_LIMIT = 1 << 20
#: Where libvfio-user takes little but what a migration needs.
STOPPED = frozenset({State.STOP, State.STOP_COPY})


class Remote:
    """The device. Calls raise ``OSError`` with the errno of the server."""

    def __init__(
        self, channel: Channel, limits: Limits, whole_state: list[memoryview] | None = None
    ) -> None:
        self.channel = channel
        self.limits = limits
        self.order = threading.Lock()
        self.sessions = Sessions()
        #: Whether it has a migration state at all; known once the device was asked.
        self.migratable = True
        #: See ``DeviceClient``.
        self.mended: list[str] = []
        #: A state that the device is known to take, if anybody has one: see running.py. It may be
        #: shared with earlier connections to the same server.
        self.whole_state = [] if whole_state is None else whole_state
        self._data_out = limits.in_one_piece(MIG_DATA.size)
        self._region_out = limits.in_one_piece(REGION_ACCESS.size)

    # What it is made of.

    def info(self) -> vfio_user.DeviceInfo:
        def parse(reply: Reply) -> vfio_user.DeviceInfo:
            found = replies.device_info_untrusted(reply)
            if found.num_regions > MOST_REGIONS:
                raise WireError(errno.EPROTO, f"it claims {found.num_regions} regions")
            return found

        asked = vfio_user.DeviceInfo(argsz=vfio_user.DeviceInfo.SIZE)
        return self.channel.call(parse, vfio_user.VFIO_USER_DEVICE_GET_INFO, bytes(asked))

    def region(self, index: int, fds: list[Fd] | None = None) -> RegionReply:
        """Ask about a region, a second time if more is to be said about it than at first.

        Descriptors that come along go to ``fds``, if that is given.
        """
        found = self._region(index, vfio.RegionInfo.SIZE, fds)
        if found.info.argsz > vfio.RegionInfo.SIZE:
            found = self._region(index, min(found.info.argsz, REGION_INFO_LIMIT), fds)
        return found

    def map_region(self, index: int, at: int, length: int, *, writable: bool) -> memoryview:
        """Map part of a region, by the descriptor that comes with what is said about it."""
        fds: list[Fd] = []
        try:
            with self.only_while_it_runs("regions are mapped"):
                found = self.region(index, fds)
            if not fds:
                raise OSError(errno.EINVAL, "the server passes no descriptor of it")
            place = found.info.offset + at
            return map_file(fds[-1].fileno(), place, length, writable=writable)
        finally:
            for fd in fds:
                fd.close()

    def _region(self, index: int, room: int, fds: list[Fd] | None) -> RegionReply:
        def parse(reply: Reply) -> RegionReply:
            found = replies.region_info_untrusted(reply)
            if found.info.index != index:
                raise WireError(errno.EPROTO, f"region {found.info.index} is told of, not {index}")
            if room > found.info.SIZE and found.info.argsz > room:
                raise WireError(
                    errno.EPROTO, f"region {index} has {found.info.argsz} bytes of info"
                )
            if found.info.size > REGION_LIMIT:
                raise WireError(errno.EPROTO, f"region {index} has {found.info.size} bytes")
            return found

        asked = bytes(vfio.RegionInfo(argsz=room, index=index))
        command = vfio_user.VFIO_USER_DEVICE_GET_REGION_INFO
        return self.channel.call(parse, command, asked, fds_to=fds)

    def irq(self, index: int) -> vfio.IrqInfo:
        asked = vfio.IrqInfo(argsz=vfio.IrqInfo.SIZE, index=index)
        return self.channel.call(
            replies.irq_info_untrusted, vfio_user.VFIO_USER_DEVICE_GET_IRQ_INFO, bytes(asked)
        )

    @contextmanager
    def only_while_it_runs(self, what: str) -> Iterator[None]:
        """Explain a refusal that libvfio-user has for nearly everything in STOP and STOP_COPY."""
        try:
            yield
        except RequestError:
            raise
        except OSError as refusal:
            state = self.sessions.state
            if refusal.errno != errno.EINVAL or state not in STOPPED:
                raise
            raise RequestError(
                errno.EINVAL,
                f"the server refuses it, and the device is in {state.name}: "
                f"many servers want that {what} while it runs",
            ) from None

    # Regions.

    def read_region(self, index: int, offset: int, view: memoryview) -> None:
        """Fill ``view`` from a region, in as many messages as it takes."""
        while view:
            piece, view = view[: self.limits.data_out], view[self.limits.data_out :]
            count = len(piece)
            self.channel.call(
                partial(replies.region_read_untrusted, count=count),
                vfio_user.VFIO_USER_REGION_READ,
                REGION_ACCESS.pack(offset, index, count),
                into=piece,
            )
            offset += count

    def write_region(self, index: int, offset: int, data: memoryview) -> None:
        """Write ``data`` to a region, in as many messages as it takes."""
        while data:
            piece, data = data[: self._region_out], data[self._region_out :]
            count = len(piece)
            self.channel.call(
                partial(replies.region_write_untrusted, count=count),
                vfio_user.VFIO_USER_REGION_WRITE,
                REGION_ACCESS.pack(offset, index, count),
                piece,
            )
            offset += count

    # Features and the state.

    def feature(self, flags: int, payload: bytes = b"", size: int = 0, room: int = 0) -> memoryview:
        """Use a feature; return at least ``size`` bytes of payload. ``room``: see ``requests``."""
        return self.feature_as_it_is(requests.feature(flags, payload, room), size)

    def feature_as_it_is(self, asked: bytes, size: int) -> memoryview:
        """Make a request whose header is somebody else's."""
        parse = partial(replies.feature_untrusted, size=size)
        return self.channel.call(parse, vfio_user.VFIO_USER_DEVICE_FEATURE, asked)

    def query_locked(self) -> int:
        """Ask where the device is."""
        size = vfio.MigState.SIZE
        state = vfio.MigState.parse(self.feature(GET | DEVICE_STATE, size=size, room=size))
        self.sessions.settle(state.device_state)
        return state.device_state

    def change_locked(self, target: int) -> bool:
        """Ask for a state; tell whether a session is open that was not before."""
        if self.sessions.state is None:
            self.query_locked()
        self.sessions.state = None  # unless it succeeds
        asked = vfio.MigState(device_state=target, data_fd=-1)
        self.feature(SET | DEVICE_STATE, bytes(asked), asked.SIZE)
        return self.sessions.settle(target)

    def reset_locked(self) -> None:
        self.sessions.end()
        self.sessions.state = None
        self.channel.call(done, vfio_user.VFIO_USER_DEVICE_RESET)

    # The stream.

    def read_data(self, data_fd: DataFd, buffer: memoryview) -> int:
        view = buffer[: self.limits.data_out]
        with self._accounted(data_fd), self.channel.prepare(DATA_READ, view) as call:
            with self.order:
                self._require(data_fd, SessionKind.SAVING)
                self.channel.send(call, _data_head(view))
            return self.channel.finish(call, _count_in(view))

    def read_locked(self, view: memoryview) -> int:
        """Read from whatever session is open; ``view`` has no more than fits a message."""
        return self.channel.call(_count_in(view), DATA_READ, _data_head(view), into=view)

    def write_data(self, data_fd: DataFd, data: memoryview) -> int:
        piece = data[: self._data_out]
        with self._accounted(data_fd), self.channel.prepare(DATA_WRITE) as call:
            with self.order:
                self._require(data_fd, SessionKind.RESUMING)
                if not piece:
                    return 0
                self.channel.send(call, _data_head(piece), piece)
            self.channel.finish(call, done)
            return len(piece)

    def write_locked(self, data: memoryview) -> int:
        """Write to whatever session is open, as much as fits a message."""
        piece = data[: self._data_out]
        self.channel.call(done, DATA_WRITE, _data_head(piece), piece)
        return len(piece)

    @contextmanager
    def _accounted(self, data_fd: DataFd) -> Iterator[None]:
        """Make a transfer that is interrupted, by Ctrl-C say, the last one of its session."""
        try:
            yield
        except OSError:
            raise
        except BaseException:  # nobody knows whether its bytes have moved
            self.sessions.lose(data_fd)
            raise

    def _require(self, data_fd: DataFd, kind: SessionKind) -> None:
        if self.sessions.state is None:
            self.query_locked()
        self.sessions.require(data_fd, kind)

    def precopy_info(self, data_fd: DataFd, asked: vfio.PrecopyInfo) -> vfio.PrecopyInfo:
        """Ask what is left before STOP_COPY."""
        with self.channel.prepare(vfio_user.VFIO_USER_MIG_GET_PRECOPY_INFO) as call:
            with self.order:
                if self.sessions.state is None:
                    self.query_locked()
                if not self.sessions.is_open(data_fd):
                    raise OSError(self._stale_info_locked(), "the session is over")
                self.channel.send(call, bytes(asked))
            return self.channel.finish(call, replies.precopy_info_untrusted)

    def _stale_info_locked(self) -> int:
        """Return what a kernel says to who asks by a data_fd of an earlier session."""
        size = vfio.FeatureMigration.SIZE
        told = self.feature(GET | vfio.VFIO_DEVICE_FEATURE_MIGRATION, size=size, room=size)
        if Capability.PRE_COPY not in Capability(vfio.FeatureMigration.parse(told).flags):
            return errno.ENOTTY
        return errno.ENODEV if self.sessions.state in PRE_COPY_GROUP else errno.EINVAL


def _data_head(view: memoryview) -> bytes:
    return MIG_DATA.pack(MIG_DATA.size + len(view), len(view))


def _count_in(view: memoryview) -> Callable[[Reply], int]:
    """Return what finds in a reply how much of ``view`` was filled."""
    return partial(replies.mig_read_untrusted, asked=len(view))
