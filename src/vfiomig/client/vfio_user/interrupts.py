"""VFIO_DEVICE_SET_IRQS as messages: eventfds travel beside the bytes.

A message cannot say "none for this vector", as -1 does, and a server takes only so many
descriptors with one. What says so is a message for those vectors without any. So a request may
become several; the first of them names all the vectors, because the kernel lets the first request
settle how many there are.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack, suppress
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from vfiomig.abi import vfio, vfio_user
from vfiomig.client.vfio_user.channel import done
from vfiomig.core.irqs import datum_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfiomig.client.vfio_user.remote import Remote
    from vfiomig.core.caller import Caller
    from vfiomig.eventfd import EventFd

__all__ = ("parts_of", "set_irqs")

EVENTFD = vfio.VFIO_IRQ_SET_DATA_EVENTFD


class Part(NamedTuple):
    """One message: vectors from ``start`` on, with an eventfd each, or with none for all."""

    start: int
    vectors: int
    fds: tuple[int, ...]


def set_irqs(remote: Remote, present: int, address: int, caller: Caller) -> None:
    """Carry out a request; ``present``: how many interrupts its index has."""
    header = vfio.IrqSet.parse(caller.read(address, vfio.IrqSet.SIZE))
    size = datum_size(header, present)
    data = caller.read(address + header.SIZE, size * header.count) if size * header.count else b""
    with remote.only_while_it_runs("interrupts are set up"):
        if header.flags & EVENTFD:
            _set_eventfds(remote, header, data, caller)
        else:
            _send(remote, header, Part(header.start, header.count, ()), data)


def _set_eventfds(remote: Remote, header: vfio.IrqSet, data: bytes, caller: Caller) -> None:
    numbers = memoryview(data).cast("i").tolist() if data else []
    with ExitStack() as held:
        # Looked at before anything is sent: a bad one leaves everything as it was.
        eventfds: list[EventFd | None] = [
            held.enter_context(caller.eventfd(number)) if number >= 0 else None
            for number in numbers
        ]
        fds = [None if eventfd is None else eventfd.fileno() for eventfd in eventfds]
        parts = list(parts_of(header.start, fds, remote.limits.fds_out))
        if len(parts) == 1:
            _send(remote, header, parts[0])
            return
        everything = Part(header.start, header.count, ())
        _send(remote, header, everything)
        try:
            for part in parts:
                if part.fds:
                    _send(remote, header, part)
        except OSError:
            with suppress(OSError):  # all or none
                _send(remote, header, everything)
            raise


def parts_of(start: int, fds: Sequence[int | None], most: int) -> Iterator[Part]:
    """Cut a request into messages of at most ``most`` descriptors."""
    if not most and any(fd is not None for fd in fds):
        raise OSError(errno.EOPNOTSUPP, "the server takes no descriptors, so it has no interrupts")
    for absent, run in groupby(fds, lambda fd: fd is None):
        present = tuple(fd for fd in run if fd is not None) if not absent else ()
        if absent:
            count = sum(1 for _ in run)
            yield Part(start, count, ())
            start += count
        for at in range(0, len(present), most or 1):
            piece = present[at : at + most]
            yield Part(start, len(piece), piece)
            start += len(piece)


def _send(remote: Remote, header: vfio.IrqSet, part: Part, data: bytes = b"") -> None:
    asked = vfio.IrqSet(
        argsz=header.SIZE + len(data),
        flags=header.flags,
        index=header.index,
        start=part.start,
        count=part.vectors,
    )
    remote.channel.call(
        done, vfio_user.VFIO_USER_DEVICE_SET_IRQS, bytes(asked) + data, fds=part.fds
    )
