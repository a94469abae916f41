"""What a device is and can do, asked in one go: for ``vfiomig info``, reports and logs.

Nothing is changed. A question that the device does not answer is noted with the reason, and the
others are asked all the same: a device in STOP_COPY behind a socket, say, may show nothing of its
regions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from vfiomig.abi import pci, vfio
from vfiomig.abi.ioctls import FEATURES
from vfiomig.client.diagnosis import why_no_migration
from vfiomig.errors import RequestError
from vfiomig.fsm import LEGAL_SETS, capability_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.client.face import DeviceClient

__all__ = ("Description", "Identity", "IrqRow", "RegionRow", "describe")

T = TypeVar("T")

CONFIG = vfio.VFIO_PCI_CONFIG_REGION_INDEX
REGION_NAMES = ("BAR0", "BAR1", "BAR2", "BAR3", "BAR4", "BAR5", "ROM", "config", "VGA")
IRQ_NAMES = ("INTx", "MSI", "MSI-X", "ERR", "REQ")
REGION_FLAGS = {
    vfio.VFIO_REGION_INFO_FLAG_READ: "read",
    vfio.VFIO_REGION_INFO_FLAG_WRITE: "write",
    vfio.VFIO_REGION_INFO_FLAG_MMAP: "mmap",
}
IRQ_FLAGS = {
    vfio.VFIO_IRQ_INFO_EVENTFD: "eventfd",
    vfio.VFIO_IRQ_INFO_MASKABLE: "maskable",
    vfio.VFIO_IRQ_INFO_AUTOMASKED: "automasked",
    vfio.VFIO_IRQ_INFO_NORESIZE: "noresize",
}
PCI_CAPABILITIES = {
    pci.PCI_CAP_ID_PM: "PM",
    pci.PCI_CAP_ID_MSI: "MSI",
    pci.PCI_CAP_ID_VNDR: "vendor",
    pci.PCI_CAP_ID_EXP: "PCI Express",
    pci.PCI_CAP_ID_MSIX: "MSI-X",
}
#: As many as fit the first 256 bytes: a list that is longer goes in circles.
MOST_CAPABILITIES = 48


@dataclass(frozen=True, slots=True)
class Identity:
    """The identification part of a PCI configuration header."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    class_code: int
    revision: int
    capabilities: list[str]


@dataclass(frozen=True, slots=True)
class RegionRow:
    """A region that the device has; ``mappable`` lists (offset, size)."""

    index: int
    name: str
    size: int
    flags: list[str]
    mappable: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class IrqRow:
    """An interrupt index that the device has."""

    index: int
    name: str
    count: int
    flags: list[str]


@dataclass(slots=True)
class Description:
    """What was found out. ``None``, or nothing in a list: see ``unknown`` for the reason."""

    name: str
    about: dict[str, str | int | bool]
    dialect: str
    identity: Identity | None = None
    capabilities: str | None = None
    #: Which layer keeps it from migrating, where it has no capability to.
    no_migration: str | None = None
    state: str | None = None
    data_size: int | None = None
    #: The features that it answers a PROBE of, by the kernel's names.
    features: list[str] = field(default_factory=list)
    regions: list[RegionRow] = field(default_factory=list)
    interrupts: list[IrqRow] = field(default_factory=list)
    #: What the device did not tell, and the error that came instead.
    unknown: dict[str, str] = field(default_factory=dict)


def describe(client: DeviceClient) -> Description:
    """Ask ``client`` for everything there is to know about its device."""
    found = Description(client.name, dict(client.about), str(client.dialect))

    def ask(what: str, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except RequestError as failure:
            found.unknown[what] = failure.strerror or str(failure)
            return None

    found.identity = ask("identity", lambda: _identity(client))
    found.capabilities = ask("capabilities", lambda: _capabilities(client))
    if found.capabilities == "none":
        found.no_migration = why_no_migration(client.about)
    else:
        found.state = ask("state", lambda: client.state.name)
        found.data_size = ask("data size", client.data_size)
    found.features = [row.name for row in FEATURES if client.has_feature(row.index)]
    found.regions = ask("regions", lambda: _regions(client)) or []
    found.interrupts = ask("interrupts", lambda: _interrupts(client)) or []
    return found


def _capabilities(client: DeviceClient) -> str:
    capabilities = client.capabilities
    if capabilities in LEGAL_SETS:
        return capability_name(capabilities)
    return f"{int(capabilities):#x}, which the protocol does not know" if capabilities else "none"


def _identity(client: DeviceClient) -> Identity | None:
    if CONFIG not in client.regions:
        return None
    header = client.read_region(CONFIG, 0, pci.PCI_STD_HEADER_SIZEOF)

    def word(at: int) -> int:
        return int.from_bytes(header[at : at + 2], "little")

    code = int.from_bytes(header[pci.PCI_CLASS_REVISION :][:4], "little")
    return Identity(
        vendor=word(pci.PCI_VENDOR_ID),
        device=word(pci.PCI_DEVICE_ID),
        subsystem_vendor=word(pci.PCI_SUBSYSTEM_VENDOR_ID),
        subsystem=word(pci.PCI_SUBSYSTEM_ID),
        class_code=code >> 8,
        revision=code & 0xFF,
        capabilities=_pci_capabilities(client, header),
    )


def _pci_capabilities(client: DeviceClient, header: bytes) -> list[str]:
    if not int.from_bytes(header[pci.PCI_STATUS :][:2], "little") & pci.PCI_STATUS_CAP_LIST:
        return []
    names: list[str] = []
    at = header[pci.PCI_CAPABILITY_LIST] & ~3
    while at >= pci.PCI_STD_HEADER_SIZEOF and len(names) < MOST_CAPABILITIES:
        number, following = client.read_region(CONFIG, at, 2).ljust(2, b"\0")
        names.append(PCI_CAPABILITIES.get(number, f"{number:#04x}"))
        at = following & ~3
    return names


def _regions(client: DeviceClient) -> list[RegionRow]:
    return [
        RegionRow(
            index,
            REGION_NAMES[index] if index < len(REGION_NAMES) else f"region {index}",
            region.size,
            [name for flag, name in REGION_FLAGS.items() if region.flags & flag],
            client.mappable(index),
        )
        for index, region in client.regions.items()
    ]


def _interrupts(client: DeviceClient) -> list[IrqRow]:
    return [
        IrqRow(
            index,
            IRQ_NAMES[index],
            info.count,
            [name for flag, name in IRQ_FLAGS.items() if info.flags & flag],
        )
        for index, info in client.interrupts.present.items()
    ]
