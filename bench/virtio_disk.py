"""Direct reads and writes of 4 KiB by a Linux guest, one at a time, against QEMU's own device.

Both disks are in one guest and over one file; the guest's memory is a memfd and its processor is
emulated, so what differs is the way of a request to the device and back.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from guests import guest_parts
from harness import Measurement

from vfiomig.qemu.guest import Guest
from vfiomig.qemu.vfio import run_words, vfio_words

if TYPE_CHECKING:
    from guests import Parts

__all__ = ("measure",)

SIZE = 64 << 20
BLOCK = 4096


def measure(count: int = 4000, rounds: int = 5) -> list[Measurement]:
    with guest_parts() as parts, disks(parts) as guest:
        guest.wait_ready()
        # The first of each pays for what is set up once.
        for disk in ("vda", "vdb"):
            seconds(guest, f"if=/dev/{disk} of=/dev/null iflag=direct", count // 4)
        return [
            compared(guest, "read", "if=/dev/{} of=/dev/null iflag=direct", count, rounds),
            compared(guest, "written", "if=/dev/zero of=/dev/{} oflag=direct", count, rounds),
        ]


def disks(parts: Parts) -> Guest:
    """Start a guest with /dev/vda served and /dev/vdb of QEMU's own."""
    disk = parts.folder / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE)
        file.write(bytes(SIZE))
    specs = (f"virtio_blk,path={disk}",)
    drive = f"file={disk},format=raw,if=none,id=own,file.locking=off"
    own = ("-drive", drive, "-device", "virtio-blk-pci,drive=own")
    machine = parts.machine(*vfio_words(len(specs)), *own)
    return Guest(parts.qemu, machine, launcher=run_words(specs))


def compared(guest: Guest, name: str, words: str, count: int, rounds: int) -> Measurement:
    taken = [
        [seconds(guest, words.format(disk), count) for disk in ("vda", "vdb")]
        for _ in range(rounds)
    ]
    return Measurement(
        f"4 KiB {name} at depth 1 against QEMU's own disk",
        statistics.median(own / served for served, own in taken),
        at_least=0.3,
        details={
            "us": [tuple(round(second / count * 1e6) for second in pair) for pair in taken],
        },
    )


def seconds(guest: Guest, words: str, count: int) -> float:
    """Return what dd takes by the guest's clock."""
    start, _, end, _ = guest.check(
        f"cat /proc/uptime; dd {words} bs={BLOCK} count={count} 2>/dev/null; cat /proc/uptime"
    ).split()
    return float(end) - float(start)
