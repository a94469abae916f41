"""ProcessMemory on this process and on a child: contents, faults and their place."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from vfiomig import memory as memory_module
from vfiomig.descriptors import create_sealed_memfd
from vfiomig.memory import (
    LANE_SIZE,
    WINDOW,
    CallMemory,
    MemoryFault,
    MemoryRefused,
    ProcessGone,
    ProcessMemory,
    covers,
    explain_refusal,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mmap.PAGESIZE
PROT_NONE = 0
MAP_FIXED = 0x10
PR_SET_DUMPABLE = 4

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Pages:
    """Anonymous pages whose protection the test chooses, page by page."""

    def __init__(self, count: int) -> None:
        self.length = count * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.address = libc.mmap(None, self.length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        ctypes.memset(self.address, 0x5A, self.length)

    def protect(self, page: int, protection: int) -> None:
        assert libc.mprotect(self.address + page * PAGE, PAGE, protection) == 0

    def unmap(self, page: int) -> None:
        assert libc.munmap(self.address + page * PAGE, PAGE) == 0


@pytest.fixture
def pages() -> Iterator[Pages]:
    region = Pages(4)
    yield region
    libc.munmap(region.address, region.length)


@pytest.fixture
def own() -> ProcessMemory:
    return ProcessMemory(os.getpid())


@pytest.mark.parametrize("length", [1, 16, LANE_SIZE, LANE_SIZE + 1, 3 * PAGE])
def test_what_is_written_is_read_back(own: ProcessMemory, pages: Pages, length: int) -> None:
    data = bytes(index * 7 & 0xFF for index in range(length))
    own.write(pages.address + 1, data)
    assert own.read(pages.address + 1, length) == data
    assert ctypes.string_at(pages.address + 1, length) == data
    assert own.read(pages.address + 1 + length, 1) == b"\x5a"


@pytest.mark.parametrize(
    "make", [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))[0:]]
)
def test_every_kind_of_buffer_can_be_written_from(
    own: ProcessMemory, pages: Pages, make: type[bytes]
) -> None:
    own.write(pages.address, make(b"0123456789"))
    assert own.write_from(pages.address + 10, make(b"abc")) == 3
    assert own.read(pages.address, 13) == b"0123456789abc"


def test_a_slice_of_a_view_is_filled_and_nothing_beside_it(
    own: ProcessMemory, pages: Pages
) -> None:
    target = bytearray(10)
    assert own.read_into(pages.address, memoryview(target)[3:7]) == 4
    assert target == bytes(3) + b"\x5a" * 4 + bytes(3)


def test_a_readonly_view_cannot_be_filled(own: ProcessMemory, pages: Pages) -> None:
    constant = bytes(8)
    with pytest.raises((BufferError, TypeError)):
        own.read_into(pages.address, memoryview(constant))
    assert constant == bytes(8)


def test_a_buffer_is_free_again_after_the_transfer(own: ProcessMemory, pages: Pages) -> None:
    target = bytearray(8)
    own.read_into(pages.address, target)
    own.write_from(pages.address, target)
    target.extend(b"a held buffer would refuse this")
    before = sys.getrefcount(target)
    for _ in range(100):
        own.read_into(pages.address, target)
    assert sys.getrefcount(target) == before


def test_a_transfer_stops_at_the_first_byte_that_faults(own: ProcessMemory, pages: Pages) -> None:
    pages.protect(2, PROT_NONE)
    start = pages.address + PAGE + 100
    readable = PAGE - 100
    target = bytearray(3 * PAGE)
    assert own.read_into(start, target) == readable
    assert target[:readable] == b"\x5a" * readable
    assert not any(target[readable:])
    assert own.write_from(start, b"w" * (3 * PAGE)) == readable
    assert ctypes.string_at(start, readable) == b"w" * readable
    for length in (readable + 1, 3 * PAGE):
        with pytest.raises(MemoryFault) as failure:
            own.read(start, length)
        assert failure.value.errno == errno.EFAULT
    assert own.read(start, readable) == b"w" * readable


def test_a_short_write_raises_and_leaves_what_fitted(own: ProcessMemory, pages: Pages) -> None:
    pages.unmap(1)
    with pytest.raises(MemoryFault):
        own.write(pages.address + PAGE - 2, b"four")
    assert ctypes.string_at(pages.address + PAGE - 2, 2) == b"fo"


def test_read_only_memory_cannot_be_written(own: ProcessMemory, pages: Pages) -> None:
    pages.protect(0, mmap.PROT_READ)
    with pytest.raises(MemoryFault):
        own.write(pages.address, b"x")
    assert own.write_from(pages.address, bytearray(8)) == 0
    assert own.read(pages.address, 1) == b"\x5a"


@pytest.mark.parametrize(
    "address",
    [
        0,
        8,
        (1 << 47) - 1,
        (1 << 63) - 1,
        1 << 63,
        (1 << 64) - 8,
        (1 << 64) - 1,
        1 << 64,
        -1,
        0xFFFFFFFFFF600000,  # the vsyscall page: get_user_pages finds it, no driver would
    ],
)
def test_an_address_outside_the_program_is_a_fault(own: ProcessMemory, address: int) -> None:
    with pytest.raises(MemoryFault):
        own.read(address, 16)
    with pytest.raises(MemoryFault):
        own.write(address, b"x" * 16)
    assert own.read_into(address, bytearray(16)) == 0
    assert own.write_from(address, bytearray(16)) == 0
    assert own.check(address, 16, writable=False) is False


def test_a_huge_length_is_a_fault_and_costs_no_memory(own: ProcessMemory, pages: Pages) -> None:
    for length in (1 << 33, 1 << 62, (1 << 64) - 1, 1 << 64):
        with pytest.raises(MemoryFault):
            own.read(pages.address, length)


@pytest.mark.parametrize("address", [0, 1 << 63, -1])
def test_zero_bytes_never_fault(own: ProcessMemory, address: int) -> None:
    assert own.read(address, 0) == b""
    own.write(address, b"")
    assert own.read_into(address, bytearray()) == 0
    assert own.write_from(address, b"") == 0


def test_more_than_one_call_can_move_is_moved_in_pieces(
    own: ProcessMemory, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "PIECE", PAGE)
    data = os.urandom(3 * PAGE)
    assert own.write_from(pages.address + 5, data) == len(data)
    back = bytearray(len(data))
    assert own.read_into(pages.address + 5, back) == len(data)
    assert back == data
    pages.protect(2, PROT_NONE)
    assert own.read_into(pages.address + 5, back) == 2 * PAGE - 5


def map_repeatedly(fill: bytes, piece: int, count: int) -> int:
    """Map one file of ``piece`` bytes ``count`` times in a row: a large range, little memory."""
    inaccessible = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base: int = libc.mmap(None, piece * count, PROT_NONE, inaccessible, -1, 0)
    both = mmap.PROT_READ | mmap.PROT_WRITE
    with create_sealed_memfd("piece", piece) as memfd:
        os.write(memfd.fileno(), fill * piece)
        for index in range(count):
            at = base + index * piece
            fixed = mmap.MAP_SHARED | MAP_FIXED
            assert libc.mmap(at, piece, both, fixed, memfd.fileno(), 0) == at
    return base


def test_more_than_two_gigabytes_go_in_one_call(own: ProcessMemory) -> None:
    piece, count = 16 << 20, 129
    length = piece * count
    source = map_repeatedly(b"s", piece, count)
    sink = map_repeatedly(b"-", piece, count)
    try:
        whole = (ctypes.c_char * length).from_address(sink)
        assert own.check(source, length, writable=True)
        assert own.read_into(source, whole) == length
        assert ctypes.string_at(sink + length - piece, piece) == b"s" * piece
    finally:
        libc.munmap(source, length)
        libc.munmap(sink, length)


def test_check_looks_at_every_page_and_its_permission(own: ProcessMemory, pages: Pages) -> None:
    whole = (pages.address, 4 * PAGE)
    assert own.check(*whole, writable=True)
    pages.protect(1, mmap.PROT_READ)
    assert own.check(*whole, writable=False)
    assert not own.check(*whole, writable=True)
    assert own.check(pages.address, PAGE, writable=True)
    pages.unmap(2)
    assert not own.check(*whole, writable=False)
    assert own.check(pages.address, 2 * PAGE, writable=False)
    assert not own.check(pages.address, 2 * PAGE + 1, writable=False)


@pytest.mark.parametrize(
    ("address", "length", "writable", "expected"),
    [
        (0x1000, 0x1000, False, True),
        (0x1000, 0x2000, False, True),
        (0x1FFF, 2, False, True),
        (0x1000, 0x2001, False, False),  # runs into the gap
        (0x0FFF, 2, False, False),
        (0x1000, 0x1000, True, False),
        (0x2000, 0x1000, True, True),
        (0x4000, 0x1000, True, True),  # write permission alone is what a pin for writing needs
        (0x4000, 0x1000, False, False),
        (0x9000, 1, False, False),
        (0x3000, 0, False, True),
    ],
)
def test_mappings_cover_a_range_only_without_gap(
    address: int, length: int, writable: bool, expected: bool
) -> None:
    maps = [
        "00001000-00002000 r--p 00000000 00:00 0 \n",
        "00002000-00003000 rw-p 00000000 fe:01 12  /a name with spaces\n",
        "00004000-00005000 -w-p 00000000 00:00 0 [stack]\n",
    ]
    assert covers(maps, address, length, writable=writable) is expected


def test_a_dead_process_is_gone_not_faulty() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    gone = ProcessMemory(pid)
    with pytest.raises(ProcessGone) as failure:
        gone.read(0x1000, 8)
    assert failure.value.errno == errno.ESRCH
    with pytest.raises(ProcessGone):
        gone.write(0x1000, b"x")
    with pytest.raises(ProcessGone):
        gone.check(0x1000, 8, writable=False)


def test_memory_of_a_forked_child_is_its_own(pages: Pages) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(ctypes.string_at(pages.address, 1)[0])
    os.close(reader)
    try:
        ProcessMemory(child).write(pages.address, b"\x07")
        assert ProcessMemory(child).read(pages.address, 2) == b"\x07\x5a"
        assert ProcessMemory(os.getpid()).read(pages.address, 1) == b"\x5a"
    finally:
        os.close(writer)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_a_thread_id_reaches_the_same_memory(pages: Pages) -> None:
    ready, done = threading.Event(), threading.Event()
    tids: list[int] = []

    def linger() -> None:
        tids.append(threading.get_native_id())
        ready.set()
        done.wait(10)

    thread = threading.Thread(target=linger)
    thread.start()
    try:
        assert ready.wait(10)
        assert ProcessMemory(tids[0]).read(pages.address, 4) == b"\x5a" * 4
    finally:
        done.set()
        thread.join()


def test_threads_do_not_mix_their_bytes(own: ProcessMemory, pages: Pages) -> None:
    wrong: list[int] = []

    def hammer(page: int) -> None:
        address = pages.address + page * PAGE
        for round_ in range(3000):
            data = bytes([page, round_ & 0xFF]) * 8
            own.write(address, data)
            if own.read(address, 16) != data:
                wrong.append(page)

    threads = [threading.Thread(target=hammer, args=(page,)) for page in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_later_reads_come_from_the_window(own: ProcessMemory, pages: Pages) -> None:
    call = CallMemory(own)
    ctypes.memmove(pages.address, bytes(range(WINDOW + 1)), WINDOW + 1)
    assert call.read(pages.address, 4) == bytes(range(4))
    ctypes.memset(pages.address, 0xEE, WINDOW + 1)
    assert call.read(pages.address + 4, 12) == bytes(range(4, 16))
    assert call.read(pages.address, WINDOW) == bytes(range(WINDOW))
    # One byte beyond: fetched anew.
    assert call.read(pages.address + WINDOW, 1) == b"\xee"


def test_a_window_cut_short_serves_what_it_has_and_faults_beyond(
    own: ProcessMemory, pages: Pages
) -> None:
    pages.unmap(1)
    call = CallMemory(own)
    start = pages.address + PAGE - 20
    assert call.read(start, 4) == b"\x5a" * 4
    assert call.read(start + 4, 16) == b"\x5a" * 16
    assert call.read(start, 20) == b"\x5a" * 20
    for address, length in ((start, 21), (start + 19, 2), (start + 20, 1)):
        with pytest.raises(MemoryFault):
            call.read(address, length)
    assert call.read(start, 20) == b"\x5a" * 20


def test_a_request_sees_what_it_wrote_itself(own: ProcessMemory, pages: Pages) -> None:
    call = CallMemory(own)
    assert call.read(pages.address, 8) == b"\x5a" * 8
    call.write(pages.address + 4, b"new!")
    assert call.read(pages.address, 8) == b"\x5a" * 4 + b"new!"
    assert call.write_from(pages.address, memoryview(b"more")) == 4
    assert call.read(pages.address, 8) == b"morenew!"


def test_reads_larger_than_the_window_and_empty_ones_pass_it_by(
    own: ProcessMemory, pages: Pages
) -> None:
    call = CallMemory(own)
    assert call.read(pages.address, WINDOW + 1) == b"\x5a" * (WINDOW + 1)
    assert call.read(0, 0) == b""
    assert call.read(pages.address, 0) == b""
    target = bytearray(9)
    assert call.read_into(pages.address, target) == 9
    assert target == b"\x5a" * 9
    assert call.check(pages.address, 1, writable=True)


@pytest.mark.parametrize(
    ("scope", "own_uid", "program_uid", "proc_uid", "words"),
    [
        (0, 1000, 0, 0, "runs as user 0, this process as 1000"),
        (0, 1000, 1000, 0, "non-dumpable"),
        (1, 1000, 1000, 1000, "ptrace_scope is 1"),
        (2, 1000, 1000, 1000, "ptrace_scope=1"),
        (3, 1000, 1000, 1000, "ptrace_scope is 3"),
        (0, 1000, 1000, 1000, "security module"),
        (1, 1000, 1000, 0, "non-dumpable"),
        (1, 1000, -1, -1, "ptrace_scope is 1"),
    ],
)
def test_a_refusal_names_its_cause(
    scope: int, own_uid: int, program_uid: int, proc_uid: int, words: str
) -> None:
    text = explain_refusal(
        77, ptrace_scope=scope, own_uid=own_uid, program_uid=program_uid, proc_uid=proc_uid
    )
    assert words in text
    assert "process 77" in text


def become_ordinary() -> None:
    """Root reaches every process: give that up, where the test runs as root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def test_the_kernels_refusal_becomes_the_message(pages: Pages) -> None:
    """A program that made itself non-dumpable is out of reach for its own user."""
    hidden_is_ready, hidden_says = os.pipe()
    hidden_may_end, end_hidden = os.pipe()
    hidden = os.fork()
    if hidden == 0:
        os.close(end_hidden)
        become_ordinary()
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        os.write(hidden_says, b"x")
        os.read(hidden_may_end, 1)
        os._exit(0)
    os.close(hidden_says)
    os.close(hidden_may_end)
    assert os.read(hidden_is_ready, 1) == b"x"
    os.close(hidden_is_ready)
    reader, writer = os.pipe()
    asking = os.fork()
    if asking == 0:
        answer = "no error"
        try:
            become_ordinary()
            ProcessMemory(hidden).read(pages.address, 8)
        except MemoryRefused as error:
            answer = str(error)
        finally:
            os.write(writer, answer.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        text = answers.read()
    os.close(end_hidden)
    os.waitpid(hidden, 0)
    os.waitpid(asking, 0)
    assert f"the memory of process {hidden} cannot be reached: the program made itself" in text
