"""BIND_IOMMUFD, ATTACH and DETACH, and the requests of /dev/iommu: every errno, in order."""

from __future__ import annotations

import ctypes
import errno
import threading
from typing import TYPE_CHECKING

import pytest

from in_process import (
    DEADLINE,
    IOMMUFD,
    OTHER,
    PAGE,
    V6,
    Caller,
    Pages,
    Program,
    Scripted,
    in_thread,
    wait_until,
)
from iommu_requests import FIXED, READABLE, U64_MAX, WRITABLE, Iommu, words
from vfiomig.abi import iommufd as abi
from vfiomig.abi import vfio
from vfiomig.core.iommufd import Iommufd
from vfiomig.core.vfio_device import VfioDevice
from vfiomig.errors import DeviceError
from vfiomig.fsm import State
from vfiomig.iommu.space import ALLOWED

if TYPE_CHECKING:
    from collections.abc import Iterator


BIND = vfio.VFIO_DEVICE_BIND_IOMMUFD
ATTACH = vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT
DETACH = vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT


@pytest.fixture
def pages() -> Iterator[Pages]:
    with Pages("rw", "r", "", "rw") as pages:
        yield pages


@pytest.fixture
def iommu() -> Iommu:
    return Iommu()


# BIND.


@pytest.fixture
def unbound() -> Iterator[Program]:
    with Program(bound=False) as program:
        yield program


def test_a_binding_returns_the_devices_id(unbound: Program) -> None:
    answer = unbound.bind()
    assert answer.errno == 0
    assert answer.data[:12] == words(16, 0, IOMMUFD)
    assert int.from_bytes(answer.data[12:], "little") == 1
    assert unbound.state() is State.RUNNING


@pytest.mark.parametrize(
    ("argument", "result"),
    [
        (words(15, 0, IOMMUFD, 0), errno.EINVAL),
        (words(0, 0, IOMMUFD, 0), errno.EINVAL),
        (words(24, 0, IOMMUFD, 0, 0, 0), 0),
        (words(32, 0, IOMMUFD, 0, 0, 0, 0, 0), 0),
        (words(32, 0, IOMMUFD, 0, 0, 0, 0, 1 << 31), errno.E2BIG),
        (words(32, 0xFF, -1, 0, 0, 0, 1, 0), errno.E2BIG),  # before what the fields say
        (words(16, 1, IOMMUFD, 0), errno.EINVAL),
        (words(16, 2, OTHER, 0), errno.EINVAL),
        (words(16, 0, -1, 0), errno.EINVAL),
        (words(16, 0, 99, 0), errno.EBADF),
        (words(16, 0, OTHER, 0), errno.EBADFD),
    ],
)
def test_a_binding_checks_its_argument(unbound: Program, argument: bytes, result: int) -> None:
    assert unbound.ioctl(BIND, argument).errno == result
    assert unbound.served.users == (not result)
    assert unbound.at(vfio.VFIO_DEVICE_RESET, 0) == (errno.EINVAL if result else 0)


def test_a_binding_whose_argument_faults_does_nothing(unbound: Program, pages: Pages) -> None:
    for address in (0, pages.page(2), pages.page(2) - 3):
        assert unbound.at(BIND, address) == errno.EFAULT
    unbound.caller.write(pages.page(3), words(4096 * 3, 0, IOMMUFD, 0))
    assert unbound.at(BIND, pages.page(3)) == errno.EFAULT  # its rest is not there
    assert unbound.served.users == 0


def test_a_device_id_that_cannot_be_written_undoes_the_binding(unbound: Program) -> None:
    with Pages("rw") as argument:
        address = argument.read_only(words(16, 0, IOMMUFD, 0))
        assert unbound.at(BIND, address) == errno.EFAULT
    assert unbound.served.users == 0
    assert unbound.bind().errno == 0


def test_an_open_is_bound_once_which_comes_before_the_iommufd(unbound: Program) -> None:
    assert unbound.bind().errno == 0
    assert unbound.bind().errno == errno.EINVAL
    assert unbound.bind(iommufd=99).errno == errno.EINVAL
    assert unbound.state() is State.RUNNING


def test_one_open_is_bound_at_a_time_which_comes_after_the_iommufd(unbound: Program) -> None:
    other = unbound.served.open()
    assert unbound.bind(other).errno == 0
    assert unbound.bind(iommufd=99).errno == errno.EBADF
    assert unbound.bind().errno == errno.EINVAL
    other.release()
    assert unbound.bind().errno == 0


def test_two_bindings_at_once_bind_one() -> None:
    device = Scripted()
    hold = device.holds["start"] = threading.Event()
    with Program(device, bound=False) as program:
        other = program.served.open()
        results: list[int] = []
        threads = [
            in_thread(lambda file=file: results.append(program.bind(file).errno))  # type: ignore[misc]
            for file in (program.file, other)
        ]
        device.wait_for("start")
        hold.set()
        for thread in threads:
            thread.join(DEADLINE)
        assert sorted(results) == [0, errno.EINVAL]
        assert program.served.users == 1
        other.release()


# ATTACH and DETACH.


@pytest.mark.parametrize(
    ("argument", "result"),
    [
        (words(11, 0, 0), errno.EINVAL),
        (words(12, 2, 0), errno.EINVAL),
        (words(12, 1, 0), errno.EINVAL),
        (words(16, 1, 0, 0), errno.EOPNOTSUPP),
        (words(12, 0, 99), errno.ENOENT),
        (words(12, 0, 1), errno.EINVAL),  # the device itself is no address space
    ],
)
def test_an_attachment_checks_its_argument(argument: bytes, result: int) -> None:
    with Program() as program:
        assert program.ioctl(ATTACH, argument) == (result, argument)
        assert program.served.device.dma.space is None


def test_an_attached_device_reaches_the_programs_memory(pages: Pages) -> None:
    with Program() as program:
        iommu = Iommu(program.caller)
        ioas = iommu.alloc()
        assert iommu.map(ioas, pages.page(0), iova=0x10000) == (0, 0x10000)
        answer = program.ioctl(ATTACH, words(12, 0, ioas))
        assert answer.errno == 0
        table = int.from_bytes(answer.data[8:12], "little")
        assert table not in {0, ioas}
        dma = program.served.device.dma
        dma.write(0x10008, b"by DMA")
        assert program.caller.read(pages.page(0) + 8, 6) == b"by DMA"
        assert iommu.destroy(ioas) == errno.EBUSY
        assert iommu.destroy(table) == errno.EBUSY
        assert [program.ioctl(DETACH, words(8, 0)).errno for _ in range(2)] == [0, 0]
        with pytest.raises(DeviceError):
            dma.read(0x10008, 6)
        assert iommu.destroy(table) == errno.ENOENT
        assert iommu.destroy(ioas) == 0


def test_attaching_elsewhere_replaces_the_former_attachment(pages: Pages) -> None:
    with Program() as program:
        iommu = Iommu(program.caller)
        first, second = iommu.alloc(), iommu.alloc()
        iommu.map(second, pages.page(0), iova=0)
        assert program.ioctl(ATTACH, words(12, 0, first)).errno == 0
        assert program.ioctl(ATTACH, words(12, 0, 99)).errno == errno.ENOENT
        assert iommu.destroy(first) == errno.EBUSY  # the failure has left it attached
        assert program.ioctl(ATTACH, words(12, 0, second)).errno == 0
        assert iommu.destroy(first) == 0
        program.served.device.dma.write(0, b"x")


def test_an_attachment_whose_answer_faults_is_undone(pages: Pages) -> None:
    with Program() as program, Pages("rw") as argument:
        iommu = Iommu(program.caller)
        ioas = iommu.alloc()
        address = argument.read_only(words(12, 0, ioas))
        assert program.at(ATTACH, address) == errno.EFAULT
        assert program.at(ATTACH, pages.page(2) - 11) == errno.EFAULT
        assert program.served.device.dma.space is None
        assert iommu.destroy(ioas) == 0


@pytest.mark.parametrize(
    ("argument", "result"),
    [
        (words(7, 0), errno.EINVAL),
        (words(8, 2), errno.EINVAL),
        (words(8, 1), errno.EINVAL),
        (words(12, 1, 0), errno.EOPNOTSUPP),
        (words(8, 0), 0),
    ],
)
def test_a_detachment_checks_its_argument(argument: bytes, result: int) -> None:
    with Program() as program:
        assert program.ioctl(DETACH, argument) == (result, argument)


def test_v6_attaches_only_what_was_bound() -> None:
    with Program(dialect=V6) as program:
        ioas = Iommu(program.caller).alloc()
        assert program.ioctl(ATTACH, words(12, 0, ioas)).errno == errno.EINVAL
        assert program.ioctl(DETACH, words(8, 0)).errno == errno.EINVAL
        program.bind()
        assert program.ioctl(ATTACH, words(12, 0, ioas)).errno == 0


def test_a_close_gives_everything_up_after_the_device_has_stopped(pages: Pages) -> None:
    class Flushes(Scripted):
        def stop(self) -> None:
            self.dma.write(0, b"the last of it")

    with Program(Flushes()) as program:
        iommu = Iommu(program.caller)
        ioas = iommu.alloc()
        iommu.map(ioas, pages.page(0), iova=0)
        program.ioctl(ATTACH, words(12, 0, ioas))
        assert iommu.destroy(1) == errno.EBUSY  # the device
        program.close()
        assert program.caller.read(pages.page(0), 14) == b"the last of it"
        assert program.served.device.dma.space is None
        assert iommu.destroy(1) == errno.ENOENT
        assert iommu.destroy(ioas) == 0


# /dev/iommu.

REQUESTS = [
    (abi.IOMMU_DESTROY, 8),
    (abi.IOMMU_IOAS_ALLOC, 12),
    (abi.IOMMU_IOAS_ALLOW_IOVAS, 24),
    (abi.IOMMU_IOAS_IOVA_RANGES, 32),
    (abi.IOMMU_IOAS_MAP, 40),
    (abi.IOMMU_IOAS_UNMAP, 24),
    (abi.IOMMU_OPTION, 24),
    (abi.IOMMU_VFIO_IOAS, 12),
]


@pytest.mark.parametrize(("number", "size"), REQUESTS)
def test_a_request_is_as_long_as_its_size_says(iommu: Iommu, number: int, size: int) -> None:
    assert iommu.ioctl(number, words(size - 1) + bytes(size)).errno == errno.EINVAL
    assert iommu.ioctl(number, words(0) + bytes(size)).errno == errno.EINVAL
    longer = words(size + 4) + bytes(size)
    assert iommu.ioctl(number, longer).errno not in {errno.E2BIG, errno.EFAULT}
    assert iommu.ioctl(number, longer[:-1] + b"\1").errno == errno.E2BIG
    assert iommu.at(number, 0) == errno.EFAULT


@pytest.mark.parametrize(("number", "size"), REQUESTS)
def test_a_request_that_runs_into_a_fault_is_efault(
    iommu: Iommu, pages: Pages, number: int, size: int
) -> None:
    assert iommu.at(number, pages.page(2) - 3) == errno.EFAULT
    iommu.caller.write(pages.page(3) + PAGE - 4, words(size))
    assert iommu.at(number, pages.page(3) + PAGE - 4) == errno.EFAULT


@pytest.mark.parametrize("number", [0x3B00, 0x3B7F, 0x3B8D, 0x3B92, 0x5401, 0x3B75])
def test_what_is_not_served_is_enotty(iommu: Iommu, number: int) -> None:
    assert iommu.at(number, 0) == errno.ENOTTY


def test_an_address_space_has_an_id_until_it_is_destroyed(iommu: Iommu) -> None:
    first, second = iommu.alloc(), iommu.alloc()
    assert first != second
    assert [iommu.destroy(first) for _ in range(2)] == [0, errno.ENOENT]
    assert iommu.alloc() not in {first, second}
    flagged = abi.IoasAlloc(size=12, flags=1)
    assert iommu.ioctl(abi.IOMMU_IOAS_ALLOC, flagged).errno == errno.EOPNOTSUPP


def test_an_address_space_whose_id_cannot_be_told_does_not_stay(iommu: Iommu) -> None:
    with Pages("rw") as pages:
        address = pages.read_only(bytes(abi.IoasAlloc(size=12)))
        assert iommu.at(abi.IOMMU_IOAS_ALLOC, address) == errno.EFAULT
    assert [iommu.destroy(number) for number in range(1, 4)] == [errno.ENOENT] * 3


@pytest.mark.parametrize("room", [0, 1, 2, 5])
def test_the_usable_ranges_are_listed_as_far_as_there_is_room(iommu: Iommu, room: int) -> None:
    ioas = iommu.in_use()
    rows = (abi.IovaRange * 5)()
    argument = abi.IoasIovaRanges(
        size=32, ioas_id=ioas, num_iovas=room, allowed_iovas=ctypes.addressof(rows)
    )
    answer = iommu.ioctl(abi.IOMMU_IOAS_IOVA_RANGES, argument)
    told = abi.IoasIovaRanges.parse(answer.data)
    assert answer.errno == (errno.EMSGSIZE if room < len(ALLOWED) else 0)
    assert (told.num_iovas, told.out_iova_alignment) == (len(ALLOWED), 4096)
    shown = [(row.start, row.last) for row in rows]
    assert shown == [*ALLOWED[:room], *[(0, 0)] * (5 - min(room, len(ALLOWED)))]


def test_the_usable_ranges_check_their_argument(iommu: Iommu) -> None:
    ioas = iommu.alloc()

    def ask(**members: int) -> int:
        argument = abi.IoasIovaRanges(size=32, **members)
        return iommu.ioctl(abi.IOMMU_IOAS_IOVA_RANGES, argument).errno

    assert ask(ioas_id=99, reserved=1) == errno.EOPNOTSUPP
    assert ask(ioas_id=99) == errno.ENOENT
    assert ask(ioas_id=ioas, num_iovas=1) == errno.EFAULT


# MAP and UNMAP.


@pytest.mark.parametrize(
    ("members", "result"),
    [
        ({"flags": 8 | READABLE, "iova": U64_MAX}, errno.EOPNOTSUPP),
        ({"reserved": 1, "iova": U64_MAX}, errno.EOPNOTSUPP),
        ({"iova": U64_MAX, "flags": FIXED}, errno.EOVERFLOW),
        ({"length": U64_MAX, "flags": FIXED}, errno.EOVERFLOW),
        ({"flags": FIXED, "ioas_id": 99}, errno.EINVAL),
        ({"ioas_id": 99, "length": 0}, errno.ENOENT),
        ({"length": 0}, errno.EINVAL),
        ({"user_va": U64_MAX - PAGE + 1, "length": 2 * PAGE}, errno.EOVERFLOW),
        ({"user_va": 0x1008}, errno.EINVAL),
        ({"iova": 0x800}, errno.EINVAL),
        ({"length": 0x800}, errno.EINVAL),
        ({"iova": 0xFEE0_0000}, errno.EINVAL),
        ({"iova": 0xFEDF_F000, "length": 2 * PAGE}, errno.EINVAL),
        ({"iova": (1 << 48) - PAGE, "length": 2 * PAGE}, errno.EINVAL),
        ({"iova": U64_MAX - PAGE + 1, "length": 2 * PAGE}, errno.EOVERFLOW),
        ({"iova": 0x5000, "user_va": 0}, errno.EEXIST),  # before the memory is looked at
        ({"iova": 0x5000, "user_va": 0x1008}, errno.EEXIST),
        ({"flags": READABLE, "user_va": 0x1008}, errno.EINVAL),
        ({"flags": READABLE, "length": 0x800}, errno.EINVAL),
        ({"flags": READABLE, "user_va": PAGE, "length": 1 << 62}, errno.ENOSPC),
        ({"iova": 0x4000, "length": 2 * PAGE}, errno.EEXIST),
        ({"user_va": 0}, errno.EFAULT),
        ({"user_va": 1 << 63}, errno.EFAULT),
    ],
)
def test_a_mapping_checks_its_argument(
    iommu: Iommu, pages: Pages, members: dict[str, int], result: int
) -> None:
    ioas = iommu.in_use()
    assert iommu.map(ioas, pages.page(0), iova=0x5000) == (0, 0x5000)
    whole = {
        "size": 40,
        "flags": FIXED | READABLE,
        "ioas_id": ioas,
        "user_va": pages.page(0),
        "length": PAGE,
    }
    argument = abi.IoasMap(**(whole | members))
    assert iommu.ioctl(abi.IOMMU_IOAS_MAP, argument) == (result, bytes(argument))
    assert iommu.unmap(ioas, 0, U64_MAX) == (0, PAGE)  # it has left nothing


@pytest.mark.parametrize(
    ("page", "flags", "result"),
    [
        (0, WRITABLE | READABLE, 0),
        (1, READABLE, 0),
        (1, WRITABLE, errno.EFAULT),
        (1, WRITABLE | READABLE, errno.EFAULT),
        (2, READABLE, errno.EFAULT),
    ],
)
def test_memory_has_to_be_there_as_it_is_to_be_used(
    iommu: Iommu, pages: Pages, page: int, flags: int, result: int
) -> None:
    ioas = iommu.in_use()
    assert iommu.map(ioas, pages.page(page), iova=0, flags=FIXED | flags)[0] == result
    assert iommu.map(ioas, pages.page(0), iova=0)[0] == (0 if result else errno.EEXIST)


def test_a_mapping_across_a_gap_is_a_fault(iommu: Iommu, pages: Pages) -> None:
    ioas = iommu.in_use()
    result, _ = iommu.map(ioas, pages.page(0), iova=0, length=4 * PAGE, flags=FIXED | READABLE)
    assert result == errno.EFAULT


def test_a_mapping_may_be_put_wherever_there_is_room(iommu: Iommu, pages: Pages) -> None:
    ioas = iommu.alloc()
    iommu.map(ioas, pages.page(0), iova=PAGE)
    placed = [iommu.map(ioas, pages.page(0), flags=READABLE, iova=0x77) for _ in range(3)]
    assert placed == [(0, 2 * PAGE), (0, 3 * PAGE), (0, 4 * PAGE)]
    assert iommu.unmap(ioas, PAGE, PAGE)[0] == 0
    # The lowest room, but never 0, which programs take for none.
    assert iommu.map(ioas, pages.page(0), flags=READABLE) == (0, PAGE)


def test_mappings_that_are_placed_at_once_do_not_meet(iommu: Iommu, pages: Pages) -> None:
    ioas = iommu.alloc()
    placed: list[tuple[int, int]] = []

    def maps() -> None:
        placed.extend(iommu.map(ioas, pages.page(0), flags=READABLE) for _ in range(25))

    threads = [in_thread(maps) for _ in range(4)]
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(placed) == [(0, at * PAGE) for at in range(1, 101)]


def test_an_unmap_tells_how_much_it_removed(iommu: Iommu, pages: Pages) -> None:
    ioas = iommu.alloc()
    for iova in (0, PAGE, 4 * PAGE):
        iommu.map(ioas, pages.page(0), iova=iova)
    assert iommu.unmap(ioas, 0, 3 * PAGE) == (0, 2 * PAGE)
    assert iommu.unmap(ioas, 0, 3 * PAGE) == (errno.ENOENT, 3 * PAGE)
    assert iommu.unmap(ioas, 0, U64_MAX) == (0, PAGE)
    assert iommu.unmap(ioas, 0, U64_MAX) == (0, 0)


def test_an_unmap_checks_its_argument_and_cuts_nothing(iommu: Iommu, pages: Pages) -> None:
    ioas = iommu.alloc()
    with Pages("rw", "rw") as two:
        iommu.map(ioas, two.page(0), iova=PAGE, length=2 * PAGE)
        assert iommu.unmap(99, 0, PAGE)[0] == errno.ENOENT
        assert iommu.unmap(ioas, U64_MAX, PAGE)[0] == errno.EOVERFLOW
        assert iommu.unmap(ioas, PAGE, U64_MAX)[0] == errno.EOVERFLOW
        assert iommu.unmap(ioas, PAGE, 0)[0] == errno.EINVAL
        assert iommu.unmap(ioas, U64_MAX - PAGE, 2 * PAGE)[0] == errno.EOVERFLOW
        assert iommu.unmap(ioas, U64_MAX - PAGE + 1, PAGE)[0] == errno.ENOENT  # the last page
        for iova, length in ((PAGE, PAGE), (2 * PAGE, PAGE), (0, 2 * PAGE), (2 * PAGE, 9 * PAGE)):
            assert iommu.unmap(ioas, iova, length)[0] == errno.ENOENT
        assert iommu.unmap(ioas, PAGE, 2 * PAGE) == (0, 2 * PAGE)


def test_the_memory_of_an_attached_device_is_locked_against_destruction_only(pages: Pages) -> None:
    served = VfioDevice(Scripted())
    file, caller = served.open(), Caller()
    iommu = Iommu(caller)
    ioas = iommu.alloc()
    argument = ctypes.create_string_buffer(words(16, 0, IOMMUFD, 0))
    assert file.ioctl(BIND, ctypes.addressof(argument), caller) == 0
    attach = ctypes.create_string_buffer(words(12, 0, ioas))
    over = threading.Event()
    seen: list[int] = []

    def attaches() -> None:
        while not over.is_set():
            ctypes.memmove(attach, words(12, 0, ioas), 12)
            file.ioctl(ATTACH, ctypes.addressof(attach), caller)

    thread = in_thread(attaches)
    wait_until(lambda: served.device.dma.space is not None)
    for _ in range(300):
        seen.append(iommu.destroy(ioas))
        assert served.device.dma.space is not None  # replaced, never gone
    over.set()
    thread.join(DEADLINE)
    file.release()
    assert set(seen) == {errno.EBUSY}
    assert iommu.destroy(ioas) == 0


# Opens by a way that knows no BIND.


@pytest.fixture
def served() -> VfioDevice:
    return VfioDevice(Scripted())


def test_an_open_by_another_way_is_in_use_at_once_and_cannot_be_bound(served: VfioDevice) -> None:
    file = served.open(in_use=True)
    assert file.in_use
    assert served.migration.state() is State.RUNNING
    with pytest.raises(OSError) as caught:
        file.bind(Iommufd)
    assert caught.value.errno == errno.EINVAL
    file.release()
    assert not served.users


def test_the_character_device_is_busy_while_there_is_an_open_by_another_way(
    served: VfioDevice,
) -> None:
    other, file = served.open(in_use=True), served.open()
    with pytest.raises(OSError) as caught:
        file.bind(Iommufd)
    assert caught.value.errno == errno.EBUSY
    other.release()
    assert file.bind(Iommufd) == 1
    file.release()


def test_no_other_way_leads_to_a_device_that_is_bound(served: VfioDevice) -> None:
    file = served.open()
    file.bind(Iommufd)
    with pytest.raises(OSError) as caught:
        served.open(in_use=True)
    assert caught.value.errno == errno.EBUSY
    file.release()
    served.open(in_use=True).release()
