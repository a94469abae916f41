"""A guest boots, does what it is told, and what it says comes out whole."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vfiomig.errors import GuestEnded, GuestError, GuestTimeout
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guest_parts import GuestParts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def guest(parts: GuestParts) -> Iterator[Guest]:
    """One guest for the tests that leave it as it was."""
    with Guest(parts.qemu, parts.machine("-device", "virtio-rng-pci")) as booted:
        booted.wait_ready()
        yield booted


def test_the_kernel_that_was_fetched_runs(guest: Guest) -> None:
    assert guest.check("cat /proc/version").startswith("Linux version ")


def test_a_device_on_the_command_line_is_on_the_bus_of_the_guest(guest: Guest) -> None:
    listing = guest.check(
        "for d in /sys/bus/pci/devices/*; do echo $(cat $d/vendor $d/device $d/class); done"
    )
    assert "0x1af4 0x1005 0x00ff00" in listing.splitlines()


def test_the_modules_of_the_initrd_are_loaded(guest: Guest) -> None:
    assert "virtio_blk " in guest.check("lsmod")
    assert "is not loaded" not in guest.console


def test_what_a_command_writes_comes_out_byte_for_byte(guest: Guest) -> None:
    guest.check("head -c 200000 /dev/urandom >result; printf '\\000\\r\\n\\004\\021' >>result")
    digest = guest.check("sha256sum result").split()[0]
    assert hashlib.sha256(guest.run("cat result").output).hexdigest() == digest


@pytest.mark.parametrize("status", [0, 1, 127, 200, 255])
def test_the_exit_status_of_a_command_is_its_own(guest: Guest, status: int) -> None:
    assert guest.run(f"exit {status}").status == status


def test_a_command_that_cannot_be_parsed_fails_alone(guest: Guest) -> None:
    assert guest.run("if; 'it is \"broken").status == 2
    assert guest.check("echo \"it's\" 'fine'") == "it's fine\n"


def test_a_failed_check_shows_what_the_command_said(guest: Guest) -> None:
    with pytest.raises(GuestError, match=r"ended with 1: cat: can't open '/no/such"):
        guest.check("cat /no/such")


def test_a_command_that_takes_too_long_is_an_error(parts: GuestParts) -> None:
    with Guest(parts.qemu, parts.machine()) as slow:
        slow.wait_ready()
        with pytest.raises(GuestTimeout, match="'sleep 100' took longer than"):
            slow.run("sleep 100", timeout=0.5)


@pytest.mark.parametrize("machine_type", ["pc", "q35"])
def test_the_status_of_the_guest_is_that_of_qemu(parts: GuestParts, machine_type: str) -> None:
    machine = Machine(kernel=parts.kernel, initrd=parts.initrd, type=machine_type)
    with Guest(parts.qemu, machine) as guest:
        guest.wait_ready()
        assert guest.power_off(42) == 42
        assert guest.wait() == 85


def test_a_guest_that_panics_says_why(parts: GuestParts) -> None:
    with Guest(parts.qemu, parts.machine()) as guest:
        guest.wait_ready()
        with pytest.raises(GuestEnded, match="Kernel panic"):
            guest.run("echo c >/proc/sysrq-trigger")


def test_a_guest_that_does_not_boot_shows_its_console(parts: GuestParts) -> None:
    with (
        Guest(parts.qemu, parts.machine(append="rdinit=/absent init=/absent")) as guest,
        pytest.raises(GuestEnded, match=r"No working init found|Unable to mount root fs"),
    ):
        guest.wait_ready()


def test_a_machine_without_a_kernel_answers_its_monitor(parts: GuestParts) -> None:
    with Guest(parts.qemu, Machine()) as guest:
        assert guest.qmp.execute("query-status")["status"] == "running"
        guest.qmp.execute("quit")
        assert guest.wait() == 0


def test_arguments_that_qemu_refuses_are_an_error_with_its_words(parts: GuestParts) -> None:
    with pytest.raises(GuestEnded, match="'nonsense' is not a valid device model name"):
        Guest(parts.qemu, Machine(extra=("-device", "nonsense")))


def test_the_command_line_ends_as_its_command_in_the_guest_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmtest", "boot", "--", "uname", "-s;", "exit 7"],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "Linux\n"), done.stderr
    assert "booted after" in done.stderr
