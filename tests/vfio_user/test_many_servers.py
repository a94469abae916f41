"""Two hundred servers in one process, two hundred clients, and migrations crosswise between them."""

from __future__ import annotations

import gc
import random
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vfiomig
from leftovers import left_behind, take_snapshot
from vfiomig import State
from vfiomig.doors.vfio_user import Server
from vfiomig.models.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfiomig import DeviceClient

COUNT = 200
WORKERS = 6
SIZE = 200_000
#: Seconds for all that a round does, on a machine that does other things as well.
PATIENCE = 100.0


class Pairs:
    """Hands out two devices that nobody else has, so many times."""

    def __init__(self, seed: int, times: int) -> None:
        self._chance = random.Random(seed)
        self._left = times
        self._free = list(range(COUNT))
        self._lock = threading.Lock()

    def take(self) -> tuple[int, int] | None:
        with self._lock:
            if not self._left:
                return None
            self._left -= 1
            return self._pick(), self._pick()

    def _pick(self) -> int:
        return self._free.pop(self._chance.randrange(len(self._free)))

    def give_back(self, *numbers: int) -> None:
        with self._lock:
            self._free += numbers


def migrate(source: DeviceClient, target: DeviceClient, buffer: memoryview) -> None:
    """Move a device with pre-copy; both run afterwards."""
    with source.set_state(State.PRE_COPY) as saving, target.set_state(State.RESUMING) as loading:
        for state in (State.PRE_COPY_P2P, State.STOP_COPY):
            source.set_state(state)
            while count := saving.readinto(buffer):
                loading.write_all(buffer[:count])
        target.set_state(State.STOP)
        source.set_state(State.STOP)


class Migrations(threading.Thread):
    """Migrates one pair after the other until there is none."""

    def __init__(self, clients: list[DeviceClient], devices: list[Pattern], pairs: Pairs) -> None:
        super().__init__()
        self._clients, self._devices, self._pairs = clients, devices, pairs
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            buffer = memoryview(bytearray(64 << 10))
            while (numbers := self._pairs.take()) is not None:
                self._migrate_one(numbers, buffer)
        except BaseException as problem:  # noqa: BLE001 - for the test to raise
            self.problem = problem

    def _migrate_one(self, numbers: tuple[int, int], buffer: memoryview) -> None:
        source, target = (self._clients[number] for number in numbers)
        mark = f"{numbers}".encode()
        source.write_region(0, 0, mark)
        migrate(source, target, buffer)
        digests = {self._devices[number].digest() for number in numbers}
        assert len(digests) == 1
        source.set_state(State.RUNNING)
        target.set_state(State.RUNNING)
        assert target.read_region(0, 0, len(mark)) == mark
        self._pairs.give_back(*numbers)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vfiomig-") as folder:
        yield Path(folder)


def memory() -> int:
    """What this process has in memory, in MiB."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) >> 10
    raise LookupError("VmRSS")


def one_round(folder: Path, migrations: int) -> None:
    """Serve, migrate so many times, and end."""
    devices = [Pattern(size=SIZE, seed=7) for _ in range(COUNT)]
    with ExitStack() as stack:
        for number, device in enumerate(devices):
            stack.enter_context(Server(device, folder / f"{number}"))
        clients = [
            stack.enter_context(vfiomig.open(f"vfio-user:{folder / str(number)}"))
            for number in range(COUNT)
        ]
        pairs = Pairs(1, migrations)
        workers = [Migrations(clients, devices, pairs) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + PATIENCE
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        assert not any(worker.is_alive() for worker in workers)
        for worker in workers:
            if worker.problem is not None:
                raise worker.problem
        for client in clients:
            assert client.state is State.RUNNING


@pytest.mark.timeout(4 * PATIENCE)
def test_two_hundred_servers_migrate_crosswise_and_leave_nothing(folder: Path) -> None:
    one_round(folder, COUNT)  # what is made once, and what the allocator keeps
    before, held = take_snapshot(), memory()
    one_round(folder, 5 * COUNT)
    assert left_behind(before) == []
    assert memory() - held < 16
