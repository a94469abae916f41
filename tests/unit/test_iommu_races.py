"""DMA while its memory is unmapped, mapped again, copied, detached and tracked."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from in_process import DEADLINE, PAGE, in_thread
from vfiomig.descriptors import create_sealed_memfd
from vfiomig.errors import DeviceError
from vfiomig.iommu import Backings, DirtyLog, DmaPort, IoSpace, Mapping, PageTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = 0.4


class SlowMemory:
    """Memory that gives other threads every chance in the middle of an access."""

    def __init__(self) -> None:
        self.data = bytearray(16 * PAGE)
        self.given_away = False
        self.trespasses = 0
        self.accesses = 0

    def _touch(self) -> None:
        self.accesses += 1
        time.sleep(0)
        self.trespasses += self.given_away

    def read(self, address: int, length: int) -> bytes:
        self._touch()
        return bytes(self.data[address : address + length])

    def read_into(self, address: int, view: memoryview) -> int:
        view[:] = self.read(address, len(view))
        return len(view)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        for at in range(0, len(data), PAGE):
            self._touch()
            part = data[at : at + PAGE]
            self.data[address + at : address + at + len(part)] = part


class Hammer:
    """Threads that make accesses until they are told to stop; only the device's error is right."""

    def __init__(self, *accesses: Callable[[], object]) -> None:
        self._over = False
        self.done = self.refused = 0
        self.problem: BaseException | None = None
        self._threads = [in_thread(lambda one=one: self._run(one)) for one in accesses]  # type: ignore[misc]

    def _run(self, access: Callable[[], object]) -> None:
        try:
            while not self._over:
                try:
                    access()
                    self.done += 1
                except DeviceError:
                    self.refused += 1
        except BaseException as problem:  # noqa: BLE001 - raised again by stop()
            self.problem = problem

    def stop(self) -> None:
        self._over = True
        for thread in self._threads:
            thread.join(DEADLINE)
        if self.problem is not None:
            raise self.problem


def rounds(enough: Callable[[], object]) -> Iterator[None]:
    """For a while, and until there was enough of what they are about."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or not enough():
        assert time.monotonic() < end + DEADLINE, "nothing comes of it"
        yield


def accesses(port: DmaPort) -> tuple[Callable[[], object], ...]:
    """Short and long ones, inside one mapping and over several."""
    return (
        lambda: port.write(0x10000, b"short"),
        lambda: port.write(0x10000 + PAGE - 2, bytes(2 * PAGE)),
        lambda: port.read(0x10000, 3 * PAGE),
        lambda: port.read_into(0x10000 + 8, bytearray(100)),
    )


def map_pages(space: IoSpace, memory: SlowMemory) -> None:
    for page in range(4):
        space.map(
            Mapping(0x10000 + page * PAGE, PAGE, memory, page * PAGE, readable=True, writable=True)
        )


@pytest.mark.parametrize("how", ["unmap", "clear", "detach", "replace"])
def test_nothing_is_under_way_to_memory_that_was_taken_away(how: str) -> None:
    space, memory, port = IoSpace(), SlowMemory(), DmaPort()
    table, elsewhere = PageTable(space), PageTable(IoSpace())
    map_pages(space, memory)
    port.attach(table)
    hammer = Hammer(*accesses(port))
    for _ in rounds(lambda: hammer.done and hammer.refused):
        if how == "unmap":
            space.unmap(0x10000, 4 * PAGE)
        elif how == "clear":
            space.clear()
        else:
            port.attach(None if how == "detach" else elsewhere)
        memory.given_away = True  # to somebody who would notice
        time.sleep(0.0002)
        memory.given_away = False
        if how in {"unmap", "clear"}:
            map_pages(space, memory)
        port.attach(table)
        time.sleep(0.0002)
    hammer.stop()
    assert memory.accesses
    assert not memory.trespasses


def test_an_unmap_waits_for_the_access_that_is_under_way() -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Held(SlowMemory):
        def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
            entered.set()
            assert go_on.wait(DEADLINE)
            super().write(address, data)

    space, memory, port = IoSpace(), Held(), DmaPort()
    map_pages(space, memory)
    port.space = space
    writer = in_thread(lambda: port.write(0x10000, b"late"))
    assert entered.wait(DEADLINE)
    remover = in_thread(lambda: space.unmap(0x10000, 4 * PAGE))
    remover.join(0.05)
    assert remover.is_alive()
    go_on.set()
    for thread in (writer, remover):
        thread.join(DEADLINE)
    assert memory.data[:4] == b"late"
    assert not len(space)


def test_mapped_files_come_and_go_under_dma() -> None:
    """The last mapping of a file takes this process's mapping along: a touch later would kill."""
    with create_sealed_memfd("guest", 4 * PAGE) as memfd:
        known, space, port = Backings(), IoSpace(), DmaPort()
        port.space = space
        hammer = Hammer(*accesses(port))
        for _ in rounds(lambda: hammer.done and hammer.refused):
            for page in range(4):
                place = known.of_file(memfd, page * PAGE, PAGE, writable=True)
                iova = 0x10000 + page * PAGE
                space.map(Mapping(iova, PAGE, *place, readable=True, writable=True))
            del place
            time.sleep(0.0005)
            space.clear()
        hammer.stop()


def test_no_write_is_lost_between_reports_of_either_tracker() -> None:
    """What a report has not told, a later one tells, whenever it came: the reader copies all."""
    space, port = IoSpace(), DmaPort()
    memory = SlowMemory()
    table = PageTable(space)
    map_pages(space, memory)
    port.attach(table)
    table.track(True)
    port.logs = (DirtyLog([(0x10000, 4 * PAGE)]),)
    copies = [bytearray(4 * PAGE), bytearray(4 * PAGE)]

    def collect() -> None:
        assert table.log is not None
        for log, copy in zip((table.log, port.logs[0]), copies, strict=True):
            bits = log.report(0x10000, 4 * PAGE, PAGE)[0]
            for page in range(4):
                if bits >> page & 1:
                    at = page * PAGE
                    copy[at : at + PAGE] = memory.data[at : at + PAGE]

    counts = [0, 0]

    def writer(number: int) -> Callable[[], None]:
        def write() -> None:
            counts[number] += 1
            at = 0x10000 + number * 8 + counts[number] % 4 * PAGE
            port.write(at, counts[number].to_bytes(8, "little"))

        return write

    hammer = Hammer(writer(0), writer(1))
    for _ in rounds(lambda: hammer.done > 20):
        collect()
        time.sleep(0.0002)
    hammer.stop()
    collect()
    assert copies[0] == memory.data[: 4 * PAGE]
    assert copies[1] == memory.data[: 4 * PAGE]
