"""What narrows an address space, what a program makes sure of, and options: errnos in order."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

import pytest

from in_process import PAGE, Pages, Program, Scripted
from iommu_requests import FIXED, READABLE, U64_MAX, Iommu, Nothing, words
from vfiomig.abi import iommufd as abi
from vfiomig.abi import vfio
from vfiomig.descriptors import create_sealed_memfd
from vfiomig.iommu import IoSpace, Mapping
from vfiomig.iommu.limits import ALLOWED, OF_DEVICE, OF_TABLE, IovaLimits
from vfiomig.process import CAP_SYS_RESOURCE, capable, process_of

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTACH = vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT
DETACH = vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT
DEVICE = 1  # the id of the program's device: it is bound first
EVERYTHING = [(0, U64_MAX)]
BELOW_2_48 = [(0, (1 << 48) - 1)]
#: Where message signalled interrupts go.
WINDOW = 0xFEE0_0000
RLIMIT_MODE, HUGE_PAGES = abi.IOMMU_OPTION_RLIMIT_MODE, abi.IOMMU_OPTION_HUGE_PAGES
OP_SET, OP_GET = abi.IOMMU_OPTION_OP_SET, abi.IOMMU_OPTION_OP_GET
GET, SET, CLEAR = abi.IOMMU_VFIO_IOAS_GET, abi.IOMMU_VFIO_IOAS_SET, abi.IOMMU_VFIO_IOAS_CLEAR


class Space:
    """A program with a device and an address space, which nobody uses yet."""

    def __init__(self) -> None:
        self.program = Program(Scripted())
        self.iommu = Iommu(self.program.caller)
        self.pages = Pages("rw", "rw", "rw", "rw")
        self.ioas = self.iommu.alloc()

    def close(self) -> None:
        self.program.close()
        self.pages.__exit__()

    def attach(self, number: int | None = None) -> int:
        asked = words(12, 0, self.ioas if number is None else number)
        return self.program.ioctl(ATTACH, asked).errno

    def detach(self) -> None:
        assert self.program.ioctl(DETACH, words(8, 0)).errno == 0

    def map(self, **members: int) -> tuple[int, int]:
        asked = {"address": self.pages.page(0), **members}
        return self.iommu.map(self.ioas, asked.pop("address"), **asked)

    def ranges(self) -> tuple[list[tuple[int, int]], int]:
        """Ask for the usable ranges and the alignment."""
        rows = (abi.IovaRange * 8)()
        argument = abi.IoasIovaRanges(
            size=32, ioas_id=self.ioas, num_iovas=8, allowed_iovas=ctypes.addressof(rows)
        )
        answer = self.iommu.ioctl(abi.IOMMU_IOAS_IOVA_RANGES, argument)
        assert answer.errno == 0
        told = abi.IoasIovaRanges.parse(answer.data)
        return [(row.start, row.last) for row in rows[: told.num_iovas]], told.out_iova_alignment

    def allow(self, *ranges: tuple[int, int], **members: int) -> int:
        rows = (abi.IovaRange * (len(ranges) + 1))(
            *(abi.IovaRange(start=start, last=last) for start, last in ranges)
        )
        asked = {
            "size": 24,
            "ioas_id": self.ioas,
            "num_iovas": len(ranges),
            "allowed_iovas": ctypes.addressof(rows),
            **members,
        }
        answer = self.iommu.ioctl(abi.IOMMU_IOAS_ALLOW_IOVAS, abi.IoasAllowIovas(**asked))
        return answer.errno

    def option(self, option: int, op: int, value: int = 0, **members: int) -> tuple[int, int]:
        """Ask for an option: errno and the value afterwards."""
        asked = {"size": 24, "option_id": option, "op": op, "val64": value, **members}
        answer = self.iommu.ioctl(abi.IOMMU_OPTION, abi.IommuOption(**asked))
        return answer.errno, abi.IommuOption.parse(answer.data).val64

    def huge(self, op: int, value: int = 0) -> tuple[int, int]:
        return self.option(HUGE_PAGES, op, value, object_id=self.ioas)

    def vfio_ioas(self, op: int, number: int = 77, **members: int) -> tuple[int, int]:
        asked = {"size": 12, "op": op, "ioas_id": number, **members}
        answer = self.iommu.ioctl(abi.IOMMU_VFIO_IOAS, abi.IommuVfioIoas(**asked))
        return answer.errno, abi.IommuVfioIoas.parse(answer.data).ioas_id


@pytest.fixture
def space() -> Iterator[Space]:
    space = Space()
    yield space
    space.close()


# What narrows it.


def test_page_tables_and_devices_narrow_a_space_while_they_use_it(space: Space) -> None:
    assert space.ranges() == (EVERYTHING, 1)
    result, table = space.iommu.hwpt(DEVICE, space.ioas)
    assert result == 0
    assert space.ranges() == (BELOW_2_48, PAGE)
    assert space.attach(table) == 0
    assert space.ranges() == (list(ALLOWED), PAGE)
    assert space.attach(table) == 0  # twice is no second use
    space.detach()
    assert space.ranges() == (BELOW_2_48, PAGE)
    assert space.iommu.destroy(table) == 0
    assert space.ranges() == (EVERYTHING, 1)
    assert space.attach() == 0
    assert space.ranges() == (list(ALLOWED), PAGE)
    space.program.close()
    assert space.ranges() == (EVERYTHING, 1)


def test_a_device_that_goes_elsewhere_leaves_the_space_behind_as_it_was(space: Space) -> None:
    other = space.iommu.alloc()
    assert space.attach() == 0
    assert space.attach(other) == 0
    assert space.ranges() == (EVERYTHING, 1)
    assert space.attach() == 0
    assert space.attach(space.iommu.hwpt(DEVICE, space.ioas)[1]) == 0
    space.detach()
    assert space.ranges() == (BELOW_2_48, PAGE)


@pytest.mark.parametrize(
    ("iova", "length"),
    [(7, 100), (1 << 48, PAGE), (WINDOW, PAGE), (U64_MAX - PAGE, PAGE), (PAGE, 2 * PAGE)],
)
def test_a_space_that_nobody_uses_takes_any_bytes_anywhere(
    space: Space, iova: int, length: int
) -> None:
    address = space.pages.page(0) + iova % PAGE
    assert space.map(address=address, iova=iova, length=length) == (0, iova)
    assert space.map(address=address, iova=iova, length=length)[0] == errno.EEXIST
    conflicts = (iova, length) != (PAGE, 2 * PAGE)
    assert space.attach() == (errno.EADDRINUSE if conflicts else 0)
    assert space.ranges()[1] == (1 if conflicts else PAGE)  # a refusal leaves nothing behind
    assert space.iommu.unmap(space.ioas, iova, length) == (0, length)
    assert space.attach() == 0


@pytest.mark.parametrize(
    "members",
    [
        {"iova": 0, "length": PAGE // 2},
        {"iova": PAGE // 2, "length": PAGE},
        {"address": 8, "iova": 0, "length": PAGE},
        {"iova": 1 << 48, "length": PAGE},
    ],
)
def test_no_page_table_is_made_over_mappings_that_it_cannot_hold(
    space: Space, members: dict[str, int]
) -> None:
    address = space.pages.page(0) + members.pop("address", 0)
    assert space.map(address=address, **members)[0] == 0
    assert space.iommu.hwpt(DEVICE, space.ioas)[0] == errno.EADDRINUSE
    # Before the kernel looks for the queue of page faults.
    faults = abi.IOMMU_HWPT_FAULT_ID_VALID
    assert space.iommu.hwpt(DEVICE, space.ioas, flags=faults)[0] == errno.EADDRINUSE
    assert space.iommu.unmap(space.ioas, 0, U64_MAX)[0] == 0
    assert space.iommu.hwpt(DEVICE, space.ioas, flags=faults)[0] == errno.ENOENT
    assert space.ranges() == (EVERYTHING, 1)
    assert space.iommu.destroy(space.ioas) == 0  # nothing uses it


def test_a_table_over_the_window_of_interrupts_keeps_devices_away_only(space: Space) -> None:
    assert space.map(iova=WINDOW)[0] == 0
    result, table = space.iommu.hwpt(DEVICE, space.ioas)
    assert result == 0
    assert space.attach(table) == errno.EADDRINUSE
    assert space.attach() == errno.EADDRINUSE
    assert space.iommu.unmap(space.ioas, WINDOW, PAGE)[0] == 0
    assert space.attach(table) == 0


def test_a_refused_attachment_leaves_the_device_where_it_was(space: Space) -> None:
    other = space.iommu.alloc()
    assert space.iommu.map(other, space.pages.page(1), iova=0)[0] == 0
    assert space.attach(other) == 0
    assert space.map(iova=WINDOW)[0] == 0
    assert space.attach() == errno.EADDRINUSE
    space.program.served.device.dma.write(0, b"still here")
    assert space.program.caller.read(space.pages.page(1), 10) == b"still here"


def test_part_of_a_page_of_a_huge_file_may_be_mapped(space: Space) -> None:
    with create_sealed_memfd("huge", 1 << 45) as memfd:
        members = {"start": (1 << 44) + 24, "length": 100, "iova": 24}
        assert space.iommu.map_file(space.ioas, memfd.fileno(), **members) == (0, 24)
        assert space.iommu.unmap(space.ioas, 24, 100) == (0, 100)


# ALLOW_IOVAS.


@pytest.mark.parametrize(
    ("ranges", "members", "result"),
    [
        ([(0, 0)], {"reserved": 1, "ioas_id": 99}, errno.EOPNOTSUPP),
        ([(0, 0)], {"ioas_id": 99}, errno.ENOENT),
        ([(0, 0)], {"ioas_id": DEVICE}, errno.ENOENT),
        ([(0, 1)], {"allowed_iovas": 8}, errno.EFAULT),
        ([], {"allowed_iovas": 8}, 0),
        ([(5, 5)], {}, errno.EINVAL),
        ([(5, 4)], {}, errno.EINVAL),
        ([(0, 10), (10, 20)], {}, errno.EINVAL),
        ([(10, 20), (0, 10)], {}, errno.EINVAL),
        ([(0, U64_MAX), (5, 6)], {}, errno.EINVAL),
        ([(5, 6), (0, U64_MAX)], {}, errno.EINVAL),
        ([(0, 1), (20, 30), (10, 19), (2, 9)], {}, 0),
        ([(0, U64_MAX)], {}, 0),
    ],
)
def test_ranges_that_are_allowed_are_checked(
    space: Space, ranges: list[tuple[int, int]], members: dict[str, int], result: int
) -> None:
    assert space.allow(*ranges, **members) == result
    assert space.ranges() == (EVERYTHING, 1)


def test_the_rows_before_a_fault_are_checked_before_it(space: Space) -> None:
    with Pages("rw") as page:
        bad = page.page(1) - 16
        space.program.caller.write(bad, bytes(abi.IovaRange(start=5, last=5)))
        assert space.allow((0, 0), (0, 0), allowed_iovas=bad) == errno.EINVAL
        space.program.caller.write(bad, bytes(abi.IovaRange(start=5, last=6)))
        assert space.allow((0, 0), (0, 0), allowed_iovas=bad) == errno.EFAULT


def test_what_is_allowed_keeps_away_whoever_would_narrow_it(space: Space) -> None:
    assert space.allow((0, PAGE), (WINDOW, WINDOW + 1)) == 0
    result, table = space.iommu.hwpt(DEVICE, space.ioas)
    assert result == 0
    assert space.attach(table) == errno.EADDRINUSE
    assert space.allow((0, 1 << 48)) == errno.EADDRINUSE  # and the former ranges stay
    assert space.attach(table) == errno.EADDRINUSE
    assert space.allow((0, (1 << 48) - 1)) == 0  # the whole list is another one
    assert space.attach(table) == errno.EADDRINUSE
    assert space.allow((0, PAGE)) == 0
    assert space.attach(table) == 0
    assert space.allow((WINDOW, WINDOW + 1)) == errno.EADDRINUSE
    assert space.allow() == 0
    assert space.allow((0, WINDOW - 1)) == 0
    space.detach()
    assert space.iommu.destroy(table) == 0
    assert space.allow((1 << 48, U64_MAX)) == 0
    assert space.iommu.hwpt(DEVICE, space.ioas)[0] == errno.EADDRINUSE


def test_an_iova_is_chosen_inside_what_is_allowed_and_may_be_fixed_elsewhere(space: Space) -> None:
    assert space.allow((0x10000, 0x10000 + 2 * PAGE - 1), (0x8000, 0x8FFF)) == 0
    assert space.map(iova=0x20000) == (0, 0x20000)
    chosen = [space.map(flags=READABLE) for _ in range(4)]
    assert chosen == [(0, 0x8000), (0, 0x10000), (0, 0x11000), (errno.ENOSPC, 0)]
    assert space.map(flags=READABLE, length=4 * PAGE) == (errno.ENOSPC, 0)
    assert space.allow((0x30000, 0x30FFF), (0x31000, 0x31FFF)) == 0  # they touch
    assert space.map(flags=READABLE, length=2 * PAGE) == (0, 0x30000)
    assert space.allow() == 0
    assert space.map(flags=READABLE) == (0, PAGE)


def test_an_iova_lies_in_its_page_as_the_memory_does(space: Space) -> None:
    address = space.pages.page(0) + 24
    assert space.map(address=address, flags=READABLE, length=100) == (0, PAGE + 24)
    # Aligned to 8 bytes, as the memory is, behind what is there; in its page as the memory is.
    assert space.map(address=address, flags=READABLE, length=100) == (0, PAGE + 0x98)


def test_nothing_is_put_into_the_last_page(space: Space) -> None:
    assert space.allow((U64_MAX - 2 * PAGE + 1, U64_MAX)) == 0
    assert space.map(flags=READABLE) == (0, U64_MAX - 2 * PAGE + 1)
    assert space.map(flags=READABLE) == (errno.ENOSPC, 0)
    assert space.map(iova=U64_MAX - PAGE) == (errno.EEXIST, U64_MAX - PAGE)


# OPTION.


@pytest.mark.parametrize(
    ("option", "op", "members", "result"),
    [
        (RLIMIT_MODE, OP_GET, {"reserved": 1}, errno.EOPNOTSUPP),
        (2, OP_GET, {}, errno.EOPNOTSUPP),
        (RLIMIT_MODE, 2, {}, errno.EOPNOTSUPP),
        (RLIMIT_MODE, OP_GET, {"object_id": 2}, errno.EOPNOTSUPP),
        (RLIMIT_MODE, OP_GET, {}, 0),
        (RLIMIT_MODE, OP_SET, {"object_id": 2}, errno.EOPNOTSUPP),
        (RLIMIT_MODE, OP_SET, {"val64": 2}, errno.EPERM),
        (HUGE_PAGES, OP_GET, {"reserved": 1}, errno.EOPNOTSUPP),
        (HUGE_PAGES, OP_GET, {"object_id": 99}, errno.ENOENT),
        (HUGE_PAGES, OP_GET, {"object_id": DEVICE}, errno.ENOENT),
        (HUGE_PAGES, 2, {"object_id": 99}, errno.ENOENT),
        (HUGE_PAGES, 2, {"object_id": 2}, errno.EOPNOTSUPP),
        (HUGE_PAGES, OP_SET, {"object_id": 2, "val64": 2}, errno.EINVAL),
        (HUGE_PAGES, OP_SET, {"object_id": 2, "val64": 1}, 0),
    ],
)
def test_an_option_checks_its_argument(
    space: Space, option: int, op: int, members: dict[str, int], result: int
) -> None:
    assert space.ioas == 2
    value = members.pop("val64", 0)
    told = 0 if option == RLIMIT_MODE and op == OP_GET else value
    assert space.option(option, op, value, **members) == (result, told)


def test_memory_is_counted_in_another_way_only_for_who_may_and_before_anything_is_there() -> None:
    space = Space()
    space.program.caller.capabilities.add(CAP_SYS_RESOURCE)
    try:
        assert space.option(RLIMIT_MODE, OP_SET, 2) == (errno.EBUSY, 2)  # the device is an object
        space.program.close()
        assert space.option(RLIMIT_MODE, OP_SET, 1) == (errno.EBUSY, 1)
        assert space.iommu.destroy(space.ioas) == 0
        assert space.option(RLIMIT_MODE, OP_SET, 2) == (errno.EINVAL, 2)
        assert space.option(RLIMIT_MODE, OP_GET, 7) == (0, 0)
        assert space.option(RLIMIT_MODE, OP_SET, 1) == (0, 1)
        assert space.option(RLIMIT_MODE, OP_GET, 7) == (0, 1)
        assert space.option(RLIMIT_MODE, OP_SET, 0) == (0, 0)
        assert space.option(RLIMIT_MODE, OP_GET, 7) == (0, 0)
    finally:
        space.close()


def test_without_huge_pages_mappings_consist_of_pages(space: Space) -> None:
    assert space.huge(OP_GET, 7) == (0, 1)
    assert space.map(iova=7, length=9)[0] == 0
    assert space.huge(OP_SET, 0) == (errno.EADDRINUSE, 0)
    assert space.huge(OP_GET) == (0, 1)
    assert space.iommu.unmap(space.ioas, 7, 9)[0] == 0
    assert space.map(iova=0)[0] == 0
    assert space.huge(OP_SET, 0) == (0, 0)
    assert space.huge(OP_GET, 7) == (0, 0)
    assert space.ranges() == (EVERYTHING, PAGE)
    assert space.map(iova=7 * PAGE + 7)[0] == errno.EINVAL
    assert space.huge(OP_SET, 1) == (0, 1)
    assert space.ranges() == (EVERYTHING, 1)


def test_mappings_that_may_be_in_huge_pages_already_stay_there(space: Space) -> None:
    assert space.attach() == 0
    assert space.huge(OP_SET, 0) == (0, 0)  # there are no mappings
    assert space.map(iova=0)[0] == 0
    assert space.huge(OP_SET, 0) == (0, 0)  # nor are these
    assert space.huge(OP_SET, 1) == (0, 1)
    assert space.huge(OP_SET, 0) == (errno.EINVAL, 0)
    assert space.huge(OP_GET) == (0, 1)


def test_an_option_that_cannot_be_told_is_efault(space: Space) -> None:
    asked = abi.IommuOption(size=24, option_id=HUGE_PAGES, op=OP_GET, object_id=space.ioas)
    assert space.iommu.at(abi.IOMMU_OPTION, space.pages.read_only(bytes(asked))) == errno.EFAULT


# VFIO_IOAS.


def test_the_space_of_the_old_interface_is_chosen_told_and_forgotten(space: Space) -> None:
    assert space.vfio_ioas(GET) == (errno.ENODEV, 77)
    assert space.vfio_ioas(SET, 99) == (errno.ENOENT, 99)
    assert space.vfio_ioas(SET, DEVICE) == (errno.ENOENT, DEVICE)
    assert space.vfio_ioas(SET, space.ioas) == (0, space.ioas)
    assert space.vfio_ioas(GET) == (0, space.ioas)
    assert space.vfio_ioas(SET, 99) == (errno.ENOENT, 99)
    assert space.vfio_ioas(GET) == (0, space.ioas)
    assert space.vfio_ioas(CLEAR, 99) == (0, 99)
    assert space.vfio_ioas(GET) == (errno.ENODEV, 77)
    assert space.vfio_ioas(3) == (errno.EOPNOTSUPP, 77)
    assert space.vfio_ioas(CLEAR, reserved=1) == (errno.EOPNOTSUPP, 77)


def test_the_space_of_the_old_interface_may_be_destroyed(space: Space) -> None:
    assert space.vfio_ioas(SET, space.ioas)[0] == 0
    assert space.iommu.destroy(space.ioas) == 0
    assert space.vfio_ioas(GET) == (errno.ENODEV, 77)


def test_only_the_id_is_written_back(space: Space) -> None:
    def at(op: int) -> int:
        asked = abi.IommuVfioIoas(size=12, op=op, ioas_id=space.ioas)
        return space.iommu.at(abi.IOMMU_VFIO_IOAS, space.pages.read_only(bytes(asked)))

    assert [at(SET), at(GET), at(CLEAR)] == [0, errno.EFAULT, 0]


# Without any request.


def test_a_space_of_its_own_is_as_narrow_as_with_a_device() -> None:
    assert tuple(IoSpace().usable()) == ALLOWED
    assert IoSpace().alignment == PAGE


def test_a_limit_holds_until_it_was_taken_back_as_often() -> None:
    space = IoSpace(limits=())
    space.limit("device", OF_DEVICE)
    space.limit("device", OF_DEVICE)
    space.limit("table", OF_TABLE)
    space.unlimit("device")
    assert tuple(space.usable()) == ALLOWED
    space.unlimit("device")
    space.unlimit("table")
    assert space.usable() == EVERYTHING


def test_limits_that_overlap_are_one_gap() -> None:
    limits = IovaLimits([OF_DEVICE])
    limits.add("other", OF_DEVICE._replace(reserved=((0xFEEF_0000, 0xFFFF_FFFF), (0, 0xFFF))))
    assert limits.usable() == [(0x1000, WINDOW - 1), (1 << 32, U64_MAX)]


def test_an_unaligned_address_alone_is_in_the_way_of_a_page_table() -> None:
    space = IoSpace(limits=())
    space.map(Mapping(PAGE, PAGE, Nothing(), 8, readable=True, writable=True))
    with pytest.raises(OSError, match="consist of pages") as caught:
        space.limit("table", OF_TABLE)
    assert caught.value.errno == errno.EADDRINUSE


def test_this_thread_has_the_capabilities_that_the_kernel_says() -> None:
    with open("/proc/thread-self/status", encoding="ascii") as status:
        (line,) = [line for line in status if line.startswith("CapEff:")]
    first = os.readlink("/proc/self/ns/user") == "user:[4026531837]"
    effective = int(line.split()[1], 16)
    for number in range(64):
        assert capable(os.getpid(), number) is bool(first and effective >> number & 1)


def test_nobody_may_what_is_gone() -> None:
    assert not capable(0, CAP_SYS_RESOURCE)
    assert process_of(0) == 0
    assert process_of(os.getpid()) == os.getpid()


def test_a_fixed_mapping_is_not_kept_to_what_is_allowed(space: Space) -> None:
    assert space.allow((0x8000, 0x8FFF)) == 0
    assert space.map(iova=0x100000, flags=FIXED | READABLE) == (0, 0x100000)
