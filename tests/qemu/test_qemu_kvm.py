"""QEMU with the kernel's virtualization: the one request of KVM's that names our descriptors."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from qemu_pair import FIRMWARE_ONLY, SWITCH_AT_ONCE, witnessed
from qemu_plugged import HOT_PLUG_BUSES, PluggedGuest
from vfiomig.errors import GuestEnded
from vfiomig.qemu.migration import migrate

if TYPE_CHECKING:
    from pathlib import Path

    from guest_parts import GuestParts

SIZE = 1 << 20
SEEDS = {"source": (1, 2), "target": (101, 102)}
#: With the features of the host's own CPU, QEMU sets registers that a nested KVM refuses.
CPU = "qemu64"
REFUSAL = "Could not access KVM kernel module"


def kvm_opens() -> bool:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def start(
    parts: GuestParts, tmp_path: Path, name: str, accel: str, *, incoming: bool = False
) -> PluggedGuest:
    """Start a machine with the first of two devices."""
    specs = [witnessed(size=SIZE, seed=seed) for seed in SEEDS[name]]
    machine = replace(FIRMWARE_ONLY, accel=accel, cpu=CPU)
    return PluggedGuest(
        parts.qemu, tmp_path, name, specs, machine=machine, incoming=incoming, cold=1
    )


def assert_refused(parts: GuestParts, tmp_path: Path, accel: str) -> None:
    """QEMU says why, and nothing of ours says anything."""
    with pytest.raises(GuestEnded, match="exit code 1\n") as ended:
        start(parts, tmp_path, "source", accel)
    assert REFUSAL in str(ended.value)
    assert "vfiomig" not in str(ended.value)


def test_a_machine_under_kvm_gets_a_device_when_its_firmware_has_ended_and_migrates(
    parts: GuestParts, tmp_path: Path
) -> None:
    if not kvm_opens():
        print("/dev/kvm does not open here, so this is about QEMU's refusal")
        assert_refused(parts, tmp_path, "kvm")
        return
    with (
        start(parts, tmp_path, "source", "kvm") as source,
        start(parts, tmp_path, "target", "kvm", incoming=True) as target,
    ):
        assert source.qmp.execute("query-kvm") == {"enabled": True, "present": True}
        source.wait_firmware()
        for guest in (source, target):
            guest.plug(1, HOT_PLUG_BUSES["q35"][0])
        migrate(source.qmp, target.qmp, f"unix:{tmp_path}/link", parameters=SWITCH_AT_ONCE)
        target.wait_status("running")
        target.unplug(1)
        assert (source.finish(), target.finish()) == (0, 0)
        for guest in (source, target):
            assert "KVM VFIO device" not in guest.said  # failed to add, or to remove, a descriptor
            assert "vfiomig" not in guest.said
    for number in range(len(SEEDS["source"])):
        left = source.digest(number, "stopped")
        assert target.digest(number, "loaded") == target.digest(number, "stopped") == left


def test_qemus_refusal_of_a_kvm_that_is_not_there_is_passed_on(
    parts: GuestParts, tmp_path: Path
) -> None:
    assert_refused(parts, tmp_path, "kvm,device=/nonexistent/kvm")
