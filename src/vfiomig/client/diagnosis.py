"""Why a device cannot be opened, or cannot migrate, and what to do next: tables of advice.

What fails is an errno at some step; which layer is to blame, and so what helps, is told by the
step and by what sysfs knows of the device. ``refused`` makes the error of all that.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NamedTuple

from vfiomig.client.kernel import BY
from vfiomig.errors import RequestError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vfiomig.client.sysfs import SysDevice

__all__ = (
    "CONTAINER",
    "DEVICE_FD",
    "FIRST",
    "GROUP",
    "MAP",
    "NODE",
    "NO_DEVICE_BUT_CONTAINER",
    "NO_NODES",
    "NO_VFIO",
    "SET_IOMMU",
    "SILENT",
    "advice",
    "not_bound",
    "not_viable",
    "refused",
    "why_no_migration",
    "with_advice",
)

#: A driver may fail for a reason of its own, and only it knows.
SILENT: Final = "see the kernel's log (dmesg)"
NO_PERMISSION: Final = "this user may not: give it the device node (chown, or a udev rule)"

# What an errno means at each step.

#: The folder of all nodes is not there, or that of the character devices.
NO_VFIO: Final = (
    "VFIO is not there: load the driver of the device (modprobe vfio-pci, or the one that "
    "migrates it), or run where /dev/vfio is visible"
)
NO_NODES: Final = (
    "this kernel has no character devices of VFIO, which come with Linux 6.6 and its option "
    "VFIO_DEVICE_CDEV: name the device's group instead, /dev/vfio/GROUP"
)
NODE: Final = {
    errno.ENOENT: "there is no such device: look into /dev/vfio/devices, and bind the PCI "
    "function to the VFIO driver that migrates it",
    errno.EACCES: NO_PERMISSION,
    errno.EPERM: NO_PERMISSION,
    errno.EBUSY: "another program has it: end that one first",
    errno.ENODEV: "the device went away: bind the PCI function to its VFIO driver again",
}
CONTAINER: Final = {
    errno.ENOENT: NO_VFIO,
    errno.ENODEV: "VFIO is not loaded: modprobe vfio",
    errno.EACCES: "this user may not: chmod 0666 /dev/vfio/vfio, which gives nobody a device",
}
GROUP: Final = {
    errno.ENOENT: "there is no such group: bind each of its devices to a VFIO driver",
    errno.EACCES: NO_PERMISSION,
    errno.EPERM: "a group without an IOMMU is for users with CAP_SYS_RAWIO only",
    errno.EBUSY: "another program has the group open, or its device as a character device: end "
    "that one first",
    errno.ENODEV: "the last device of the group went away: bind it to its VFIO driver again",
}
SET_IOMMU: Final = {
    errno.ENODEV: "the container has no such IOMMU: modprobe vfio_iommu_type1",
    errno.EPERM: "the machine cannot remap interrupts, so a device could forge some: enable that "
    "in its firmware, or trust the device (modprobe vfio_iommu_type1 allow_unsafe_interrupts=1)",
}
DEVICE_FD: Final = {
    errno.ENODEV: "the group has no device of that name that is bound to a VFIO driver",
    errno.EACCES: "its physical function asks for a VF token, which this program cannot give",
    errno.EBUSY: "another program has it: end that one first",
}

MAP: Final = {
    errno.ENOMEM: "what a device reaches counts as locked memory: raise the limit (ulimit -l, or "
    "LimitMEMLOCK= of a service), or run with CAP_IPC_LOCK",
    errno.EEXIST: "something is mapped there already: unmap it first, or choose another IOVA",
    errno.EINVAL: "memory and IOVA begin and end at a page, and the IOMMU has ranges that it "
    "cannot map, such as that of MSI at 0xfee00000",
    errno.EFAULT: "the memory has to be readable and writable",
    errno.ENOSPC: "the container has no more room for mappings: map larger pieces, or raise "
    "dma_entry_limit of vfio_iommu_type1",
}

#: A descriptor that answers what containers are asked.
NO_DEVICE_BUT_CONTAINER: Final = (
    "it is a container or an iommufd, and no device: name the device's descriptor, and this one "
    "behind it, as in fd:N,container={number} or fd:N,iommufd={number}"
)
FIRST: Final = {errno.EBUSY: "another program has its group open: end that one first"}


class Migrating(NamedTuple):
    """A driver of the kernel that migrates some devices."""

    #: The PCI vendor of its devices.
    vendor: int | None
    #: What it depends on whether it migrates a certain one.
    needs: str


MIGRATES: Final = {
    "mlx5_vfio_pci": Migrating(
        0x15B3,
        "its physical function must allow it: devlink port function set ... migratable enable, "
        "before the driver is bound",
    ),
    "hisi_acc_vfio_pci": Migrating(
        0x19E5, "the driver of its physical function must be the kernel's own, and new enough"
    ),
    "pds_vfio_pci": Migrating(0x1DD8, "its firmware must offer live migration"),
    "virtio_vfio_pci": Migrating(
        0x1AF4, "the virtio device must offer the device parts admin commands"
    ),
    "qat_vfio_pci": Migrating(0x8086, "its physical function's driver must offer live migration"),
    "xe_vfio_pci": Migrating(
        0x8086, "its physical function's driver must run in SR-IOV mode and offer migration"
    ),
    "mtty": Migrating(None, "Linux 6.8 or later"),
}
GENERIC: Final = "vfio-pci"
#: Drivers of bridges, which are in nobody's way.
BRIDGES: Final = frozenset({"pcieport"})


def advice(table: Mapping[int, str], failure: OSError) -> str:
    """Say what to do about a failure at the step of ``table``."""
    return table.get(failure.errno or 0, SILENT)


def with_advice(failure: RequestError, table: Mapping[int, str]) -> RequestError:
    """Add what to do about a failed request, if ``table`` knows."""
    number = failure.errno or errno.EIO
    if number not in table:
        return failure
    return RequestError(number, f"{failure.strerror}; {table[number]}")


def refused(name: str, failure: OSError, what_to_do: str) -> TargetError:
    number = failure.errno or errno.EIO
    word = errno.errorcode.get(number, str(number))
    return TargetError(number, f"{name} cannot be opened: {word}; {what_to_do}")


def not_bound(device: SysDevice) -> str:
    """Say why a device that is there has no VFIO node."""
    if device.node is not None or (device.group is not None and _is_for_vfio(device.driver)):
        node = f"neither /dev/vfio/devices/{device.node} nor" if device.node else "no"
        return (
            f"its driver {device.driver} has it, but there is {node} /dev/vfio/{device.group}: "
            "run where /dev/vfio is visible"
        )
    if device.driver is None:
        has = "no driver is bound to it"
    else:
        has = f"it is bound to {device.driver}, which is no VFIO driver"
    bind = _how_to_bind(device)
    if device.group is None:
        return (
            f"{has}, and it has no IOMMU group: enable the IOMMU in the machine's firmware and "
            f"kernel (intel_iommu=on, or amd_iommu=on), then {bind}"
        )
    return f"{has}: {bind}"


def _how_to_bind(device: SysDevice) -> str:
    command = f"driverctl set-override {device.name}"
    if device.vendor is None:
        return f"bind it to the VFIO driver that migrates it ({command} DRIVER)"
    drivers = [name for name, row in MIGRATES.items() if row.vendor == device.vendor]
    if drivers:
        which = " or ".join(drivers)
        return f"bind it to {which}, which migrates devices of its vendor ({command} {drivers[0]})"
    return (
        f"bind it to {GENERIC}, which does not migrate it ({command} {GENERIC}); no driver is "
        f"known here that migrates devices of its vendor, {device.vendor:#06x}"
    )


def not_viable(group: str, members: Iterable[SysDevice]) -> str:
    """Say which devices of a group are in the way."""
    others = [f"{m.name} ({m.driver})" for m in members if _is_in_the_way(m)]
    who = ", ".join(others) or "a device that sysfs does not show here"
    return (
        f"the group is not viable: all devices of {group} must be bound to a VFIO driver or to "
        f"none, and there is {who}; unbind it, or bind it to vfio-pci as well"
    )


def _is_in_the_way(device: SysDevice) -> bool:
    driver = device.driver
    if driver is None or driver in BRIDGES or device.node is not None:
        return False
    return not _is_for_vfio(driver)


def _is_for_vfio(driver: str | None) -> bool:
    """Guess by its name whether a driver is one of VFIO: before Linux 6.1 nothing else tells."""
    return driver is not None and ("vfio" in driver or driver in MIGRATES)


def why_no_migration(about: Mapping[str, str | int | bool]) -> str:
    """Say which layer keeps a device from migrating; ``about`` is its transport's."""
    if about.get("by") != BY:
        return "whoever serves it gives it no capability to; a Device class has capabilities"
    driver = about.get("driver")
    if driver is None:
        return (
            "its driver, or the kernel (5.18 or later), offers no migration: bind it to the driver "
            f"that migrates it, such as {', '.join(MIGRATES)}"
        )
    if driver == GENERIC:
        return (
            f"{GENERIC} migrates no device: bind it to the driver that migrates it, such as "
            f"{', '.join(MIGRATES)}; one behind vfiomig run has what its Device class has"
        )
    if driver in MIGRATES:
        return f"its driver {driver} could, but does not for this device: {MIGRATES[driver].needs}"
    return f"its driver {driver} offers no migration: look for a newer one"
