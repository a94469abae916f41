"""The one table of vfio-user commands: who asks, what goes along, what comes back.

A request is at least as long as its head. Replies may be shorter than theirs: a read of no bytes
is answered with a header alone, a DMA_UNMAP likewise by a server without DMA, and DMA_WRITE by
QEMU 10.1; `vfiomig.wire.replies` knows which.

Where data follow a head they may be as many as were agreed on. Such a message is handed out as
soon as its head is there, and whoever takes it receives the data where they belong.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfiomig.abi import vfio, vfio_user

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfiomig.abi.uapi import UapiStruct

__all__ = ("COMMANDS", "Command", "Role", "command_name", "requests_to")


class Role(enum.StrEnum):
    """The two ends of a connection."""

    CLIENT = "client"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Command:
    """One command."""

    #: The name without VFIO_USER.
    name: str
    number: int
    asks: Role
    #: What a request begins with, and a reply.
    request: type[UapiStruct] | None = None
    reply: type[UapiStruct] | None = None
    #: Data follow the head of a request, or of a reply.
    request_data: bool = False
    reply_data: bool = False
    #: Descriptors may come with a request.
    request_fds: bool = False
    #: Exists only where the extension was agreed on.
    extension: bool = False
    #: How long the two heads are.
    request_size: int = 0
    reply_size: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "request_size", self.request.SIZE if self.request else 0)
        object.__setattr__(self, "reply_size", self.reply.SIZE if self.reply else 0)


def _row(
    name: str,
    request: type[UapiStruct] | None,
    reply: type[UapiStruct] | None,
    *has: str,
    asks: Role = Role.CLIENT,
) -> Command:
    return Command(
        name,
        getattr(vfio_user, f"VFIO_USER_{name}"),
        asks,
        request,
        reply,
        **dict.fromkeys(has, True),
    )


# DEVICE_GET_REGION_IO_FDS has no row: libvfio-user and the specification disagree about its
# layout, and no client is known that needs it. Like every command that is not here it is
# refused with EINVAL.
COMMANDS: tuple[Command, ...] = (
    _row("VERSION", vfio_user.Version, vfio_user.Version),
    _row("DMA_MAP", vfio_user.DmaMap, None, "request_fds"),
    _row("DMA_UNMAP", vfio_user.DmaUnmap, vfio_user.DmaUnmap),
    _row("DEVICE_GET_INFO", vfio_user.DeviceInfo, vfio_user.DeviceInfo),
    _row("DEVICE_GET_REGION_INFO", vfio.RegionInfo, vfio.RegionInfo),
    _row("DEVICE_GET_IRQ_INFO", vfio.IrqInfo, vfio.IrqInfo),
    _row("DEVICE_SET_IRQS", vfio.IrqSet, None, "request_fds"),
    _row("REGION_READ", vfio_user.RegionAccess, vfio_user.RegionAccess, "reply_data"),
    _row("REGION_WRITE", vfio_user.RegionAccess, vfio_user.RegionAccess, "request_data"),
    _row("REGION_WRITE_MULTI", vfio_user.WriteMulti, vfio_user.WriteMulti),
    _row(
        "DMA_READ",
        vfio_user.DmaRegionAccess,
        vfio_user.DmaRegionAccess,
        "reply_data",
        asks=Role.SERVER,
    ),
    _row(
        "DMA_WRITE",
        vfio_user.DmaRegionAccess,
        vfio_user.DmaRegionAccess,
        "request_data",
        asks=Role.SERVER,
    ),
    _row("DEVICE_RESET", None, None),
    _row("DEVICE_FEATURE", vfio.DeviceFeature, vfio.DeviceFeature),
    _row("MIG_DATA_READ", vfio_user.MigData, vfio_user.MigData, "reply_data"),
    _row("MIG_DATA_WRITE", vfio_user.MigData, None, "request_data"),
    _row("MIG_GET_PRECOPY_INFO", vfio.PrecopyInfo, vfio.PrecopyInfo, "extension"),
)

BY_NUMBER: Mapping[int, Command] = {row.number: row for row in COMMANDS}
VERSION = BY_NUMBER[vfio_user.VFIO_USER_VERSION]


def requests_to(role: Role, *, extension: bool) -> dict[int, Command]:
    """Return what this end may be asked for once the version is agreed on."""
    return {
        row.number: row
        for row in COMMANDS
        if row.asks is not role and row is not VERSION and (extension or not row.extension)
    }


def command_name(number: int) -> str:
    """Name a command for a message; an unknown one is its number."""
    row = BY_NUMBER.get(number)
    return row.name if row else f"command {number}"
