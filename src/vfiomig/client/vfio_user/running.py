"""The two promises that not every server keeps: a device runs when it is opened, and after a reset.

Theory of operation
-------------------
In the kernel an open and a reset both leave a device in RUNNING, with no session. libvfio-user
keeps the migration state over either, refuses a reset in STOP and STOP_COPY, and may serve a
device that does not survive a session which is left before it was read to its end. So the state
is asked for, and where the promise was not kept the device is led to RUNNING by requests that
every server takes: out of PRE_COPY by way of STOP_COPY, and out of STOP_COPY when all was read.
Out of RESUMING many devices let nobody who has not loaded a whole state; who has one that was
saved before puts it into ``Remote.whole_state``.
A warning tells, because what the device was doing is over.
"""

from __future__ import annotations

import errno
import logging
import time
from typing import TYPE_CHECKING

from vfiomig.client.dialects import ABSENT, known
from vfiomig.client.vfio_user.remote import STOPPED
from vfiomig.errors import RequestError
from vfiomig.fsm import PRE_COPY_GROUP, State

if TYPE_CHECKING:
    from vfiomig.client.vfio_user.remote import Remote

__all__ = ("begin", "reset")

log = logging.getLogger("vfiomig.client.vfio_user")

RUNNING = State.RUNNING
#: Bytes that are read at a time when nobody wants them.
CHUNK = 1 << 20


def begin(remote: Remote) -> None:
    """Bring a device that was just opened to RUNNING, and see whether it migrates at all.

    Raises:
        OSError: what it refused to be brought there with.
    """
    with remote.order:
        try:
            remote.query_locked()
        except OSError as refusal:
            if refusal.errno not in ABSENT:
                raise
            remote.migratable = False
            return
        if remote.sessions.state is not RUNNING:
            _lead_to_running(remote, "an earlier client left the device in")


def reset(remote: Remote) -> None:
    """Reset the device; it is in RUNNING then, whatever the server thinks of that."""
    with remote.order:
        try:
            remote.reset_locked()
        except OSError as refusal:
            if refusal.errno != errno.EINVAL or not _is_stopped_locked(remote):
                raise
            _lead_to_running(remote, "no reset is possible in")
            remote.reset_locked()
        if not remote.migratable:
            return
        # A reset that met another request is carried out when that ends: one query may be early.
        if remote.query_locked() != RUNNING and remote.query_locked() != RUNNING:
            _lead_to_running(remote, "a reset leaves the device in")
        remote.sessions.end()


def _is_stopped_locked(remote: Remote) -> bool:
    return remote.migratable and known(remote.query_locked()) in STOPPED


def _lead_to_running(remote: Remote, why: str) -> None:
    """Bring the device to RUNNING from a state that was just asked for."""
    state, name = remote.sessions.state, remote.channel.name
    where = state.name if state is not None else "a state that is not known here"
    log.warning("%s: %s %s; it is brought to RUNNING", name, why, where)
    remote.mended.append(f"{why} {where}")
    try:
        if state is State.ERROR:
            remote.reset_locked()
        elif state in PRE_COPY_GROUP:
            remote.change_locked(State.STOP_COPY)
        if remote.sessions.state is State.STOP_COPY:
            _drain(remote)
        try:
            remote.change_locked(RUNNING)
        except RequestError:
            raise
        except OSError:
            if state is not State.RESUMING or not remote.whole_state:
                raise
            _load(remote, remote.whole_state[0])
            remote.change_locked(RUNNING)
            remote.mended.append("only a whole state leads out of RESUMING")
    except RequestError:
        raise  # there is no connection any more
    except OSError as refusal:
        raise RequestError(
            refusal.errno or errno.EIO,
            f"the server at {name} keeps the device in {where} and does not let it run: "
            f"{refusal.strerror}; start the server again",
        ) from None


def _load(remote: Remote, state: memoryview) -> None:
    """Load a state that the device is known to take, in place of what it was given."""
    remote.reset_locked()
    while state:
        state = state[remote.write_locked(state) :]


def _drain(remote: Remote) -> None:
    """Read what is left of a state that nobody wants, if that takes no longer than a request."""
    buffer = memoryview(bytearray(min(CHUNK, remote.limits.data_out)))
    deadline = time.monotonic() + remote.channel.timeout
    while time.monotonic() < deadline:
        try:
            if not remote.read_locked(buffer):
                return
        except RequestError:
            raise
        except OSError:
            return  # a state that cannot be read is left all the same
