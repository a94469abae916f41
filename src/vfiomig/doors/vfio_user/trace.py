"""One line for every request over the socket, in either direction.

The connection is where each request comes in and each reply is made, once, so that is where it is
looked at: a server that is not traced has the connection without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from vfiomig.abi import vfio_user
from vfiomig.device.region import BAR_NAMES
from vfiomig.doors.tracing import TraceFile, feature_words
from vfiomig.wire import Request, ServerConnection, command_name
from vfiomig.wire.layouts import DMA_ACCESS, MIG_DATA, REGION_ACCESS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfiomig.core.migration import ArcEvent
    from vfiomig.core.vfio_device import VfioDevice
    from vfiomig.wire import Buffer, Buffers, Capabilities, Outgoing, Reply

__all__ = ("Trace", "TracedConnection")

REGIONS = {index: name for name, index in BAR_NAMES.items()} | {6: "rom", 7: "config", 8: "vga"}
FEATURE_HEADER = 8


class Trace(TraceFile):
    """The trace of one device's clients."""

    def __init__(self, out: TextIO, *, as_json: bool) -> None:
        super().__init__(out, as_json=as_json)
        self._clients = 0
        self._arcs: list[str] = []

    def connection(
        self, device: VfioDevice, ours: Capabilities, head_room: int
    ) -> TracedConnection:
        """Make the connection of the next client, whose requests are told."""
        if self._saw_arc not in device.migration.observers:
            device.migration.observers.append(self._saw_arc)
        self._clients += 1
        return TracedConnection(self, self._clients, device.name, ours, head_room)

    def _saw_arc(self, event: ArcEvent) -> None:
        self._arcs.append(str(event))

    def take_arcs(self) -> list[str]:
        """Return the arcs that were taken since the last time; one request is executed at a time."""
        arcs, self._arcs = self._arcs, []
        return arcs


class TracedConnection(ServerConnection):
    """``ServerConnection`` that tells what it sees."""

    def __init__(
        self, trace: Trace, client: int, name: str, ours: Capabilities, head_room: int
    ) -> None:
        super().__init__(ours, head_room=head_room)
        self._trace = trace
        self._who = {"client": client}
        self._name = name
        self._told: dict[int, tuple[Request, str]] = {}  # by the identity of the request
        self._asked: dict[int, str] = {}

    def next(self) -> Request | Reply | None:
        message = super().next()
        if isinstance(message, Request):
            self._told[id(message)] = message, _describe(message)
        elif message is not None:
            asked = self._asked.pop(message.msg_id, "")
            result = -message.errno if message.errno else message.data_size
            self._trace.write(self._who, "client's memory", asked, result)
        return message

    def reply(
        self, request: Request, head: Buffer = b"", data: Buffer = b"", *more: Buffer
    ) -> Buffers:
        self._tell(request, len(data) + sum(map(len, more)))
        return super().reply(request, head, data, *more)

    def reply_region_read(self, request: Request, offset: int, region: int, data: bytes) -> Buffers:
        self._tell(request, len(data))
        return super().reply_region_read(request, offset, region, data)

    def error(self, request: Request, number: int, payload: bytes = b"") -> Buffers:
        self._tell(request, -number)
        return super().error(request, number, payload)

    def request(
        self,
        command: int,
        head: Buffer = b"",
        data: Buffer = b"",
        *more: Buffer,
        fds: Sequence[int] = (),
        no_reply: bool = False,
    ) -> Outgoing:
        outgoing = super().request(command, head, data, *more, fds=fds, no_reply=no_reply)
        address, count = DMA_ACCESS.unpack_from(head)
        self._asked[outgoing.msg_id] = f"{command_name(command)}({address:#x}, {count})"
        return outgoing

    def _tell(self, request: Request, result: int) -> None:
        _, text = self._told.pop(id(request), (request, command_name(request.command)))
        changes = request.command in CHANGING
        arcs = self._trace.take_arcs() if changes else []
        self._trace.write(self._who, self._name, text, result, arcs)


#: Commands that may take arcs of the state machine.
CHANGING = {vfio_user.VFIO_USER_DEVICE_FEATURE, vfio_user.VFIO_USER_DEVICE_RESET}


def _describe(request: Request) -> str:
    detail = DETAILS.get(request.command)
    words = detail(request) if detail is not None and request.refusal is None else ""
    return f"{command_name(request.command)}({words})"


def _access(request: Request) -> str:
    offset, region, count = REGION_ACCESS.unpack_from(request.body)
    return f"{REGIONS.get(region, region)}+{offset:#x}, {count}"


def _state_data(request: Request) -> str:
    return str(MIG_DATA.unpack_from(request.body)[1])


def _map(request: Request) -> str:
    asked = vfio_user.DmaMap.parse(request.body)
    what = "by descriptor" if request.fds else "by messages"
    return f"{asked.addr:#x}, {asked.size:#x}, {what}"


def _unmap(request: Request) -> str:
    asked = vfio_user.DmaUnmap.parse(request.body)
    return f"{asked.addr:#x}, {asked.size:#x}"


def _index(request: Request) -> str:
    return str(int.from_bytes(request.body[8:12], "little"))


def _feature(request: Request) -> str:
    flags = int.from_bytes(request.body[4:FEATURE_HEADER], "little")
    return feature_words(flags, bytes(request.body[FEATURE_HEADER : FEATURE_HEADER + 4]))


DETAILS: dict[int, Callable[[Request], str]] = {
    vfio_user.VFIO_USER_DMA_MAP: _map,
    vfio_user.VFIO_USER_DMA_UNMAP: _unmap,
    vfio_user.VFIO_USER_DEVICE_GET_REGION_INFO: _index,
    vfio_user.VFIO_USER_DEVICE_GET_IRQ_INFO: _index,
    vfio_user.VFIO_USER_DEVICE_SET_IRQS: _index,
    vfio_user.VFIO_USER_REGION_READ: _access,
    vfio_user.VFIO_USER_REGION_WRITE: _access,
    vfio_user.VFIO_USER_DEVICE_FEATURE: _feature,
    vfio_user.VFIO_USER_MIG_DATA_READ: _state_data,
    vfio_user.VFIO_USER_MIG_DATA_WRITE: _state_data,
}
