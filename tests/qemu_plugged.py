"""A QEMU whose devices come and go while it runs, and a stand-in for its guest's consent.

Theory of operation
-------------------
A device leaves a machine when the guest lets it go. No system runs in these guests, so
:func:`let_go` does with QEMU's monitor what a system's ACPI code does: it reads the
registers of QEMU's PCI hot-plug controller and writes back what they say is to go
(docs/specs/acpi_pci_hotplug.rst of QEMU).
"""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from plugger import PLUGGER, Plugger
from qemu_pair import FIRMWARE_ONLY, VfioGuest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from vfiomig.qemu.machine import Machine
    from vfiomig.qemu.qmp import Qmp

__all__ = ("HOT_PLUG_BUSES", "PluggedGuest", "let_go")

#: Where devices can be plugged in, by machine type; a PCI Express slot takes one.
HOT_PLUG_BUSES: Final = {"pc": ["pci.0", "pci.0"], "q35": ["port0", "port1"]}

#: Of the hot-plug controller: its ports by machine type, and the registers used here.
_CONTROLLER: Final = {"pc": 0xAE00, "q35": 0x0CC0}
_LEAVING, _EJECT, _BUS = 4, 8, 16
_BUSES: Final = 4


class PluggedGuest(VfioGuest):
    """A machine into which :meth:`plug` puts the devices that are not there from the start."""

    def __init__(
        self,
        qemu: Path,
        folder: Path,
        name: str,
        specs: Sequence[str],
        *,
        machine: Machine = FIRMWARE_ONLY,
        incoming: bool = False,
        cold: int,
    ) -> None:
        self._type = machine.type
        control, control_there = socket.socketpair()
        self._plugger = Plugger(control)
        ports = [bus for bus in HOT_PLUG_BUSES[machine.type] if bus.startswith("port")]
        for chassis, port in enumerate(ports, 1):
            words = ("-device", f"pcie-root-port,id={port},chassis={chassis},slot={chassis}")
            machine = replace(machine, extra=(*machine.extra, *words))
        with control_there:
            super().__init__(
                qemu,
                folder,
                name,
                specs,
                machine=machine,
                incoming=incoming,
                cold=cold,
                program=(*PLUGGER, str(control_there.fileno())),
                pass_fds=(control_there.fileno(),),
            )

    def plug(self, number: int, bus: str, *, iommufd: str = "iommufd0", name: str = "") -> None:
        """Open a device behind the door and put it into the machine, as v0, v1 and so on."""
        name = name or f"v{number}"
        self._plugger.hand_over(f"/dev/vfio/devices/vfio{number}", name)
        self._plugger.execute(
            "device_add", driver="vfio-pci", id=name, fd=name, iommufd=iommufd, bus=bus
        )

    def add_iommufd(self, name: str) -> None:
        """Open an iommufd behind the door and give it to QEMU."""
        self._plugger.hand_over("/dev/iommu", name)
        self._plugger.execute("object-add", qom_type="iommufd", id=name, fd=name)

    def devices(self) -> dict[str, tuple[int, int]]:
        """Return what QEMU says is on its PCI buses: name, vendor and device."""
        buses = self.qmp.execute("query-pci")
        return {
            device["qdev_id"]: (device["id"]["vendor"], device["id"]["device"])
            for bus in buses
            for device in _all_of(bus["devices"])
        }

    def unplug(self, number: int) -> None:
        """Ask for a device, as the guest let it go, and wait until it is gone."""
        self.qmp.execute("device_del", id=f"v{number}")
        let_go(self.qmp, self._type)
        self.qmp.wait_event("DEVICE_DELETED", lambda data: data.get("device") == f"v{number}")

    def close(self) -> None:
        super().close()
        self._plugger.close()


def let_go(qmp: Qmp, machine_type: str) -> None:
    """Do what the guest's ACPI code does for a device that is to leave."""

    def monitor(line: str) -> str:
        said: str = qmp.execute("human-monitor-command", command_line=line)
        return said

    base = _CONTROLLER[machine_type]
    for bus in range(_BUSES):
        monitor(f"o /w {base + _BUS:#x} {bus}")
        leaving = monitor(f"i /w {base + _LEAVING:#x}").partition("=")[2].strip()
        if int(leaving, 16):
            monitor(f"o /w {base + _EJECT:#x} {leaving}")


def _all_of(devices: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for device in devices:
        yield device
        yield from _all_of(device.get("pci_bridge", {}).get("devices", []))
