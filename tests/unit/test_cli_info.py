"""``vfiomig info``: everything about a device, and what is said where it does not tell."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from vfiomig import Device, PciIdentity, Region
from vfiomig.cli.app import main
from vfiomig.client import open_device
from vfiomig.client.description import describe
from vfiomig.device import Msix, PciExpress, VendorCapability
from vfiomig.errors import DeviceError

BELL = f"model:{Path(__file__).parents[1] / 'suite_devices.py'}:Bell"
ALL_FEATURES = [
    "MIGRATION", "MIG_DEVICE_STATE", "DMA_LOGGING_START", "DMA_LOGGING_STOP",
    "DMA_LOGGING_REPORT", "MIG_DATA_SIZE", "MIG_PRECOPY_INFOv2",
]  # fmt: skip


def info(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["info", *arguments]) == 0
    output = capsys.readouterr()
    assert not output.err
    return output.out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(info(capsys, *arguments, "--json"))
    return document


def test_a_pattern_tells_everything(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "model:pattern,size=1M")
    assert found["target"] == "model:pattern,size=1M"
    assert found["about"] == {"by": "calls in this process"}
    assert found["dialect"] == "landed"
    assert (found["identity"]["vendor"], found["identity"]["device"]) == (0x1AF4, 0x10F0)
    assert found["capabilities"] == "stop-copy+p2p+pre-copy"
    assert found["state"] == "RUNNING"
    assert found["data_size"] > 1 << 20
    assert found["features"] == ALL_FEATURES
    assert [region["name"] for region in found["regions"]] == ["BAR0", "config"]
    assert found["unknown"] == {}


def test_v6_has_no_data_size_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "model:pattern,size=1M", "--dialect", "v6")
    assert (found["dialect"], found["capabilities"]) == ("v6", "stop-copy")
    assert found["features"] == ["MIGRATION"]
    assert found["data_size"] is None
    assert "EINVAL" in found["unknown"]["data size"]
    shown = info(capsys, "model:pattern,size=1M", "--dialect", "v6")
    assert "data size   not told: pattern: the query of its data size" in shown


def test_a_device_that_cannot_migrate_has_no_state_and_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = as_json(capsys, "model:pattern,size=4K,caps=none")
    assert (found["capabilities"], found["state"], found["data_size"]) == ("none", None, None)
    assert found["unknown"] == {}
    assert "whoever serves it" in found["no_migration"]
    shown = info(capsys, "model:pattern,size=4K,caps=none")
    assert f"none: {found['no_migration']}" in " ".join(shown.split())
    rows = [line.split()[0] for line in shown.splitlines() if line.split()]
    assert "migration" in rows
    assert "state" not in rows


def test_the_screen_names_areas_and_interrupts(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [" ".join(line.split()) for line in info(capsys, BELL).splitlines()]
    assert "BAR1 16.0 KiB read write 0x0 +4.0 KiB, 0x2000 +8.0 KiB" in lines
    assert "INTx 1 eventfd maskable automasked" in lines
    assert "MSI-X 4 eventfd noresize" in lines


class Talkative(Device):
    pci = PciIdentity(0x1234, 0x5678, 0x9ABC, 0xDEF0, class_code=0x010802, revision=7)
    bar0 = Region(size=8192)
    pci_capabilities = (
        Msix(vectors=1, table=(0, 0), pending=(0, 4096)),
        PciExpress(),
        VendorCapability(b"\x01"),
    )

    def state_size(self) -> int:
        raise DeviceError(errno.EIO, "the firmware is away")


def test_what_a_device_does_not_tell_keeps_nothing_else_back() -> None:
    with open_device(Talkative()) as client:
        found = describe(client)
    assert found.data_size is None
    assert "EIO" in found.unknown["data size"]
    assert found.state == "RUNNING"
    identity = found.identity
    assert identity is not None
    assert (identity.subsystem_vendor, identity.subsystem) == (0x9ABC, 0xDEF0)
    assert (identity.class_code, identity.revision) == (0x010802, 7)
    assert identity.capabilities == ["MSI-X", "PCI Express", "vendor"]
    assert [irq.name for irq in found.interrupts] == ["MSI-X", "ERR", "REQ"]


@pytest.mark.parametrize("target", ["nothing", "/dev/vfio/devices/vfio99"])
def test_a_target_that_cannot_be_reached_is_exit_code_2(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", target]) == 2
    output = capsys.readouterr()
    assert not output.out
    assert len(output.err.splitlines()) == 1


def test_looking_changes_nothing() -> None:
    with open_device(Talkative()) as client:
        first, second = describe(client), describe(client)
    assert first == second
