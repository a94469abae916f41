"""A vfio-user server against one of fifty lines that receives and replies and looks at nothing.

A C program asks for 4 bytes of a region again and again, and moves a state out and back in. Either
server runs in a thread of this process, once pinned to one CPU together with the client, and once
wherever they like. Also: how much this process grows while a state goes through.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from harness import Measurement, compiled, peak, reset_peak, result_of

from vfiomig import Device, StateReader
from vfiomig.doors.vfio_user import Server
from vfiomig.models import make
from vfiomig.models.spec import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    #: Serves one client at a path, as a context.
    Serve = Callable[[str], AbstractContextManager[None]]

__all__ = ("measure",)

MIB = 1 << 20
HEADER = struct.Struct("<HHIII")
REGION_READ, MIG_DATA_READ, MIG_DATA_WRITE = 9, 17, 18
#: Of so many the best counts for a round, on either side: one run moves a state in a quarter of a
#: second, and a machine that has something else to do meanwhile makes any of them twice as long.
TRIES = 3
ACCESS, DATA = struct.Struct("<HHIIIQII"), struct.Struct("<HHIIIII")


def serve_minimally(listener: socket.socket, memory: memoryview) -> None:
    """Answer one client: receive a header, receive a body, reply."""
    client, _ = listener.accept()
    header, wait, at = bytearray(HEADER.size), socket.MSG_WAITALL, 0
    with client:
        while client.recv_into(header, HEADER.size, wait) == HEADER.size:
            msg_id, command, size, _, _ = HEADER.unpack(header)
            if command == MIG_DATA_WRITE:
                client.recv(8, wait)
                client.recv_into(memory[at:], size - 24, wait)
                at += size - 24
                client.sendall(HEADER.pack(msg_id, command, 16, 1, 0))
                continue
            body = client.recv(size - HEADER.size, wait)
            if command == REGION_READ:
                offset, region, count = struct.unpack("<QII", body)
                reply = ACCESS.pack(msg_id, command, 32 + count, 1, 0, offset, region, count)
                client.sendall(reply + memory[offset : offset + count])
            elif command == MIG_DATA_READ:
                _, count = struct.unpack("<II", body)
                data = memory[at : at + count]
                at += len(data)
                reply = DATA.pack(msg_id, command, 24 + len(data), 1, 0, 8 + len(data), len(data))
                send_both(client, reply, data)
            else:  # a change of state, or the version
                at = 0
                client.sendall(HEADER.pack(msg_id, command, 16, 1, 0))


def send_both(client: socket.socket, head: bytes, data: memoryview) -> None:
    sent = client.sendmsg((head, data))
    if sent < len(head) + len(data):
        client.sendall(data[sent - len(head) :])


@contextmanager
def minimal(path: str, memory: memoryview) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve_minimally, args=(listener, memory))
        thread.start()
        yield
        thread.join()


class Plain(Device):
    """Memory and nothing else: a device that makes or checks its content would hide in that time.

    Its memory is the minimal server's, so that both move the same bytes.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def save(self) -> Iterator[memoryview]:
        yield self._memory

    def load(self, state: StateReader) -> None:
        state.readinto(self._memory)


class Passing(Device):
    """A state of any size that it keeps nothing of."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._piece = memoryview(bytearray(MIB))

    def save(self) -> Iterator[memoryview]:
        for _ in range(self._size // MIB):
            yield self._piece

    def load(self, state: StateReader) -> None:
        while state.readinto(self._piece):
            pass


@contextmanager
def ours(path: str, make_device: Callable[[], Device]) -> Iterator[None]:
    with Server(make_device(), path):
        yield


@contextmanager
def on_cpus(cpus: set[int]) -> Iterator[None]:
    """Let this process and its children run there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ask(binary: Path, serve: Serve, *words: object) -> list[float]:
    """Run the client against a server; return its numbers."""
    with tempfile.TemporaryDirectory(prefix="vfiomig-bench-") as folder:
        path = f"{folder}/s"

        def start(argv: Sequence[str | Path]) -> None:
            with serve(path):
                subprocess.run(argv, check=True)

        return result_of(binary, start, path, *words)


def measure(size: str = "1G", count: int = 20_000, rounds: int = 5) -> list[Measurement]:
    memory = memoryview(bytearray(b"\x5a") * parse_size(size))
    peer = partial(minimal, memory=memory)
    everywhere = os.sched_getaffinity(0)
    found = []
    with compiled("vfio_user") as binary:
        for name, cpus in (("pinned", {min(everywhere)}), ("unpinned", everywhere)):
            with on_cpus(cpus):
                found.append(_region(binary, peer, count, rounds, name))
                for chunk in (MIB, 16 * MIB):
                    found += _state(binary, peer, memory, chunk, rounds, name)
        del peer, memory
        found.append(_growth(binary, parse_size(size)))
    return found


def _region(binary: Path, peer: Serve, count: int, rounds: int, where: str) -> Measurement:
    device = partial(ours, make_device=partial(make, "pattern,size=1M"))
    pairs = [
        (ask(binary, device, "region", count)[0], ask(binary, peer, "region", count)[0])
        for _ in range(rounds)
    ]
    return Measurement(
        f"4-byte REGION_READ against the minimal server, {where}",
        statistics.median(own / other for own, other in pairs),
        at_most=1.25,
        details={"us": [(round(own, 1), round(other, 1)) for own, other in pairs]},
    )


def _state(
    binary: Path, peer: Serve, memory: memoryview, chunk: int, rounds: int, where: str
) -> list[Measurement]:
    device = partial(ours, make_device=partial(Plain, memory))
    reading, writing = [], []
    for _ in range(rounds):
        tries = [
            [speeds(*ask(binary, serve, "state", chunk)) for serve in (device, peer)]
            for _ in range(TRIES)
        ]
        (read, write), (plain_read, plain_write) = (
            map(max, zip(*side, strict=True)) for side in zip(*tries, strict=True)
        )
        reading.append((read, plain_read))
        writing.append((write, plain_write))
    return [
        Measurement(
            f"{command} of {chunk // MIB} MiB against the minimal server, {where}",
            statistics.median(own / other for own, other in pairs),
            at_least=0.9,
            details={"GiB_per_s": [(round(own, 2), round(other, 2)) for own, other in pairs]},
        )
        for command, pairs in (("MIG_DATA_READ", reading), ("MIG_DATA_WRITE", writing))
    ]


def speeds(read_s: float, write_s: float, total: float) -> tuple[float, float]:
    """In GiB a second."""
    return total / read_s / 2**30, total / write_s / 2**30


def _growth(binary: Path, size: int) -> Measurement:
    before = reset_peak()
    ask(binary, partial(ours, make_device=partial(Passing, size)), "state", 16 * MIB)
    return Measurement("server grows (MiB)", (peak() - before) / 1024, at_most=64)
