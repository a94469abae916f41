"""The assembled filters, run by an interpreter, against the rules written down a second time."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vfiomig.abi.syscalls import X86_64
from vfiomig.doors.syscall.filter import exact_filter, fast_filter

FIRST, TAG = 900, 0x56
EXACT = exact_filter()
FAST = fast_filter(first_data_fd=FIRST, offset_tag=TAG)
ALLOW, NOTIFY, REFUSE = 0x7FFF0000, 0x7FC00000, 0x00050000 | errno.ENOSYS
NATIVE, I386 = 0xC000003E, 0x40000003
WORD = 0xFFFFFFFF

PATHS = """open openat openat2 creat access faccessat faccessat2 stat lstat fstat newfstatat statx
           readlink readlinkat getxattr lgetxattr listxattr llistxattr"""
PLAIN = """read write readv writev lseek ftruncate fallocate fsync fdatasync sync_file_range
           vmsplice"""
POSITIONAL = "pread64 pwrite64 preadv pwritev preadv2 pwritev2"
TWO_FDS = {"splice": 2, "copy_file_range": 2, "tee": 1, "sendfile": 1}


def run(program: bytes, arch: int, number: int, args: tuple[int, ...]) -> int:
    """Run classic BPF; every load is checked as the kernel's verifier does."""
    data = struct.pack("<iIQ6Q", number - (number >> 31 << 32), arch, 0xDEAD, *args)
    code = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = 0
    while True:
        op, if_true, if_false, k = code[at]
        at += 1
        if op == 0x20:
            assert k % 4 == 0
            assert k < len(data)
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif op == 0x54:
            accumulator &= k
        elif op == 0x15:
            at += if_true if accumulator == k else if_false
        elif op == 0x35:
            at += if_true if accumulator >= k else if_false
        else:
            assert op == 0x06
            return int(k)


def expected(*, fast: bool, arch: int, number: int, args: tuple[int, ...]) -> int:
    if arch != NATIVE or number >= 0x40000000:
        return REFUSE
    name = {value: key for key, value in X86_64.items()}.get(number)
    if name == "io_uring_setup":
        return REFUSE
    return NOTIFY if name is not None and stops(name, args, fast=fast) else ALLOW


def stops(name: str, args: tuple[int, ...], *, fast: bool) -> bool:
    low = [arg & WORD for arg in args]
    if name == "ioctl":
        return (low[1] >> 8) & 0xFF == ord(";") or low[1] in {0x541B, 0x4018AEE1}
    if name in PATHS.split():
        return True
    if name == "mmap":
        of_a_file = not low[3] & 0x20 and low[4] != WORD
        return of_a_file and (not fast or low[4] >= FIRST or args[5] >> 56 == TAG)
    if name in PLAIN.split():
        return not fast or low[0] >= FIRST
    if name in POSITIONAL.split():
        return not fast or low[0] >= FIRST or args[3] >> 56 == TAG or args[3] >> 40 == 7
    if name in TWO_FDS:
        return not fast or low[0] >= FIRST or low[TWO_FDS[name]] >= FIRST
    return False


numbers = st.one_of(
    st.sampled_from(sorted(X86_64.values())),
    st.integers(0, 480),
    st.sampled_from([value | 0x40000000 for value in X86_64.values()]),
    st.just(WORD),
)
arguments = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, 3, FIRST - 1, FIRST, FIRST + 1, WORD, (1 << 64) - 1, 0x20, 0x22, 0x02]),
    st.sampled_from([0x3B64, 0x3BFF, 0x3A00, 0x3C00, 0xC0003B80, 0x541B, 0x4018AEE1, 0xFF00003B71]),
    st.integers(0, (1 << 56) - 1).map(lambda low: TAG << 56 | low),
    st.integers(0, 255).map(lambda top: top << 56),
    st.sampled_from([(7 << 40) - 1, 7 << 40, (7 << 40) + 0x34, (8 << 40) - 1, 8 << 40]),
)


@settings(max_examples=2000)
@given(
    st.sampled_from([NATIVE, NATIVE, NATIVE, I386, 0xC00000B7, 0]),
    numbers,
    st.tuples(*[arguments] * 6),
)
@example(NATIVE, X86_64["mmap"], (0, 4096, 3, 1, 5, TAG << 56))
@example(NATIVE, X86_64["mmap"], (0, 4096, 3, 0x22, WORD, TAG << 56))
@example(I386, 54, (3, 0x3B64, 0, 0, 0, 0))
def test_the_filters_do_what_the_rules_say(arch: int, number: int, args: tuple[int, ...]) -> None:
    for program, fast in ((EXACT, False), (FAST, True)):
        assert run(program, arch, number, args) == expected(
            fast=fast, arch=arch, number=number, args=args
        )


@pytest.mark.parametrize("name", sorted(X86_64))
@pytest.mark.parametrize("fast", [False, True])
def test_every_named_call_follows_its_rule_with_plain_arguments(name: str, *, fast: bool) -> None:
    for args in ((FIRST,) * 6, (3,) * 6, ((1 << 64) - 1,) * 6):
        program = FAST if fast else EXACT
        assert run(program, NATIVE, X86_64[name], args) == expected(
            fast=fast, arch=NATIVE, number=X86_64[name], args=args
        )


@pytest.mark.parametrize("name", ["close", "poll", "ppoll", "dup", "dup2", "fcntl"])
def test_calls_of_no_row_pass_without_a_look_at_their_arguments(name: str) -> None:
    """The kernel then remembers the answer for the number: such calls cost nothing."""
    for program in (EXACT, FAST):
        assert run(program, NATIVE, X86_64[name], ((1 << 64) - 1,) * 6) == ALLOW
        loads = {k for op, _, _, k in struct.iter_unpack("<HBBI", program[: 8 * 4]) if op == 0x20}
        assert loads == {0, 4}


@pytest.mark.parametrize(("first", "tag"), [(900, 0), (900, 0x80), (2, 1), (-1, 1), (1 << 31, 1)])
def test_numbers_that_cannot_work_are_refused(first: int, tag: int) -> None:
    with pytest.raises(ValueError):
        fast_filter(first_data_fd=first, offset_tag=tag)
