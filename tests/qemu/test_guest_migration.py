"""A guest goes from one QEMU to another and notices nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from vfiomig.errors import MigrationFailed
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.migration import configure, migrate, start_incoming, start_outgoing, wait_settled

if TYPE_CHECKING:
    from pathlib import Path

    from guest_parts import GuestParts

COUNT = b"i=0; while :; do echo count $i; i=$((i + 1)); sleep 0.01; done\n"


def start_counting(guest: Guest) -> None:
    guest.wait_ready()
    guest.shell.send(COUNT)
    guest.shell.expect(b"count 20\n")


def assert_counted_on(before: bytes, after: bytes) -> None:
    """No line lost, doubled or torn between what the two machines said."""
    numbers = [int(line.removeprefix(b"count ")) for line in (before + after).splitlines()]
    assert len(numbers) > 50
    assert all(second == first + 1 for first, second in pairwise(numbers))


def test_a_counter_goes_on_where_it_was(parts: GuestParts, tmp_path: Path) -> None:
    with (
        Guest(parts.qemu, parts.machine()) as source,
        Guest(parts.qemu, parts.machine(incoming=True)) as target,
    ):
        start_counting(source)
        migrate(source.qmp, target.qmp, f"unix:{tmp_path}/link")
        before = source.shell.drain()
        after = target.shell.expect(rb"(?:count \d+\n){50}").group()
        assert_counted_on(before, after)
        assert source.qmp.execute("query-status")["status"] == "postmigrate"
        assert target.qmp.execute("query-status")["status"] == "running"


def test_a_shell_answers_at_the_other_end(parts: GuestParts, tmp_path: Path) -> None:
    with Guest(parts.qemu, parts.machine()) as source:
        source.wait_ready()
        source.check("echo what was written before >note")
        with Guest(parts.qemu, parts.machine(incoming=True)) as target:
            migrate(source.qmp, target.qmp, f"unix:{tmp_path}/link")
            source.kill()
            assert target.check("cat note") == "what was written before\n"
            assert target.power_off(5) == 5


def test_a_guest_in_a_file_starts_later(parts: GuestParts, tmp_path: Path) -> None:
    with Guest(parts.qemu, parts.machine()) as source:
        start_counting(source)
        configure(source.qmp)
        start_outgoing(source.qmp, f"file:{tmp_path}/guest")
        assert wait_settled(source.qmp, timeout=60) == "completed"
        before = source.shell.drain()
    with Guest(parts.qemu, parts.machine(incoming=True)) as target:
        configure(target.qmp)
        start_incoming(target.qmp, f"file:{tmp_path}/guest")
        assert wait_settled(target.qmp, timeout=60) == "completed"
        assert_counted_on(before, target.shell.expect(rb"(?:count \d+\n){50}").group())


def test_a_migration_into_a_different_machine_fails_and_the_source_goes_on(
    parts: GuestParts, tmp_path: Path
) -> None:
    with (
        Guest(parts.qemu, parts.machine("-device", "virtio-rng-pci")) as source,
        Guest(parts.qemu, parts.machine(incoming=True)) as target,
    ):
        source.wait_ready()
        with pytest.raises(MigrationFailed):
            migrate(
                source.qmp,
                target.qmp,
                f"unix:{tmp_path}/link",
                capabilities={"return-path": True},
            )
        assert target.wait() == 1
        assert "0000:00:01.0/virtio-rng" in target.said
        assert source.check("echo on") == "on\n"
