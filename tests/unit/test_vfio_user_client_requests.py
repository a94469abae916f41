"""What each request of a client becomes on the wire, byte for byte, and what comes back of it.

The bytes are those of the vfio-user specification, spelled out; `c_style_server` notes them.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

import c_style_server as c_style
import vfiomig
from c_style_server import CStyleServer, Options
from vfiomig import State
from vfiomig.abi import iommufd, vfio
from vfiomig.client.vfio_user.interrupts import parts_of
from vfiomig.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vfiomig import DeviceClient
    from vfiomig.abi.uapi import UapiStruct
    from vfiomig.client.vfio_user import VfioUserTransport

PAGE = mmap.PAGESIZE
MSIX = vfio.VFIO_PCI_MSIX_IRQ_INDEX
NONE, BOOL, EVENTFD = 1, 2, 4
MASK, TRIGGER = 8, 32


class Opened(NamedTuple):
    """A client, its transport, and the server that it talks to."""

    dev: DeviceClient
    transport: VfioUserTransport
    server: CStyleServer

    def sent(self) -> list[tuple[int, bytes, int]]:
        """What was asked for since the last look."""
        seen = self.server.seen.copy()
        self.server.seen.clear()
        return seen

    def errno_of(self, number: int, argument: UapiStruct | None, on: int | None = None) -> int:
        """Make a raw request; return its errno, 0 for none."""
        try:
            self.transport.ioctl(self.transport.device if on is None else on, number, argument)
        except OSError as failure:
            return failure.errno or -1
        return 0


@contextmanager
def opening(path: Path, options: Options | None = None) -> Iterator[Opened]:
    socket_path = path / "device.sock"
    with (
        CStyleServer(socket_path, b"0123456789", options) as server,
        vfiomig.open(f"vfio-user:{socket_path}", timeout=10) as dev,
    ):
        transport: VfioUserTransport = dev._transport  # type: ignore[assignment]
        yield Opened(dev, transport, server)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    with opening(tmp_path) as found:
        found.sent()
        yield found


def words(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in numbers)


def longs(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)


# Opening.


def test_everything_that_never_changes_is_asked_for_at_the_beginning(tmp_path: Path) -> None:
    with opening(tmp_path) as opened:
        sent = opened.sent()
        version = (
            b'\0\0\2\0{"capabilities":{"mig_stream":{"version":1},"max_msg_fds":8,'
            b'"max_data_xfer_size":16777216,"migration":{"pgsize":4096},'
            b'"pgsizes":4096,"max_dma_maps":65535}}\0'
        )
        assert sent == [
            (c_style.VERSION, version, 0),
            (c_style.FEATURE, words(16, 0x10002), 0),
            (c_style.GET_INFO, words(16, 0, 0, 0), 0),
            *((c_style.REGION_INFO, words(32, 0, index, 0, 0, 0, 0, 0), 0) for index in range(9)),
            *((c_style.IRQ_INFO, words(16, 0, index, 0), 0) for index in range(5)),
        ]
        assert 0 in opened.dev.regions
        assert MSIX in opened.dev.interrupts.present
        assert opened.sent() == []


# Rows: what is done, and what is sent.


def set_irqs(flags: int, start: int, count: int, data: bytes = b"") -> Callable[[Opened], object]:
    def request(opened: Opened) -> object:
        argument = vfio.IrqSet.from_buffer(bytearray(20) + data)
        argument.argsz, argument.flags, argument.index = 20 + len(data), flags, MSIX
        argument.start, argument.count = start, count
        return opened.errno_of(vfio.VFIO_DEVICE_SET_IRQS, argument)

    return request


def log_two_ranges(opened: Opened) -> object:
    return opened.dev.start_dma_logging([(0x1000, 0x2000), (0x10000, 0x1000)])


#: Asked of a server that may be without DMA: one that has it says ENOENT.
NO_SUCH_MEMORY = (c_style.DMA_UNMAP, words(24, 0) + longs(1 << 62, PAGE), 0)
ROWS: dict[str, tuple[Callable[[Opened], object], list[tuple[int, bytes, int]]]] = {
    "reset": (
        lambda opened: opened.dev.reset(),
        [(c_style.RESET, b"", 0), (c_style.FEATURE, words(16, 0x10002), 0)],
    ),
    "capabilities": (
        lambda opened: opened.dev.capabilities,
        [(c_style.FEATURE, words(16, 0x10001), 0)],
    ),
    "state": (lambda opened: opened.dev.state, [(c_style.FEATURE, words(16, 0x10002), 0)]),
    "set state": (
        lambda opened: opened.dev.set_state(State.STOP, force=True),
        [(c_style.FEATURE, words(16, 0x20002, 1, 0xFFFFFFFF), 0)],
    ),
    "probe": (
        lambda opened: opened.dev.has_feature(8, vfio.VFIO_DEVICE_FEATURE_GET),
        [(c_style.FEATURE, words(8, 0x50008), 0)],
    ),
    "start logging": (
        log_two_ranges,
        [
            NO_SUCH_MEMORY,
            (
                c_style.FEATURE,
                words(56, 0x20006) + longs(4096, 2, 0x1000, 0x2000, 0x10000, 0x1000),
                0,
            ),
        ],
    ),
    "stop logging": (
        lambda opened: opened.dev.stop_dma_logging(),
        [(c_style.FEATURE, words(8, 0x20007), 0)],
    ),
    "read region": (
        lambda opened: opened.dev.read_region(0, 0x10, 4),
        [(c_style.REGION_READ, longs(0x10) + words(0, 4), 0)],
    ),
    "read region to its end": (
        lambda opened: opened.dev.read_region(0, 4090, 100),
        [(c_style.REGION_READ, longs(4090) + words(0, 6), 0)],
    ),
    "write region": (
        lambda opened: opened.dev.write_region(0, 0x10, b"abcd"),
        [(c_style.REGION_WRITE, longs(0x10) + words(0, 4) + b"abcd", 0)],
    ),
    "read nothing": (lambda opened: opened.dev.read_region(0, 0, 0), []),
    "disable": (
        set_irqs(NONE | TRIGGER, 0, 0),
        [(c_style.SET_IRQS, words(20, 0x21, 2, 0, 0), 0)],
    ),
    "bools": (
        set_irqs(BOOL | TRIGGER, 1, 3, b"\1\0\1"),
        [(c_style.SET_IRQS, words(23, 0x22, 2, 1, 3) + b"\1\0\1", 0)],
    ),
    "no eventfds": (
        set_irqs(EVENTFD | TRIGGER, 1, 2, b"\xff" * 8),
        [(c_style.SET_IRQS, words(20, 0x24, 2, 1, 2), 0)],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_request_is_these_bytes(opened: Opened, name: str) -> None:
    request, expected = ROWS[name]
    request(opened)
    assert opened.sent() == expected


def test_eventfds_go_beside_the_bytes(opened: Opened) -> None:
    numbers = [os.eventfd(0) for _ in range(4)]
    opened.dev.interrupts.enable(MSIX, numbers)
    opened.dev.interrupts.enable(MSIX, numbers[:1], start=3)
    opened.dev.interrupts.enable(MSIX, [numbers[0], None, numbers[1]])
    assert opened.sent() == [
        (c_style.SET_IRQS, words(20, 0x24, 2, 0, 4), 4),
        (c_style.SET_IRQS, words(20, 0x24, 2, 3, 1), 1),
        (c_style.SET_IRQS, words(20, 0x24, 2, 0, 3), 0),
        (c_style.SET_IRQS, words(20, 0x24, 2, 0, 1), 1),
        (c_style.SET_IRQS, words(20, 0x24, 2, 2, 1), 1),
    ]
    for number in numbers:
        os.close(number)


@pytest.mark.parametrize("bad", [0, 999])
def test_what_is_no_eventfd_is_not_sent(opened: Opened, bad: int) -> None:
    number = os.eventfd(0)
    data = struct.pack("<ii", number, bad)
    request = set_irqs(EVENTFD | TRIGGER, 0, 2, data)
    assert request(opened) == (errno.EINVAL if bad == 0 else errno.EBADF)
    assert opened.sent() == []
    os.close(number)


@pytest.mark.parametrize(
    ("fds", "most", "parts"),
    [
        ([5, 6], 8, [(3, 2, (5, 6))]),
        ([5, 6, 7], 2, [(3, 2, (5, 6)), (5, 1, (7,))]),
        ([None, None], 8, [(3, 2, ())]),
        ([5, None, None, 6], 8, [(3, 1, (5,)), (4, 2, ()), (6, 1, (6,))]),
        ([], 8, []),
    ],
)
def test_vectors_are_cut_into_messages(
    fds: list[int | None], most: int, parts: list[tuple[int, int, tuple[int, ...]]]
) -> None:
    assert list(parts_of(3, fds, most)) == parts


def test_a_server_that_takes_no_descriptors_cannot_interrupt() -> None:
    with pytest.raises(OSError) as caught:
        list(parts_of(0, [5], 0))
    assert caught.value.errno == errno.EOPNOTSUPP


def test_a_file_goes_along_with_its_memory_and_takes_its_dirty_bits_back(opened: Opened) -> None:
    memfd = os.memfd_create("memory")
    os.truncate(memfd, 8 * PAGE)
    with mmap.mmap(memfd, 4 * PAGE, offset=2 * PAGE) as memory:
        os.close(memfd)
        opened.dev.map(0x100000, memory)
        opened.dev.unmap(0x100000, 4 * PAGE)
        opened.dev.map(0x100000, memory)
        opened.dev.start_dma_logging([(0x100000, 4 * PAGE)])
        opened.dev.report_dma_logging(0x100000, 4 * PAGE)
        opened.dev.unmap(0x100000, 4 * PAGE)
    mapped = words(32, 3) + longs(2 * PAGE, 0x100000, 4 * PAGE)
    assert opened.sent() == [
        (c_style.DMA_MAP, mapped, 1),
        (c_style.DMA_UNMAP, words(24, 0) + longs(0x100000, 4 * PAGE), 0),
        (c_style.DMA_MAP, mapped, 1),
        NO_SUCH_MEMORY,
        (c_style.FEATURE, words(40, 0x20006) + longs(4096, 1, 0x100000, 0x4000), 0),
        (c_style.FEATURE, words(40, 0x10008) + longs(0x100000, 0x4000, 4096), 0),
        (c_style.DMA_UNMAP, words(48, 1) + longs(0x100000, 0x4000, 4096, 8), 0),
    ]


def test_other_memory_goes_without(opened: Opened) -> None:
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        opened.dev.map(0x100000, memory)
        opened.dev.unmap(0x100000, PAGE)
    assert opened.sent() == [
        (c_style.DMA_MAP, words(32, 3) + longs(0, 0x100000, PAGE), 0),
        (c_style.DMA_UNMAP, words(24, 0) + longs(0x100000, PAGE), 0),
    ]


def test_state_is_read_and_written_by_size(opened: Opened) -> None:
    with opened.dev.set_state(State.STOP_COPY) as session:
        opened.sent()
        assert session.readinto(bytearray(7)) == 7
        assert opened.sent() == [(c_style.DATA_READ, words(15, 7), 0)]
    with opened.dev.set_state(State.RESUMING) as session:
        opened.sent()
        assert session.write(b"abc") == 3
        assert opened.sent() == [(c_style.DATA_WRITE, words(11, 3) + b"abc", 0)]


def test_long_reads_and_writes_of_a_region_are_several_messages(tmp_path: Path) -> None:
    def grow(server: CStyleServer, command: int) -> None:
        server.bar0.extend(bytes((3 << 20) - len(server.bar0)))

    def mangle(command: int, reply: bytes) -> bytes:
        if command == c_style.REGION_INFO and reply[24:28] == words(0):
            return reply[:32] + longs(3 << 20) + reply[40:]
        return reply

    with opening(tmp_path, Options(before=grow, mangle=mangle)) as opened:
        data = bytes(range(256)) * (3 << 12)
        opened.sent()
        assert opened.dev.read_region(0, 0, 3 << 20) == bytes(3 << 20)
        assert [command for command, _, _ in opened.sent()] == [c_style.REGION_READ] * 3
        # 4 KiB at a time are what this server takes.
        assert opened.dev.write_region(0, 0, data[:4096]) == 4096
        assert opened.dev.read_region(0, 0, 4096) == data[:4096]


# The extension.


def test_the_extension_tells_what_the_wire_lacks(tmp_path: Path) -> None:
    options = Options(mig_stream=True, precopy_info=(1, 4096, 77))
    with opening(tmp_path, options) as opened:
        dev = opened.dev
        assert dev.about["mig_stream"] is True
        opened.sent()
        assert dev.data_size() == 10
        with dev.set_state(State.PRE_COPY) as session:
            assert session.precopy_info() == (4096, 77, False)
            assert dev.precopy_v2()
            assert session.precopy_info() == (4096, 77, True)
            assert session.readinto(bytearray(5)) is None
        sent = [(command, body) for command, body, _ in opened.sent()]
        assert sent[0] == (c_style.FEATURE, words(16, 0x10009))
        assert (c_style.FEATURE, words(8, 0x2000C)) in sent
        assert sent.count((0x8079, words(24, 0) + longs(0, 0))) == 2


def test_a_server_with_the_extension_takes_long_messages(tmp_path: Path) -> None:
    with (
        opening(tmp_path, Options(mig_stream=True)) as opened,
        opened.dev.set_state(State.RESUMING) as session,
    ):
        assert session.write(bytes(2 << 20)) == 1 << 20
        assert opened.server.loaded_bytes == 1 << 20


def test_the_end_of_pre_copy_is_exact_with_it_and_an_error_in_stop_copy(tmp_path: Path) -> None:
    def mangle(command: int, reply: bytes) -> bytes:
        if command == c_style.DATA_READ:
            return reply[:4] + words(16, 0x21, errno.ENOMSG)
        return reply

    options = Options(mig_stream=True)
    with opening(tmp_path, options) as opened, opened.dev.set_state(State.STOP_COPY) as session:
        options.mangle = mangle
        with pytest.raises(vfiomig.SessionError) as caught:
            session.readinto(bytearray(5))
        assert caught.value.errno == errno.ENOMSG


# Raw requests: what the kernel would answer.


def feature(argsz: int, flags: int, payload: bytes = b"") -> vfio.DeviceFeature:
    argument = vfio.DeviceFeature.from_buffer(bytearray(8) + payload)
    argument.argsz, argument.flags = argsz, flags
    return argument


@pytest.mark.parametrize(
    ("argument", "number"),
    [
        (feature(7, 0x10002), errno.EINVAL),
        (feature(15, 0x10002, bytes(8)), errno.EINVAL),
        (feature(15, 0x20002, bytes(8)), errno.EINVAL),
        (feature(31, 0x20006, bytes(24)), errno.EINVAL),
        (feature(16, 0x30002, bytes(8)), errno.EINVAL),
        (feature(16, 0x00002, bytes(8)), errno.EINVAL),
        (feature(16, 0x10009, bytes(8)), errno.ENOTTY),
        (feature(8, 0x40063), errno.ENOTTY),
        (feature(16, 0x10001, bytes(8)), 0),
        (feature(16, 0x10002, bytes(8)), 0),
        (feature(1 << 31, 0x10002, bytes(8)), 0),
        (None, errno.EFAULT),
    ],
)
def test_a_feature_is_checked_as_by_the_kernel(
    opened: Opened, argument: vfio.DeviceFeature | None, number: int
) -> None:
    assert opened.errno_of(vfio.VFIO_DEVICE_FEATURE, argument) == number


def test_a_failed_change_writes_back_what_was_asked_and_no_descriptor(opened: Opened) -> None:
    buffer = bytearray(words(16, 0x20002, 99, 5))
    argument = vfio.DeviceFeature.from_buffer(buffer)
    assert opened.errno_of(vfio.VFIO_DEVICE_FEATURE, argument) == errno.EINVAL
    assert buffer == words(16, 0x20002, 99, 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("number", "argument", "answer"),
    [
        (vfio.VFIO_DEVICE_GET_INFO, vfio.DeviceInfo(argsz=15), errno.EINVAL),
        (vfio.VFIO_DEVICE_GET_INFO, vfio.DeviceInfo(argsz=16), 0),
        (vfio.VFIO_DEVICE_GET_REGION_INFO, vfio.RegionInfo(argsz=31), errno.EINVAL),
        (vfio.VFIO_DEVICE_GET_REGION_INFO, vfio.RegionInfo(argsz=32, index=9), errno.EINVAL),
        (vfio.VFIO_DEVICE_GET_REGION_INFO, vfio.RegionInfo(argsz=32, index=8), 0),
        (vfio.VFIO_DEVICE_GET_IRQ_INFO, vfio.IrqInfo(argsz=15), errno.EINVAL),
        (vfio.VFIO_DEVICE_GET_IRQ_INFO, vfio.IrqInfo(argsz=16, index=5), errno.EINVAL),
        (vfio.VFIO_DEVICE_SET_IRQS, vfio.IrqSet(argsz=19), errno.EINVAL),
        (vfio.VFIO_DEVICE_SET_IRQS, vfio.IrqSet(argsz=20, flags=0x21, index=99), errno.EINVAL),
        (vfio.VFIO_DEVICE_MIG_SET_STATE, vfio.MigSetState(argsz=16), errno.ENOTTY),
        (vfio.VFIO_DEVICE_BIND_IOMMUFD, vfio.BindIommufd(argsz=16), errno.ENOTTY),
        (vfio.VFIO_DEVICE_GET_INFO, None, errno.EFAULT),
        (vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, vfio.AttachIommufdPt(argsz=11), errno.EINVAL),
        (vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, vfio.AttachIommufdPt(argsz=12), errno.ENOENT),
        (vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT, vfio.DetachIommufdPt(argsz=7), errno.EINVAL),
    ],
)
def test_other_requests_are_checked_as_by_the_kernel(
    opened: Opened, number: int, argument: UapiStruct | None, answer: int
) -> None:
    assert opened.errno_of(number, argument) == answer


def test_what_the_regions_tell_is_what_a_kernel_would_write(opened: Opened) -> None:
    info = vfio.RegionInfo(argsz=64, index=0)
    assert opened.errno_of(vfio.VFIO_DEVICE_GET_REGION_INFO, info) == 0
    assert (info.argsz, info.flags, info.size, info.cap_offset) == (64, 3, 4096, 0)


def test_an_iommufd_has_no_iommu_behind_it(opened: Opened) -> None:
    answer = opened.errno_of(
        iommufd.IOMMU_GET_HW_INFO,
        iommufd.HwInfo(size=iommufd.HwInfo.SIZE),
        opened.transport.iommufd,
    )
    assert answer == errno.ENOTTY
    assert not opened.dev.iommu_dirty_tracking
    with pytest.raises(RequestError, match="start_dma_logging"):
        opened.dev.start_iommu_tracking()


def test_memory_goes_to_the_server_when_its_address_space_is_attached(opened: Opened) -> None:
    transport = opened.transport
    space = iommufd.IoasAlloc(size=iommufd.IoasAlloc.SIZE)
    transport.ioctl(transport.iommufd, iommufd.IOMMU_IOAS_ALLOC, space)
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        held = ctypes.c_char.from_buffer(memory)
        mapping = iommufd.IoasMap(
            size=iommufd.IoasMap.SIZE,
            flags=7,
            ioas_id=space.out_ioas_id,
            user_va=ctypes.addressof(held),
            length=PAGE,
            iova=0x1000,
        )
        transport.ioctl(transport.iommufd, iommufd.IOMMU_IOAS_MAP, mapping)
        attach = vfio.AttachIommufdPt(argsz=12, pt_id=space.out_ioas_id)
        assert opened.sent() == []
        assert opened.errno_of(vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach) == 0
        assert opened.errno_of(vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach) == 0
        assert opened.sent() == [(c_style.DMA_MAP, words(32, 3) + longs(0, 0x1000, PAGE), 0)]
        detach = vfio.DetachIommufdPt(argsz=8)
        assert opened.errno_of(vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT, detach) == 0
        assert opened.errno_of(vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT, detach) == 0
        assert opened.sent() == [(c_style.DMA_UNMAP, words(24, 0) + longs(0x1000, PAGE), 0)]
        unmap = iommufd.IoasUnmap(
            size=iommufd.IoasUnmap.SIZE, ioas_id=space.out_ioas_id, iova=0x1000, length=PAGE
        )
        transport.ioctl(transport.iommufd, iommufd.IOMMU_IOAS_UNMAP, unmap)
        del held
    assert opened.sent() == []


def test_a_request_on_a_data_fd_is_precopy_info_or_nothing(opened: Opened) -> None:
    with opened.dev.set_state(State.STOP_COPY) as session:
        assert opened.errno_of(vfio.VFIO_DEVICE_RESET, None, session.fileno()) == errno.ENOTTY
    assert opened.errno_of(vfio.VFIO_DEVICE_RESET, None, 999) == errno.EBADF
    with pytest.raises(OSError) as caught:
        opened.transport.readinto(opened.transport.device, memoryview(bytearray(1)))
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("place", [0, -1, (0x56 << 56) + (200 << 40), (0x56 << 56) + (1 << 40)])
def test_between_the_regions_is_nothing(opened: Opened, place: int) -> None:
    for access in (
        lambda: opened.transport.pread(place, 1),
        lambda: opened.transport.pwrite(place, b"x"),
    ):
        with pytest.raises(OSError) as caught:
            access()
        assert caught.value.errno == errno.EINVAL
