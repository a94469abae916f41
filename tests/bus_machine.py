"""A QEMU whose processor stands still: its buses and memory do what the test says, at once.

It is the accelerator "qtest" of QEMU, which takes reads and writes as lines of text
(docs/devel/testing/qtest.rst). Devices, their memory regions and their DMA work as ever, so what a
driver would do takes a few lines here and no second.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Final

from vfiomig.qemu.guest import Guest
from vfiomig.qemu.lines import Lines
from vfiomig.qemu.machine import Machine
from vfiomig.qemu.vfio import vfio_user_device, vfio_user_words

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ("MEMORY", "BusMachine", "PciFunction")

MEMORY: Final = 64 << 20
#: Where BARs go; above the memory, and below the interrupt controllers.
_BARS: Final = 0xE000_0000
_BAR_ROOM: Final = 1 << 20

_COMMAND, _BAR0, _CAPABILITIES = 0x04, 0x10, 0x34
_PORTS: Final = 1
_MEMORY_AND_MASTER: Final = 6
_MSIX: Final = 0x11
_LETTERS: Final = {1: "b", 2: "w", 4: "l", 8: "q"}


class BusMachine(Guest):
    """A machine of type "pc" with the devices behind ``sockets``."""

    def __init__(
        self,
        qemu: Path,
        sockets: Sequence[Path],
        *extra: str,
        shared_memory: bool = True,
        **options: Any,
    ) -> None:
        """``options`` go to each device, ``extra`` are more words for QEMU."""
        here, there = socket.socketpair()
        self._lines = Lines(here, "QEMU's bus")
        with there:
            words = (
                *vfio_user_words(sockets, **options),
                *("-chardev", f"socket,id=bus,fd={there.fileno()}"),
                *("-object", "qtest,id=qtest0,chardev=bus,log=/dev/null"),
            )
            machine = Machine(
                type="pc",
                accel="qtest",
                cpu="qemu64",
                memory_mib=MEMORY >> 20,
                shared_memory=shared_memory,
                extra=(*words, *extra),
            )
            super().__init__(qemu, machine, pass_fds=(there.fileno(),))

    def close(self) -> None:
        super().close()
        self._lines.close()

    def finish(self) -> int:
        """Have QEMU quit, and return the exit code."""
        self.qmp.execute("quit")
        return self.wait()

    def _ask(self, *words: object) -> int:
        line = " ".join(f"{word:#x}" if isinstance(word, int) else str(word) for word in words)
        self._lines.send(line.encode() + b"\n")
        while (answer := self._lines.line()).startswith(b"IRQ"):
            pass
        ok, _, value = answer.partition(b" ")
        assert ok == b"OK", answer
        return int(value or b"0", 16)

    def get(self, address: int, size: int = 4) -> int:
        return self._ask("read" + _LETTERS[size], address)

    def put(self, address: int, value: int, size: int = 4) -> None:
        self._ask("write" + _LETTERS[size], address, value)

    def get_port(self, port: int, size: int = 4) -> int:
        return self._ask("in" + _LETTERS[size], port)

    def put_port(self, port: int, value: int, size: int = 4) -> None:
        self._ask("out" + _LETTERS[size], port, value)

    def read(self, address: int, size: int) -> bytes:
        """Read memory."""
        return self._ask("read", address, size).to_bytes(size, "big")

    def write(self, address: int, data: bytes) -> None:
        """Write memory."""
        self._ask("write", address, len(data), f"0x{data.hex()}")

    def fill(self, address: int, size: int, value: int) -> None:
        self._ask("memset", address, size, value)

    def plug(self, path: Path, name: str, **options: Any) -> None:
        """Put in another device while the machine runs."""
        self.qmp.execute("device_add", **vfio_user_device(path, name, **options))

    def reset(self) -> None:
        """Reset the machine as its button does."""
        self.qmp.execute("set-action", reboot="reset")
        self.qmp.execute("system_reset")
        self.qmp.wait_event("RESET")


class PciFunction:
    """One device on the machine's bus, by the name that QEMU has for it."""

    def __init__(self, machine: BusMachine, name: str) -> None:
        self.machine = machine
        found: list[int] = [
            device["slot"]
            for bus in machine.qmp.execute("query-pci")
            for device in bus["devices"]
            if device["qdev_id"] == name
        ]
        (self._slot,) = found

    def config(self, offset: int, size: int = 4) -> int:
        self._select(offset)
        return self.machine.get_port(0xCFC + offset % 4, size)

    def set_config(self, offset: int, value: int, size: int = 4) -> None:
        self._select(offset)
        self.machine.put_port(0xCFC + offset % 4, value, size)

    def _select(self, offset: int) -> None:
        self.machine.put_port(0xCF8, 0x8000_0000 | self._slot << 11 | offset & ~3)

    def enable(self, *bars: int) -> None:
        """Give the BARs addresses, and let the device answer there and master the bus."""
        for bar in bars:
            self.set_config(_BAR0 + 4 * bar, self.bar(bar))
        self.set_config(_COMMAND, _MEMORY_AND_MASTER, 2)

    def enable_ports(self, bar: int, port: int) -> None:
        """Give a BAR of I/O space its first port, and let the device answer there."""
        self.set_config(_BAR0 + 4 * bar, port)
        self.set_config(_COMMAND, _PORTS, 2)

    def bar(self, number: int) -> int:
        return _BARS + (self._slot * 8 + number) * _BAR_ROOM

    def enable_msix(self, bar: int, table: int, address: int, vectors: int) -> None:
        """Let each vector write its number to a word of memory, beginning at ``address``."""
        for vector in range(vectors):
            entry = self.bar(bar) + table + 16 * vector
            for offset, value in ((0, address + 4 * vector), (4, 0), (8, vector + 1), (12, 0)):
                self.machine.put(entry + offset, value)
        control = self._capability(_MSIX) + 2
        self.set_config(control, self.config(control, 2) | 0x8000, 2)

    def _capability(self, wanted: int) -> int:
        place = self.config(_CAPABILITIES, 1)
        while place and self.config(place, 1) != wanted:
            place = self.config(place + 1, 1)
        assert place, f"no capability {wanted:#x}"
        return place
