"""IOMMU tracking and device logging at once, against models that remember bytes."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from vfiomig.errors import DeviceError, RequestError
from vfiomig.iommu import DirtyLog, DmaPort, IoSpace, Mapping, PageTable

PAGE = 4096
PAGES = 12
BASE = 0x10000
SIZE = PAGES * PAGE


class Plain:
    """Memory by IOVA."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.data[address : address + length])

    def read_into(self, address: int, view: memoryview) -> int:
        view[:] = self.read(address, len(view))
        return len(view)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self.data[address : address + len(data)] = data


places = st.one_of(
    st.integers(0, SIZE - 1),
    st.integers(0, PAGES - 1).map(lambda page: page * PAGE),
    st.integers(1, PAGES).map(lambda page: page * PAGE - 1),
)
lengths = st.one_of(st.integers(1, 3 * PAGE), st.sampled_from([1, 2, PAGE, PAGE + 1]))
numbers = st.integers(0, PAGES)


class Tracking(RuleBasedStateMachine):
    """Writes, mappings and reports of two page tables over one space, and a device's log."""

    LOGGED: ClassVar = range(2, 9)  # pages that the device logs

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.bytes = Plain(), bytearray(SIZE)
        self.space, self.port = IoSpace(), DmaPort()
        self.tables = [PageTable(self.space), PageTable(self.space)]
        self.at = 0
        self.port.attach(self.tables[0])
        start, count = BASE + self.LOGGED.start * PAGE, len(self.LOGGED)
        self.port.logs = (DirtyLog([(start, count * PAGE)]),)
        #: Page -> (whether it may be written, number of its mapping).
        self.mapped: dict[int, tuple[bool, int]] = {}
        self.maps = 0
        self.told: list[set[int] | None] = [None, None]
        self.logged: set[int] = set()

    @initialize(split=st.integers(1, PAGES - 1))
    def map_all(self, split: int) -> None:
        self.map(0, split, writable=True)
        self.map(split, PAGES - split, writable=True)
        self.track(0, on=True)

    @rule(first=numbers, count=st.integers(1, 4), writable=st.booleans())
    def map(self, first: int, count: int, *, writable: bool) -> None:
        count = min(count, PAGES - first)
        taken = any(page in self.mapped for page in range(first, first + count))
        mapping = Mapping(
            BASE + first * PAGE,
            count * PAGE,
            self.memory,
            first * PAGE,
            readable=True,
            writable=writable,
        )
        try:
            self.space.map(mapping)
        except RequestError:
            assert taken or not count
            return
        assert not taken
        self.maps += 1
        self.mapped |= dict.fromkeys(range(first, first + count), (writable, self.maps))

    @rule(first=numbers, count=numbers)
    def unmap(self, first: int, count: int) -> None:
        inside = [page for page in self.mapped if first <= page < first + count]
        numbers = {self.mapped[page][1] for page in inside}
        whole = [page for page, (_, number) in self.mapped.items() if number in numbers]
        try:
            self.space.unmap(BASE + first * PAGE, count * PAGE)
        except RequestError:
            assert not inside or len(whole) > len(inside)
            return
        assert inside
        assert len(whole) == len(inside)
        for page in inside:
            del self.mapped[page]
            for told in self.told:
                if told is not None:
                    told.discard(page)

    @rule(place=places, length=lengths, value=st.integers(1, 255))
    def write(self, place: int, length: int, value: int) -> None:
        good = 0
        while good < length:
            at = place + good
            if not self.mapped.get(at // PAGE, (False, 0))[0]:
                break
            good += 1
        try:
            self.port.write(BASE + place, bytes([value]) * length)
        except DeviceError:
            assert good < length
        else:
            assert good == length
        self.bytes[place : place + good] = bytes([value]) * good
        pages = {byte // PAGE for byte in range(place, place + good)}
        self.logged |= pages & set(self.LOGGED)
        told = self.told[self.at]
        if told is not None:
            told |= pages

    @rule(table=st.integers(0, 1), on=st.booleans())
    def track(self, table: int, *, on: bool) -> None:
        self.tables[table].track(on)
        self.told[table] = set() if on else None

    @rule(table=st.integers(0, 1))
    def attach(self, table: int) -> None:
        self.at = table
        self.port.attach(self.tables[table])

    @rule(table=st.integers(0, 1), first=numbers, count=numbers, clear=st.booleans())
    def report(self, table: int, first: int, count: int, *, clear: bool) -> None:
        log, told = self.tables[table].log, self.told[table]
        if log is None or told is None:
            assert log is None
            assert told is None
            return
        bitmap = Plain()
        log.report_into(BASE + first * PAGE, count * PAGE, PAGE, bitmap, 0, clear=clear)
        seen = {bit for bit in range(64) if bitmap.data[bit >> 3] >> (bit & 7) & 1}
        assert seen == {page - first for page in told if first <= page < first + count}
        if clear:
            told -= set(range(first, first + count))

    @rule(first=numbers, count=numbers)
    def report_logged(self, first: int, count: int) -> None:
        bitmap = self.port.logs[0].report(BASE + first * PAGE, count * PAGE, PAGE)
        seen = {bit for bit in range(len(bitmap) * 8) if bitmap[bit >> 3] >> (bit & 7) & 1}
        assert seen == {page - first for page in self.logged if first <= page < first + count}
        self.logged -= set(range(first, first + count))

    @precondition(lambda self: self.mapped)
    @rule(place=places, length=lengths)
    def read(self, place: int, length: int) -> None:
        reachable = all(byte // PAGE in self.mapped for byte in range(place, place + length, 1))
        into = bytearray(length)
        try:
            self.port.read_into(BASE + place, into)
        except DeviceError:
            assert not reachable
        else:
            assert reachable
            assert into == self.bytes[place : place + length]
            assert self.port.read(BASE + place, length) == into

    @invariant()
    def memory_is_what_was_written(self) -> None:
        assert self.memory.data == self.bytes


Tracking.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestTracking = Tracking.TestCase
