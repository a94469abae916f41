"""A vfio-user server that behaves as libvfio-user does where a client would not expect it.

It is written from the layouts of the specification, with ``struct`` alone, and shares no code
with what it tests. What it does, knowingly:

- a body is what one ``recv`` brings; a shorter one is answered with EINVAL, and the rest of it is
  taken for headers
- a message over 1 MiB and 32 bytes is answered with EINVAL, and its body is taken for headers
- MIG_DATA_READ is answered with as many bytes as were asked for, zeros behind the last one
- a request that fails late is answered with an error and a payload
- in STOP and STOP_COPY nearly everything is EINVAL, a reset as well
- neither a reset nor the end of a connection changes the migration state
- the DMA log tells of exactly one mapping, of what was written through a descriptor

Capabilities are STOP_COPY and PRE_COPY, without P2P.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import queue
import select
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType
    from typing import Self

HEADER = struct.Struct("<HHIII")  # msg_id, command, size, flags, errno
REPLY, ERROR, NO_REPLY = 0x1, 0x20, 0x10
VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, REGION_INFO, IRQ_INFO = 1, 2, 3, 4, 5, 7
SET_IRQS, REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE = 8, 9, 10, 11, 12
RESET, FEATURE, DATA_READ, DATA_WRITE, PRECOPY_INFO = 13, 16, 17, 18, 0x8079
LIMIT = (1 << 20) + 32
STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY = 1, 2, 3, 4, 6
ARCS = {
    STOP: (RUNNING, STOP_COPY, RESUMING),
    RUNNING: (STOP, PRE_COPY),
    STOP_COPY: (STOP,),
    RESUMING: (STOP,),
    PRE_COPY: (RUNNING, STOP_COPY),
}
WAYS = {
    (RUNNING, STOP_COPY): (STOP, STOP_COPY),
    (RUNNING, RESUMING): (STOP, RESUMING),
    (RESUMING, RUNNING): (STOP, RUNNING),
    (STOP, PRE_COPY): (RUNNING, PRE_COPY),
    (PRE_COPY, STOP): (RUNNING, STOP),
    (PRE_COPY, RESUMING): (RUNNING, STOP, RESUMING),
    (STOP_COPY, RUNNING): (STOP, RUNNING),
    (STOP_COPY, RESUMING): (STOP, RESUMING),
    (RESUMING, STOP_COPY): (STOP, STOP_COPY),
    (RESUMING, PRE_COPY): (STOP, RUNNING, PRE_COPY),
}
ALWAYS = {VERSION, REGION_READ, REGION_WRITE, FEATURE, DATA_READ}
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
BAR0_SIZE = 4096
CONFIG = bytes.fromhex("f41af010") + bytes(252)


class Refused(Exception):
    """A request is answered with an error, and perhaps a payload."""

    def __init__(self, number: int, payload: bytes = b"") -> None:
        super().__init__(number)
        self.number = number
        self.payload = payload


@dataclass
class Mapped:
    """Memory that the client gave; ``content`` if it came with a descriptor."""

    size: int
    flags: int
    content: mmap.mmap | None
    dirty: set[int] = field(default_factory=set)


@dataclass
class Options:
    """What else a server may do."""

    #: Changes replies on their way out, or keeps them back: command, reply.
    mangle: Callable[[int, bytes], bytes | None] | None = None
    #: Called with the server before each request.
    before: Callable[[CStyleServer, int], None] | None = None
    #: States whose arc fails, and what with.
    fails: dict[int, int] = field(default_factory=dict)
    minor: int = 2
    maps_files: bool = True
    migratable: bool = True
    #: Without, memory is accepted and ignored, and a DMA log is the end of the server.
    dma: bool = True
    #: Not as libvfio-user: it speaks the extension, and takes messages however they come.
    mig_stream: bool = False
    #: What is left to read in PRE_COPY, for the extension.
    precopy_info: tuple[int, int, int] = (0, 0, 0)


class CStyleServer:
    """Serves one client after the other in a thread; ``state`` is the device's own bytes."""

    def __init__(self, path: Path, state: bytes = b"", options: Options | None = None) -> None:
        self.options = options or Options()
        self.state_bytes = state
        self.early = b""
        self.migration = RUNNING
        self.position = 0
        self.loaded = hashlib.sha256()
        self.loaded_bytes = 0
        self.memory: dict[int, Mapped] = {}
        self.logging = False
        self.bar0 = bytearray(BAR0_SIZE)
        self.eventfds: dict[int, int] = {}
        self.resets = 0
        #: Every request: command, body, how many descriptors came along.
        self.seen: list[tuple[int, bytes, int]] = []
        self.transitions: list[int] = []
        self.connection: socket.socket | None = None
        self._client_transfer = 1 << 20
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(0)
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._called = os.eventfd(0, os.EFD_CLOEXEC)
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="c-style-server", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()
        os.close(self._called)
        self._forget()

    def do(self, job: Callable[[], None]) -> None:
        """Have the server's thread do something, as a device would, and wait until it is done.

        Nobody needs to wait for a reply meanwhile; but that thread answers nobody until then.
        """
        done = threading.Event()
        failures: list[BaseException] = []

        def run() -> None:
            try:
                job()
            except (OSError, AssertionError) as failure:
                failures.append(failure)
            done.set()

        self._jobs.put(run)
        os.eventfd_write(self._called, 1)
        assert done.wait(50), "the server's thread does not come to it"
        if failures:
            raise failures[0]

    def hang_up(self) -> None:
        connection = self.connection
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        while not self._ended:
            try:
                self.connection, _ = self._listener.accept()
            except OSError:
                return
            with self.connection as connection, suppress(ConnectionError):
                self._serve(connection)
            self.connection = None
            self._forget()

    def _forget(self) -> None:
        for mapped in self.memory.values():
            if mapped.content is not None:
                mapped.content.close()
        for number in self.eventfds.values():
            os.close(number)
        self.memory.clear()
        self.eventfds.clear()

    def _serve(self, connection: socket.socket) -> None:
        greeted = False
        while True:
            ready, _, _ = select.select([connection.fileno(), self._called], [], [])
            if self._called in ready:
                os.eventfd_read(self._called)
                self._jobs.get()()
                continue
            header, fds, _, _ = socket.recv_fds(connection, HEADER.size, 8)
            if len(header) < HEADER.size:
                return  # a header in two pieces is a client that went away
            try:
                keep_on = self._take(connection, header, fds, greeted)
            finally:
                for fd in fds:
                    os.close(fd)
            greeted = True
            if not keep_on:
                return

    def _take(
        self, connection: socket.socket, header: bytes, fds: list[int], greeted: bool
    ) -> bool:
        msg_id, command, size, flags, _ = HEADER.unpack(header)
        if flags & 0xF or not HEADER.size <= size <= LIMIT:
            self._reply(connection, msg_id, command, flags, errno.EINVAL)
            return True  # and the body is read as what it is not
        wanted = size - HEADER.size
        whole = socket.MSG_WAITALL if self.options.mig_stream else 0
        body = connection.recv(wanted, whole) if wanted else b""
        if len(body) < wanted:
            self._reply(connection, msg_id, command, flags, errno.EINVAL)
            return True
        self.seen.append((command, body if len(body) < 4096 else b"", len(fds)))
        if self.options.before is not None:
            self.options.before(self, command)
        number, payload = 0, b""
        try:
            if greeted is (command == VERSION):
                raise Refused(errno.EINVAL)
            stopped = self.migration in {STOP, STOP_COPY}
            if stopped and command not in ALWAYS:
                raise Refused(errno.EINVAL)
            payload = HANDLERS[command](self, body, fds)
        except Refused as refusal:
            number, payload = refusal.number, refusal.payload
        except KeyError:
            number = errno.EINVAL
        self._reply(connection, msg_id, command, flags, number, payload)
        return greeted or not number

    def _reply(
        self,
        connection: socket.socket,
        msg_id: int,
        command: int,
        flags: int,
        number: int,
        payload: bytes = b"",
    ) -> None:
        if flags & NO_REPLY:
            return
        kind = REPLY | ERROR * bool(number)
        reply = HEADER.pack(msg_id, command, HEADER.size + len(payload), kind, number) + payload
        mangled = reply if self.options.mangle is None else self.options.mangle(command, reply)
        if mangled is not None:
            connection.sendall(mangled)

    # What is asked.

    def version(self, body: bytes, fds: list[int]) -> bytes:
        major, minor = struct.unpack_from("<HH", body)
        said = json.loads(body[4:-1])["capabilities"] if len(body) > 4 else {}
        if major or fds or (len(body) > 4 and body[-1]):
            raise Refused(errno.EINVAL)
        page = said.get("migration", {}).get("pgsize", mmap.PAGESIZE)
        if page != mmap.PAGESIZE:
            raise Refused(errno.EINVAL)
        self._client_transfer = said.get("max_data_xfer_size", 1 << 20)
        extension = ', "mig_stream": {"version": 1}' if self.options.mig_stream else ""
        text = (
            '{ "capabilities": { "max_msg_fds": 8, "max_data_xfer_size": 1048576, '
            f'"migration": {{ "pgsize": 4096 }}{extension} }} }}'
        )
        return struct.pack("<HH", 0, min(minor, self.options.minor)) + text.encode() + b"\0"

    def dma_map(self, body: bytes, fds: list[int]) -> bytes:
        if not self.options.dma:
            return b""
        argsz, flags, offset, address, size = struct.unpack("<IIQQQ", body)
        if argsz < 32 or flags & ~15 or not size:
            raise Refused(errno.EINVAL)
        for start, mapped in self.memory.items():
            if start < address + size and address < start + mapped.size:
                raise Refused(errno.EINVAL)
        content = None
        if fds:
            if not self.options.maps_files:
                raise Refused(errno.ENODEV)
            protection = mmap.PROT_READ * bool(flags & 1) | mmap.PROT_WRITE * bool(flags & 2)
            content = mmap.mmap(fds[0], size, prot=protection, offset=offset)
        self.memory[address] = Mapped(size, flags, content)
        return b""

    def dma_unmap(self, body: bytes, fds: list[int]) -> bytes:
        if not self.options.dma:
            return b""
        argsz, flags, address, size = struct.unpack_from("<IIQQ", body)
        mapped = self.memory.get(address)
        if mapped is None or mapped.size != size:
            raise Refused(errno.ENOENT)
        reply = body[:24]
        if flags & 1:
            page, length = struct.unpack_from("<QQ", body, 24)
            if argsz < 40 + length or not self.logging or mapped.content is None:
                raise Refused(errno.EINVAL)
            reply = body[:40] + self._bitmap(mapped, page)
        if mapped.content is not None:
            mapped.content.close()
        del self.memory[address]
        return reply

    def get_info(self, body: bytes, fds: list[int]) -> bytes:
        return struct.pack("<IIII", 16, 3, 9, 5)

    def region_info(self, body: bytes, fds: list[int]) -> bytes:
        argsz, _, index, _, _, _ = struct.unpack("<IIIIQQ", body)
        if argsz < 32 or index >= 9:
            raise Refused(errno.EINVAL)
        size = {0: BAR0_SIZE, 7: len(CONFIG)}.get(index, 0)
        return struct.pack("<IIIIQQ", 32, 3 if size else 0, index, 0, size, 0)

    def irq_info(self, body: bytes, fds: list[int]) -> bytes:
        _, _, index, _ = struct.unpack("<IIII", body)
        if index >= 5:
            raise Refused(errno.EINVAL)
        return struct.pack("<IIII", 16, 1, index, {0: 1, 2: 4, 4: 1}.get(index, 0))

    def set_irqs(self, body: bytes, fds: list[int]) -> bytes:
        _, flags, index, start, count = struct.unpack_from("<IIIII", body)
        present = {0: 1, 2: 4, 4: 1}.get(index, 0)
        if start >= present or start + count > present or (fds and len(fds) != count):
            raise Refused(errno.EINVAL)
        if flags & 4:  # eventfds; without any the vectors are disabled
            for vector in range(start, start + count):
                if (former := self.eventfds.pop(vector, None)) is not None:
                    os.close(former)
            for vector, fd in enumerate(fds, start):
                self.eventfds[vector] = os.dup(fd)
        return b""

    def region_read(self, body: bytes, fds: list[int]) -> bytes:
        offset, region, count = struct.unpack("<QII", body)
        content = {0: bytes(self.bar0), 7: CONFIG}.get(region, b"")
        if self.migration == STOP_COPY or offset + count > len(content):
            raise Refused(errno.EINVAL, body + bytes(count))
        return (body + content[offset : offset + count]) if count else b""

    def region_write(self, body: bytes, fds: list[int]) -> bytes:
        offset, region, count = struct.unpack_from("<QII", body)
        bad = region != 0 or offset + count > BAR0_SIZE or len(body) != 16 + count
        if bad or self.migration == STOP_COPY:
            raise Refused(errno.EINVAL, body[:16])
        self.bar0[offset : offset + count] = body[16:]
        return body[:16] if count else b""

    def reset(self, body: bytes, fds: list[int]) -> bytes:
        self.resets += 1
        self.bar0[:] = bytes(BAR0_SIZE)
        return b""

    def feature(self, body: bytes, fds: list[int]) -> bytes:
        argsz, flags = struct.unpack_from("<II", body)
        index, operation = flags & 0xFFFF, flags & (GET | SET | PROBE)
        allowed = {1: GET, 2: GET | SET, 6: SET, 7: SET, 8: GET}.get(index, 0)
        if self.options.mig_stream:
            allowed |= {9: GET, 12: SET}.get(index, 0)
        if not self.options.migratable or not allowed or operation & (GET | SET) & ~allowed:
            raise Refused(errno.EINVAL)
        if operation & PROBE:
            return body
        least = 16 if operation == GET and index < 8 else len(body)
        if operation not in {GET, SET} or argsz < least:
            raise Refused(errno.EINVAL)
        return self._get(index, argsz, body) if operation == GET else self._set(index, body)

    def _get(self, index: int, argsz: int, body: bytes) -> bytes:
        if index == 8:
            return self._report(argsz, body)
        answers = {
            1: struct.pack("<Q", 5),
            2: struct.pack("<II", self.migration, 0),
            9: struct.pack("<Q", len(self.state_bytes)),
        }
        return body[:8] + answers[index]

    def _set(self, index: int, body: bytes) -> bytes:
        if index == 2:
            self._walk(struct.unpack_from("<I", body, 8)[0], body)
        elif index in {6, 7}:
            if not self.options.dma:
                self.hang_up()
                raise ConnectionError
            self.logging = index == 6
        return body

    def ask_precopy_info(self, body: bytes, fds: list[int]) -> bytes:
        if not self.options.mig_stream or self.migration != PRE_COPY:
            raise Refused(errno.EINVAL)
        return body[:4] + struct.pack("<IQQ", *self.options.precopy_info)

    def _walk(self, target: int, body: bytes) -> None:
        if target == self.migration:
            return
        if target in ARCS[self.migration]:
            steps: tuple[int, ...] = (target,)
        elif (self.migration, target) in WAYS:
            steps = WAYS[self.migration, target]
        else:
            raise Refused(errno.EINVAL, body)
        for step in steps:
            number = self.options.fails.get(step, 0)
            if number:
                raise Refused(number, body)
            if step in {PRE_COPY, STOP_COPY, RESUMING} and self.migration != PRE_COPY:
                self.position = 0
                self.loaded, self.loaded_bytes = hashlib.sha256(), 0
            self.migration = step
            self.transitions.append(step)

    def _report(self, argsz: int, body: bytes) -> bytes:
        iova, length, page = struct.unpack_from("<QQQ", body, 8)
        mapped = self.memory.get(iova)
        if mapped is None:
            raise Refused(errno.ENOENT)
        if mapped.size != length:
            raise Refused(errno.ENOTSUP)
        if mapped.content is None or not self.logging or length < page:
            raise Refused(errno.EINVAL)
        bitmap = self._bitmap(mapped, page)
        if argsz < 32 + len(bitmap):
            raise Refused(errno.EINVAL)
        return body + bitmap

    def _bitmap(self, mapped: Mapped, page: int) -> bytes:
        bits = 0
        for at in mapped.dirty:
            bits |= 1 << (at // page)
        mapped.dirty.clear()
        return bits.to_bytes(-(-mapped.size // (page * 64)) * 8, "little")

    def data_read(self, body: bytes, fds: list[int]) -> bytes:
        argsz, size = struct.unpack("<II", body)
        if self.migration not in {PRE_COPY, STOP_COPY}:
            raise Refused(errno.EINVAL)
        if argsz < 8 + size or size > self._client_transfer:
            raise Refused(errno.EINVAL)
        data = self.early[self.position : self.position + size]
        if self.migration == STOP_COPY and not data:
            start = self.position - len(self.early)
            data = self.state_bytes[start : start + size]
        if not data and self.options.mig_stream and self.migration == PRE_COPY:
            raise Refused(errno.ENOMSG)
        self.position += len(data)
        return struct.pack("<II", 8 + len(data), len(data)) + data.ljust(size, b"\0")

    def data_write(self, body: bytes, fds: list[int]) -> bytes:
        argsz, size = struct.unpack_from("<II", body)
        if self.migration != RESUMING or argsz < 8 + size or len(body) != 8 + size:
            raise Refused(errno.EINVAL)
        self.loaded.update(body[8:])
        self.loaded_bytes += size
        return b""

    # What the device asks of the client's memory.

    def write_memory(self, address: int, data: bytes) -> None:
        """Write as the device does: by a descriptor where there is one."""
        for start, mapped in self.memory.items():
            if mapped.content is not None and start <= address < start + mapped.size:
                at = address - start
                mapped.content[at : at + len(data)] = data
                mapped.dirty.update(range(at, at + len(data)))
                return
        self.ask(DMA_WRITE, struct.pack("<QQ", address, len(data)) + data)

    def read_memory(self, address: int, count: int) -> bytes:
        return self.ask(DMA_READ, struct.pack("<QQ", address, count))[16:]

    def ask(self, command: int, body: bytes) -> bytes:
        """Ask the client, which may be done while it waits or not, but by one thread."""
        connection = self.connection
        assert connection is not None
        connection.sendall(HEADER.pack(1, command, HEADER.size + len(body), 0, 0) + body)
        header = _receive(connection, HEADER.size)
        msg_id, answered, size, flags, number = HEADER.unpack(header)
        payload = _receive(connection, size - HEADER.size)
        assert (msg_id, answered, flags & 0xF) == (1, command, REPLY)
        if flags & ERROR:
            raise OSError(number, os.strerror(number))
        return payload


def _receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError
        data += piece
    return bytes(data)


HANDLERS: dict[int, Callable[[CStyleServer, bytes, list[int]], bytes]] = {
    VERSION: CStyleServer.version,
    DMA_MAP: CStyleServer.dma_map,
    DMA_UNMAP: CStyleServer.dma_unmap,
    GET_INFO: CStyleServer.get_info,
    REGION_INFO: CStyleServer.region_info,
    IRQ_INFO: CStyleServer.irq_info,
    SET_IRQS: CStyleServer.set_irqs,
    REGION_READ: CStyleServer.region_read,
    REGION_WRITE: CStyleServer.region_write,
    RESET: CStyleServer.reset,
    FEATURE: CStyleServer.feature,
    DATA_READ: CStyleServer.data_read,
    DATA_WRITE: CStyleServer.data_write,
    PRECOPY_INFO: CStyleServer.ask_precopy_info,
}
