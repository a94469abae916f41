"""What a checker knows of its target before it begins: one look, and nothing is changed.

A transport cannot show everything: a data_fd of a device in this process is a number of the
client's own, which has no flags and cannot be polled, and the memory of a request that is turned
into a message cannot fault. A client of a socket even decides by itself what its descriptors
mean. Nothing is concluded from what cannot be seen.
"""

from __future__ import annotations

import enum
import os
import re
import resource
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import FEATURES, Dialect
from vfiomig.client.diagnosis import why_no_migration
from vfiomig.client.kernel import KernelTransport
from vfiomig.client.local import LocalTransport
from vfiomig.errors import RequestError
from vfiomig.fsm import LEGAL_SETS, Capability, capability_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig.client import DeviceClient
    from vfiomig.client.transport import Transport

__all__ = (
    "Facts",
    "Shows",
    "look",
    "no_descriptor_left",
    "numbers_in_use",
    "open_descriptors",
    "shown_by",
)

CONFIG = vfio.VFIO_PCI_CONFIG_REGION_INDEX


class Shows(enum.Flag):
    """What can be seen through a transport."""

    #: A data_fd is a descriptor of the system: it has flags, and can be polled and duplicated.
    DESCRIPTORS = enum.auto()
    #: The memory of a request can be missing.
    FAULTS = enum.auto()
    #: There can be no descriptor left.
    EXHAUSTION = enum.auto()
    #: What a descriptor means is decided by the device's side, and not by its client.
    MEANING = enum.auto()
    #: Every request of the kernel has its like, and every errno its meaning.
    ALL_REQUESTS = enum.auto()
    #: Its last descriptor can be closed, and the device be opened again.
    REOPENING = enum.auto()


@dataclass(frozen=True, slots=True)
class Facts:
    """One target."""

    name: str
    by: str
    dialect: Dialect
    #: What VFIO_DEVICE_FEATURE_MIGRATION answers, as it stands.
    flags: int
    #: The same if it is one of the sets that mean something, else none.
    capabilities: Capability
    #: That in words; where it is none, which layer keeps the device from migrating.
    migration: str
    #: Indices of the features that it answers a PROBE of.
    features: frozenset[int]
    shows: Shows
    #: Release of the kernel that the requests go to; empty if they go to none.
    kernel: tuple[int, ...]
    #: PCI vendor and device; ``None`` if it does not show them.
    identity: tuple[int, int] | None

    @property
    def is_server(self) -> bool:
        """Whether requests go to a program as messages, and neither to a kernel nor to a call."""
        return Shows.FAULTS not in self.shows

    @property
    def may_keep_states(self) -> bool:
        """Whether it may be a server that keeps the migration state over a reset (FAULT-7)."""
        return self.is_server and Shows.ALL_REQUESTS not in self.shows


def look(client: DeviceClient) -> Facts:
    """Ask an open device for the facts.

    Raises:
        RequestError: it does not tell its capabilities.
    """
    transport = client._transport
    flags = int(client.capabilities)
    capabilities = Capability(flags) if flags in LEGAL_SETS else Capability(0)
    kernel = _release(os.uname().release) if isinstance(transport, KernelTransport) else ()
    features = frozenset(row.index for row in FEATURES if client.has_feature(row.index))
    return Facts(
        client.name,
        str(client.about.get("by", "")),
        client.dialect,
        flags,
        capabilities,
        _migration(flags, capabilities, transport),
        features,
        shown_by(transport),
        kernel,
        _identity(client),
    )


def _migration(flags: int, capabilities: Capability, transport: Transport) -> str:
    if flags:
        return capability_name(capabilities) if capabilities else f"{flags:#x}, which means nothing"
    return f"none: {why_no_migration(transport.about)}"


def shown_by(transport: Transport) -> Shows:
    """Tell what can be seen through a transport."""
    if isinstance(transport, KernelTransport):
        # One that was handed over is its giver's as well.
        return ~Shows.REOPENING if "descriptor" in transport.about else ~Shows(0)
    if isinstance(transport, LocalTransport):
        return ~Shows.DESCRIPTORS
    requests = Shows.ALL_REQUESTS if transport.about.get("mig_stream") else Shows(0)
    return requests | Shows.REOPENING


def numbers_in_use(transport: Transport) -> frozenset[int]:
    """Return the descriptors that a new data_fd cannot be."""
    own = {transport.device, transport.iommufd}
    if isinstance(transport, KernelTransport):
        own |= open_descriptors()
    return frozenset(own)


def open_descriptors() -> set[int]:
    """Return the numbers of everything that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # that of the listing
        found.add(int(name))
    return found


@contextmanager
def no_descriptor_left(transport: Transport) -> Iterator[None]:
    """Let every new descriptor fail with EMFILE.

    Raises:
        OSError, ValueError: this process may not set its limit.
    """
    if isinstance(transport, KernelTransport):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    else:
        assert isinstance(transport, LocalTransport), "others have no such limit"
        before, transport.numbers.nofile = transport.numbers.nofile, 0
        try:
            yield
        finally:
            transport.numbers.nofile = before


def _release(text: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def _identity(client: DeviceClient) -> tuple[int, int] | None:
    try:
        header = client.read_region(CONFIG, 0, 4)
    except RequestError:
        return None
    if len(header) < 4:
        return None
    return int.from_bytes(header[:2], "little"), int.from_bytes(header[2:], "little")
