"""Which system calls of a program stop and wait for an answer, as one table.

Theory of operation
===================
seccomp looks before the kernel checks the descriptor, and a filter sees numbers only. Two
filters answer the question whose descriptor it is:

``exact`` stops every call that could touch a descriptor of ours, whatever the number, and leaves
the question to the supervisor, which knows after dup, fork and hand-over as well.

``fast`` leaves the program's own reads and writes alone. Data descriptors have numbers from
``first_data_fd`` on, device regions have offsets whose top byte is ``offset_tag``, and nothing
else of the read and write family stops but accesses to where vfio-pci has configuration space:
programs that ask for no offset go there, and files of so many TiB are few. A copy of a data descriptor at a low number is not seen.

In both, requests of type ``;`` (VFIO and iommufd), the paths, and the two foreign requests that
are made on descriptors of ours stop. io_uring would read and write past the filter and does not
exist for the program; neither do the i386 and x32 calls, whose numbers mean other calls. ENOSYS
is what kernels built without them say.

A row names calls and, for each filter, the alternatives under which they stop; an alternative is
a group of tests that all hold. For numbers in no row the program looks at nothing but the number
and the architecture, which lets the kernel remember the answer: such calls cost nothing.
"""

from __future__ import annotations

import errno
import mmap
import termios
from dataclasses import dataclass
from enum import Enum

from vfiomig.abi.kvm import KVM_SET_DEVICE_ATTR
from vfiomig.abi.seccomp import (
    AUDIT_ARCH_X86_64,
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO,
    SECCOMP_RET_USER_NOTIF,
    X32_SYSCALL_BIT,
)
from vfiomig.abi.syscalls import X86_64
from vfiomig.abi.vfio import VFIO_PCI_CONFIG_REGION_INDEX
from vfiomig.doors.syscall.bpf import ARCH, NUMBER, Assembler, high_word, low_word

__all__ = ("exact_filter", "fast_filter")

_REFUSE = SECCOMP_RET_ERRNO | errno.ENOSYS
_WORD = 0xFFFF_FFFF


class _Relation(Enum):
    EQUAL = "=="
    DIFFERENT = "!="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True)
class _Test:
    """``(word & mask) relation value``, on one half of an argument."""

    word: int
    value: int
    relation: _Relation = _Relation.EQUAL
    mask: int = _WORD


_When = tuple[tuple[_Test, ...], ...]
_ALWAYS: _When = ((),)


@dataclass(frozen=True, slots=True)
class _Row:
    calls: str
    exact: _When = _ALWAYS
    fast: _When = _ALWAYS
    action: int = SECCOMP_RET_USER_NOTIF


# The kernel takes a request, a descriptor and mmap's flags from the low word alone.
_OUR_REQUEST: _When = (
    (_Test(low_word(1), 0x3B00, mask=0xFF00),),
    (_Test(low_word(1), termios.FIONREAD),),
    (_Test(low_word(1), KVM_SET_DEVICE_ATTR),),
)
_MAPS_A_FILE = (
    _Test(low_word(3), 0, mask=mmap.MAP_ANONYMOUS),
    _Test(low_word(4), _WORD, _Relation.DIFFERENT),
)


#: The fourth argument is an offset in the region of vfio-pci's configuration space, 7 << 40.
_IN_CONFIGURATION = _Test(high_word(3), VFIO_PCI_CONFIG_REGION_INDEX << 8, mask=0xFFFF_FF00)


def _table(first_data_fd: int, offset_tag: int) -> tuple[_Row, ...]:
    def data_fd(*arguments: int) -> _When:
        return tuple(
            (_Test(low_word(argument), first_data_fd, _Relation.AT_LEAST),)
            for argument in arguments
        )

    def tagged(argument: int) -> _Test:
        return _Test(high_word(argument), offset_tag << 24, mask=0xFF00_0000)

    return (
        _Row("ioctl", exact=_OUR_REQUEST, fast=_OUR_REQUEST),
        _Row("read write readv writev", fast=data_fd(0)),
        _Row(
            # x86-64 passes the whole offset in its first half and ignores the second.
            "pread64 pwrite64 preadv pwritev preadv2 pwritev2",
            fast=((tagged(3),), (_IN_CONFIGURATION,), *data_fd(0)),
        ),
        _Row(
            "mmap",
            exact=(_MAPS_A_FILE,),
            fast=((*_MAPS_A_FILE, tagged(5)), (*_MAPS_A_FILE, *data_fd(4)[0])),
        ),
        _Row("splice copy_file_range", fast=data_fd(0, 2)),
        _Row("tee sendfile", fast=data_fd(0, 1)),
        _Row("vmsplice", fast=data_fd(0)),
        _Row("lseek ftruncate fallocate fsync fdatasync sync_file_range", fast=data_fd(0)),
        _Row("open openat openat2 creat"),
        _Row("access faccessat faccessat2"),
        _Row("stat lstat fstat newfstatat statx"),
        _Row("readlink readlinkat"),
        _Row("getxattr lgetxattr listxattr llistxattr"),
        _Row("io_uring_setup", action=_REFUSE),
    )


def exact_filter() -> bytes:
    """Stop every call that could touch a descriptor of ours, whatever its number."""
    return _build({row: row.exact for row in _table(0, 0)})


def fast_filter(*, first_data_fd: int, offset_tag: int) -> bytes:
    """Stop reads and writes only by number of the descriptor or tag of the offset.

    Args:
        first_data_fd: data descriptors have this number or a higher one.
        offset_tag: top byte of the offsets of device regions, 1 to 0x7F: offsets are signed.

    """
    if not 0 < offset_tag <= 0x7F:
        raise ValueError(f"the tag of an offset is 1 to 0x7f, not {offset_tag:#x}")
    if not 2 < first_data_fd <= 0x7FFF_FFFF:
        raise ValueError(f"data descriptors cannot start at {first_data_fd}; choose 3 or more")
    return _build({row: row.fast for row in _table(first_data_fd, offset_tag)})


def _build(rules: dict[_Row, _When]) -> bytes:
    code = Assembler()
    code.load(ARCH)
    code.if_equal(AUDIT_ARCH_X86_64, otherwise="refuse")
    code.load(NUMBER)
    code.if_at_least(X32_SYSCALL_BIT, then="refuse")
    for row in rules:
        for call in row.calls.split():
            code.if_equal(X86_64[call], then=row.calls)
    code.ret(SECCOMP_RET_ALLOW)
    code.label("refuse")
    code.ret(_REFUSE)
    for row, when in rules.items():
        code.label(row.calls)
        _add_rule(code, row, when)
    return code.assemble()


def _add_rule(code: Assembler, row: _Row, when: _When) -> None:
    """Add the row's action under its alternatives, in order; after them, the call passes."""
    for number, alternative in enumerate(when):
        next_alternative = f"{row.calls}, after alternative {number}"
        for test in alternative:
            code.load(test.word)
            if test.mask != _WORD:
                code.mask(test.mask)
            if test.relation is _Relation.EQUAL:
                code.if_equal(test.value, otherwise=next_alternative)
            elif test.relation is _Relation.DIFFERENT:
                code.if_equal(test.value, then=next_alternative)
            else:
                code.if_at_least(test.value, otherwise=next_alternative)
        code.ret(row.action)
        code.label(next_alternative)
    if when != _ALWAYS:
        code.ret(SECCOMP_RET_ALLOW)
