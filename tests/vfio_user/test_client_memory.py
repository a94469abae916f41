"""A client's memory: what its device does there, by descriptor and by messages, at any time."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

import vfiomig
from c_style_server import CStyleServer, Options
from devices import engine
from in_process import wait_until
from raw_peer import InThread
from vfiomig.abi import iommufd, vfio
from vfiomig.client import dirty_ranges
from vfiomig.doors.vfio_user import Server
from vfiomig.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vfiomig import DeviceClient

PAGE = mmap.PAGESIZE
MIB = 1 << 20
BASE = 0x10_0000
SECONDS = 20.0


class Opened(NamedTuple):
    """A client, and the device behind its socket."""

    dev: DeviceClient
    device: engine.Engine

    def start(self, command: int, iova: int, length: int) -> None:
        for offset, number in ((0, iova), (8, length), (16, command)):
            self.dev.write_region(0, offset, number.to_bytes(8, "little"))

    def run(self, command: int, iova: int, length: int) -> int:
        """Have the device read or write, and tell what came of it."""
        self.start(command, iova, length)
        wait_until(lambda: self.device.result)
        return self.device.result


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    device = engine.Engine()
    path = tmp_path / "device.sock"
    with Server(device, path), vfiomig.open(f"vfio-user:{path}", timeout=SECONDS) as dev:
        dev.set_bus_master(True)
        yield Opened(dev, device)


def private(size: int) -> mmap.mmap:
    """Make memory that no descriptor leads to."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@contextmanager
def shared(size: int, offset: int = 0) -> Iterator[mmap.mmap]:
    """Make memory that is a part of a memfd."""
    memfd = os.memfd_create("memory")
    os.truncate(memfd, offset + size)
    with mmap.mmap(memfd, size, offset=offset) as memory:
        yield memory
    os.close(memfd)


@contextmanager
def memory_of(kind: str, size: int) -> Iterator[mmap.mmap]:
    if kind == "file":
        with shared(size, offset=3 * PAGE) as memory:
            yield memory
    else:
        with private(size) as memory:
            yield memory


KINDS = ("file", "messages")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 4064, 4065, PAGE + 1, MIB, 3 * MIB + 5])
@pytest.mark.parametrize("apart", [False, True])
def test_the_device_reads_and_writes_it(
    opened: Opened, kind: str, length: int, apart: bool
) -> None:
    """In a request of the client's, and while it makes none."""
    with memory_of(kind, 4 * MIB) as memory:
        opened.dev.map(BASE, memory)
        at = 100
        command = engine.WRITE_APART if apart else engine.WRITE
        assert opened.run(command, BASE + at, length) == engine.DONE
        written = bytes(opened.device.memory[:length])
        assert memory[at : at + length] == written
        assert not any(memory[:at] + memory[at + length : at + length + PAGE])
        memory[at : at + length] = written[::-1]
        command = engine.READ_APART if apart else engine.READ
        assert opened.run(command, BASE + at, length) == engine.DONE
        assert opened.device.memory[:length] == written[::-1]
        opened.dev.unmap(BASE, 4 * MIB)


def test_an_access_may_go_over_pieces_of_both_kinds(opened: Opened) -> None:
    with private(PAGE) as first, shared(PAGE) as second, private(PAGE) as third:
        for at, memory in enumerate((first, second, third)):
            opened.dev.map(BASE + at * PAGE, memory)
        assert opened.run(engine.WRITE, BASE + 10, 3 * PAGE - 20) == engine.DONE
        written = first[10:] + second[:] + third[:-10]
        assert written == opened.device.memory[: 3 * PAGE - 20]
        assert opened.run(engine.WRITE, BASE + 10, 3 * PAGE) == engine.FAILED
        assert opened.dev.unmap(BASE, 3 * PAGE) == 3 * PAGE


def test_both_go_on_at_once(opened: Opened) -> None:
    """The device's accesses by messages, and requests of several threads of the client."""
    over = threading.Event()

    def ask() -> int:
        asked = 0
        while not over.is_set():
            assert opened.dev.read_region(7, 0, 4) == b"\xf4\x1a\xf0\x10"
            asked += 1
        return asked

    with private(2 * MIB) as memory:
        opened.dev.map(BASE, memory)
        asking = [InThread(ask) for _ in range(3)]
        try:
            for turn in range(12):
                opened.device.memory[:MIB] = bytes([turn + 1]) * MIB
                assert opened.run(engine.WRITE_APART, BASE + turn * PAGE, MIB) == engine.DONE
                assert memory[turn * PAGE : turn * PAGE + MIB] == bytes([turn + 1]) * MIB
                memory[: 2 * MIB] = bytes([turn + 101]) * (2 * MIB)
                assert opened.run(engine.READ_APART, BASE + turn * PAGE, MIB) == engine.DONE
                assert opened.device.memory[:MIB] == bytes([turn + 101]) * MIB
        finally:
            over.set()
        assert all(thread.result() for thread in asking)
        opened.dev.unmap(BASE, 2 * MIB)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_unmapped_is_out_of_reach_and_may_go_away(opened: Opened, kind: str) -> None:
    with memory_of(kind, 2 * PAGE) as memory:
        opened.dev.map(BASE, memory)
        assert opened.run(engine.WRITE, BASE, 16) == engine.DONE
        assert opened.dev.unmap(BASE, 2 * PAGE) == 2 * PAGE
        before = memory[:]
        opened.device.memory[:16] = b"after the unmap!"
        assert opened.run(engine.WRITE, BASE, 16) == engine.FAILED
        assert opened.run(engine.READ_APART, BASE, 16) == engine.FAILED
        assert memory[:] == before
    with memory_of(kind, PAGE) as other:  # the place is free again
        opened.dev.map(BASE, other)
        assert opened.run(engine.WRITE, BASE, 16) == engine.DONE
        assert other[:16] == b"after the unmap!"
        opened.dev.unmap(BASE, PAGE)


def test_memory_for_reading_only_is_not_written(opened: Opened) -> None:
    transport = opened.dev._transport
    space = iommufd.IoasAlloc(size=iommufd.IoasAlloc.SIZE)
    transport.ioctl(transport.iommufd, iommufd.IOMMU_IOAS_ALLOC, space)
    attach = vfio.AttachIommufdPt(argsz=12, pt_id=space.out_ioas_id)
    transport.ioctl(transport.device, vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach)
    with private(PAGE) as memory:
        held = ctypes.c_char.from_buffer(memory)
        mapping = iommufd.IoasMap(
            size=iommufd.IoasMap.SIZE,
            flags=iommufd.IOMMU_IOAS_MAP_READABLE | iommufd.IOMMU_IOAS_MAP_FIXED_IOVA,
            ioas_id=space.out_ioas_id,
            user_va=ctypes.addressof(held),
            length=PAGE,
            iova=BASE,
        )
        transport.ioctl(transport.iommufd, iommufd.IOMMU_IOAS_MAP, mapping)
        memory[:4] = b"read"
        assert opened.run(engine.READ, BASE, 4) == engine.DONE
        assert opened.device.memory[:4] == b"read"
        opened.device.memory[:4] = b"oops"
        assert opened.run(engine.WRITE, BASE, 4) == engine.FAILED
        assert memory[:4] == b"read"
        transport.ioctl(
            transport.device, vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT, vfio.DetachIommufdPt(argsz=8)
        )
        assert opened.run(engine.READ, BASE, 4) == engine.FAILED
        del held


def test_memory_that_went_away_fails_the_access_and_nothing_else(tmp_path: Path) -> None:
    """A file that shrank: a touch of its pages would kill this process."""
    path = tmp_path / "device.sock"
    with (
        CStyleServer(path, options=Options(maps_files=False)) as server,
        vfiomig.open(f"vfio-user:{path}", timeout=SECONDS) as dev,
    ):
        memfd = os.memfd_create("memory")
        os.truncate(memfd, 2 * PAGE)
        with mmap.mmap(memfd, 2 * PAGE) as memory:
            dev.map(BASE, memory)
            os.truncate(memfd, 0)

            def reach() -> None:
                for access in (
                    lambda: server.read_memory(BASE, 16),
                    lambda: server.write_memory(BASE, b"x"),
                ):
                    with pytest.raises(OSError) as caught:
                        access()
                    assert caught.value.errno == errno.EFAULT

            server.do(reach)
            assert dev.read_region(0, 0, 4) == bytes(4)
            dev.unmap(BASE, 2 * PAGE)
        os.close(memfd)


def test_memory_that_no_descriptor_is_left_to_answer_for_is_not_mapped(opened: Opened) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    with private(PAGE) as memory:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))  # two are needed
        try:
            with pytest.raises(RequestError) as refused:
                opened.dev.map(BASE, memory)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert refused.value.errno == errno.EMFILE
        opened.dev.map(BASE, memory)
        assert opened.run(engine.WRITE, BASE, 16) == engine.DONE
        opened.dev.unmap(BASE, PAGE)


def test_memory_is_given_back_when_the_server_refuses_it(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    refuse = {2}

    def mangle(command: int, reply: bytes) -> bytes:
        if command in refuse:
            return reply[:4] + (16).to_bytes(4, "little") + b"\x21\0\0\0\x0c\0\0\0"
        return reply

    with (
        CStyleServer(path, options=Options(mangle=mangle)),
        vfiomig.open(f"vfio-user:{path}", timeout=SECONDS) as dev,
    ):
        with private(PAGE) as memory, pytest.raises(RequestError) as caught:
            dev.map(BASE, memory)
        assert caught.value.errno == errno.ENOMEM


# Logs.


@pytest.mark.parametrize("kind", KINDS)
def test_every_write_is_in_the_log_once(opened: Opened, kind: str) -> None:
    length = 64 * PAGE

    def dirty(iova: int = BASE, length: int = length, page: int = PAGE) -> list[tuple[int, int]]:
        bitmap = opened.dev.report_dma_logging(iova, length, page)
        return list(dirty_ranges(bitmap, iova, length, page))

    with memory_of(kind, length) as memory:
        opened.dev.map(BASE, memory)
        assert opened.run(engine.WRITE, BASE, 16) == engine.DONE  # nobody logs yet
        assert (
            opened.dev.start_dma_logging([(BASE, length // 2), (BASE + length // 2, PAGE)]) == PAGE
        )
        assert dirty() == []
        for at in (PAGE - 8, 5 * PAGE, length // 2 + 8, length // 2 + 5 * PAGE):
            assert opened.run(engine.WRITE_APART, BASE + at, 16) == engine.DONE
        assert opened.run(engine.READ, BASE, length) == engine.DONE
        expected = [(BASE, 2 * PAGE), (BASE + 5 * PAGE, PAGE), (BASE + length // 2, PAGE)]
        assert dirty() == expected
        assert dirty() == []
        # A report in larger pages, off the grid of the mapping, and beyond it.
        assert opened.run(engine.WRITE, BASE + 3 * PAGE, 1) == engine.DONE
        assert dirty(BASE - PAGE, 2 * length, 4 * PAGE) == [(BASE + 3 * PAGE, 4 * PAGE)]
        # What was unmapped keeps what was written there.
        assert opened.run(engine.WRITE, BASE + 7 * PAGE, 1) == engine.DONE
        opened.dev.unmap(BASE, length)
        assert dirty() == [(BASE + 7 * PAGE, PAGE)]
        opened.dev.stop_dma_logging()


# The end.


def test_closing_ends_accesses_that_are_under_way(tmp_path: Path) -> None:
    device = engine.Engine()
    path = tmp_path / "device.sock"
    with Server(device, path), ExitStack() as stack:
        memory = stack.enter_context(private(16 * MIB))
        for _ in range(3):
            dev = vfiomig.open(f"vfio-user:{path}", timeout=SECONDS)
            with dev:
                dev.set_bus_master(True)
                dev.map(BASE, memory)
                Opened(dev, device).start(engine.WRITE_APART, BASE, 16 * MIB)
            wait_until(lambda: device.result)


def test_a_client_that_maps_nothing_has_no_thread(opened: Opened) -> None:
    names = {thread.name for thread in threading.enumerate()}
    assert "vfiomig-attendant" not in names
    with private(PAGE) as memory:
        opened.dev.map(BASE, memory)
        assert "vfiomig-attendant" in {thread.name for thread in threading.enumerate()}
        opened.dev.unmap(BASE, PAGE)
