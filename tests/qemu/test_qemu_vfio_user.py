"""A Linux guest over vfio-user: its own lspci, a reboot, and a QEMU that is killed."""

from __future__ import annotations

import hashlib
import re
import shlex
import socket
from typing import TYPE_CHECKING

from bus_machine import BusMachine, PciFunction
from serving import PATIENT, serving_all, vfio_user_guest

if TYPE_CHECKING:
    from pathlib import Path

    from guest_parts import GuestParts
    from vfiomig.qemu.guest import Guest

BLOCK = 4096
SIZE = 16 << 20
#: The numbers of the blocks that are written by each part of the test.
BEFORE_THE_REBOOT, BEFORE_THE_KILL = 0, 2048
PATIENCE_S = 20
#: Writes random blocks, and tells the host of each with its checksum when it is on the disk.
WRITER = f"""
i={BEFORE_THE_KILL}
while head -c {BLOCK} /dev/urandom >block; do
    dd if=block of=/dev/vda oflag=direct bs={BLOCK} seek=$i 2>/dev/null || exit
    echo $i $(sha256sum <block)
    i=$((i + 1))
done >/dev/ttyS5
"""
LOOPED = (
    "stty -F /dev/ttyS4 115200 raw -echo && exec 4<>/dev/ttyS4 && echo on >&4 && "
    f"timeout {PATIENCE_S} head -n 1 <&4"
)
#: Places in BAR4 of the disk, and in BAR0 of the card when that is at PORT.
DISK_STATUS, DISK_SECTORS = 0x14, 0x2000
PORT, LINE_STATUS = 0xC000, 5


def test_a_guest_has_its_devices_after_a_reboot_and_the_next_qemu_has_them_after_a_kill(
    vfio_user_parts: GuestParts, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    specs = (f"virtio_blk,path={disk}", f"mtty,port1=socket:{tmp_path}/port")
    with serving_all(specs, tmp_path) as servings:
        with vfio_user_guest(vfio_user_parts, servings) as guest:
            assert_found_by_lspci(guest)
            assert guest.check(LOOPED) == "on\n"
            written = guest.check(
                f"head -c 1048576 /dev/urandom >sent && sha256sum <sent && dd if=sent of=/dev/vda "
                f"oflag=direct bs=64k seek={BEFORE_THE_REBOOT} 2>/dev/null"
            )
            reboot(guest)
            assert_found_by_lspci(guest)
            assert guest.check(LOOPED) == "on\n"
            read = guest.check("dd if=/dev/vda iflag=direct bs=64k count=16 2>/dev/null| sha256sum")
            assert read == written
            told = kill_while_it_writes(guest, tmp_path / "port")
        content = disk.read_bytes()
        for number, sum_ in told:
            block = content[number * BLOCK :][:BLOCK]
            assert hashlib.sha256(block).hexdigest() == sum_
        paths = [serving.path for serving in servings]
        with BusMachine(vfio_user_parts.qemu, paths, shared_memory=False, **PATIENT) as machine:
            assert_as_new(machine)
            assert machine.finish() == 0
            assert machine.said == ""


def assert_found_by_lspci(guest: Guest) -> None:
    """Let lspci, which walks the capabilities by itself, say what it sees, and who drives it."""
    functions = guest.check("lspci -n -vvv").split("\n\n")
    (disk,) = (text for text in functions if "1af4:1042" in text)
    assert re.search(r"Capabilities: \[\w+\] MSI-X: Enable\+ Count=\d+ Masked-", disk)
    assert len(re.findall(r"Vendor Specific Information: VirtIO: ", disk)) >= 4
    assert "Kernel driver in use: virtio-pci" in disk
    (card,) = (text for text in functions if "4348:3253" in text)
    assert re.search(r"Interrupt: pin A routed to IRQ \d+", card)
    assert len(re.findall(r"Region \d: I/O ports at \w+ \[size=8\]", card)) == 2
    assert "Kernel driver in use: serial" in card


def reboot(guest: Guest) -> None:
    guest.qmp.execute("set-action", reboot="reset")
    guest.shell.send(b"reboot -f\n")
    guest.wait_ready()


def kill_while_it_writes(guest: Guest, port: Path) -> list[tuple[int, str]]:
    """Kill QEMU after some blocks; return the blocks that the guest had told of by then."""
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(PATIENCE_S)
        host.connect(str(port))
        guest.check(
            "stty -F /dev/ttyS5 115200 raw -echo && exec 4<>/dev/ttyS5 && "
            f"printf %s {shlex.quote(WRITER)} >writer && sh writer >/dev/null 2>&1 &"
        )
        heard = b""
        while heard.count(b"\n") < 10:
            piece = host.recv(4096)
            assert piece
            heard += piece
        guest.kill()
        # The last line may have come in part.
        lines = heard.decode().split("\n")[:-1]
    return [(int(number), sum_) for number, sum_, _ in map(str.split, lines)]


def assert_as_new(machine: BusMachine) -> None:
    disk, card = PciFunction(machine, "v0"), PciFunction(machine, "v1")
    disk.enable(4)
    assert machine.get(disk.bar(4) + DISK_STATUS, 1) == 0
    assert machine.get(disk.bar(4) + DISK_SECTORS, 8) == SIZE // 512
    card.enable_ports(0, PORT)
    assert machine.get_port(PORT + LINE_STATUS, 1) == 0x60
