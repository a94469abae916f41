"""Page tables of an iommufd: HWPT_ALLOC, GET_HW_INFO, attaching, and IOMMU dirty tracking."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import pytest

from in_process import GET, PAGE, SET, Pages, Program, Scripted
from iommu_requests import READABLE, U64_MAX, Iommu, words
from vfiomig.abi import iommufd as abi
from vfiomig.abi import vfio
from vfiomig.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTACH = vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT
DETACH = vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT
NEST_PARENT, TRACKING, FAULTS, PASID = 1, 2, 4, 8
NO_CLEAR = 1
DEVICE = 1  # the id of the program's device: it is bound first
BASE = 0x100000
MIB = 1 << 20


class Untracked(Scripted):
    iommu_dirty_tracking = False


class Guest:
    """A program whose device sees 64 pages at ``BASE`` through a page table that tracks writes."""

    def __init__(self, *, attached: bool = True) -> None:
        self.program = Program()
        self.iommu = Iommu(self.program.caller)
        self.memory = Pages(*["rw"] * 64)
        self.ioas = self.iommu.alloc()
        self.table = self.iommu.hwpt(DEVICE, self.ioas, flags=TRACKING)[1]
        self.dma = self.program.served.device.dma
        address = self.memory.page(0)
        assert self.iommu.map(self.ioas, address, iova=BASE, length=64 * PAGE)[0] == 0
        if attached:
            assert self.attach(self.table) == (0, self.table)

    def attach(self, number: int) -> tuple[int, int]:
        answer = self.program.ioctl(ATTACH, words(12, 0, number))
        return answer.errno, int.from_bytes(answer.data[8:], "little")

    def close(self) -> None:
        self.program.close()
        self.memory.__exit__()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def unattached() -> Iterator[Guest]:
    guest = Guest(attached=False)
    yield guest
    guest.close()


# HWPT_ALLOC.


@pytest.mark.parametrize(
    ("members", "result"),
    [
        ({"reserved": 1, "data_len": 4}, errno.EOPNOTSUPP),
        ({"data_len": 4, "dev_id": 99}, errno.EINVAL),
        ({"data_type": 1, "dev_id": 99}, errno.EINVAL),
        ({"dev_id": 99, "pt_id": 99}, errno.ENOENT),
        ({"dev_id": 2, "pt_id": 99}, errno.ENOENT),  # the IOAS is no device
        ({"pt_id": 99, "flags": 1 << 31}, errno.EINVAL),
        ({"pt_id": DEVICE, "flags": 1 << 31}, errno.EINVAL),
        ({"pt_id": 3}, errno.EOPNOTSUPP),  # a page table inside a page table
        ({"pt_id": 3, "flags": TRACKING}, errno.EOPNOTSUPP),
        ({"flags": 16}, errno.EOPNOTSUPP),
        ({"flags": NEST_PARENT}, errno.EOPNOTSUPP),
        ({"flags": PASID}, errno.EOPNOTSUPP),
        ({"flags": NEST_PARENT | FAULTS}, errno.EOPNOTSUPP),
        ({"flags": FAULTS, "fault_id": 3}, errno.ENOENT),
        ({"flags": FAULTS | TRACKING}, errno.ENOENT),
        ({"data_type": 1, "data_len": 4}, errno.EOPNOTSUPP),
        ({"flags": 0}, 0),
        ({"flags": TRACKING, "reserved2": 7, "fault_id": 9, "data_uptr": 1}, 0),
    ],
)
def test_a_page_table_checks_its_argument(
    unattached: Guest, members: dict[str, int], result: int
) -> None:
    iommu = unattached.iommu
    assert (unattached.ioas, unattached.table) == (2, 3)
    argument = {"out_hwpt_id": 77, "device": DEVICE, "parent": unattached.ioas, **members}
    seen, number = iommu.hwpt(argument.pop("device"), argument.pop("parent"), **argument)
    assert seen == result
    assert (number == 77) is bool(result)
    assert iommu.destroy(unattached.table) == 0
    # What failed has left no user behind.
    assert iommu.destroy(unattached.ioas) == (0 if result else errno.EBUSY)


def test_an_iommu_that_cannot_track_says_so_and_makes_no_table_that_could() -> None:
    program = Program(Untracked())
    iommu = Iommu(program.caller)
    ioas = iommu.alloc()
    assert iommu.hwpt(DEVICE, ioas, flags=TRACKING)[0] == errno.EOPNOTSUPP
    assert iommu.hwpt(DEVICE, ioas)[0] == 0
    assert hw_info(iommu) == (0, 0, 0)
    program.close()


def test_a_device_is_not_attached_to_a_table_that_its_iommu_cannot_serve(guest: Guest) -> None:
    other = Program(Untracked(), bound=False)
    other.caller.iommufds = guest.program.caller.iommufds
    assert other.bind().errno == 0
    assert other.ioctl(ATTACH, words(12, 0, guest.table)).errno == errno.EINVAL
    assert other.ioctl(ATTACH, words(12, 0, guest.ioas)).errno == 0
    other.close()


def test_a_page_table_whose_id_cannot_be_told_does_not_stay(unattached: Guest) -> None:
    iommu = unattached.iommu
    with Pages("rw") as pages:
        argument = abi.HwptAlloc(size=48, dev_id=DEVICE, pt_id=unattached.ioas)
        address = pages.read_only(bytes(argument))
        assert iommu.at(abi.IOMMU_HWPT_ALLOC, address) == errno.EFAULT
    assert [iommu.destroy(number) for number in (unattached.table, 4, 5)] == [
        0,
        errno.ENOENT,
        errno.ENOENT,
    ]
    assert iommu.destroy(unattached.ioas) == 0


# Attaching.


def test_what_is_used_is_not_destroyed(guest: Guest) -> None:
    iommu = guest.iommu
    assert [iommu.destroy(n) for n in (guest.table, guest.ioas, DEVICE)] == [errno.EBUSY] * 3
    assert guest.program.ioctl(DETACH, words(8, 0)).errno == 0
    assert iommu.destroy(guest.ioas) == errno.EBUSY  # the page table uses it
    assert iommu.destroy(guest.table) == 0
    assert iommu.destroy(guest.table) == errno.ENOENT
    assert iommu.destroy(guest.ioas) == 0


def test_a_table_outlives_the_device_that_it_was_made_for(guest: Guest) -> None:
    guest.program.file.release()
    assert guest.iommu.destroy(guest.ioas) == errno.EBUSY
    assert guest.iommu.destroy(guest.table) == 0


def test_devices_on_one_ioas_share_its_table_and_the_last_takes_it_along(
    unattached: Guest,
) -> None:
    other = Program(bound=False)
    other.caller.iommufds = unattached.program.caller.iommufds
    assert other.bind().errno == 0
    automatic = unattached.attach(unattached.ioas)[1]
    assert automatic not in {unattached.ioas, unattached.table}
    answer = other.ioctl(ATTACH, words(12, 0, unattached.ioas))
    assert (answer.errno, answer.data[8:]) == (0, words(automatic))
    assert unattached.attach(unattached.ioas) == (0, automatic)  # where it is already
    assert unattached.attach(automatic) == (0, automatic)
    assert unattached.attach(unattached.table) == (0, unattached.table)
    assert unattached.iommu.destroy(automatic) == errno.EBUSY
    other.close()
    assert unattached.iommu.destroy(automatic) == errno.ENOENT


def test_tables_over_one_ioas_lead_to_the_same_memory(guest: Guest) -> None:
    plain = guest.iommu.hwpt(DEVICE, guest.ioas)[1]
    guest.dma.write(BASE, b"one")
    assert guest.attach(plain) == (0, plain)
    assert guest.dma.read(BASE, 3) == b"one"
    assert guest.attach(99) == (errno.ENOENT, 99)
    assert guest.attach(DEVICE) == (errno.EINVAL, DEVICE)
    guest.dma.write(BASE, b"two")  # a failure has left it attached
    assert guest.program.ioctl(DETACH, words(8, 0)).errno == 0
    with pytest.raises(DeviceError):
        guest.dma.read(BASE, 3)


# GET_HW_INFO.


def hw_info(iommu: Iommu, **members: int) -> tuple[int, int, int]:
    """Ask: errno, capabilities, and the length of the data."""
    argument = abi.HwInfo(**{"size": 40, "dev_id": DEVICE, **members})
    argument.out_data_type = argument.out_max_pasid_log2 = 9
    answer = iommu.ioctl(abi.IOMMU_GET_HW_INFO, argument)
    told = abi.HwInfo.parse(answer.data)
    assert (told.out_data_type, told.out_max_pasid_log2) == ((9, 9) if answer.errno else (0, 0))
    return answer.errno, told.out_capabilities, told.data_len


def test_the_iommu_tells_that_it_tracks_and_zeroes_what_it_has_no_data_for(guest: Guest) -> None:
    assert hw_info(guest.iommu) == (0, abi.IOMMU_HW_CAP_DIRTY_TRACKING, 0)
    address = guest.memory.page(0)
    guest.program.caller.write(address, b"x" * 100)
    assert hw_info(guest.iommu, data_len=96, data_uptr=address) == (0, 1, 0)
    assert guest.program.caller.read(address, 100) == bytes(96) + b"xxxx"


def test_the_iommus_data_may_be_longer_than_a_piece(guest: Guest) -> None:
    address = guest.memory.page(0)
    guest.program.caller.write(address, b"x" * 64 * PAGE)
    assert hw_info(guest.iommu, data_len=64 * PAGE - 1, data_uptr=address) == (0, 1, 0)
    assert guest.program.caller.read(address, 64 * PAGE) == bytes(64 * PAGE - 1) + b"x"


@pytest.mark.parametrize(
    ("members", "result"),
    [
        ({"flags": 1, "dev_id": 99}, errno.EOPNOTSUPP),
        ({"dev_id": 99, "data_len": 8}, errno.ENOENT),
        ({"dev_id": 2}, errno.ENOENT),
        ({"data_len": 8}, errno.EFAULT),
        ({"data_len": U64_MAX >> 32, "data_uptr": 1 << 63}, errno.EFAULT),
    ],
)
def test_asking_about_the_iommu_checks_its_argument(
    guest: Guest, members: dict[str, int], result: int
) -> None:
    assert hw_info(guest.iommu, **members)[0] == result


def test_reserved_fields_of_asking_about_the_iommu_are_zero(guest: Guest) -> None:
    for at in (29, 30, 31):
        argument = bytearray(bytes(abi.HwInfo(size=40, dev_id=99)))
        argument[at] = 1
        answer = guest.iommu.ioctl(abi.IOMMU_GET_HW_INFO, bytes(argument))
        assert answer.errno == errno.EOPNOTSUPP


def test_an_old_struct_of_asking_about_the_iommu_gets_no_capabilities(guest: Guest) -> None:
    argument = bytes(abi.HwInfo(size=32, dev_id=DEVICE))[:32] + b"x" * 8
    answer = guest.iommu.ioctl(abi.IOMMU_GET_HW_INFO, argument)
    assert (answer.errno, answer.data[32:]) == (0, b"x" * 8)


# Dirty tracking.


@pytest.mark.parametrize(
    ("members", "result"),
    [
        ({"flags": 2, "hwpt_id": 99}, errno.EOPNOTSUPP),
        ({"flags": 1, "hwpt_id": 99}, errno.ENOENT),
        ({"flags": 1, "hwpt_id": 2}, errno.ENOENT),
        ({"flags": 1, "hwpt_id": 4}, errno.EOPNOTSUPP),
        ({"flags": 0, "hwpt_id": 4}, errno.EOPNOTSUPP),
        ({"flags": 1, "hwpt_id": 3, "reserved": 9}, 0),
        ({"flags": 0, "hwpt_id": 3}, 0),
    ],
)
def test_tracking_checks_its_argument(guest: Guest, members: dict[str, int], result: int) -> None:
    assert guest.iommu.hwpt(DEVICE, guest.ioas) == (0, 4)
    argument = abi.HwptSetDirtyTracking(size=16, **members)
    assert guest.iommu.ioctl(abi.IOMMU_HWPT_SET_DIRTY_TRACKING, argument).errno == result


@pytest.mark.parametrize(
    ("members", "result"),
    [
        ({"flags": 2, "table": 99}, errno.EOPNOTSUPP),
        ({"reserved": 1, "table": 99}, errno.EOPNOTSUPP),
        ({"table": 99, "length": 0}, errno.ENOENT),
        ({"table": 2}, errno.ENOENT),
        ({"table": 4, "length": 0}, errno.EINVAL),
        ({"length": 0}, errno.EINVAL),
        ({"iova": U64_MAX - PAGE + 1, "length": 2 * PAGE, "page_size": 0}, errno.EOVERFLOW),
        ({"iova": U64_MAX - PAGE + 1}, 0),  # up to the very end is no overflow
        ({"iova": BASE + 8}, errno.EINVAL),
        ({"length": PAGE + 8}, errno.EINVAL),
        ({"iova": BASE + 8, "length": PAGE - 8}, errno.EINVAL),
        ({"page_size": 0}, errno.EINVAL),
        ({"iova": BASE + PAGE, "length": 2 * PAGE, "page_size": 2 * PAGE}, errno.EINVAL),
        ({"length": 3 * PAGE, "page_size": 2 * PAGE}, errno.EINVAL),
        ({"table": 4, "page_size": 0}, errno.EINVAL),
        ({"table": 4}, errno.EOPNOTSUPP),
        ({"data": 8}, errno.EFAULT),
        ({"data": 1 << 63}, errno.EFAULT),
        ({}, 0),
    ],
)
def test_a_report_checks_its_argument(guest: Guest, members: dict[str, int], result: int) -> None:
    assert guest.iommu.hwpt(DEVICE, guest.ioas) == (0, 4)
    assert guest.iommu.track(guest.table, 1) == 0
    asked = {"table": guest.table, "iova": BASE, "length": PAGE, **members}
    assert guest.iommu.dirty(**asked) == (result, set())


def test_tracking_tells_what_was_written_since_it_was_turned_on_or_asked(guest: Guest) -> None:
    iommu, dma = guest.iommu, guest.dma
    dma.write(BASE, b"x")
    assert iommu.dirty(guest.table, BASE, 64 * PAGE) == (0, set())  # off: nothing, and no error
    assert iommu.track(guest.table, 1) == 0
    dma.write(BASE + 3 * PAGE - 1, b"xy")
    dma.read(BASE + 7 * PAGE, 9)
    assert iommu.dirty(guest.table, BASE, 64 * PAGE, flags=NO_CLEAR) == (0, {2, 3})
    assert iommu.dirty(guest.table, BASE, 64 * PAGE) == (0, {2, 3})
    assert iommu.dirty(guest.table, BASE, 64 * PAGE) == (0, set())
    dma.write(BASE, b"x")
    assert iommu.track(guest.table, 1) == 0  # once more: it starts anew
    assert iommu.dirty(guest.table, BASE, 64 * PAGE) == (0, set())
    dma.write(BASE, b"x")
    assert iommu.track(guest.table, 0) == 0
    assert iommu.dirty(guest.table, BASE, 64 * PAGE) == (0, set())
    assert iommu.track(guest.table, 1) == 0
    assert iommu.dirty(guest.table, BASE, 64 * PAGE) == (0, set())


@pytest.mark.parametrize(
    ("first", "count", "page_size", "bits"),
    [
        (0, 64, PAGE, {0, 7, 8, 63}),
        (7, 2, PAGE, {0, 1}),
        (8, 8, 8 * PAGE, {0}),
        (16, 8, 8 * PAGE, set()),
        (0, 64, 8 * PAGE, {0, 1, 7}),
        (0, 64, 64 * PAGE, {0}),
        (8, 1, PAGE // 4, {0, 1, 2, 3}),  # a written page is all its parts
        (4, 4, 3 * PAGE, {3}),  # no power of two: its lowest bit counts
    ],
)
def test_bits_are_exact_at_the_edges(
    guest: Guest, first: int, count: int, page_size: int, bits: set[int]
) -> None:
    assert guest.iommu.track(guest.table, 1) == 0
    for page in (0, 7, 8, 63):
        guest.dma.write(BASE + page * PAGE + (PAGE - 1) * (page % 2), b"x")
    seen = guest.iommu.dirty(guest.table, BASE + first * PAGE, count * PAGE, page_size)
    assert seen == (0, bits)


def test_bits_are_only_ever_set_and_a_bitmap_that_faults_forgets_nothing(guest: Guest) -> None:
    iommu = guest.iommu
    iommu.track(guest.table, 1)
    guest.dma.write(BASE + 2 * PAGE, b"x")
    with Pages("rw", "r") as pages:
        guest.program.caller.write(pages.page(0), b"\x81" + bytes(7))
        for address in (pages.page(1), pages.page(1) - 4):
            seen = iommu.dirty(guest.table, BASE, 64 * PAGE, data=address)
            assert seen == (errno.EFAULT, set())
        assert iommu.dirty(guest.table, BASE, 64 * PAGE, data=pages.page(0)) == (0, set())
        assert guest.program.caller.read(pages.page(0), 8) == b"\x85" + bytes(7)


def test_a_report_ends_at_the_first_gap_and_what_lies_behind_stays(guest: Guest) -> None:
    iommu, end = guest.iommu, BASE + 64 * PAGE
    assert iommu.map(guest.ioas, guest.memory.page(0), iova=end + PAGE)[0] == 0
    iommu.track(guest.table, 1)
    guest.dma.write(end - PAGE, b"x")
    guest.dma.write(end + PAGE, b"x")
    assert iommu.dirty(guest.table, end - PAGE, 3 * PAGE) == (0, {0})
    assert iommu.dirty(guest.table, end, 2 * PAGE) == (0, set())
    assert iommu.dirty(guest.table, end + PAGE, PAGE) == (0, {0})
    # However far a report reaches, its bitmap is needed for what is mapped.
    guest.dma.write(end + PAGE, b"x")
    assert iommu.dirty(guest.table, end + PAGE, 1 << 47) == (0, {0})


def test_what_is_unmapped_is_forgotten(guest: Guest) -> None:
    iommu = guest.iommu
    iommu.track(guest.table, 1)
    guest.dma.write(BASE + PAGE, b"x")
    assert iommu.unmap(guest.ioas, BASE, 64 * PAGE)[0] == 0
    assert iommu.map(guest.ioas, guest.memory.page(0), iova=BASE, length=64 * PAGE)[0] == 0
    assert iommu.dirty(guest.table, BASE, 64 * PAGE) == (0, set())
    guest.dma.write(BASE + PAGE, b"x")
    assert iommu.unmap(guest.ioas, 0, U64_MAX)[0] == 0
    assert iommu.map(guest.ioas, guest.memory.page(0), iova=BASE, length=PAGE)[0] == 0
    assert iommu.map(guest.ioas, guest.memory.page(0), iova=BASE + PAGE, length=PAGE)[0] == 0
    assert iommu.dirty(guest.table, BASE, 2 * PAGE) == (0, set())


def test_a_table_tracks_every_device_on_it_and_no_other(guest: Guest) -> None:
    iommu = guest.iommu
    other = Program(bound=False)
    other.caller.iommufds = guest.program.caller.iommufds
    assert other.bind().errno == 0
    second = iommu.hwpt(DEVICE, guest.ioas, flags=TRACKING)[1]
    assert other.ioctl(ATTACH, words(12, 0, guest.table)).errno == 0
    for table in (guest.table, second):
        assert iommu.track(table, 1) == 0
    guest.dma.write(BASE, b"x")
    other.served.device.dma.write(BASE + PAGE, b"x")
    assert iommu.dirty(guest.table, BASE, 64 * PAGE) == (0, {0, 1})
    assert iommu.dirty(second, BASE, 64 * PAGE) == (0, set())
    assert other.ioctl(ATTACH, words(12, 0, second)).errno == 0
    other.served.device.dma.write(BASE + 2 * PAGE, b"x")
    assert iommu.dirty(guest.table, BASE, 64 * PAGE) == (0, set())
    assert iommu.dirty(second, BASE, 64 * PAGE) == (0, {2})
    other.close()
    assert iommu.destroy(second) == 0
    guest.dma.write(BASE, b"x")
    assert iommu.unmap(guest.ioas, BASE, 64 * PAGE)[0] == 0  # a table that is gone is not told


def test_the_iommu_and_the_device_log_without_noticing_each_other(guest: Guest) -> None:
    logged = vfio.DmaLoggingRange(iova=BASE, length=64 * PAGE)
    control = vfio.DmaLoggingControl(page_size=PAGE, num_ranges=1, ranges=ctypes.addressof(logged))
    start = SET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
    assert guest.program.feature(start, bytes(control)).errno == 0
    guest.iommu.track(guest.table, 1)
    guest.dma.write(BASE + 5 * PAGE, b"x")
    assert guest.iommu.dirty(guest.table, BASE, 64 * PAGE) == (0, {5})
    bitmap = ctypes.create_string_buffer(8)
    report = vfio.DmaLoggingReport(
        iova=BASE, length=64 * PAGE, page_size=PAGE, bitmap=ctypes.addressof(bitmap)
    )
    asked = GET | vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
    assert guest.program.feature(asked, bytes(report)).errno == 0
    assert bitmap.raw == b"\x20" + bytes(7)
    guest.dma.write(BASE, b"x")
    guest.iommu.unmap(guest.ioas, BASE, 64 * PAGE)
    assert guest.program.feature(asked, bytes(report)).errno == 0
    assert bitmap.raw == b"\x21" + bytes(7)  # the device's log is about addresses, mapped or not


def test_a_write_that_fails_half_way_is_tracked(guest: Guest) -> None:
    guest.iommu.track(guest.table, 1)
    guest.iommu.map(guest.ioas, guest.memory.page(0), iova=BASE + 64 * PAGE, flags=1 | READABLE)
    with pytest.raises(DeviceError):
        guest.dma.write(BASE + 63 * PAGE, bytes(PAGE + 1))
    assert guest.iommu.dirty(guest.table, BASE, 65 * PAGE) == (0, {63})


# Sizes.


@pytest.mark.parametrize(
    ("number", "least", "size"),
    [
        (abi.IOMMU_HWPT_ALLOC, 24, 48),
        (abi.IOMMU_GET_HW_INFO, 32, 40),
        (abi.IOMMU_HWPT_SET_DIRTY_TRACKING, 16, 16),
        (abi.IOMMU_HWPT_GET_DIRTY_BITMAP, 48, 48),
        (abi.IOMMU_IOAS_COPY, 40, 40),
        (abi.IOMMU_IOAS_MAP_FILE, 40, 40),
    ],
)
def test_a_request_is_as_long_as_its_size_says(
    guest: Guest, number: int, least: int, size: int
) -> None:
    ioctl = guest.iommu.ioctl
    assert ioctl(number, words(least - 1) + bytes(size)).errno == errno.EINVAL
    assert ioctl(number, words(least) + bytes(least - 4)).errno not in {errno.EFAULT, errno.E2BIG}
    longer = words(size + 4) + bytes(size)
    assert ioctl(number, longer).errno not in {errno.E2BIG, errno.EFAULT}
    assert ioctl(number, longer[:-1] + b"\1").errno == errno.E2BIG
    assert guest.iommu.at(number, 0) == errno.EFAULT
    edge = guest.memory.page(64) - size + 4
    guest.program.caller.write(edge, words(size))
    assert guest.iommu.at(number, edge) == errno.EFAULT
