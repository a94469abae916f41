"""What launching says about kernels and programs that this machine does not have."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from vfiomig.doors.syscall.launch import explain_exec, explain_seccomp
from vfiomig.doors.syscall.notify import kernel_version, receive_ends_with_program
from vfiomig.doors.syscall.program import _await_end, _children


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.18.44-fc-v669", (6, 18)),
        ("5.15.0-91-generic", (5, 15)),
        ("4.18.0-513.el8.x86_64", (4, 18)),
        ("6.8.0-1065-azure", (6, 8)),
        ("7.0-rc1", (7, 0)),
        ("unknown", (0, 0)),
    ],
)
def test_versions_are_read_from_any_vendors_release(release: str, version: tuple[int, int]) -> None:
    assert kernel_version(release) == version


@pytest.mark.parametrize(
    ("release", "ends"),
    [("5.19.0", False), ("6.6.10", False), ("6.10.3", False), ("6.11.0-rc1", True), ("7.0", True)],
)
def test_receivers_of_older_kernels_poll_first(release: str, *, ends: bool) -> None:
    assert receive_ends_with_program(release) is ends


@pytest.mark.parametrize(
    ("number", "release", "words"),
    [
        (errno.EINVAL, "5.15.0-91-generic", "run Linux 5.19 or later"),
        (errno.EINVAL, "5.18.19", "WAIT_KILLABLE_RECV"),
        (errno.EINVAL, "6.1.0", "CONFIG_SECCOMP_FILTER"),
        (errno.ENOSYS, "4.4.0", "CONFIG_SECCOMP_FILTER"),
        (errno.EPERM, "6.1.0", "sandbox"),
        (errno.EACCES, "6.1.0", "sandbox"),
    ],
)
def test_a_machine_without_the_mechanism_is_told_what_it_lacks(
    number: int, release: str, words: str
) -> None:
    assert words in str(explain_seccomp(number, release))


def test_a_kernel_that_gets_as_far_as_the_missing_filter_has_all_flags() -> None:
    assert explain_seccomp(errno.EFAULT, "6.1.0") is None


@pytest.mark.parametrize(
    ("name", "number", "exists", "code", "words"),
    [
        ("tool", errno.ENOENT, False, 127, "no folder of PATH"),
        ("tool", errno.ENOENT, True, 127, "no folder of PATH"),  # a file here is not meant
        ("./tool", errno.ENOENT, False, 127, "no such file"),
        ("/dev/null/tool", errno.ENOTDIR, False, 127, "no such file"),
        ("./tool", errno.ENOENT, True, 126, "interpreter"),
        ("./tool", errno.EACCES, True, 126, "chmod +x"),
        ("/private/tool", errno.EACCES, False, 126, "may not look into its folder"),
        ("tool", errno.EACCES, False, 126, "chmod +x"),
        ("./tool", errno.ENOEXEC, True, 126, "#!"),
        ("./tool", errno.E2BIG, True, 126, "too long"),
    ],
)
def test_a_program_that_does_not_start_has_a_shells_exit_code(
    name: str, number: int, exists: bool, code: int, words: str
) -> None:
    error = explain_exec(name, number, exists=exists)
    assert error.exit_code == code
    assert words in str(error)
    assert str(error).startswith(name)


def test_orphans_are_looked_for_another_time_where_no_descriptor_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(Path, "glob", refuse)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert not list(_children())
    _await_end(os.getpid(), sys.float_info.max)
