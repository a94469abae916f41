"""The two ways to ask for a state, and which of them a device understands.

Theory of operation
-------------------
Both dialects have the same states and sessions; they differ in the request, in where the answer
stands, and in how one learns the state after a failure. In the landed dialect that is a query of
its own. V6 has none: the answer is in the struct of the failed request, unless the errno says
that the device was never asked. Its query is a request for ERROR, which every device refuses
without doing anything. docs/protocol.md, chapters "dialects" and "v6".
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import Dialect
from vfiomig.client.requests import GET, SET, said_about
from vfiomig.client.transport import NO_FD
from vfiomig.fsm import State

if TYPE_CHECKING:
    from vfiomig.client.requests import Requests

__all__ = ("Answer", "StateRequests", "find_dialect", "state_requests")

MIGRATION = vfio.VFIO_DEVICE_FEATURE_MIGRATION
DEVICE_STATE = vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE

#: What a probe answers for a feature that is not there.
ABSENT = frozenset({errno.ENOTTY, errno.EINVAL})
#: V6: with these the core refused before the device was asked, and no state was written.
NO_STATE_WRITTEN = frozenset({errno.EOPNOTSUPP, errno.EFAULT, errno.ENOTTY})


class Answer(NamedTuple):
    """What came of a request for a state. ``device_state`` is set after a failure, if known."""

    errno: int
    data_fd: int = NO_FD
    device_state: State | None = None
    #: What the transport says about a failure, if that is more than the errno.
    reason: str = ""


class StateRequests(Protocol):
    """One dialect."""

    def ask(self, target: int) -> Answer:
        """Request a state."""

    def query(self) -> int:
        """Return the number of the state; ``OSError`` if the device does not tell."""


def find_dialect(requests: Requests) -> Dialect | None:
    """Find the dialect out without side effects; ``None`` if the device cannot migrate.

    Raises:
        OSError: an answer that no dialect has, such as EIO from a device that does not wake.
    """
    for index, operations, conclusion in (
        (MIGRATION, 0, None),
        (DEVICE_STATE, GET | SET, Dialect.V6),
    ):
        try:
            requests.probe(index, operations)
        except OSError as refusal:
            if refusal.errno not in ABSENT:
                raise
            return conclusion
    return Dialect.LANDED


def state_requests(requests: Requests, dialect: Dialect) -> StateRequests:
    return V6(requests) if dialect is Dialect.V6 else Landed(requests)


def known(number: int) -> State | None:
    """Return the state of that number; a later kernel may have more than this client knows."""
    return State(number) if number < vfio.VFIO_DEVICE_STATE_NR else None


class Landed:
    """VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    def ask(self, target: int) -> Answer:
        argument = vfio.MigState(device_state=target, data_fd=NO_FD)
        try:
            self._requests.feature_once(DEVICE_STATE, SET, argument)
        except OSError as failure:
            # The struct still holds the request: only a query tells.
            number = failure.errno or errno.EIO
            return Answer(number, NO_FD, self._look(), said_about(failure))
        return Answer(0, argument.data_fd)

    def query(self) -> int:
        argument = vfio.MigState(data_fd=NO_FD)
        self._requests.feature(DEVICE_STATE, GET, argument)
        return argument.device_state

    def _look(self) -> State | None:
        try:
            return known(self.query())
        except OSError:
            return None


class V6:
    """VFIO_DEVICE_MIG_SET_STATE."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    def ask(self, target: int) -> Answer:
        argument = vfio.MigSetState(argsz=vfio.MigSetState.SIZE, device_state=target, data_fd=NO_FD)
        transport = self._requests.transport
        try:
            transport.ioctl(transport.device, vfio.VFIO_DEVICE_MIG_SET_STATE, argument)
        except OSError as failure:
            number = failure.errno or errno.EIO
            told = number not in NO_STATE_WRITTEN
            return Answer(number, NO_FD, known(argument.device_state) if told else None)
        return Answer(0, argument.data_fd)

    def query(self) -> int:
        argument = vfio.MigSetState(
            argsz=vfio.MigSetState.SIZE,
            device_state=vfio.VFIO_DEVICE_STATE_ERROR,
            data_fd=NO_FD,
        )
        try:
            self._requests.on_device(vfio.VFIO_DEVICE_MIG_SET_STATE, argument)
        except OSError as refusal:
            if refusal.errno in NO_STATE_WRITTEN:
                raise
        return argument.device_state
