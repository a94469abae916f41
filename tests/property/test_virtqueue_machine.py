"""A guest, its disk and its moves, in any order, against a dictionary."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pattern_streams import load, state_of
from vfiomig.models.virtio_blk import VirtioBlk
from virtio_driver import (
    EVENT_IDX,
    FLUSHES,
    IN,
    INDIRECT,
    OK,
    OUT,
    VERSION_1,
    Bench,
    Driver,
    Request,
)

SECTORS = 300
EMPTY = bytes(512)
FEATURES = st.sampled_from(
    [VERSION_1, VERSION_1 | INDIRECT, VERSION_1 | EVENT_IDX, VERSION_1 | EVENT_IDX | INDIRECT]
)


class GuestAndDisk(RuleBasedStateMachine):
    """Requests are on different sectors as long as they are under way: their order is free."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(VirtioBlk(size=SECTORS * 512))
        self.driver = Driver(self.bench, self.bench.guest)
        self.driver.start(size=8)
        self.disk: dict[int, bytes] = {}
        self.under_way: dict[Request, tuple[int, int, bytes]] = {}

    def teardown(self) -> None:
        self.bench.device.start()
        self.finish()
        for sector, data in self.disk.items():
            assert self.driver.read(sector, 512) == data
        self.bench.device.stop()

    def finish(self) -> None:
        """Have everything answered."""
        self.driver.kick()
        self.driver.wait(*self.under_way)
        self.settle()

    @rule(features=FEATURES, size=st.sampled_from([4, 8, 16]))
    def begin_anew(self, features: int, size: int) -> None:
        self.bench.device.start()
        self.finish()
        self.driver.start(features=features, size=size)

    @rule(
        kind=st.sampled_from([IN, OUT, FLUSHES]),
        sector=st.integers(0, SECTORS - 1),
        byte=st.integers(0, 255),
        indirect=st.booleans(),
        kick=st.booleans(),
    )
    def ask(self, kind: int, sector: int, byte: int, indirect: bool, kick: bool) -> None:
        # How much is under way is a matter of time, so no precondition may ask for it.
        if len(self.driver.free) < 3:
            return
        if any(sector == other for _, other, _ in self.under_way.values()):
            return
        data = bytes((byte,)) * 512 if kind == OUT else b""
        room = 512 * (kind == IN)
        indirect = indirect and bool(self.driver.features & INDIRECT)
        request = self.driver.build(kind, sector, data, room, indirect=indirect)
        self.under_way[request] = kind, sector, data
        self.driver.offer(request)
        if kick:
            self.driver.kick()

    @rule()
    def notify(self) -> None:
        self.driver.kick(always=True)

    @rule()
    def pause(self) -> None:
        self.bench.device.quiesce()

    @rule()
    def go_on(self) -> None:
        self.bench.device.start()

    @rule(precopy=st.booleans())
    def move(self, precopy: bool) -> None:
        stream = b""
        if precopy:
            for buffer in self.bench.device.precopy():
                if not buffer:
                    break
                stream += bytes(buffer)
            self.driver.kick()
        self.bench.device.stop()
        stream += state_of(self.bench.device)
        device = VirtioBlk(size=SECTORS * 512)
        load(device, stream)
        self.bench = Bench(device, self.bench.guest)
        self.driver.bar = self.bench

    @invariant()
    def settle(self) -> None:
        self.driver.collect()  # what others collected while they waited is here as well
        for request in [request for request in self.under_way if request.status >= 0]:
            kind, sector, data = self.under_way.pop(request)
            assert request.status == OK
            if kind == OUT:
                self.disk[sector] = data
            elif kind == IN:
                assert request.data == self.disk.get(sector, EMPTY)


GuestAndDisk.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestGuestAndDisk = GuestAndDisk.TestCase
