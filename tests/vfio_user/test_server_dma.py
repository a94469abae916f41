"""The client's memory: mapped from its descriptors, and reached by messages that it answers."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from devices.engine import DONE, FAILED, READ, READ_APART, WRITE, WRITE_APART, Engine
from raw_vfio_user import (
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    DMA_WRITE,
    ERROR,
    FULL,
    GET,
    GET_INFO,
    HEADER,
    MIB,
    PLAIN,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    REPORT,
    RESET,
    SET,
    START,
    STOP,
    STOP_LOGGING,
    Message,
    Raw,
    client_of,
    served,
)
from vfiomig.descriptors import Fd
from vfiomig.doors.vfio_user import line as line_module

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IOVA = 0x10_0000
PAGE = mmap.PAGESIZE
R, W, RW = 1, 2, 3


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def client(engine: Engine) -> Iterator[Raw]:
    with client_of(engine) as raw:
        yield raw


def create_memory(size: int, content: bytes = b"", *, sealed: bool = False) -> Fd:
    memory = Fd(os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.truncate(memory.fileno(), size)
    os.pwrite(memory.fileno(), content, 0)
    if sealed:
        fcntl.fcntl(memory.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return memory


def map_body(iova: int, size: int, offset: int = 0, flags: int = RW, argsz: int = 32) -> bytes:
    return struct.pack("<IIQQQ", argsz, flags, offset, iova, size)


def unmap_body(iova: int, size: int, flags: int = 0, argsz: int = 24) -> bytes:
    return struct.pack("<IIQQ", argsz, flags, iova, size)


def order(client: Raw, iova: int, length: int) -> None:
    """Say what the next command is about, to a device that may do DMA."""
    assert client.write_region(7, 4, b"\6\0") == 0
    assert client.write_region(0, 0, struct.pack("<Q", iova)) == 0
    assert client.write_region(0, 8, struct.pack("<Q", length)) == 0


def start(client: Raw, command: int) -> int:
    """Send the write that starts it; the number of the message."""
    return client.send(REGION_WRITE, struct.pack("<QIIQ", 16, 0, 8, command))


def work(client: Raw, iova: int, length: int, command: int) -> int:
    """Have DMA made that needs no message; return what came of it."""
    order(client, iova, length)
    assert client.write_region(0, 16, struct.pack("<Q", command)) == 0
    return client.read_region(0, 24, 4)[0]


def expect(client: Raw, command: int, msg_id: int | None = None) -> Message:
    message = client.receive()
    assert message is not None
    assert message.command == command
    assert msg_id is None or message.msg_id == msg_id
    return message


def answer(client: Raw, request: Message, data: bytes = b"") -> None:
    """Answer a DMA message as the specification has it."""
    client.send(request.command, request.body[:16] + data, flags=REPLY, msg_id=request.msg_id)


# By mapping.


@pytest.mark.parametrize("sealed", [False, True])
def test_memory_that_comes_with_a_descriptor_is_reached_without_messages(
    client: Raw, engine: Engine, sealed: bool
) -> None:
    with create_memory(4 * PAGE, b"to be read", sealed=sealed) as memory:
        client.good(DMA_MAP, map_body(IOVA, 2 * PAGE, PAGE * 0), [memory.fileno()])
        client.good(DMA_MAP, map_body(IOVA + 4 * PAGE, PAGE, 3 * PAGE), [memory.fileno()])
        assert work(client, IOVA, 10, READ) == DONE
        assert engine.memory[:10] == b"to be read"
        engine.memory[:4] = b"back"
        assert work(client, IOVA + 4 * PAGE + 8, 4, WRITE) == DONE
        assert os.pread(memory.fileno(), 4, 3 * PAGE + 8) == b"back"
        assert work(client, IOVA + 2 * PAGE, 4, WRITE) == FAILED


def test_a_file_on_a_disk_is_memory_too(client: Raw, engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE))
    with Fd(os.open(path, os.O_RDWR)) as memory:
        client.good(DMA_MAP, map_body(IOVA, PAGE), [memory.fileno()])
    engine.memory[:5] = b"there"
    assert work(client, IOVA, 5, WRITE) == DONE
    assert path.read_bytes()[:5] == b"there"


@pytest.mark.parametrize(("flags", "readable", "writable"), [(R, 1, 0), (W, 0, 1), (RW, 1, 1)])
def test_a_mapping_may_be_used_as_its_flags_say(
    client: Raw, flags: int, readable: int, writable: int
) -> None:
    with create_memory(PAGE) as memory:
        client.good(DMA_MAP, map_body(IOVA, PAGE, flags=flags), [memory.fileno()])
        assert work(client, IOVA, 8, READ) == (DONE if readable else FAILED)
        assert work(client, IOVA, 8, WRITE) == (DONE if writable else FAILED)


def test_what_cannot_be_mapped_is_an_errno_and_maps_nothing(client: Raw) -> None:
    reader, writer = os.pipe()
    with Fd(reader), Fd(writer), create_memory(PAGE) as memory:
        name = f"/proc/self/fd/{memory.fileno()}"
        with Fd(os.open(name, os.O_RDONLY)) as read_only:
            for body, fd, number in (
                (map_body(IOVA, PAGE), reader, errno.EINVAL),
                (map_body(IOVA, 2 * PAGE), memory.fileno(), errno.EINVAL),
                (map_body(IOVA, PAGE, PAGE), memory.fileno(), errno.EINVAL),
                (map_body(IOVA, PAGE), read_only.fileno(), errno.EPERM),
            ):
                assert client.call(DMA_MAP, body, [fd]).errno == number
        client.good(DMA_MAP, map_body(IOVA, PAGE), [memory.fileno()])


@pytest.mark.parametrize(
    ("access", "number"), [(os.O_PATH, errno.EBADF), (os.O_WRONLY, errno.EACCES)]
)
def test_a_file_that_the_client_may_not_read_is_not_read_for_it(
    client: Raw, tmp_path: Path, access: int, number: int
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(bytes(PAGE))
    with Fd(os.open(path, access | os.O_CLOEXEC)) as file:
        for flags in (R, W):
            body = map_body(IOVA, PAGE, flags=flags)
            assert client.call(DMA_MAP, body, [file.fileno()]).errno == number
    assert work(client, IOVA, 8, READ) == FAILED


def test_overlaps_are_eexist_and_unmapping_takes_one_mapping_or_all(client: Raw) -> None:
    with create_memory(8 * PAGE) as memory:
        for at in (0, 2, 4):
            client.good(DMA_MAP, map_body(IOVA + at * PAGE, 2 * PAGE), [memory.fileno()])
        for at, size in ((0, 2), (1, 1), (5, 4), (0, 99)):
            body = map_body(IOVA + at * PAGE, size * PAGE)
            assert client.call(DMA_MAP, body).errno == errno.EEXIST
        for at, size in ((0, 1), (1, 1), (0, 4), (6, 2), (0, 6)):
            body = unmap_body(IOVA + at * PAGE, size * PAGE)
            assert client.call(DMA_UNMAP, body).errno == errno.ENOENT
        body = unmap_body(IOVA + 2 * PAGE, 2 * PAGE)
        assert client.good(DMA_UNMAP, body) == body
        assert work(client, IOVA + 2 * PAGE, 8, READ) == FAILED
        assert work(client, IOVA, 8, READ) == work(client, IOVA + 4 * PAGE, 8, READ) == DONE
        body = unmap_body(0, 0, flags=2)
        assert client.good(DMA_UNMAP, body) == body
        assert work(client, IOVA, 8, READ) == FAILED


def test_any_iova_and_any_size_can_be_mapped(client: Raw) -> None:
    with create_memory(PAGE, b"at the top") as memory:
        client.good(DMA_MAP, map_body(2**64 - 256, 256), [memory.fileno()])
        client.good(DMA_MAP, map_body(0xFEE0_0001, 16, 3), [memory.fileno()])
        assert work(client, 2**64 - 256, 10, READ) == work(client, 0xFEE0_0001, 16, READ) == DONE


def test_the_mappings_of_a_client_go_with_it(engine: Engine) -> None:
    with served(engine) as path, create_memory(PAGE) as memory:
        with Raw.connect(path) as first:
            first.good(DMA_MAP, map_body(IOVA, PAGE), [memory.fileno()])
            assert work(first, IOVA, 8, WRITE) == DONE
        with Raw.connect(path) as second:
            assert work(second, IOVA, 8, WRITE) == FAILED


def test_no_more_is_mapped_than_was_agreed_on(engine: Engine) -> None:
    few = FULL.replace(b"65535", b"2    ")
    with client_of(engine, few) as client:
        for at, number in enumerate((0, 0, errno.ENOSPC)):
            assert client.call(DMA_MAP, map_body(IOVA + at * PAGE, PAGE)).errno == number


# By messages.


@pytest.mark.parametrize("command", [READ, READ_APART])
def test_a_read_asks_the_client(client: Raw, engine: Engine, command: int) -> None:
    client.good(DMA_MAP, map_body(IOVA, PAGE))
    order(client, IOVA + 8, 100)
    number = start(client, command)
    messages = [client.receive()] if command == READ else [client.receive(), client.receive()]
    (asked,) = (m for m in messages if m is not None and m.command == DMA_READ)
    assert (asked.flags, asked.body) == (0, struct.pack("<QQ", IOVA + 8, 100))
    answer(client, asked, bytes(range(100, 200)))
    if command == READ:
        expect(client, REGION_WRITE, number)
    assert wait_for_result(client) == DONE
    assert engine.memory[:100] == bytes(range(100, 200))


@pytest.mark.parametrize("head_only", [False, True])
def test_a_write_is_done_when_the_client_says_so(client: Raw, head_only: bool) -> None:
    client.good(DMA_MAP, map_body(IOVA, PAGE))
    order(client, IOVA, 64)
    number = start(client, WRITE)
    asked = expect(client, DMA_WRITE)
    assert asked.body == struct.pack("<QQ", IOVA, 64) + bytes(range(64))
    if head_only:
        client.send(DMA_WRITE, flags=REPLY, msg_id=asked.msg_id)
    else:
        answer(client, asked)
    expect(client, REGION_WRITE, number)
    assert client.read_region(0, 24, 4)[0] == DONE


def test_large_accesses_are_split_as_the_client_says(engine: Engine) -> None:
    with client_of(engine, PLAIN.replace(b"1048576", b"1000000")) as client:
        client.good(DMA_MAP, map_body(0, 1 << 40))
        order(client, 12345, 3 * MIB)
        number = start(client, WRITE)
        written = bytearray()
        while (asked := client.receive()) is not None and asked.command == DMA_WRITE:
            iova, count = struct.unpack_from("<QQ", asked.body)
            assert (iova, count) == (12345 + len(written), len(asked.body) - 16)
            assert count <= 1_000_000
            written += asked.body[16:]
            answer(client, asked)
        assert asked is not None
        assert asked.msg_id == number
        assert written == engine.memory[: 3 * MIB]
        order(client, 12345, 3 * MIB)
        number = start(client, READ)
        while (asked := client.receive()) is not None and asked.command == DMA_READ:
            _, count = struct.unpack("<QQ", asked.body)
            answer(client, asked, bytes(count))
        assert asked is not None
        assert asked.msg_id == number
        assert engine.memory[: 3 * MIB] == bytes(3 * MIB)


def test_a_client_may_send_what_its_socket_takes_at_once_and_forget_the_rest(
    engine: Engine,
) -> None:
    # As QEMU 11 answers: one call that does not wait, and what it did not take is never sent.
    content = bytes(range(256)) * (MIB // 256) + b"end"
    with client_of(engine, PLAIN) as client:
        client.good(DMA_MAP, map_body(IOVA, 2 * MIB))
        order(client, IOVA, len(content))
        number = start(client, READ)
        while (asked := client.receive()) is not None and asked.command == DMA_READ:
            iova, count = struct.unpack("<QQ", asked.body)
            data = content[iova - IOVA :][:count]
            head = (asked.msg_id, DMA_READ, 32 + len(data), REPLY, 0)
            client.sock.send(HEADER.pack(*head) + asked.body + data, socket.MSG_DONTWAIT)
        assert asked is not None
        assert asked.msg_id == number
        assert engine.memory[: len(content)] == content


def test_commands_that_come_before_the_answer_are_executed_after_it(client: Raw) -> None:
    client.good(DMA_MAP, map_body(IOVA, PAGE))
    order(client, IOVA, 4)
    first = start(client, READ)
    asked = expect(client, DMA_READ)
    others = [client.send(REGION_READ, struct.pack("<QII", 24, 0, 4)) for _ in range(5)]
    others.append(client.send(GET_INFO, struct.pack("<4I", 16, 0, 0, 0)))
    big = client.send(REGION_WRITE, struct.pack("<QII", 0, 7, 9000) + bytes(9000))
    answer(client, asked, b"data")
    expect(client, REGION_WRITE, first)
    for number in others[:5]:
        assert expect(client, REGION_READ, number).body[16:] == struct.pack("<I", DONE)
    expect(client, GET_INFO, others[5])
    assert expect(client, REGION_WRITE, big).errno == errno.EFAULT


def test_a_device_makes_dma_while_an_arc_waits_for_it(client: Raw, engine: Engine) -> None:
    client.good(DMA_MAP, map_body(IOVA, PAGE))
    order(client, IOVA, 4)
    number = start(client, WRITE_APART)
    messages = {m.command: m for m in (client.receive(), client.receive()) if m is not None}
    assert messages[REGION_WRITE].msg_id == number
    stopping = client.send(16, struct.pack("<IIII", 16, SET | 2, STOP, 0))
    time.sleep(0.05)  # so that the arc is likely to wait; without it the test is as right
    answer(client, messages[DMA_WRITE])
    assert expect(client, 16, stopping).errno == 0
    assert engine.result == DONE


def test_a_client_that_waits_for_an_answer_need_not_answer_dma_meanwhile(client: Raw) -> None:
    # As QEMU: whoever waits holds a lock that the one who answers needs.
    client.good(DMA_MAP, map_body(IOVA, PAGE))
    order(client, IOVA, 4)
    start(client, WRITE_APART)
    messages = {m.command: m for m in (client.receive(), client.receive()) if m is not None}
    client.good(DMA_MAP, map_body(IOVA + PAGE, PAGE))
    client.good(DMA_UNMAP, unmap_body(IOVA, PAGE))
    assert client.write_region(7, 4, b"\2\0") == 0  # no bus master any more
    answer(client, messages[DMA_WRITE])
    assert wait_for_result(client) == DONE


def test_a_write_that_is_under_way_is_in_the_bitmap_of_an_unmap(client: Raw) -> None:
    client.good(DMA_MAP, map_body(IOVA, 2 * PAGE))
    log_body = struct.pack("<QII2Q", PAGE, 1, 0, IOVA, 2 * PAGE)
    assert client.feature(START, SET, log_body).errno == 0
    order(client, IOVA + PAGE, 4)
    start(client, WRITE_APART)
    messages = {m.command: m for m in (client.receive(), client.receive()) if m is not None}
    body = unmap_body(IOVA, 2 * PAGE, flags=1, argsz=48) + struct.pack("<QQ", PAGE, 8)
    assert client.good(DMA_UNMAP, body) == body + struct.pack("<Q", 0b10)
    answer(client, messages[DMA_WRITE])
    assert wait_for_result(client) == DONE


def refuse(client: Raw, asked: Message) -> None:
    client.send(asked.command, flags=REPLY | ERROR, msg_id=asked.msg_id, error=errno.ENODEV)


def lie_about_the_address(client: Raw, asked: Message) -> None:
    body = struct.pack("<QQ", 77, 16) + bytes(16)
    client.send(asked.command, body, flags=REPLY, msg_id=asked.msg_id)


def answer_less(client: Raw, asked: Message) -> None:
    body = struct.pack("<QQ", IOVA, 8) + bytes(8)
    client.send(asked.command, body, flags=REPLY, msg_id=asked.msg_id)


def send_less(client: Raw, asked: Message) -> None:
    body = struct.pack("<QQ", IOVA, 16) + bytes(8)
    client.send(asked.command, body, flags=REPLY, msg_id=asked.msg_id)


def send_more(client: Raw, asked: Message) -> None:
    body = struct.pack("<QQ", IOVA, 16) + bytes(900_000)
    client.send(asked.command, body, flags=REPLY, msg_id=asked.msg_id)


def send_nothing(client: Raw, asked: Message) -> None:
    client.send(asked.command, flags=REPLY, msg_id=asked.msg_id)


@pytest.mark.parametrize(
    "lie", [refuse, lie_about_the_address, answer_less, send_less, send_more, send_nothing]
)
def test_a_client_that_answers_wrong_fails_the_dma_and_nothing_else(
    client: Raw, lie: object
) -> None:
    assert callable(lie)
    client.good(DMA_MAP, map_body(IOVA, PAGE))
    order(client, IOVA, 16)
    number = start(client, READ)
    lie(client, expect(client, DMA_READ))
    assert expect(client, REGION_WRITE, number).errno == 0
    assert client.read_region(0, 24, 4)[0] == FAILED
    assert work_by_messages(client) == DONE


@pytest.mark.parametrize(("command", "msg_id"), [(DMA_WRITE, 0), (DMA_READ, 1), (9, 0)])
def test_an_answer_that_nobody_asked_for_ends_the_connection(
    engine: Engine, command: int, msg_id: int
) -> None:
    with served(engine) as path:
        with Raw.connect(path) as client:
            client.good(DMA_MAP, map_body(IOVA, PAGE))
            order(client, IOVA, 16)
            start(client, READ)
            asked = expect(client, DMA_READ)
            body = asked.body + bytes(16)
            client.send(command, body, flags=REPLY, msg_id=asked.msg_id + msg_id)
            while (message := client.receive()) is not None:
                assert message.command == REGION_WRITE
        with Raw.connect(path) as client:
            assert engine.result == FAILED
            client.good(DMA_MAP, map_body(IOVA, PAGE))
            assert work_by_messages(client) == DONE


def test_a_client_that_does_not_answer_fails_the_dma_in_time(
    client: Raw, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "DMA_SECONDS", 0.2)
    client.good(DMA_MAP, map_body(IOVA, PAGE))
    order(client, IOVA, 16)
    number = start(client, READ)
    late = expect(client, DMA_READ)
    expect(client, REGION_WRITE, number)
    assert client.read_region(0, 24, 4)[0] == FAILED
    assert "did not answer" in engine.problem
    # As long as it owes an answer it is asked for nothing else, and nobody waits for it again.
    assert work(client, IOVA, 16, READ) == FAILED
    assert "owes the answer" in engine.problem
    answer(client, late, bytes(16))
    monkeypatch.undo()
    assert work_by_messages(client) == DONE


@pytest.mark.parametrize("command", [READ_APART, WRITE_APART])
def test_a_reset_does_not_wait_for_a_client_that_answers_no_dma_before_it(
    client: Raw, engine: Engine, monkeypatch: pytest.MonkeyPatch, command: int
) -> None:
    """As QEMU, whose thread that waits for the reply has the lock that the answer needs."""
    monkeypatch.setattr(line_module, "DMA_SECONDS", 1000.0)  # longer than this client waits
    client.good(DMA_MAP, map_body(IOVA, PAGE))
    order(client, IOVA, 16)
    start(client, command)
    messages = {m.command: m for m in (client.receive(), client.receive()) if m is not None}
    asked = messages[DMA_READ if command == READ_APART else DMA_WRITE]
    client.good(RESET)
    assert "the device is reset" in engine.problem
    # It is asked for more at once, and its late answer is nobody's.
    order(client, IOVA, 16)
    number = start(client, READ)
    again = expect(client, DMA_READ)
    answer(client, asked, bytes(16) if command == READ_APART else b"")
    answer(client, again, b"what comes now!!")
    expect(client, REGION_WRITE, number)
    assert client.read_region(0, 24, 4)[0] == DONE
    assert engine.memory[:16] == b"what comes now!!"


def test_a_client_that_resets_and_never_answers_is_asked_no_more(
    client: Raw, engine: Engine
) -> None:
    client.good(DMA_MAP, map_body(IOVA, PAGE))
    order(client, IOVA, 16)
    for _ in range(line_module.MOST_DROPPED):
        start(client, READ_APART)
        assert {m.command for m in (client.receive(), client.receive()) if m} == {
            DMA_READ,
            REGION_WRITE,
        }
        client.good(RESET)
    assert work(client, IOVA, 16, READ) == FAILED
    assert "owes the answer" in engine.problem


def test_a_client_that_leaves_fails_the_dma_at_once(engine: Engine) -> None:
    with served(engine) as path:
        with Raw.connect(path) as client:
            client.good(DMA_MAP, map_body(IOVA, PAGE))
            order(client, IOVA, 16)
            start(client, READ)
            expect(client, DMA_READ)
        with Raw.connect(path) as client:
            assert engine.result == FAILED
            client.good(GET_INFO, struct.pack("<4I", 16, 0, 0, 0))


def test_a_client_that_leaves_in_the_middle_of_an_answer_fails_the_dma(engine: Engine) -> None:
    with served(engine) as path:
        with Raw.connect(path) as client:
            client.good(DMA_MAP, map_body(IOVA, MIB))
            order(client, IOVA, MIB)
            start(client, READ)
            asked = expect(client, DMA_READ)
            size = 16 + 16 + MIB
            client.send(
                DMA_READ, asked.body + bytes(5000), flags=REPLY, msg_id=asked.msg_id, size=size
            )
        with Raw.connect(path) as client:
            client.good(GET_INFO, struct.pack("<4I", 16, 0, 0, 0))
            assert engine.result == FAILED


def test_more_commands_than_can_wait_make_the_client_wait(
    client: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "QUEUED", 4)
    monkeypatch.setattr(line_module, "DMA_SECONDS", 0.3)
    client.good(DMA_MAP, map_body(IOVA, PAGE))
    order(client, IOVA, 16)
    number = start(client, READ)
    asked = expect(client, DMA_READ)
    others = [client.send(REGION_READ, struct.pack("<QII", 24, 0, 4)) for _ in range(9)]
    answer(client, asked, bytes(16))  # behind commands for which there is no room: too late
    expect(client, REGION_WRITE, number)
    for other in others:
        assert expect(client, REGION_READ, other).body[16] == FAILED
    monkeypatch.undo()
    assert work_by_messages(client) == DONE


def work_by_messages(client: Raw) -> int:
    """Have 16 bytes read by a message; return what came of it."""
    order(client, IOVA, 16)
    number = start(client, READ)
    answer(client, expect(client, DMA_READ), bytes(16))
    expect(client, REGION_WRITE, number)
    return client.read_region(0, 24, 4)[0]


def wait_for_result(client: Raw) -> int:
    deadline = time.monotonic() + 10
    while not (result := client.read_region(0, 24, 4)[0]):
        assert time.monotonic() < deadline
    return result


# What the device wrote.


def logging_start(*ranges: tuple[int, int]) -> bytes:
    packed = b"".join(struct.pack("<QQ", iova, size) for iova, size in ranges)
    return struct.pack("<QII", PAGE, len(ranges), 0) + packed


def report(client: Raw, iova: int, size: int, page_size: int = PAGE) -> bytes:
    bitmap = -(-size // (page_size * 64)) * 8
    answer = client.feature(REPORT, GET, struct.pack("<QQQ", iova, size, page_size), room=bitmap)
    assert answer.errno == 0, os.strerror(answer.errno)
    head = struct.pack("<II3Q", 32 + bitmap, REPORT | GET, iova, size, page_size)
    assert answer.body[:32] == head
    assert len(answer.body) == 32 + bitmap
    return answer.body[32:]


def test_the_log_has_writes_by_mapping_and_by_messages(client: Raw) -> None:
    with create_memory(64 * PAGE) as memory:
        client.good(DMA_MAP, map_body(IOVA, 64 * PAGE), [memory.fileno()])
        client.good(DMA_MAP, map_body(IOVA + 64 * PAGE, 64 * PAGE))
        body = logging_start((IOVA, 128 * PAGE))
        answered = client.feature(START, SET, body)
        assert answered.errno == 0
        assert answered.body[8:] == body
        assert work(client, IOVA + 3 * PAGE, 8, WRITE) == DONE
        order(client, IOVA + 66 * PAGE, 2 * PAGE)
        start(client, WRITE)
        answer(client, expect(client, DMA_WRITE))
        expect(client, REGION_WRITE)
        assert report(client, IOVA, 128 * PAGE) == struct.pack("<QQ", 1 << 3, 0b11 << 2)
        assert report(client, IOVA, 128 * PAGE) == bytes(16)
        assert work(client, IOVA, 8, WRITE) == DONE
        assert report(client, IOVA, 64 * PAGE, 16 * PAGE) == struct.pack("<Q", 1)
        assert client.feature(STOP_LOGGING, SET).errno == 0


def test_an_unmap_tells_what_was_written_to_the_memory_before(client: Raw) -> None:
    with create_memory(4 * PAGE) as memory:
        client.good(DMA_MAP, map_body(IOVA, 4 * PAGE), [memory.fileno()])
        body = unmap_body(IOVA, 4 * PAGE, flags=1, argsz=48) + struct.pack("<QQ", PAGE, 8)
        assert client.call(DMA_UNMAP, body).errno == errno.EINVAL  # nothing logs
        assert client.feature(START, SET, logging_start((IOVA, 4 * PAGE))).errno == 0
        assert work(client, IOVA + PAGE, 2 * PAGE, WRITE) == DONE
        assert client.good(DMA_UNMAP, body) == body + struct.pack("<Q", 0b0110)
        assert client.call(DMA_UNMAP, body).errno == errno.ENOENT


@pytest.mark.parametrize(
    ("argsz", "pages", "size", "number"),
    [
        (47, PAGE, 8, errno.EINVAL),
        (40, PAGE, 0, errno.EINVAL),
        (48, 100, 8, errno.EINVAL),
        (48, 2048, 8, errno.EINVAL),
        (48, 0, 8, errno.EINVAL),
        (0xFFFF_FFFF, PAGE, 17 * MIB, errno.E2BIG),
    ],
)
def test_an_unmap_with_a_bitmap_that_cannot_be_unmaps_nothing(
    client: Raw, argsz: int, pages: int, size: int, number: int
) -> None:
    client.good(DMA_MAP, map_body(IOVA, 4 * PAGE))
    assert client.feature(START, SET, logging_start((IOVA, 4 * PAGE))).errno == 0
    body = unmap_body(IOVA, 4 * PAGE, flags=1, argsz=argsz) + struct.pack("<QQ", pages, size)
    assert client.call(DMA_UNMAP, body).errno == number
    client.good(DMA_UNMAP, unmap_body(IOVA, 4 * PAGE))


@pytest.mark.parametrize(
    ("body", "argsz", "number"),
    [
        (struct.pack("<QQQ", 0, 64 * PAGE, PAGE), 39, errno.EINVAL),
        (struct.pack("<QQQ", 0, 64 * PAGE, 3), 40, errno.EINVAL),
        (struct.pack("<QQQ", 0, 64 * PAGE, 0), 40, errno.EINVAL),
        (struct.pack("<QQQ", 0, 1 << 60, PAGE), 0xFFFF_FFFF, errno.EINVAL),
        (struct.pack("<QQQ", 0, 1 << 45, PAGE), 0xFFFF_FFFF, errno.E2BIG),
        (struct.pack("<QQQ", (1 << 64) - 1, 1 << 20, PAGE), 4096, errno.EOVERFLOW),
        (struct.pack("<QQ", 0, 1 << 20), 4096, errno.EINVAL),
        (b"", 4096, errno.EINVAL),
    ],
)
def test_a_report_that_cannot_be_is_an_errno(
    client: Raw, body: bytes, argsz: int, number: int
) -> None:
    assert client.feature(START, SET, logging_start((IOVA, 4 * PAGE))).errno == 0
    request = struct.pack("<II", argsz, REPORT | GET) + body
    assert client.call(16, request).errno == number
    assert report(client, IOVA, 4 * PAGE) == bytes(8)


def test_dma_goes_on_while_a_second_client_waits_in_the_backlog(engine: Engine) -> None:
    with (
        served(engine) as path,
        Raw.connect(path) as client,
        socket.socket(socket.AF_UNIX) as next_,
    ):
        next_.connect(path)
        client.good(DMA_MAP, map_body(IOVA, PAGE))
        assert work_by_messages(client) == DONE
