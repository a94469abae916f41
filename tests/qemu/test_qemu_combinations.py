"""Every pair of ways in which QEMU migrates a machine with our devices.

Theory of operation
-------------------
What can be chosen is in ``CHOICES``, what cannot go together in ``possible``. The rows that run
are computed: few, but every pair of two values that can go together is in one of them.
"""

from __future__ import annotations

from itertools import chain, combinations, product
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from qemu_pair import SWITCH_AT_ONCE, VfioGuest, pair, witnessed
from qemu_states import (
    CAPS,
    SOURCE_STATES,
    TARGET_STATES,
    has_p2p,
    has_pre_copy,
    machine_starts,
    machine_stops,
)
from vfiomig.models.pattern import Pattern
from vfiomig.qemu.migration import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from guest_parts import GuestParts

SOURCE_SEED, TARGET_SEED = 1, 101


class Row(NamedTuple):
    """A migration."""

    caps: str
    devices: int
    switchover_ack: bool
    #: What goes through channels beside the main one: nothing, memory, or devices as well.
    multifd: str
    #: Who tells which memory the devices have written.
    tracker: str

    @property
    def capabilities(self) -> dict[str, bool]:
        """QEMU's migration capabilities.

        Without a return path a QEMU 10.0 that sends devices through the channels ends when its
        last packet is queued, and if it is not sent by then the target's migration fails. QEMU's
        management layers always use one.
        """
        return {
            "multifd": self.multifd != "none",
            "switchover-ack": self.switchover_ack,
            "return-path": self.switchover_ack or self.multifd == "devices",
        }

    @property
    def parameters(self) -> dict[str, Any]:
        """QEMU's migration parameters.

        Compressed channels carry no devices. The devices' own option would keep them out as well,
        but then a QEMU 10.0 dies now and then: it starts threads for them all the same, counts
        these, and does not expect that they have ended for want of anything to do.
        """
        compression = {"multifd-compression": "zlib"} if self.multifd == "memory" else {}
        return SWITCH_AT_ONCE | compression

    @property
    def options(self) -> str:
        """What every vfio-pci is given."""
        words = ",x-migration-multifd-transfer=on" if self.multifd == "devices" else ""
        if self.tracker == "iommu":
            words += ",x-device-dirty-page-tracking=off"
        return words

    @property
    def pause(self) -> float:
        """Seconds that the source's devices take, so that no thread ends as soon as it began."""
        return 0.5 if self.multifd == "devices" else 0

    @property
    def size(self) -> int:
        """Bytes of a device's memory.

        A QEMU 10.0 that sends devices through the channels stalls now and then: the threads that
        send them take the turns that the memory's last synchronization waits for, while the
        channels are full and the target does not read before it. What fits into the sockets'
        buffers never fills them.
        """
        return 32 << 10 if self.multifd == "devices" else 1 << 20

    @property
    def dirty(self) -> int:
        """Bytes that the source's device rewrites per second, so that its content is its own."""
        return self.size // 4


CHOICES: Mapping[str, tuple[Any, ...]] = {
    "caps": CAPS,
    "devices": (1, 2),
    "switchover_ack": (False, True),
    "multifd": ("none", "memory", "devices"),
    "tracker": ("device", "iommu"),
}


def possible(row: Row) -> bool:
    """QEMU migrates several devices only if all can be quiescent together."""
    return row.devices == 1 or has_p2p(row.caps)


def pairs_of(row: Row) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in combinations(row._asdict().items(), 2)}


EVERY_ROW = [row for values in product(*CHOICES.values()) if possible(row := Row(*values))]
EVERY_PAIR = frozenset(chain.from_iterable(map(pairs_of, EVERY_ROW)))


def choose_rows() -> Iterator[Row]:
    """Choose rows until every pair is in one, each time one with the most that still lack."""
    lacking = set(EVERY_PAIR)
    while lacking:
        row = max(EVERY_ROW, key=lambda row: len(pairs_of(row) & lacking))
        lacking -= pairs_of(row)
        yield row


ROWS = tuple(choose_rows())


def row_name(row: Row) -> str:
    ack = "ack" if row.switchover_ack else "no ack"
    return f"{row.caps}, {row.devices}, {ack}, multifd {row.multifd}, {row.tracker}"


def test_every_pair_of_choices_is_in_a_row() -> None:
    assert set(chain.from_iterable(map(pairs_of, ROWS))) == EVERY_PAIR
    for left, right in combinations(CHOICES, 2):
        # Two pairs cannot be had: two devices, with the two sets that lack P2P.
        count = len(CHOICES[left]) * len(CHOICES[right])
        lacks = 2 if {left, right} == {"caps", "devices"} else 0
        there = {(getattr(row, left), getattr(row, right)) for row in ROWS}
        assert len(there) == count - lacks
    assert len(ROWS) < len(EVERY_ROW) // 3


@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_devices_arrive_by_the_states_of_their_set_whatever_else_is_chosen(
    parts: GuestParts, tmp_path: Path, row: Row
) -> None:
    keys = {"size": row.size, "caps": row.caps}
    numbers = range(row.devices)
    own = {"dirty": row.dirty, "pause": row.pause}
    leaving = [witnessed(**keys, **own, seed=SOURCE_SEED + number) for number in numbers]
    arriving = [witnessed(**keys, seed=TARGET_SEED + number) for number in numbers]
    with pair(parts.qemu, tmp_path, leaving, arriving, row.options) as (source, target):
        account = migrate(
            source.qmp,
            target.qmp,
            f"unix:{tmp_path}/link",
            capabilities=row.capabilities,
            parameters=row.parameters,
        )
        assert account["vfio"]["transferred"] > row.devices * row.size
        source.wait_status("postmigrate")
        target.wait_status("running")
        assert (source.finish(), target.finish()) == (0, 0)
    assert (account["ram"]["multifd-bytes"] > 0) == (row.multifd != "none")
    for number in numbers:
        assert source.states_of(number) == machine_starts(row.caps) + SOURCE_STATES[row.caps]
        assert target.states_of(number) == TARGET_STATES[row.caps] + machine_stops(row.caps)
        assert source.resets(number) == target.resets(number) == 1  # the machine's start
        assert_arrived(source, target, number, row)
        assert_tracked(source, number, row)
        assert_sent_as_chosen(source, target, number, row)
    starts = machine_starts(row.caps)
    assert_all_wait_for_all(source, [*starts, *SOURCE_STATES[row.caps]], row.devices)
    assert_all_wait_for_all(target, TARGET_STATES[row.caps], row.devices)


def assert_all_wait_for_all(guest: VfioGuest, states: list[str], devices: int) -> None:
    """No device is asked for the next state before all have been asked for this one."""
    asked = [state for _, state in guest.states()]
    assert asked[: len(states) * devices] == [state for state in states for _ in range(devices)]


def assert_arrived(source: VfioGuest, target: VfioGuest, number: int, row: Row) -> None:
    """What the source stopped with is what the target loaded, and still had when it quit."""
    left = source.digest(number, "stopped")
    assert left != Pattern(size=row.size, seed=SOURCE_SEED + number).digest()
    assert target.digest(number, "loaded") == left
    assert target.digest(number, "stopped") == left


def assert_tracked(source: VfioGuest, number: int, row: Row) -> None:
    """Whoever is to tell of the device's DMA was told to begin, then asked, and nobody else."""
    asked, of_iommu = source.features(number), source.requests_on("iommu")
    if row.tracker == "device":
        start = asked.index("SET DMA_LOGGING_START")
        reports = [at for at, words in enumerate(asked) if words == "GET DMA_LOGGING_REPORT"]
        assert reports
        assert min(reports) > start
        # QEMU stops it when a migration fails, and never else.
        assert "SET DMA_LOGGING_STOP" not in asked
        assert "IOMMU_HWPT_SET_DIRTY_TRACKING()" not in of_iommu
    else:
        tracking = of_iommu.index("IOMMU_HWPT_SET_DIRTY_TRACKING()")
        assert "IOMMU_HWPT_GET_DIRTY_BITMAP()" in of_iommu[tracking:]
        assert "SET DMA_LOGGING_START" not in asked


def assert_sent_as_chosen(source: VfioGuest, target: VfioGuest, number: int, row: Row) -> None:
    """The state came by the threads, and before the switch as much, as was chosen."""
    rows = [request for request in target.requests() if request["on"].startswith(f"vfio{number}")]
    (resuming,) = (
        request for request in rows if "SET MIG_DEVICE_STATE RESUMING" in request["request"]
    )
    last = [request for request in rows if request["on"] == f"vfio{number}:resuming"][-1]
    assert (last["thread"] != resuming["thread"]) == (row.multifd == "devices")
    if row.switchover_ack and has_pre_copy(row.caps):
        assert source.read_before_the_switch(number) > row.size
