"""QEMU on the older path: groups, a container and the type1 IOMMU, as before iommufd.

QEMU looks a device up in sysfs to find its group, or its character device.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from qemu_pair import FIRMWARE_ONLY, SWITCH_AT_ONCE, VfioGuest, witnessed
from qemu_states import SOURCE_STATES, TARGET_STATES, machine_starts, machine_stops
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.doors.syscall.run import run
from vfiomig.models import make
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.installed import cache_folder
from vfiomig.qemu.migration import migrate
from vfiomig.qemu.vfio import run_words
from vmtest.fetch import fetch_lspci

if TYPE_CHECKING:
    from pathlib import Path

    from guest_parts import GuestParts

CAPS = "all"
SIZE = 16 << 20
BLOCKS = 64


def group_words(count: int, options: str = "", named: str = "host=") -> tuple[str, ...]:
    """QEMU's words for the devices of the first ``count`` groups."""
    words = (f"vfio-pci,id=v{n},{named}0000:{n + 1:02x}:00.0" for n in range(count))
    return tuple(part for word in words for part in ("-device", word + options))


#: How a device is named, and requests by which QEMU reaches it then.
BY_GROUP = ("VFIO_GROUP_SET_CONTAINER", "VFIO_SET_IOMMU", "VFIO_IOMMU_MAP_DMA")
BY_NODE = ("VFIO_DEVICE_BIND_IOMMUFD", "IOMMU_IOAS_MAP")
IOMMUFD = ("-object", "iommufd,id=memory")
WAYS = {
    "host": (group_words(1), BY_GROUP),
    "sysfsdev": (group_words(1, named="sysfsdev=/sys/bus/pci/devices/"), BY_GROUP),
    "iommufd": ((*IOMMUFD, *group_words(1, ",iommufd=memory")), BY_NODE),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_guest_uses_a_disk_that_sysfs_led_to(parts: GuestParts, tmp_path: Path, way: str) -> None:
    disk, trace = tmp_path / "disk", tmp_path / "trace"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    words, asked = WAYS[way]
    machine = parts.machine(*words)
    launcher = run_words([f"virtio_blk,path={disk}"], "--trace", str(trace))
    with Guest(parts.qemu, machine, launcher=launcher) as guest:
        guest.wait_ready()
        told = guest.check(
            f"dd if=/dev/urandom of=blocks bs=4k count={BLOCKS} 2>/dev/null && sha256sum <blocks "
            "&& dd if=blocks of=/dev/vda oflag=direct bs=4k seek=100 2>/dev/null && "
            f"dd if=/dev/vda iflag=direct bs=4k skip=100 count={BLOCKS} 2>/dev/null | sha256sum"
        )
    written, read = told.split()[::2]
    assert read == written
    content = disk.read_bytes()[4096 * 100 :][: 4096 * BLOCKS]
    assert hashlib.sha256(content).hexdigest() == written
    requests = trace.read_text()
    assert {name for name in (*BY_GROUP, *BY_NODE) if name in requests} == set(asked)


@pytest.mark.parametrize("tracker", ["device", "container"])
def test_devices_of_groups_arrive_by_the_same_states(
    parts: GuestParts, tmp_path: Path, tracker: str
) -> None:
    # A container's dirty pages are a last resort, and QEMU takes it only if migration is a must.
    last_resort = ",x-device-dirty-page-tracking=off,enable-migration=on"
    options = last_resort if tracker == "container" else ""
    keys = {"size": 1 << 20, "caps": CAPS}
    guests = []
    for name, seed, dirty in (("source", 1, 1 << 18), ("target", 101, 0)):
        specs = [witnessed(**keys, seed=seed + n, dirty=dirty) for n in range(2)]
        words = group_words(2, options)
        machine = replace(FIRMWARE_ONLY, extra=words)
        incoming = name == "target"
        guests.append(
            VfioGuest(parts.qemu, tmp_path, name, specs, incoming=incoming, machine=machine, cold=0)
        )
    with guests[0] as source, guests[1] as target:
        account = migrate(
            source.qmp,
            target.qmp,
            f"unix:{tmp_path}/link",
            parameters=SWITCH_AT_ONCE,
        )
        assert account["vfio"]["transferred"] > 2 << 20
        source.wait_status("postmigrate")
        target.wait_status("running")
        assert (source.finish(), target.finish()) == (0, 0)
    for number in range(2):
        assert source.states_of(number) == machine_starts(CAPS) + SOURCE_STATES[CAPS]
        assert target.states_of(number) == TARGET_STATES[CAPS] + machine_stops(CAPS)
        left = source.digest(number, "stopped")
        assert target.digest(number, "loaded") == target.digest(number, "stopped") == left
        logs = "SET DMA_LOGGING_START" in source.features(number)
        assert logs == (tracker == "device")
    asked = source.requests_on("container")
    assert ("VFIO_IOMMU_DIRTY_PAGES()" in asked) == (tracker == "container")


def test_an_unmodified_lspci_lists_the_served_functions_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lspci"
    shutil.copytree(fetch_lspci(cache_folder()), folder)
    loader = folder / "ld-linux-x86-64.so.2"
    loader.chmod(0o755)
    lister = [str(loader), "--library-path", str(folder), str(folder / "lspci.program"), "-nnvk"]
    devices = [VfioDevice(make(spec), spec) for spec in ("mtty", "counter")]
    assert run(devices, lister) == 0
    first, second = capfd.readouterr().out.strip().split("\n\n")
    assert first.startswith("01:00.0 Class [0700]: Device [4348:3253] (rev 10) (prog-if 02")
    assert second.startswith("02:00.0 ")
    for number, shown in enumerate((first, second)):
        assert f"IOMMU group {number}" in shown
        assert "Kernel driver in use: vfio-pci" in shown
