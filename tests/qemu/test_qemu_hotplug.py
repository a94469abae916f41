"""Devices that are plugged into a running machine and out of it, and migrate in between."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from in_process import wait_until
from qemu_pair import FIRMWARE_ONLY, SWITCH_AT_ONCE, witnessed
from qemu_plugged import HOT_PLUG_BUSES, PluggedGuest
from vfiomig.errors import GuestError
from vfiomig.qemu.migration import configure, migrate, start_incoming, start_outgoing, wait_settled

if TYPE_CHECKING:
    from pathlib import Path

    from guest_parts import GuestParts

SIZE = 1 << 20
SEEDS = {"source": 1, "target": 101}
#: Vendor and device of what is no particular PCI function.
OURS = (0x1AF4, 0x10F0)

COUNT_PORTS = "grep -c uart:16550A /proc/tty/driver/serial"
GONE = f"[ ! -e /dev/vda ] && [ $({COUNT_PORTS}) = 2 ]"
WRITE = (
    "head -c 1048576 /dev/urandom | dd of=/dev/vda oflag=direct bs=64k iflag=fullblock 2>/dev/null"
)
READ = "dd if=/dev/vda iflag=direct bs=64k count=16 2>/dev/null | sha256sum"
LOOPED = (
    "stty -F /dev/ttyS5 115200 raw -echo && exec 4<>/dev/ttyS5 && echo on >&4 && "
    "timeout 20 head -n 1 <&4"
)

both_machine_types = pytest.mark.parametrize("machine_type", ["pc", "q35"])


def start(
    parts: GuestParts, folder: Path, name: str, machine_type: str, *, count: int, cold: int
) -> PluggedGuest:
    """Start a machine that can have ``count`` devices, and has ``cold`` of them so far."""
    return PluggedGuest(
        parts.qemu,
        folder,
        name,
        [witnessed(size=SIZE, seed=SEEDS[name] + number) for number in range(count)],
        machine=replace(FIRMWARE_ONLY, type=machine_type),
        incoming=name == "target",
        cold=cold,
    )


def ours(guest: PluggedGuest) -> dict[str, tuple[int, int]]:
    return {name: ids for name, ids in guest.devices().items() if name.startswith("v")}


def until(condition: str) -> str:
    """Return a command that waits for a condition in the guest, as long as a test lasts."""
    return f"until {condition}; do sleep 0.1; done"


def end(*guests: PluggedGuest) -> None:
    for guest in guests:
        assert guest.finish() == 0
        assert "vfiomig" not in guest.said


def assert_arrived(source: PluggedGuest, target: PluggedGuest, number: int) -> None:
    left = source.digest(number, "stopped")
    assert target.digest(number, "loaded") == target.digest(number, "stopped") == left


@pytest.mark.parametrize(
    ("machine_type", "plugged_there"),
    [("pc", False), ("pc", True), ("q35", True)],
    ids=["pc to cold devices", "pc to plugged devices", "q35 to plugged devices"],
)
def test_devices_plugged_into_a_running_machine_migrate_beside_one_that_was_there(
    parts: GuestParts, tmp_path: Path, machine_type: str, *, plugged_there: bool
) -> None:
    there = 1 if plugged_there else 3
    with (
        start(parts, tmp_path, "source", machine_type, count=3, cold=1) as source,
        start(parts, tmp_path, "target", machine_type, count=3, cold=there) as target,
    ):
        source.wait_firmware()
        assert ours(source) == {"v0": OURS}
        for guest in (source, target) if plugged_there else (source,):
            for number, bus in enumerate(HOT_PLUG_BUSES[machine_type], 1):
                guest.plug(number, bus)
        assert ours(source) == {"v0": OURS, "v1": OURS, "v2": OURS}
        migrate(source.qmp, target.qmp, f"unix:{tmp_path}/link", parameters=SWITCH_AT_ONCE)
        target.wait_status("running")
        end(source, target)
    starts = ["RUNNING_P2P", "RUNNING"]
    for number in range(3):
        # A device that comes into a running machine runs, and nobody has to tell it.
        told = starts if number == 0 else []
        leaves = ["PRE_COPY", "PRE_COPY_P2P", "STOP_COPY", "STOP"]
        assert source.states_of(number) == told + leaves
        assert target.states_of(number) == ["RESUMING", *starts, "RUNNING_P2P", "STOP"]
        assert_arrived(source, target, number)


@both_machine_types
def test_the_only_device_may_come_late_with_an_iommufd_of_its_own(
    parts: GuestParts, tmp_path: Path, machine_type: str
) -> None:
    with (
        start(parts, tmp_path, "source", machine_type, count=1, cold=0) as source,
        start(parts, tmp_path, "target", machine_type, count=1, cold=0) as target,
    ):
        source.wait_firmware()
        for guest in (source, target):
            guest.add_iommufd("late")
            guest.plug(0, HOT_PLUG_BUSES[machine_type][0], iommufd="late")
        migrate(source.qmp, target.qmp, f"unix:{tmp_path}/link", parameters=SWITCH_AT_ONCE)
        end(source, target)
    assert_arrived(source, target, 0)
    passed = {row["fd"] for row in source.requests() if row["on"] == "iommu"}
    assert len(passed) == 1  # the one on the command line was never used


@both_machine_types
def test_a_device_that_leaves_is_closed_and_can_come_again(
    parts: GuestParts, tmp_path: Path, machine_type: str
) -> None:
    bus = HOT_PLUG_BUSES[machine_type][0]
    with (
        start(parts, tmp_path, "source", machine_type, count=2, cold=1) as source,
        start(parts, tmp_path, "target", machine_type, count=2, cold=1) as target,
    ):
        source.wait_firmware()
        for _ in range(2):
            source.plug(1, bus)
            assert ours(source) == {"v0": OURS, "v1": OURS}
            source.unplug(1)
            assert ours(source) == {"v0": OURS}
        for guest in (source, target):
            guest.plug(1, bus)
        migrate(source.qmp, target.qmp, f"unix:{tmp_path}/link", parameters=SWITCH_AT_ONCE)
        target.unplug(1)
        assert ours(target) == {"v0": OURS}
        end(source, target)
    asked = source.requests_on("vfio1")
    assert asked.count("VFIO_DEVICE_BIND_IOMMUFD()") == 3
    assert asked.count("VFIO_DEVICE_DETACH_IOMMUFD_PT()") == 2
    # A reset at each coming; a stop at the last close, which after a migration needs a reset too.
    lives = ["reset", "stopped"] * 3
    assert [note[0] for note in source.notes(1)] == [*lives, "reset"]
    for number in (0, 1):
        assert_arrived(source, target, number)


def test_a_device_that_is_in_the_machine_cannot_be_plugged_in_once_more(
    parts: GuestParts, tmp_path: Path
) -> None:
    with start(parts, tmp_path, "source", "pc", count=1, cold=1) as guest:
        guest.wait_firmware()
        with pytest.raises(GuestError, match=r"error bind device fd=.*: Invalid argument"):
            guest.plug(0, "pci.0", name="again")
        assert ours(guest) == {"v0": OURS}
        assert guest.status == "running"
        end(guest)
    assert guest.resets(0) == 1
    assert guest.states_of(0) == ["RUNNING_P2P", "RUNNING", "RUNNING_P2P", "STOP"]


def test_a_device_cannot_leave_while_its_machine_does(parts: GuestParts, tmp_path: Path) -> None:
    with (
        start(parts, tmp_path, "source", "pc", count=2, cold=1) as source,
        start(parts, tmp_path, "target", "pc", count=2, cold=2) as target,
    ):
        source.wait_firmware()
        source.plug(1, "pci.0")
        configure(source.qmp, parameters={"max-bandwidth": 1 << 20})
        configure(target.qmp)
        start_incoming(target.qmp, f"unix:{tmp_path}/link")
        start_outgoing(source.qmp, f"unix:{tmp_path}/link")
        source.qmp.wait_event("MIGRATION", lambda data: data["status"] == "active")
        with pytest.raises(GuestError, match="not allowed while migrating"):
            source.unplug(1)
        at_once: dict[str, Any] = SWITCH_AT_ONCE | {"max-bandwidth": 1 << 30}
        source.qmp.execute("migrate-set-parameters", **at_once)
        assert wait_settled(source.qmp, timeout=60) == "completed"
        assert wait_settled(target.qmp, timeout=60) == "completed"
        end(source, target)
    for number in (0, 1):
        assert_arrived(source, target, number)


@both_machine_types
def test_a_system_uses_devices_that_come_takes_them_along_and_lets_them_go(
    parts: GuestParts, tmp_path: Path, machine_type: str
) -> None:
    machine = replace(parts.machine(), type=machine_type)
    buses = HOT_PLUG_BUSES[machine_type]

    def start_linux(name: str, *, incoming: bool) -> PluggedGuest:
        specs = ["virtio_blk,size=8M", f"mtty,port0=socket:{tmp_path}/{name}"]
        return PluggedGuest(
            parts.qemu, tmp_path, name, specs, machine=machine, incoming=incoming, cold=0
        )

    with start_linux("source", incoming=False) as source:
        source.wait_ready()
        assert not source.run(GONE).status
        for number, bus in enumerate(buses):
            source.plug(number, bus)
        source.check(until(f"[ -b /dev/vda ] && [ $({COUNT_PORTS}) = 4 ]"))
        written = source.check(f"{WRITE} && {READ} && {LOOPED}").split()
        with start_linux("target", incoming=True) as target:
            for number, bus in enumerate(buses):
                target.plug(number, bus)
            migrate(source.qmp, target.qmp, f"unix:{tmp_path}/link")
            source.kill()
            assert target.check(f"{READ} && {LOOPED}").split() == written
            for number in range(len(buses)):
                target.qmp.execute("device_del", id=f"v{number}")
            for _ in buses:
                target.qmp.wait_event("DEVICE_DELETED", lambda data: "device" in data)
            target.check(until(GONE))
            # QEMU lets go of the card, and so of its socket, some time after it says so.
            wait_until(lambda: not (tmp_path / "target").exists())
            assert target.power_off(3) == 3
            assert "vfiomig" not in target.said
