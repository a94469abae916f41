"""A container and an iommufd, given the same mappings: devices and dirty bitmaps see no difference.

Each rule makes the same request in both ways. Where their rules differ (an unmap of nothing, a
cut, reports of parts of mappings), the model says what either answers.
"""

from __future__ import annotations

import ctypes
import errno

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from group_requests import ALL, START, STOP, OldProgram
from in_process import PAGE, Pages, Program
from iommu_requests import FIXED, READABLE, U64_MAX, WRITABLE, Iommu, words
from vfiomig.abi import vfio
from vfiomig.errors import DeviceError

BASE = 0xFED0_0000  # the window that no mapping may touch begins 256 pages from here
ROOM = 300
PAGES = 12
TRACKING = 2
#: (readable, writable) as the flags of both requests.
ACCESS = {1: READABLE, 2: WRITABLE, 3: READABLE | WRITABLE}

firsts = st.one_of(st.integers(0, PAGES), st.integers(250, ROOM - 1))
counts = st.integers(0, PAGES)


class BothWays(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Pages(*["rw"] * PAGES, "r", "", "rw")
        self.old, self.new = OldProgram(), Program()
        self.iommu = Iommu(self.new.caller)
        self.ioas = self.iommu.alloc()
        self.table = self.iommu.hwpt(1, self.ioas, flags=TRACKING)[1]
        attach = words(12, 0, self.table)
        assert self.new.ioctl(vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach).errno == 0
        self.ports = self.old.device.dma, self.new.served.device.dma
        #: First page and number of pages of each mapping.
        self.mapped: dict[int, int] = {}
        self.tracked = False

    def teardown(self) -> None:
        self.old.close()
        self.new.close()
        self.memory.__exit__()

    def inside(self, first: int, count: int) -> dict[int, int]:
        """The mappings that a range touches."""
        return {f: n for f, n in self.mapped.items() if f < first + count and first < f + n}

    def is_cut(self, first: int, count: int) -> bool:
        touched = self.inside(first, count)
        return any(f < first or f + n > first + count for f, n in touched.items())

    @rule(first=firsts, count=counts, page=st.integers(0, PAGES + 1), access=st.integers(1, 3))
    def map(self, first: int, count: int, page: int, access: int) -> None:
        iova, size, address = BASE + first * PAGE, count * PAGE, self.memory.page(page)
        old = self.old.map(address, iova, size, access)
        new = self.iommu.map(
            self.ioas, address, iova=iova, length=size, flags=FIXED | ACCESS[access]
        )[0]
        reserved = first < 512 and first + count > 256
        if reserved and self.inside(first, count) and count:
            assert (old, new) == (errno.EEXIST, errno.EINVAL)  # the one difference in order
        else:
            assert old == new
        if not old:
            self.mapped[first] = count

    @rule(first=firsts, count=st.integers(1, PAGES))
    def unmap(self, first: int, count: int) -> None:
        iova, size = BASE + first * PAGE, count * PAGE
        old, new = self.old.unmap(iova, size), self.iommu.unmap(self.ioas, iova, size)
        touched = self.inside(first, count)
        if self.is_cut(first, count):
            assert (old, new) == ((errno.EINVAL, size), (errno.ENOENT, size))
            # What an iommufd met before the one that it would have to cut is gone.
            for start, pages in sorted(touched.items()):
                if start < first or start + pages > first + count:
                    break
                assert self.old.unmap(BASE + start * PAGE, pages * PAGE) == (0, pages * PAGE)
                del self.mapped[start]
        elif not touched:
            assert (old, new[0]) == ((0, 0), errno.ENOENT)
        else:
            assert old == new == (0, sum(touched.values()) * PAGE)
            for gone in touched:
                del self.mapped[gone]

    @rule()
    def unmap_all(self) -> None:
        size = sum(self.mapped.values()) * PAGE
        assert self.old.unmap(0, 0, ALL) == (0, size)
        assert self.iommu.unmap(self.ioas, 0, U64_MAX) == (0, size)
        self.mapped.clear()

    @rule(on=st.booleans())
    def track(self, *, on: bool) -> None:
        if on and self.tracked:
            return  # an iommufd starts anew then, a container does not
        assert self.old.track(START if on else STOP) == 0
        assert self.iommu.track(self.table, int(on)) == 0
        self.tracked = on

    @rule(first=firsts, inside=st.integers(0, PAGE - 1), length=st.integers(1, 2 * PAGE))
    def write(self, first: int, inside: int, length: int) -> None:
        """One device after the other: both lead to the same memory."""
        results = []
        for number, port in enumerate(self.ports):
            try:
                port.write(BASE + first * PAGE + inside, bytes([number + 1]) * length)
            except DeviceError as failure:
                results.append(failure.errno)
            else:
                results.append(0)
            results.append(self.content(number + 1))
        assert results[:2] == results[2:]

    def content(self, value: int) -> int:
        """How many bytes have this value: written is set to zero again."""
        data = ctypes.string_at(self.memory.page(0), PAGES * PAGE)
        ctypes.memset(self.memory.page(0), 0, PAGES * PAGE)
        return data.count(value)

    @rule(first=firsts, length=st.integers(1, 2 * PAGE))
    def read(self, first: int, length: int) -> None:
        results: list[bytes | int | None] = []
        for port in self.ports:
            try:
                results.append(port.read(BASE + first * PAGE, length))
            except DeviceError as failure:
                results.append(failure.errno)
        assert results[0] == results[1]

    @rule(first=firsts, count=st.integers(1, 3 * PAGES))
    def report(self, first: int, count: int) -> None:
        iova, size = BASE + first * PAGE, count * PAGE
        errno_, old = self.old.dirty(iova, size)
        if not self.tracked or self.is_cut(first, count):
            assert errno_ == errno.EINVAL
            return
        # An iommufd's report ends at the first gap, so each mapping is asked about.
        new: set[int] = set()
        for start, pages in self.inside(first, count).items():
            seen, bits = self.iommu.dirty(self.table, BASE + start * PAGE, pages * PAGE)
            assert seen == 0
            new |= {start - first + bit for bit in bits}
        assert (errno_, old) == (0, new)


BothWays.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestBothWays = BothWays.TestCase
