"""Unmodified QEMU migrates machines with our devices: what it asks for, and what arrives."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from qemu_pair import SWITCH_AT_ONCE, VfioGuest, pair, witnessed
from vfiomig.errors import MigrationFailed
from vfiomig.models.pattern import Pattern
from vfiomig.qemu.migration import configure, migrate, start_incoming, start_outgoing, wait_settled

if TYPE_CHECKING:
    from pathlib import Path

    from guest_parts import GuestParts

SIZE = 4 << 20
SOURCE_SEED, TARGET_SEED = 1, 101
#: Bytes that the source's device rewrites per second, so that its content is its own.
DIRTY = 256 << 10

# What QEMU 10 asks for, by capability set, in the order of the whole migration.
SOURCE_STATES = {
    "stop-copy": ["STOP", "STOP_COPY", "STOP"],
    "stop-copy+p2p": ["RUNNING_P2P", "STOP", "STOP_COPY", "STOP"],
    "stop-copy+pre-copy": ["PRE_COPY", "STOP_COPY", "STOP"],
    "all": ["PRE_COPY", "PRE_COPY_P2P", "STOP_COPY", "STOP"],
}
TARGET_STATES = {
    "stop-copy": ["RESUMING", "RUNNING"],
    "stop-copy+p2p": ["RESUMING", "RUNNING_P2P", "RUNNING"],
    "stop-copy+pre-copy": ["RESUMING", "RUNNING"],
    "all": ["RESUMING", "RUNNING_P2P", "RUNNING"],
}


def has_p2p(caps: str) -> bool:
    return caps in {"stop-copy+p2p", "all"}


def machine_starts(caps: str) -> list[str]:
    """What QEMU asks for when a machine that is not incoming starts."""
    return ["RUNNING_P2P", "RUNNING"] if has_p2p(caps) else []


def machine_stops(caps: str) -> list[str]:
    """What QEMU asks for when it quits and the machine runs."""
    return ["RUNNING_P2P", "STOP"] if has_p2p(caps) else ["STOP"]


def specs(caps: str, count: int = 1, *, seed: int, **keys: object) -> list[str]:
    return [witnessed(size=SIZE, caps=caps, seed=seed + number, **keys) for number in range(count)]


def power_on_digest(seed: int) -> str:
    return Pattern(size=SIZE, seed=seed).digest()


def assert_arrived(source: VfioGuest, target: VfioGuest, number: int) -> None:
    """What the source stopped with is what the target loaded, and still had when it quit."""
    left = source.digest(number, "stopped")
    assert left != power_on_digest(SOURCE_SEED + number)
    assert target.digest(number, "loaded") == left
    assert target.digest(number, "stopped") == left


def assert_logged_dma(source: VfioGuest, number: int) -> None:
    """The device logged its own DMA; QEMU stops that only when a migration fails."""
    asked = source.features(number)
    start = asked.index("SET DMA_LOGGING_START")
    assert "GET DMA_LOGGING_REPORT" in asked[start:]
    assert "GET DMA_LOGGING_REPORT" not in asked[:start]
    assert "SET DMA_LOGGING_STOP" not in asked


@pytest.mark.parametrize(
    ("caps", "count"),
    [
        ("stop-copy", 1),
        ("stop-copy+p2p", 1),
        ("stop-copy+pre-copy", 1),
        ("all", 1),
        ("stop-copy+p2p", 2),
        ("all", 2),
    ],
)
def test_a_machine_arrives_by_the_states_of_its_capability_set(
    parts: GuestParts, tmp_path: Path, caps: str, count: int
) -> None:
    leaving = specs(caps, count, seed=SOURCE_SEED, dirty=DIRTY)
    arriving = specs(caps, count, seed=TARGET_SEED)
    with pair(parts.qemu, tmp_path, leaving, arriving) as (source, target):
        account = migrate(
            source.qmp, target.qmp, f"unix:{tmp_path}/link", parameters=SWITCH_AT_ONCE, timeout=20
        )
        assert account["status"] == "completed"
        assert account["vfio"]["transferred"] > count * SIZE
        assert source.status == "postmigrate"
        assert target.status == "running"
        assert (source.finish(), target.finish()) == (0, 0)
    for number in range(count):
        assert source.states_of(number) == machine_starts(caps) + SOURCE_STATES[caps]
        assert target.states_of(number) == TARGET_STATES[caps] + machine_stops(caps)
        assert_logged_dma(source, number)
        assert_arrived(source, target, number)


def test_the_iommu_tracks_dirty_memory_where_devices_do_not(
    parts: GuestParts, tmp_path: Path
) -> None:
    leaving, arriving = specs("all", seed=SOURCE_SEED, dirty=DIRTY), specs("all", seed=TARGET_SEED)
    options = ",x-device-dirty-page-tracking=off"
    with pair(parts.qemu, tmp_path, leaving, arriving, options) as (source, target):
        migrate(source.qmp, target.qmp, f"unix:{tmp_path}/link", parameters=SWITCH_AT_ONCE)
        assert (source.finish(), target.finish()) == (0, 0)
    asked = source.requests_on("iommu")
    tracking = asked.index("IOMMU_HWPT_SET_DIRTY_TRACKING()")
    assert "IOMMU_HWPT_GET_DIRTY_BITMAP()" in asked[tracking:]
    assert "SET DMA_LOGGING_START" not in source.features(0)
    assert source.states_of(0) == machine_starts("all") + SOURCE_STATES["all"]
    assert_arrived(source, target, 0)


@pytest.mark.parametrize(
    ("capabilities", "options"),
    [
        ({"return-path": True, "switchover-ack": True}, ""),
        ({"multifd": True}, ""),
        ({"multifd": True}, ",x-migration-multifd-transfer=on"),
        (
            {"multifd": True, "return-path": True, "switchover-ack": True},
            ",x-migration-multifd-transfer=on,x-device-dirty-page-tracking=off",
        ),
    ],
    ids=["switchover-ack", "multifd", "multifd-transfer", "together"],
)
def test_two_devices_arrive_by_every_way_that_qemu_has(
    parts: GuestParts, tmp_path: Path, capabilities: dict[str, bool], options: str
) -> None:
    leaving = specs("all", 2, seed=SOURCE_SEED, dirty=DIRTY)
    arriving = specs("all", 2, seed=TARGET_SEED)
    with pair(parts.qemu, tmp_path, leaving, arriving, options) as (source, target):
        migrate(
            source.qmp,
            target.qmp,
            f"unix:{tmp_path}/link",
            capabilities=capabilities,
            parameters=SWITCH_AT_ONCE,
            timeout=20,
        )
        assert (source.finish(), target.finish()) == (0, 0)
    for number in range(2):
        assert source.states_of(number) == machine_starts("all") + SOURCE_STATES["all"]
        assert target.states_of(number) == TARGET_STATES["all"] + machine_stops("all")
        assert_arrived(source, target, number)


def test_no_device_stops_before_all_are_quiescent(parts: GuestParts, tmp_path: Path) -> None:
    leaving = specs("all", 2, seed=SOURCE_SEED)
    arriving = specs("all", 2, seed=TARGET_SEED)
    with pair(parts.qemu, tmp_path, leaving, arriving) as (source, target):
        migrate(source.qmp, target.qmp, f"unix:{tmp_path}/link", parameters=SWITCH_AT_ONCE)
        assert target.status == "running"
        asked, given = source.states(), target.states()
    quiescent = [asked.index((device, "PRE_COPY_P2P")) for device in ("vfio0", "vfio1")]
    stopped = [asked.index((device, "STOP_COPY")) for device in ("vfio0", "vfio1")]
    assert max(quiescent) < min(stopped)
    woken = [given.index((device, "RUNNING_P2P")) for device in ("vfio0", "vfio1")]
    running = [given.index((device, "RUNNING")) for device in ("vfio0", "vfio1")]
    assert max(woken) < min(running)


@pytest.mark.parametrize(
    ("caps", "fails", "asked", "resets"),
    [
        # The machine has stopped, then this fails: QEMU goes back to STOP and needs no reset.
        ("stop-copy+p2p", "stop-stop_copy", ["RUNNING_P2P", "STOP", "STOP_COPY", "STOP"], 0),
        # Here it is the stopping of the machine that fails, which only a reset gets out of.
        ("all", "pre_copy_p2p-stop_copy", ["PRE_COPY", "PRE_COPY_P2P", "STOP_COPY"], 1),
    ],
)
def test_a_source_that_cannot_enter_stop_copy_goes_on(
    parts: GuestParts, tmp_path: Path, caps: str, fails: str, asked: list[str], resets: int
) -> None:
    leaving = specs(caps, seed=SOURCE_SEED, fails=fails, number=errno.EIO)
    source = source_after_failure(parts, tmp_path, leaving, specs(caps, seed=TARGET_SEED))
    goes_on = ["RUNNING_P2P", "RUNNING"]
    assert source.states_of(0) == [*machine_starts(caps), *asked, *goes_on, *machine_stops(caps)]
    assert source.failures(0) == [("SET MIG_DEVICE_STATE STOP_COPY", "EIO")]
    assert source.resets(0) == 1 + resets  # the first one is the machine's start
    assert source.features(0).count("SET DMA_LOGGING_STOP") == 1


def test_a_source_without_memory_for_pre_copy_goes_on_as_if_nothing_was(
    parts: GuestParts, tmp_path: Path
) -> None:
    leaving = specs("all", seed=SOURCE_SEED, fails="running-pre_copy", number=errno.ENOMEM)
    source = source_after_failure(parts, tmp_path, leaving, specs("all", seed=TARGET_SEED))
    asked = ["PRE_COPY", "RUNNING"]
    assert source.states_of(0) == machine_starts("all") + asked + machine_stops("all")
    assert source.failures(0) == [("SET MIG_DEVICE_STATE PRE_COPY", "ENOMEM")]
    assert source.resets(0) == 1  # the machine's start
    assert source.features(0).count("SET DMA_LOGGING_STOP") == 1


def source_after_failure(
    parts: GuestParts, tmp_path: Path, leaving: list[str], arriving: list[str]
) -> VfioGuest:
    """Return a source that ran on after its migration failed, and has ended since."""
    with pair(parts.qemu, tmp_path, leaving, arriving) as (source, target):
        with pytest.raises(MigrationFailed):
            migrate(source.qmp, target.qmp, f"unix:{tmp_path}/link", parameters=SWITCH_AT_ONCE)
        assert target.wait() == 1
        assert source.status == "running"
        assert source.finish() == 0
    assert target.states_of(0) == ["RESUMING"]
    return source


@pytest.mark.parametrize("fails", ["resuming-stop", "stop-running_p2p"])
def test_a_target_whose_device_does_not_wake_runs_on_with_a_blank_one(
    parts: GuestParts, tmp_path: Path, fails: str
) -> None:
    leaving = specs("all", seed=SOURCE_SEED)
    arriving = specs("all", seed=TARGET_SEED, fails=fails)
    with pair(parts.qemu, tmp_path, leaving, arriving) as (source, target):
        account = migrate(
            source.qmp, target.qmp, f"unix:{tmp_path}/link", parameters=SWITCH_AT_ONCE
        )
        assert account["status"] == "completed"
        assert target.status == "running"
        assert (source.finish(), target.finish()) == (0, 0)
    # QEMU takes a device that was reset for a running one, so it does not ask for RUNNING.
    assert target.states_of(0) == ["RESUMING", "RUNNING_P2P", *machine_stops("all")]
    assert target.failures(0) == [("SET MIG_DEVICE_STATE RUNNING_P2P", "EIO")]
    assert target.digest(0, "stopped") == power_on_digest(TARGET_SEED)
    assert source.digest(0, "stopped") == power_on_digest(SOURCE_SEED)


def test_a_source_that_cancels_in_pre_copy_runs_on_untouched(
    parts: GuestParts, tmp_path: Path
) -> None:
    leaving = specs("all", seed=SOURCE_SEED, precopy=0)
    arriving = specs("all", seed=TARGET_SEED)
    # 1 KB may be left for the switch, and the device offers none of its memory before it.
    never = {"avail-switchover-bandwidth": 1 << 20, "downtime-limit": 1}
    with pair(parts.qemu, tmp_path, leaving, arriving) as (source, target):
        configure(source.qmp, parameters=never)
        configure(target.qmp)
        start_incoming(target.qmp, f"unix:{tmp_path}/link")
        start_outgoing(source.qmp, f"unix:{tmp_path}/link")
        source.wait_request("vfio0:saving", "ENOMSG")
        source.qmp.execute("migrate_cancel")
        assert wait_settled(source.qmp, timeout=10) == "cancelled"
        assert target.wait() == 1
        assert source.status == "running"
        assert source.finish() == 0
    assert source.states_of(0) == [
        *machine_starts("all"), "PRE_COPY", "RUNNING", *machine_stops("all")
    ]  # fmt: skip
    assert source.resets(0) == 1  # the machine's start
    assert source.failures(0) == []
    assert source.features(0).count("SET DMA_LOGGING_STOP") == 1
    assert target.states_of(0) == ["RESUMING"]
