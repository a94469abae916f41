"""QEMU as a client of ``vfiomig serve``, whose processor stands still: each thing it asks for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bus_machine import MEMORY, BusMachine, PciFunction
from devices import engine
from devices.engine import PATTERN
from devices.switchboard import COUNT, DIGEST, MODULUS, RING, TABLE, VALUE, VECTORS
from qemu_plugged import let_go
from serial_cards import eventually
from serving import PATIENT, Serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guest_parts import GuestParts

HERE = Path(__file__).parents[1]
SWITCHBOARD = f"{HERE}/devices/switchboard.py:Switchboard"
ENGINE = f"{HERE}/devices/engine.py:Engine"
#: Its BAR1 can be mapped, but for the second page.
BELL = f"{HERE}/suite_devices.py:Bell"
#: A place in the machine's memory, and one that is no page's beginning.
HERE_ADDRESS, THERE_ADDRESS = 0x20_0000, 0x200_0123
MIB = 1 << 20


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sockets")


@pytest.fixture(scope="module")
def switchboard(sockets: Path) -> Iterator[Serving]:
    with Serving(SWITCHBOARD, sockets / "switchboard") as serving:
        yield serving


@pytest.fixture(scope="module")
def dma_engine(sockets: Path) -> Iterator[Serving]:
    with Serving(ENGINE, sockets / "engine") as serving:
        yield serving


@pytest.fixture(scope="module")
def bell(sockets: Path) -> Iterator[Serving]:
    with Serving(BELL, sockets / "bell") as serving:
        yield serving


def start(
    parts: GuestParts, *servings: Serving, words: Sequence[str] = (), shared_memory: bool = True
) -> BusMachine:
    paths = [serving.path for serving in servings]
    return BusMachine(parts.qemu, paths, *words, shared_memory=shared_memory, **PATIENT)


def digest_of(values: Sequence[int]) -> int:
    digest = 0
    for value in values:
        digest = (digest * 31 + value) % MODULUS
    return digest


class Engine:
    """The driver of a device that makes DMA."""

    def __init__(self, machine: BusMachine, name: str) -> None:
        self.machine = machine
        function = PciFunction(machine, name)
        function.enable(0)
        self._bar = function.bar(0)

    def write(self, address: int, length: int) -> int:
        """Let the device write what it has, and return what came of it."""
        return self.do(engine.WRITE_APART, address, length)

    def read(self, address: int, length: int) -> int:
        """Let the device have what is in memory, and return what came of it."""
        return self.do(engine.READ_APART, address, length)

    def do(self, command: int, address: int, length: int) -> int:
        for offset, value in ((0, address), (8, length), (16, command)):
            self.machine.put(self._bar + offset, value, 8)
        assert eventually(lambda: self.result != 0)
        return self.result

    @property
    def result(self) -> int:
        return self.machine.get(self._bar + 24)


@pytest.mark.parametrize("queued", [False, True], ids=["", "queued"])
def test_writes_that_qemu_does_not_wait_for_come_in_order_alone_or_many_in_a_message(
    vfio_user_parts: GuestParts, switchboard: Serving, tmp_path: Path, *, queued: bool
) -> None:
    trace = tmp_path / "trace"
    words = ("-trace", "enable=vfio_user_wrmulti", "-D", str(trace))
    values = random.Random(11).choices(range(1 << 31), k=4000)
    with BusMachine(
        vfio_user_parts.qemu, [switchboard.path], *words, x_send_queued=queued, **PATIENT
    ) as machine:
        function = PciFunction(machine, "v0")
        function.enable(0)
        bar = function.bar(0)
        for value in values[:10]:
            machine.put(bar + VALUE, value)
        assert (machine.get(bar + COUNT), machine.get(bar + DIGEST)) == (10, digest_of(values[:10]))
        switchboard.pause()
        for value in values[10:]:
            machine.put(bar + VALUE, value)
        switchboard.go_on()
        assert machine.get(bar + COUNT) == len(values)
        assert machine.get(bar + DIGEST) == digest_of(values)
        assert machine.finish() == 0
        assert machine.said == ""
    # As many as QEMU puts together.
    assert "flush count 0xc8" in trace.read_text()


def test_all_vectors_arrive_of_a_device_with_more_than_a_message_has_descriptors_for(
    vfio_user_parts: GuestParts, switchboard: Serving
) -> None:
    with start(vfio_user_parts, switchboard) as machine:
        assert_all_vectors_arrive(machine)


def assert_all_vectors_arrive(machine: BusMachine) -> None:
    function = PciFunction(machine, "v0")
    function.enable(0, 2)
    function.enable_msix(2, TABLE, HERE_ADDRESS, VECTORS)
    machine.fill(HERE_ADDRESS, 4 * VECTORS, 0)
    for vector in range(VECTORS):
        machine.put(function.bar(0) + RING, vector)
    expected = b"".join((vector + 1).to_bytes(4, "little") for vector in range(VECTORS))
    assert eventually(lambda: machine.read(HERE_ADDRESS, 4 * VECTORS) == expected)


def test_qemu_uses_devices_of_a_server_in_the_manner_of_libvfio_user(
    vfio_user_parts: GuestParts, tmp_path: Path
) -> None:
    manner = ("--compat", "libvfio-user")
    with (
        Serving(SWITCHBOARD, tmp_path / "switchboard", *manner) as switchboard,
        Serving(BELL, tmp_path / "bell", *manner) as bell,
        start(vfio_user_parts, switchboard, bell, shared_memory=False) as machine,
    ):
        assert_all_vectors_arrive(machine)
        function = PciFunction(machine, "v1")
        function.enable(1)
        bell.pause()
        machine.put(function.bar(1), 11)
        assert machine.get(function.bar(1)) == 11
        bell.go_on()
        assert machine.finish() == 0
        assert machine.said == ""


def test_a_vector_that_is_masked_comes_when_it_is_unmasked(
    vfio_user_parts: GuestParts, switchboard: Serving
) -> None:
    with start(vfio_user_parts, switchboard) as machine:
        function = PciFunction(machine, "v0")
        function.enable(0, 2)
        function.enable_msix(2, TABLE, HERE_ADDRESS, 4)
        control = function.bar(2) + TABLE + 16 * 2 + 12
        machine.put(control, 1)
        for vector in (2, 3):
            machine.put(function.bar(0) + RING, vector)
        # The one that is not masked is the later one.
        assert eventually(lambda: machine.get(HERE_ADDRESS + 4 * 3) == 4)
        assert machine.get(HERE_ADDRESS + 4 * 2) == 0
        machine.put(control, 0)
        assert eventually(lambda: machine.get(HERE_ADDRESS + 4 * 2) == 3)


@pytest.mark.parametrize("shared", [True, False], ids=["by mapping", "by messages"])
def test_dma_of_any_length_goes_both_ways(
    vfio_user_parts: GuestParts, dma_engine: Serving, *, shared: bool
) -> None:
    with start(vfio_user_parts, dma_engine, shared_memory=shared) as machine:
        device = Engine(machine, "v0")
        assert (dma_engine.mapped("memory-backend-memfd") >= MEMORY - MIB) == shared
        for length in (1, 4096, MIB, 3 * MIB + 77):
            for address in (HERE_ADDRESS, THERE_ADDRESS):
                machine.fill(address - 1, length + 2, 0xEE)
                assert device.write(address, length) == engine.DONE
                assert machine.read(address - 1, length + 2) == b"\xee" + PATTERN[:length] + b"\xee"
        sent = random.Random(11).randbytes(2 * MIB + 5)
        machine.write(HERE_ADDRESS, sent)
        assert device.read(HERE_ADDRESS, len(sent)) == engine.DONE
        assert device.write(THERE_ADDRESS, len(sent)) == engine.DONE
        assert machine.read(THERE_ADDRESS, len(sent)) == sent
        assert machine.finish() == 0
        assert machine.said == ""


def test_dma_that_qemu_cannot_answer_while_it_waits_for_the_device_fails_and_qemu_goes_on(
    vfio_user_parts: GuestParts, dma_engine: Serving
) -> None:
    # In QEMU, whoever waits for an access to the device holds up whoever answers DMA.
    paths = [dma_engine.path]
    with BusMachine(
        vfio_user_parts.qemu, paths, shared_memory=False, x_no_posted_writes=True, **PATIENT
    ) as machine:
        device = Engine(machine, "v0")
        assert device.do(engine.WRITE, HERE_ADDRESS, 16) == engine.FAILED
        # The answer that comes late is nobody's, and the one to what comes next is right.
        assert eventually(lambda: device.write(THERE_ADDRESS, 16) == engine.DONE)
        assert machine.read(THERE_ADDRESS, 16) == PATTERN[:16]
        assert machine.finish() == 0
        assert machine.said == ""


def test_dma_where_nothing_is_mapped_or_only_for_reading_fails_and_the_next_one_works(
    vfio_user_parts: GuestParts, dma_engine: Serving
) -> None:
    firmware = 0xFFFC_0000
    with start(vfio_user_parts, dma_engine) as machine:
        device = Engine(machine, "v0")
        before = machine.read(firmware, 16)
        assert device.write(firmware, 16) == engine.FAILED
        assert device.read(firmware, 16) == engine.DONE
        assert device.write(0x8000_0000, 16) == engine.FAILED
        assert device.write(MEMORY - 8, 16) == engine.FAILED
        assert device.write(HERE_ADDRESS, 16) == engine.DONE
        assert machine.read(HERE_ADDRESS, 16) == before
        assert machine.read(firmware, 16) == before


def test_pages_that_may_be_mapped_are_reached_without_the_server(
    vfio_user_parts: GuestParts, bell: Serving
) -> None:
    with start(vfio_user_parts, bell) as machine:
        function = PciFunction(machine, "v0")
        function.enable(0, 1)
        bar = function.bar(1)
        places = (bar, bar + 2 * 4096, bar + 4 * 4096 - 4)
        bell.pause()
        for number, place in enumerate(places, 1):
            machine.put(place, number)
        assert [machine.get(place) for place in places] == [1, 2, 3]
        bell.go_on()


def test_a_device_writes_into_the_mapped_pages_of_another_one(
    vfio_user_parts: GuestParts, dma_engine: Serving, bell: Serving
) -> None:
    with start(vfio_user_parts, dma_engine, bell) as machine:
        target = PciFunction(machine, "v1")
        target.enable(0, 1)
        device = Engine(machine, "v0")
        pages = target.bar(1) + 2 * 4096
        machine.fill(pages, 2 * 4096, 0xEE)
        assert device.write(pages + 16, 4096) == engine.DONE
        assert machine.read(pages, 16 + 4096 + 16) == b"\xee" * 16 + PATTERN[:4096] + b"\xee" * 16


def test_a_reset_of_the_machine_resets_its_devices(
    vfio_user_parts: GuestParts, switchboard: Serving
) -> None:
    with start(vfio_user_parts, switchboard) as machine:
        function = PciFunction(machine, "v0")
        for _ in range(2):
            function.enable(0, 2)
            function.enable_msix(2, TABLE, HERE_ADDRESS, 2)
            bar = function.bar(0)
            assert machine.get(bar + COUNT) == 0
            machine.fill(HERE_ADDRESS, 8, 0)
            machine.put(bar + VALUE, 5)
            machine.put(bar + RING, 1)
            assert eventually(lambda: machine.get(HERE_ADDRESS + 4) == 2)
            assert machine.get(bar + COUNT) == 1
            machine.reset()


@pytest.mark.parametrize("killed", [False, True], ids=["quits", "is killed"])
def test_the_next_qemu_finds_a_new_device_when_one(
    vfio_user_parts: GuestParts, switchboard: Serving, *, killed: bool
) -> None:
    for _ in range(2):
        with start(vfio_user_parts, switchboard) as machine:
            function = PciFunction(machine, "v0")
            function.enable(0)
            bar = function.bar(0)
            assert machine.get(bar + COUNT) == 0
            if killed:
                switchboard.pause()
            for value in range(100):
                machine.put(bar + VALUE, value)
            if killed:
                machine.kill()
                switchboard.go_on()
            else:
                assert machine.finish() == 0


def test_a_device_is_plugged_out_of_a_machine_and_in_again_while_another_one_stays(
    vfio_user_parts: GuestParts, switchboard: Serving, dma_engine: Serving
) -> None:
    with start(vfio_user_parts, switchboard, dma_engine) as machine:
        other = PciFunction(machine, "v0")
        other.enable(0)
        for number in range(1, 3):
            assert Engine(machine, "v1").write(HERE_ADDRESS, 16) == engine.DONE
            machine.qmp.execute("device_del", id="v1")
            let_go(machine.qmp, "pc")
            machine.qmp.wait_event("DEVICE_DELETED", lambda data: data.get("device") == "v1")
            machine.put(other.bar(0) + VALUE, number)
            assert machine.get(other.bar(0) + COUNT) == number
            machine.plug(dma_engine.path, "v1", **PATIENT)
        assert Engine(machine, "v1").write(HERE_ADDRESS, 16) == engine.DONE
        assert machine.finish() == 0
        assert machine.said == ""
