"""Two QEMUs behind ``vfiomig run``, and what their devices and traces tell afterwards.

Theory of operation
-------------------
Nothing runs in the guests but firmware, so a test is over in a second or two. What QEMU asked of
the devices is read from the trace, what became of their state from the notes that a
``devices/witnessed.py`` leaves. Both are complete, and the list of states exact, when
:meth:`VfioGuest.finish` has seen QEMU's end; what QEMU does on its way out is part of them.
"""

from __future__ import annotations

import json
import re
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vfiomig.errors import GuestTimeout
from vfiomig.qemu.guest import Guest
from vfiomig.qemu.machine import Machine
from vfiomig.qemu.vfio import run_words, vfio_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ("FIRMWARE_ONLY", "SWITCH_AT_ONCE", "VfioGuest", "pair", "witnessed")

HERE: Final = Path(__file__).parent
DEVICE: Final = HERE / "devices" / "witnessed.py"
_SET_STATE: Final = re.compile(r"VFIO_DEVICE_FEATURE\(SET MIG_DEVICE_STATE (\w+)\)")
_FEATURE: Final = re.compile(r"VFIO_DEVICE_FEATURE\((.*)\)")
_POLL_S: Final = 0.01
FIRMWARE_ONLY: Final = Machine(memory_mib=64)
#: The last that SeaBIOS says, on a port of its own.
_FIRMWARE_ENDS: Final = b"No bootable device."

#: An idle machine sends too little for QEMU to measure a bandwidth, and would never switch over.
SWITCH_AT_ONCE: Final = {"avail-switchover-bandwidth": 1 << 30}


def witnessed(**keys: object) -> str:
    """Return all of a device's SPEC but its notes."""
    return ",".join([f"{DEVICE}:Witnessed", *(f"{key}={value}" for key, value in keys.items())])


class VfioGuest(Guest):
    """A machine with devices written in Python, and nothing but firmware unless told otherwise."""

    def __init__(
        self,
        qemu: Path,
        folder: Path,
        name: str,
        specs: Sequence[str],
        *,
        incoming: bool = False,
        options: str = "",
        machine: Machine = FIRMWARE_ONLY,
        cold: int | None = None,
        program: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start it; ``options`` go to every vfio-pci, each with a comma in front.

        Only the first ``cold`` devices are there from the start, all if it is not given.
        ``program`` are words in front of QEMU's own, behind the door as well.
        """
        self._trace = folder / f"{name}.trace"
        self._firmware = folder / f"{name}.firmware"
        self._notes = [folder / f"{name}.notes{number}" for number in range(len(specs))]
        noted = [
            f"{spec},notes={notes}" if spec.startswith(f"{DEVICE}:") else spec
            for spec, notes in zip(specs, self._notes, strict=True)
        ]
        launcher = run_words(noted, "--trace", str(self._trace), "--trace-format", "json")
        extra = [
            *("-chardev", f"file,id=firmware,path={self._firmware}"),
            *("-device", "isa-debugcon,iobase=0x402,chardev=firmware", *machine.extra),
            *vfio_words(len(specs) if cold is None else cold, options),
        ]
        machine = replace(machine, extra=tuple(extra), incoming=incoming)
        super().__init__(qemu, machine, launcher=[*launcher, *program], pass_fds=pass_fds)

    @property
    def qemu_pid(self) -> int:
        """QEMU itself, the one process that ``vfiomig run`` started from its main thread."""
        (child,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(child)

    @property
    def status(self) -> str:
        """What QEMU says of its machine: running, postmigrate and so on."""
        status: str = self.qmp.execute("query-status")["status"]
        return status

    def wait_status(self, wanted: str, *, timeout: float = 30) -> None:
        """Wait until QEMU says this of its machine."""
        deadline = time.monotonic() + timeout
        while (status := self.status) != wanted:
            if time.monotonic() > deadline:
                raise GuestTimeout(f"the machine is {status}, not {wanted}, after {timeout} s")
            time.sleep(_POLL_S)

    def wait_firmware(self, *, timeout: float = 60) -> None:
        """Wait until the firmware has set up all that there is, and found no system to start."""
        deadline = time.monotonic() + timeout
        while _FIRMWARE_ENDS not in self._firmware.read_bytes():
            if time.monotonic() > deadline:
                raise GuestTimeout(f"the firmware has not ended after {timeout} s")
            time.sleep(_POLL_S)

    def finish(self) -> int:
        """Have QEMU quit, and return the exit code."""
        self.qmp.execute("quit")
        return self.wait()

    def requests(self) -> list[dict[str, Any]]:
        """Return the lines of the trace so far; the last one may be on its way."""
        lines = self._trace.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def states(self) -> list[tuple[str, str]]:
        """Return whom QEMU asked for which state, in order."""
        rows = ((row["on"], _SET_STATE.fullmatch(row["request"])) for row in self.requests())
        return [(on, found[1]) for on, found in rows if found]

    def states_of(self, number: int) -> list[str]:
        """Return the states that QEMU asked one device for."""
        return [state for on, state in self.states() if on == f"vfio{number}"]

    def requests_of(self, number: int) -> list[dict[str, Any]]:
        """Return the lines of the trace that are about one device itself, not its sessions."""
        return [row for row in self.requests() if row["on"] == f"vfio{number}"]

    def requests_on(self, label: str) -> list[str]:
        """Return the requests on what the trace calls ``label``: vfio0, iommu, vfio0:saving."""
        return [row["request"] for row in self.requests() if row["on"] == label]

    def features(self, number: int) -> list[str]:
        """Return every VFIO_DEVICE_FEATURE of one device, as ``SET DMA_LOGGING_START``."""
        return [words for words, _ in self._features(number)]

    def failures(self, number: int) -> list[tuple[str, str]]:
        """Return every VFIO_DEVICE_FEATURE of one device that failed, with its errno."""
        return [(words, error) for words, error in self._features(number) if error]

    def read_before_the_switch(self, number: int) -> int:
        """Return how many bytes QEMU read from one device until it asked it for STOP_COPY."""
        size = 0
        for row in self.requests():
            if row["on"] == f"vfio{number}" and row["request"].endswith(" STOP_COPY)"):
                break
            if row["on"] == f"vfio{number}:saving" and row["request"].startswith("read("):
                size += max(row["result"], 0)
        return size

    def resets(self, number: int) -> int:
        """Return how often QEMU has reset one device."""
        return self.requests_on(f"vfio{number}").count("VFIO_DEVICE_RESET()")

    def _features(self, number: int) -> list[tuple[str, str]]:
        rows = self.requests_of(number)
        found = ((_FEATURE.fullmatch(row["request"]), row["errno"]) for row in rows)
        return [(match[1], error) for match, error in found if match]

    def wait_request(self, on: str, error: str, *, timeout: float = 10) -> None:
        """Wait until a request on ``on`` was answered with ``error``."""
        deadline = time.monotonic() + timeout
        while not any(row["on"] == on and row["errno"] == error for row in self.requests()):
            if time.monotonic() > deadline:
                raise GuestTimeout(f"{on} has answered no request with {error} in {timeout} s")
            time.sleep(_POLL_S)

    def notes(self, number: int) -> list[list[str]]:
        """Return what one device noted, each line as its words."""
        return [line.split() for line in self._notes[number].read_text().splitlines()]

    def digest(self, number: int, word: str) -> str:
        """Return the digest that one device noted last with ``word``."""
        return [note[1] for note in self.notes(number) if note[0] == word][-1]


@contextmanager
def pair(
    qemu: Path,
    folder: Path,
    source: Sequence[str],
    target: Sequence[str],
    options: str = "",
    program: Sequence[str] = (),
) -> Iterator[tuple[VfioGuest, VfioGuest]]:
    """Run a source and a target with a device for each SPEC, and ``options`` for vfio-pci.

    ``program`` are words in front of the source's QEMU.
    """
    with (
        VfioGuest(qemu, folder, "source", source, options=options, program=program) as leaving,
        VfioGuest(qemu, folder, "target", target, incoming=True, options=options) as arriving,
    ):
        try:
            yield leaving, arriving
        except BaseException:
            # pytest shows it beside the failure.
            print(f"the source said: {leaving.said}\nthe target said: {arriving.said}")
            raise
