"""Devices whose data_fds are not as they have to be: a program that finds them, under the door.

What a data_fd is as a descriptor shows of real ones only, so these faults are made on the way
between the checks and the system. ``python descriptor_mutants.py TARGET`` runs for each fault the
check that it is for, and prints what came of it as JSON.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

from vfiomig.checks import Suite, find
from vfiomig.checks.raw import UNSET_FD, Raw, Reply
from vfiomig.client import target_maker
from vfiomig.client.kernel import KernelTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.abi.uapi import UapiStruct

#: Seconds for a check; one that polls in vain takes half of them.
DEADLINE = 3.0


class Fault(NamedTuple):
    """What is wrong, the check that has to find it, and what puts it wrong while a stack is open."""

    check: str
    put: Callable[[ExitStack], None]


def swapped(swap: Callable[[int, ExitStack], object]) -> Callable[[ExitStack], None]:
    """Do something to every data_fd that a request gives."""
    original = Raw.set_state

    def put(stack: ExitStack) -> None:
        def set_state(raw: Raw, target: int, data_fd: int = UNSET_FD) -> Reply:
            reply = original(raw, target, data_fd)
            if not reply.errno and reply.data_fd >= 0:
                swap(reply.data_fd, stack)
            return reply

        stack.enter_context(mock.patch.object(Raw, "set_state", set_state))

    return put


def inherited(data_fd: int, _: ExitStack) -> None:
    fcntl.fcntl(data_fd, fcntl.F_SETFD, 0)


def a_file(data_fd: int, _: ExitStack) -> None:
    """Put something there that can be sought in, mapped, and not watched by epoll."""
    file = os.memfd_create("data_fd")
    os.truncate(file, 4096)
    os.dup2(file, data_fd)
    os.close(file)


def a_silent_pipe(data_fd: int, stack: ExitStack) -> None:
    read_end, write_end = os.pipe()
    os.dup2(read_end, data_fd)
    os.close(read_end)
    stack.callback(os.close, write_end)


def instead(name: str, fault: Callable[..., int]) -> Callable[[ExitStack], None]:
    """Let the transport do another thing; ``fault`` gets what it did, and the arguments."""
    original = getattr(KernelTransport, name)

    def put(stack: ExitStack) -> None:
        def call(transport: KernelTransport, *arguments: object) -> int:
            return fault(lambda: original(transport, *arguments), *arguments)

        stack.enter_context(mock.patch.object(KernelTransport, name, call))

    return put


def two_positions(call: Callable[[], int], data_fd: int, buffer: memoryview) -> int:
    """What a duplicate reads is the start of the stream, again."""
    link = os.readlink(f"/proc/self/fd/{data_fd}")
    same = [int(n) for n in os.listdir("/proc/self/fd") if _link(n) == link]
    if data_fd == min(same):
        return call()
    buffer[:1] = b"\xee"
    return 1


def _link(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""  # that of the listing


def bytes_are_lost_at_a_fault(call: Callable[[], int], data_fd: int, buffer: memoryview) -> int:
    try:
        count = call()
    except OSError as failure:
        if failure.errno == errno.EFAULT:
            os.read(data_fd, 16)
        raise
    if 0 < count < len(buffer):
        os.read(data_fd, 1)
    return count


def bytes_come_from_nowhere(call: Callable[[], int], data_fd: int, _: memoryview) -> int:
    try:
        return call()
    except OSError as failure:
        if failure.errno == errno.EFAULT:
            os.write(data_fd, b"\0")
        raise


def a_number_is_kept(
    call: Callable[[], int], _on: int, _number: int, _argument: UapiStruct | None
) -> int:
    try:
        return call()
    except OSError as failure:
        if failure.errno == errno.EFAULT:
            LEAKED.append(os.dup(0))
        raise


LEAKED: list[int] = []

FAULTS = {
    "a data_fd is inherited": Fault("sessions.a-data-fd-is-close-on-exec", swapped(inherited)),
    "a data_fd is open for both": Fault(
        "sessions.the-access-mode-is-that-of-the-session", swapped(a_file)
    ),
    "a data_fd is a file": Fault("sessions.a-data-fd-cannot-be-sought-in", swapped(a_file)),
    "a data_fd can be mapped": Fault("sessions.a-data-fd-cannot-be-mapped", swapped(a_file)),
    "epoll does not take it": Fault("sessions.a-data-fd-can-be-watched-by-epoll", swapped(a_file)),
    "data do not show": Fault("sessions.a-saving-data-fd-polls-readable", swapped(a_silent_pipe)),
    "the end does not show": Fault("sessions.a-dead-data-fd-polls-hung-up", swapped(a_silent_pipe)),
    "a duplicate reads for itself": Fault(
        "sessions.a-duplicate-is-the-same-stream", instead("readinto", two_positions)
    ),
    "a fault takes bytes": Fault(
        "saving.a-read-into-no-memory-takes-nothing",
        instead("readinto", bytes_are_lost_at_a_fault),
    ),
    "half a fault takes bytes": Fault(
        "saving.a-buffer-that-ends-early-is-filled-so-far",
        instead("readinto", bytes_are_lost_at_a_fault),
    ),
    "a fault writes bytes": Fault(
        "resuming.a-write-from-no-memory-gives-nothing",
        instead("write", bytes_come_from_nowhere),
    ),
    "a number is kept": Fault(
        "exhaustion.a-number-that-cannot-be-told-is-given-back",
        instead("ioctl", a_number_is_kept),
    ),
}


def main(target: str) -> None:
    found = {}
    for name, fault in FAULTS.items():
        with ExitStack() as stack, Suite(target_maker(target), deadline=DEADLINE) as suite:
            check = find(fault.check)
            good = suite.run_check(check)
            fault.put(stack)
            bad = suite.run_check(check)
        found[name] = [str(good.verdict), str(bad.verdict), bad.saw]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
