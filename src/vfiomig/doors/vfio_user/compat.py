"""How a server behaves: as the kernel would, or in the manner of libvfio-user.

A client that has to get along with that library's servers is tried out against one here. Each
difference is a row of ``DIFFERENCES``, and the same table stands in docs/vfio-user.md.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vfiomig.abi import vfio, vfio_user
from vfiomig.doors.vfio_user import commands
from vfiomig.doors.vfio_user.commands import HANDLERS
from vfiomig.fsm import State
from vfiomig.wire import Capabilities, command_name, requests
from vfiomig.wire.connection import HEAD_ROOM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfiomig.doors.vfio_user.commands import Handler
    from vfiomig.doors.vfio_user.visit import Visit
    from vfiomig.wire import Request

__all__ = ("BEHAVIOURS", "DIFFERENCES", "KERNEL", "Behaviour", "Difference")

READ, WRITE = vfio_user.VFIO_USER_REGION_READ, vfio_user.VFIO_USER_REGION_WRITE
FEATURE, RESET = vfio_user.VFIO_USER_DEVICE_FEATURE, vfio_user.VFIO_USER_DEVICE_RESET
DATA_READ, DATA_WRITE = vfio_user.VFIO_USER_MIG_DATA_READ, vfio_user.VFIO_USER_MIG_DATA_WRITE

#: What this server says of itself.
OURS = Capabilities(
    max_msg_fds=253,  # as many as the kernel passes at once
    max_data_xfer_size=16 << 20,
    mig_stream=1,
    migration_pgsize=4096,
    write_multiple=True,
    pgsizes=4096,
    max_dma_maps=65535,
    max_bitmap_size=16 << 20,
)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a server does where servers differ; the defaults are the kernel's."""

    capabilities: Capabilities = OURS
    #: How much longer than its data a message may be.
    head_room: int = HEAD_ROOM
    #: Replies to MIG_DATA_READ are as long as what was asked for.
    pads_reads: bool = False
    #: The device is not released between clients.
    stays_open: bool = False
    handlers: Mapping[int, Handler] = field(default_factory=lambda: HANDLERS)


class Difference(NamedTuple):
    """In what libvfio-user differs: the command, what happens there, and here."""

    command: str
    there: str
    here: str


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "VERSION",
        "says 8 descriptors, 1 MiB of data and pages of 4096 bytes",
        "says 253 descriptors, 16 MiB, several writes in one message and the extension",
    ),
    Difference(
        "all",
        "a message has at most 1 MiB and 32 bytes",
        "a message has at most 16 MiB of data",
    ),
    Difference(
        "all",
        "in STOP only REGION_READ, REGION_WRITE and DEVICE_FEATURE are executed, in STOP_COPY"
        " only DEVICE_FEATURE and MIG_DATA_READ; others fail with EINVAL",
        "every command is executed in every state",
    ),
    Difference(
        "all",
        "what a device or session does not have is EINVAL",
        "it is the kernel's errno: ENOTTY, ENODEV or EBADF",
    ),
    Difference(
        "REGION_READ, REGION_WRITE, DEVICE_FEATURE",
        "the reply that tells an error has a payload, that of a reply to success",
        "it is a header",
    ),
    Difference(
        "MIG_DATA_READ",
        "the reply is as long as what was asked for; its size says how many bytes of it count",
        "the reply has the bytes that there are",
    ),
    Difference(
        "DEVICE_RESET",
        "fails in STOP and STOP_COPY, and leaves the migration state as it is; in RESUMING what"
        " was loaded is dropped",
        "ends the session and leads to RUNNING from every state",
    ),
    Difference(
        "the client leaves",
        "the migration state and its session stay for the next client",
        "the session ends, and the next client finds RUNNING",
    ),
)

#: Commands that are executed in these states.
EXECUTED = {State.STOP: {READ, WRITE, FEATURE}, State.STOP_COPY: {FEATURE, DATA_READ}}
#: States in which these commands are executed.
ONLY_IN = {
    DATA_READ: {State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY},
    DATA_WRITE: {State.RESUMING},
}
IS_EINVAL = {errno.ENOTTY, errno.ENODEV, errno.EBADF, errno.EFAULT}


def _require_executed(visit: Visit, command: int) -> None:
    state = visit.served.migration.state()
    if command not in EXECUTED.get(state, {command}) or state not in ONLY_IN.get(command, {state}):
        raise OSError(errno.EINVAL, f"{command_name(command)} in {state.name}")


def _reset(visit: Visit, request: Request) -> None:
    """Reset a device that runs; in any other state, only what is not about migration.

    What was loaded belongs to the device and not to the library: it is dropped, and a load begins.
    """
    state = visit.served.migration.state()
    if state is State.RUNNING or request.refusal is not None:
        commands.reset(visit, request)
        return
    visit.line.lend()
    if state is State.RESUMING:
        visit.ioctl(vfio.VFIO_DEVICE_RESET, bytearray())
        visit.ioctl(vfio.VFIO_DEVICE_FEATURE, bytearray(LOAD))
    else:
        visit.served.irqs.reset()
    visit.reply(request)


def _payload_of_error(request: Request) -> bytes:
    """Return what is behind the header that tells an error; look before the role is lent."""
    if request.command == READ:
        size = int.from_bytes(request.body[12:16], "little")
        return bytes(request.body) + bytes(min(size, LIBVFIO_USER_SIZE))
    if request.command == WRITE:
        return bytes(request.body)
    is_set = request.command == FEATURE and request.body[6:7] == SET_BYTE
    return bytes(request.body) if is_set else b""


def _guarded(handler: Handler) -> Handler:
    def answer(visit: Visit, request: Request) -> None:
        payload = _payload_of_error(request)
        try:
            _require_executed(visit, request.command)
            handler(visit, request)
        except OSError as refusal:
            number = refusal.errno or errno.EIO
            number = errno.EINVAL if number in IS_EINVAL else number
            visit.line.send(visit.wire.error(request, number, payload))

    return answer


#: The request for RESUMING.
LOAD = requests.feature(
    vfio.VFIO_DEVICE_FEATURE_SET | vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    bytes(vfio.MigState(device_state=State.RESUMING)),
)
SET_BYTE = bytes([vfio.VFIO_DEVICE_FEATURE_SET >> 16])
LIBVFIO_USER_SIZE = 1 << 20
KERNEL = Behaviour()
LIBVFIO_USER = Behaviour(
    capabilities=Capabilities(
        max_msg_fds=8, max_data_xfer_size=LIBVFIO_USER_SIZE, migration_pgsize=4096
    ),
    head_room=32,
    pads_reads=True,
    stays_open=True,
    handlers={
        number: _guarded(_reset if number == RESET else handler)
        for number, handler in HANDLERS.items()
        if number != vfio_user.VFIO_USER_REGION_WRITE_MULTI
    },
)

#: By the word that chooses it.
BEHAVIOURS: dict[str, Behaviour] = {"libvfio-user": LIBVFIO_USER}
