"""A Linux guest uses devices written in Python with its own drivers: virtio_blk and 8250_pci."""

from __future__ import annotations

import hashlib
import os
import re
import select
import shlex
import signal
import socket
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest

from serving import serving_all, vfio_user_guest
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.machine import Machine
from vfiomig.qemu.migration import migrate
from vfiomig.qemu.vfio import run_words, vfio_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from guest_parts import GuestParts

SIZE = 64 << 20
#: In 4 KiB writes, so that there is an interrupt for each.
BLOCKS = 256
#: Of a serial stream; a guest under emulation moves some thousand bytes per second.
LINES = 1500
STREAM = b"".join(b"%d\n" % number for number in range(1, LINES + 1))
PATIENCE_S = 50
#: Writes its number into each block, and notes a block when the disk has acknowledged it.
WRITER = """
i=0
while [ ! -e stop ]; do
    printf %4096d $i | dd of=/dev/vda oflag=direct iflag=fullblock bs=4k seek=$i 2>/dev/null || exit
    echo $i >>acknowledged
    i=$((i + 1))
done
echo ended >>acknowledged
"""


Way: TypeAlias = "Callable[[GuestParts, Sequence[str], Path], AbstractContextManager[Guest]]"


class Served:
    """A guest with two devices, and where these can be seen from outside."""

    def __init__(self, guest: Guest, folder: Path) -> None:
        self.guest = guest
        self.disk = folder / "disk"
        self.port = folder / "port"


@contextmanager
def behind_run(parts: GuestParts, specs: Sequence[str], folder: Path) -> Iterator[Guest]:
    machine = parts.machine(*vfio_words(len(specs)))
    with Guest(parts.qemu, machine, launcher=run_words(specs)) as guest:
        guest.wait_ready()
        yield guest


@contextmanager
def over_vfio_user(
    parts: GuestParts, specs: Sequence[str], folder: Path, *, shared_memory: bool
) -> Iterator[Guest]:
    with (
        serving_all(specs, folder) as servings,
        vfio_user_guest(parts, servings, shared_memory=shared_memory) as guest,
    ):
        # What they have not mapped they reach by messages.
        assert all(bool(each.mapped("memory-backend")) == shared_memory for each in servings)
        yield guest


#: How QEMU reaches the devices, and the fixture with the QEMU that can do so.
WAYS: dict[str, tuple[Way, str]] = {
    "vfiomig run": (behind_run, "parts"),
    "vfio-user": (partial(over_vfio_user, shared_memory=True), "vfio_user_parts"),
    "vfio-user, DMA by messages": (
        partial(over_vfio_user, shared_memory=False),
        "vfio_user_parts",
    ),
}


@pytest.fixture(scope="module", params=WAYS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One guest with a disk in a file, and a serial card with a socket and a loopback plug."""
    way, parts = WAYS[request.param]
    folder = tmp_path_factory.mktemp("served")
    with (folder / "disk").open("wb") as disk:
        disk.truncate(SIZE)
    specs = (f"virtio_blk,path={folder}/disk", f"mtty,port0=socket:{folder}/port")
    with way(request.getfixturevalue(parts), specs, folder) as guest:
        yield Served(guest, folder)


def interrupts(guest: Guest, name: str) -> tuple[int, str]:
    """Return how many interrupts came for ``name``, and of what kind they are."""
    for line in guest.check("cat /proc/interrupts").splitlines():
        if line.split()[-1] == name:
            _, count, kind, *_ = line.split()
            return int(count), kind
    raise AssertionError(f"no interrupt of {name}")


def test_the_disk_is_found_by_the_stock_driver_with_its_size(served: Served) -> None:
    assert int(served.guest.check("cat /sys/block/vda/size")) == SIZE // 512
    driver = served.guest.check("readlink -f /sys/block/vda/device/driver").strip()
    assert driver.endswith("/virtio_blk")


def test_what_is_written_to_the_disk_is_read_back_and_is_in_its_file(served: Served) -> None:
    told = served.guest.check(
        f"dd if=/dev/urandom of=blocks bs=4k count={BLOCKS} 2>/dev/null && sha256sum <blocks && "
        "dd if=blocks of=/dev/vda oflag=direct bs=4k seek=1000 2>/dev/null && "
        f"dd if=/dev/vda iflag=direct bs=4k skip=1000 count={BLOCKS} 2>/dev/null | sha256sum"
    )
    written, read = told.split()[::2]
    assert read == written
    content = served.disk.read_bytes()
    assert hashlib.sha256(content[4096 * 1000 :][: 4096 * BLOCKS]).hexdigest() == written
    assert not any(content[: 4096 * 1000])
    assert not any(content[4096 * (1000 + BLOCKS) :])


def test_large_requests_keep_their_bytes_in_order(served: Served) -> None:
    command = (
        "dd if=/dev/urandom of=large bs=1M count=16 2>/dev/null && sha256sum <large && "
        "dd if=large of=/dev/vda oflag=direct bs=1M seek=32 2>/dev/null && "
        "dd if=/dev/vda iflag=direct bs=64k skip=512 count=256 2>/dev/null | sha256sum; rm large"
    )
    written, read = served.guest.check(command).split()[::2]
    assert read == written


def test_each_request_of_the_disk_ends_with_an_msi_x_interrupt(served: Served) -> None:
    before, kind = interrupts(served.guest, "virtio0-req.0")
    assert kind.startswith("PCI-MSIX")
    served.guest.check(f"dd if=/dev/vda of=/dev/null iflag=direct bs=4k count={BLOCKS}")
    after, _ = interrupts(served.guest, "virtio0-req.0")
    assert after - before >= BLOCKS


def test_what_the_page_cache_held_is_on_the_disk_after_a_sync(served: Served) -> None:
    told = served.guest.check(
        "head -c 3000001 /dev/urandom >sent && sha256sum <sent && "
        "dd if=sent of=/dev/vda bs=1M seek=8 conv=notrunc,fsync 2>/dev/null && "
        "echo 3 >/proc/sys/vm/drop_caches && "
        "dd if=/dev/vda bs=1M skip=8 count=3 2>/dev/null | head -c 3000001 | sha256sum"
    )
    written, read = told.split()[::2]
    assert read == written
    with served.disk.open("rb") as disk:
        disk.seek(8 << 20)
        assert hashlib.sha256(disk.read(3000001)).hexdigest() == written


def test_both_ports_of_the_card_are_16550a_for_the_stock_driver(served: Served) -> None:
    ports = served.guest.check("cat /proc/tty/driver/serial").splitlines()
    for number in (4, 5):
        assert any(line.startswith(f"{number}: uart:16550A ") for line in ports), ports


def test_a_looped_port_gives_every_byte_back_through_intx(served: Served) -> None:
    told = served.guest.check(
        "stty -F /dev/ttyS5 115200 raw -echo && head -c 4096 /dev/urandom >sent "
        f"&& exec 4<>/dev/ttyS5 && {{ timeout {PATIENCE_S} head -c 4096 <&4 >got & }} "
        f"&& timeout {PATIENCE_S} cat sent >&4; wait; grep ttyS5 /proc/interrupts; "
        "sha256sum <sent; sha256sum <got",
        timeout=2 * PATIENCE_S,
    )
    line, sent, got = told.splitlines()
    count, kind = line.split()[1:3]
    assert int(count) > 0
    assert kind == "IO-APIC"
    assert got == sent


def test_a_stream_goes_both_ways_through_the_socket_of_a_port(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(PATIENCE_S)
        host.connect(str(served.port))
        # The driver throws away what came before it opened the port, so the guest begins.
        echo = threading.Thread(target=answer_stream, args=(host,))
        echo.start()
        try:
            told = served.guest.check(
                "stty -F /dev/ttyS4 115200 raw -echo crtscts && exec 4<>/dev/ttyS4 "
                f"&& timeout {PATIENCE_S} seq 1 {LINES} >&4 "
                f"&& timeout {PATIENCE_S} head -n {LINES} <&4",
                timeout=2 * PATIENCE_S,
            )
        finally:
            echo.join()
    assert told.encode() == STREAM


def answer_stream(host: socket.socket) -> None:
    """Take the guest's stream, and send back what came when it is long enough."""
    taken = b""
    while len(taken) < len(STREAM) and (data := host.recv(65536)):
        taken += data
    host.sendall(taken)


@pytest.mark.parametrize(
    ("machine_type", "filter_name"), [("pc", "fast"), ("q35", "exact")], ids=["pc", "exact filter"]
)
def test_a_disk_in_memory_works_elsewhere_and_nothing_is_left_at_the_end(
    parts: GuestParts, tmp_path: Path, machine_type: str, filter_name: str
) -> None:
    specs = ("virtio_blk,size=64M", f"mtty,ports=1,port0=socket:{tmp_path}/port")
    machine = Machine(
        kernel=parts.kernel,
        initrd=parts.initrd,
        type=machine_type,
        extra=tuple(vfio_words(len(specs))),
    )
    with Guest(parts.qemu, machine, launcher=run_words(specs, filter_name=filter_name)) as guest:
        guest.wait_ready()
        written, read = guest.check(
            "head -c 1048576 /dev/urandom >sent && sha256sum <sent "
            "&& dd if=sent of=/dev/vda oflag=direct bs=64k 2>/dev/null "
            "&& dd if=/dev/vda iflag=direct bs=64k count=16 2>/dev/null | sha256sum"
        ).split()[::2]
        assert read == written
        ports = guest.check("cat /proc/tty/driver/serial")
        assert len(re.findall("uart:16550A", ports)) == 3
        assert guest.power_off(42) == 42
        assert "vfiomig" not in guest.said
    assert not list(tmp_path.iterdir())


def test_a_guest_that_writes_and_talks_goes_on_after_a_live_migration(
    parts: GuestParts, tmp_path: Path
) -> None:
    specs = ("virtio_blk,size=16M", "mtty")
    words = vfio_words(len(specs))
    with Guest(parts.qemu, parts.machine(*words), launcher=run_words(specs)) as source:
        source.wait_ready()
        source.check(f"printf %s {shlex.quote(WRITER)} >writer; sh writer >/dev/null 2>&1 &")
        source.check("stty -F /dev/ttyS5 115200 raw -echo; while [ ! -s acknowledged ]; do :; done")
        there = parts.machine(*words, incoming=True)
        with Guest(parts.qemu, there, launcher=run_words(specs)) as target:
            account = migrate(source.qmp, target.qmp, f"unix:{tmp_path}/link")
            source.kill()
            assert account["vfio"]["transferred"] > 0
            before = int(target.check("wc -l <acknowledged"))
            target.check(
                "sleep 1; touch stop; until grep -q ended acknowledged; do sleep 0.1; done"
            )
            noted = target.check("cat acknowledged").split()[:-1]
            assert before < len(noted)
            target.check("echo 3 >/proc/sys/vm/drop_caches")
            content = target.check(
                f"dd if=/dev/vda bs=4k count={len(noted)} 2>/dev/null | tr -s ' '"
            )
            assert content.split() == noted == [str(number) for number in range(len(noted))]
            looped = f"exec 4<>/dev/ttyS5; echo on >&4; timeout {PATIENCE_S} head -n 1 <&4"
            assert target.check(looped, timeout=2 * PATIENCE_S) == "on\n"
            assert target.power_off(3) == 3


def test_a_qemu_that_is_killed_ends_the_run_with_the_signals_status(
    parts: GuestParts, tmp_path: Path
) -> None:
    specs = ("virtio_blk", f"mtty,port0=socket:{tmp_path}/port")
    machine = Machine(extra=tuple(vfio_words(len(specs))))
    with Guest(parts.qemu, machine, launcher=run_words(specs)) as guest:
        assert [entry.name for entry in tmp_path.iterdir()] == ["port"]
        os.kill(only_child(guest.pid), signal.SIGKILL)
        assert guest.wait() == 128 + signal.SIGKILL
        assert not guest.said
    assert not list(tmp_path.iterdir())


def test_qemu_does_not_outlive_a_killed_run(parts: GuestParts) -> None:
    machine = Machine(extra=tuple(vfio_words(1)))
    with Guest(parts.qemu, machine, launcher=run_words(["virtio_blk"])) as guest:
        qemu = os.pidfd_open(only_child(guest.pid))
        try:
            os.kill(guest.pid, signal.SIGKILL)
            poll = select.poll()
            poll.register(qemu, select.POLLIN)
            assert poll.poll(PATIENCE_S * 1000), "QEMU still runs"
        finally:
            os.close(qemu)


def only_child(pid: int) -> int:
    """Return the process that ``vfiomig run`` started from its main thread."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)
