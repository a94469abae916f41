"""Counts and lengths that contradict each other, in requests and in replies, and those that do not.

Each row is a payload and what it gives: an errno, or what it means.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

import pytest

from vfiomig.abi import vfio
from vfiomig.errors import WireError
from vfiomig.wire import replies, requests
from wire_peers import (
    MIB,
    REPLY,
    REQUEST_PARSERS,
    agreed,
    answered,
    arrival,
    asked,
    message,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfiomig.wire import Reply, Request

EINVAL, E2BIG, EPROTO = errno.EINVAL, errno.E2BIG, errno.EPROTO
TOP = 1 << 64


def outcome(parse: Callable[..., Any], message: Request | Reply, *args: object) -> object:
    """Return the errno that parsing raises, or what it returns."""
    try:
        return parse(message, *args)
    except WireError as error:
        return error.errno


# Requests.


def dma_map(argsz: int, flags: int, offset: int, addr: int, size: int) -> bytes:
    return struct.pack("<IIQQQ", argsz, flags, offset, addr, size)


@pytest.mark.parametrize(
    ("payload", "fds", "result"),
    [
        (dma_map(32, 3, 0, 0x1000, 0x1000), 0, None),
        (dma_map(32, 0, 0, 0, 1), 0, None),
        (dma_map(1 << 31, 3, 0, 0x1000, 0x1000), 0, None),
        (dma_map(31, 3, 0, 0x1000, 0x1000), 0, EINVAL),
        (dma_map(0, 3, 0, 0x1000, 0x1000), 0, EINVAL),
        (dma_map(32, 0x10, 0, 0x1000, 0x1000), 0, EINVAL),
        (dma_map(32, 1 << 31, 0, 0x1000, 0x1000), 0, EINVAL),
        (dma_map(32, 7, 0, 0x1000, 0x1000), 0, EINVAL),
        (dma_map(32, 11, 0, 0x1000, 0x1000), 0, EINVAL),
        (dma_map(32, 7, 0, 0x1000, 0x1000), 1, None),
        (dma_map(32, 11, 0, 0x1000, 0x1000), 1, None),
        (dma_map(32, 3, 0, 0x1000, 0), 0, EINVAL),
        (dma_map(32, 3, 0, TOP - 0x1000, 0x1000), 0, None),
        (dma_map(32, 3, 0, TOP - 0x1000, 0x1001), 0, EINVAL),
        (dma_map(32, 3, TOP - 1, 0, 1), 1, None),
        (dma_map(32, 3, TOP - 1, 0, 2), 1, EINVAL),
    ],
)
def test_dma_map(payload: bytes, fds: int, result: int | None) -> None:
    request = asked(agreed()[1], message(1, 2, payload))
    request.fds = range(fds)
    found = outcome(requests.dma_map_untrusted, request)
    assert (found if isinstance(found, int) else None) == result


def unmap(argsz: int, flags: int, addr: int, size: int, *bitmap: int) -> bytes:
    return struct.pack(f"<IIQQ{len(bitmap)}Q", argsz, flags, addr, size, *bitmap)


@pytest.mark.parametrize(
    ("payload", "result"),
    [
        (unmap(24, 0, 0x1000, 0x1000), (0, None)),
        (unmap(24, 0, 0, 0), (0, None)),
        (unmap(24, 2, 0, 0), (2, None)),
        (unmap(23, 0, 0x1000, 0x1000), EINVAL),
        (unmap(24, 2, 1, 0), EINVAL),
        (unmap(24, 2, 0, 1), EINVAL),
        (unmap(24, 4, 0, 0), EINVAL),
        (unmap(64, 3, 0, 0, 4096, 8), EINVAL),
        (unmap(24, 0, TOP - 1, 2), EINVAL),
        (unmap(24, 0, TOP - 1, 1), (0, None)),
        (unmap(48, 1, 0, 0x1000, 4096, 8), (1, (4096, 8))),
        (unmap(40, 1, 0, 0x1000, 4096, 0), (1, (4096, 0))),
        (unmap(47, 1, 0, 0x1000, 4096, 8), EINVAL),
        (unmap(48, 1, 0, 0x1000, 4096), EINVAL),
        (unmap(48, 1, 0, 0x1000), EINVAL),
        (unmap(48, 1, 0, 0x1000, 4096, TOP - 1), EINVAL),
    ],
)
def test_dma_unmap(payload: bytes, result: object) -> None:
    found = outcome(requests.dma_unmap_untrusted, asked(agreed()[1], message(1, 3, payload)))
    if isinstance(found, requests.Unmap):
        bitmap = found.bitmap
        found = found.flags, bitmap and (bitmap.pgsize, bitmap.size)
    assert found == result


def irqs(flags: int, count: int, rest: bytes = b"") -> bytes:
    return struct.pack("<5I", 20 + len(rest), flags, 2, 0, count) + rest


@pytest.mark.parametrize(
    ("payload", "fds", "result"),
    [
        (irqs(0x21, 4), 0, b""),
        (irqs(0x21, 1 << 31), 0, b""),
        (irqs(0x21, 0), 0, b""),
        (irqs(0x21, 1), 1, EINVAL),
        (irqs(0x22, 3, b"\1\0\1"), 0, b"\1\0\1"),
        (irqs(0x22, 3, b"\1\0"), 0, EINVAL),
        (irqs(0x22, 3, b"\1\0\1\1"), 0, EINVAL),
        (irqs(0x22, (1 << 32) - 1), 0, EINVAL),
        (irqs(0x22, 3, b"\1\0\1"), 3, EINVAL),
        (irqs(0x24, 3), 3, b""),
        (irqs(0x24, 3), 0, b""),
        (irqs(0x24, 3), 2, EINVAL),
        (irqs(0x24, 3), 4, EINVAL),
        (irqs(0x24, 0), 1, EINVAL),
        (irqs(0, 1), 1, EINVAL),
        # What several kinds at once mean is the core's to refuse, with nothing taken for bools.
        (irqs(0x27, 3, b"\1\0\1"), 0, b""),
    ],
)
def test_set_irqs(payload: bytes, fds: int, result: object) -> None:
    request = asked(agreed()[1], message(1, 8, payload))
    request.fds = range(fds)
    found = outcome(requests.set_irqs_untrusted, request)
    assert (bytes(found[1]) if isinstance(found, tuple) else found) == result


def access(offset: int, region: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<QII", offset, region, count) + data


@pytest.mark.parametrize(
    ("payload", "result"),
    [
        (access(0, 7, 4), (0, 7, 4)),
        (access(0, 7, 0), (0, 7, 0)),
        (access(0, 0, MIB), (0, 0, MIB)),
        (access(0, 0, MIB + 1), EINVAL),
        (access(0, 0, (1 << 32) - 1), EINVAL),
        (access(TOP - 4, 0, 4), (TOP - 4, 0, 4)),
        (access(TOP - 4, 0, 5), EINVAL),
        (access(0, (1 << 32) - 1, 4), (0, (1 << 32) - 1, 4)),
        (access(0, 7, 4, b"more than a read has"), (0, 7, 4)),
    ],
)
def test_region_read(payload: bytes, result: object) -> None:
    server = agreed()[1]
    request = asked(server, message(1, 9, payload))
    assert outcome(requests.region_read_untrusted, request, server.limits) == result


@pytest.mark.parametrize(
    ("payload", "result"),
    [
        (access(0, 7, 4, b"1234"), (0, 7, 4)),
        (access(0, 7, 0), (0, 7, 0)),
        (access(0, 7, 4, b"123"), EINVAL),
        (access(0, 7, 4, b"12345"), EINVAL),
        (access(0, 7, 4), EINVAL),
        (access(0, 7, 0, b"1"), EINVAL),
        (access(0, 7, (1 << 32) - 1, b"1"), EINVAL),
        (access(TOP - 4, 0, 4, b"1234"), (TOP - 4, 0, 4)),
        (access(TOP - 3, 0, 4, b"1234"), EINVAL),
        (access(0, 0, 20_000, bytes(20_000)), (0, 0, 20_000)),
        (access(0, 0, 20_001, bytes(20_000)), EINVAL),
    ],
)
def test_region_write(payload: bytes, result: object) -> None:
    request = asked(agreed()[1], message(1, 10, payload))
    assert outcome(requests.region_write_untrusted, request) == result


def multi(count: int, *writes: tuple[int, int, int], more: bytes = b"") -> bytes:
    packed = [struct.pack("<QII", *write) + b"12345678" for write in writes]
    return struct.pack("<Q", count) + b"".join(packed) + more


@pytest.mark.parametrize(
    ("payload", "result"),
    [
        (multi(0), []),
        (multi(1, (0, 0, 8)), [(0, 0, b"12345678")]),
        (multi(1, (0, 0, 0)), [(0, 0, b"")]),
        (multi(2, (5, 1, 1), (TOP - 2, 2, 2)), [(5, 1, b"1"), (TOP - 2, 2, b"12")]),
        (multi(1, (0, 0, 9)), EINVAL),
        (multi(1, (0, 0, (1 << 32) - 1)), EINVAL),
        (multi(1, (TOP - 1, 0, 2)), EINVAL),
        (multi(2, (0, 0, 4)), EINVAL),
        (multi(1, (0, 0, 4), (0, 0, 4)), EINVAL),
        (multi(1, (0, 0, 4), more=b"1"), EINVAL),
        (multi(TOP - 1, (0, 0, 4)), EINVAL),
        (multi(TOP // 8, (0, 0, 4)), EINVAL),
    ],
)
def test_region_write_multi(payload: bytes, result: object) -> None:
    found = outcome(requests.write_multi_untrusted, asked(agreed()[1], message(1, 15, payload)))
    if isinstance(found, list):
        found = [(offset, region, bytes(data)) for offset, region, data in found]
    assert found == result


@pytest.mark.parametrize(
    ("command", "payload", "result"),
    [
        (17, struct.pack("<2I", 8 + 4096, 4096), 4096),
        (17, struct.pack("<2I", 8, 0), 0),
        (17, struct.pack("<2I", 1 << 31, MIB), MIB),
        (17, struct.pack("<2I", 8 + MIB + 1, MIB + 1), EINVAL),
        (17, struct.pack("<2I", 7 + 4096, 4096), EINVAL),
        (17, struct.pack("<2I", 0, (1 << 32) - 1), EINVAL),
        (18, struct.pack("<2I", 12, 4) + b"data", 4),
        (18, struct.pack("<2I", 8, 0), 0),
        (18, struct.pack("<2I", 11, 4) + b"data", EINVAL),
        (18, struct.pack("<2I", 12, 4) + b"dat", EINVAL),
        (18, struct.pack("<2I", 12, 4) + b"data!", EINVAL),
        (18, struct.pack("<2I", 0xFFFFFFFF, 0xFFFFFFF0) + b"data", EINVAL),
    ],
)
def test_mig_data(command: int, payload: bytes, result: object) -> None:
    server = agreed()[1]
    request = asked(server, message(1, command, payload))
    assert outcome(requests.mig_data_untrusted, request, server.limits) == result


@pytest.mark.parametrize(
    ("command", "payload", "result"),
    [
        (11, struct.pack("<QQ", 0x1000, 16), (0x1000, 16)),
        (11, struct.pack("<QQ", TOP - 16, 16), (TOP - 16, 16)),
        (11, struct.pack("<QQ", TOP - 15, 16), EINVAL),
        (11, struct.pack("<QQ", 0, MIB + 1), E2BIG),
        (11, struct.pack("<QQ", 0, TOP - 1), E2BIG),
        (12, struct.pack("<QQ", 0x1000, 4) + b"data", (0x1000, 4)),
        (12, struct.pack("<QQ", 0x1000, 0), (0x1000, 0)),
        (12, struct.pack("<QQ", 0x1000, 4) + b"dat", EINVAL),
        (12, struct.pack("<QQ", 0x1000, TOP - 1) + b"data", EINVAL),
        (12, struct.pack("<QQ", TOP - 3, 4) + b"data", EINVAL),
    ],
)
def test_dma(command: int, payload: bytes, result: object) -> None:
    client = agreed()[0]
    request = asked(client, message(1, command, payload))
    if command == 11:
        found = outcome(requests.dma_read_untrusted, request, client.limits)
    else:
        found = outcome(requests.dma_write_untrusted, request)
    assert found == result


@pytest.mark.parametrize("command", [n for n in REQUEST_PARSERS if n not in {11, 12}])
def test_a_refused_request_is_refused_by_whoever_reads_it(command: int) -> None:
    server = agreed()[1]
    request = asked(server, message(1, command))
    assert server.limits is not None
    with pytest.raises(WireError) as caught:
        REQUEST_PARSERS[command](request, server.limits)
    assert caught.value is request.refusal


# Replies.


def replied(command: int, payload: bytes) -> Reply:
    """Return the reply to a request, as it comes in at the end that asked."""
    client, server = agreed()
    end = server if command in {11, 12} else client
    out = end.request(command, bytes(32))
    return answered(end, message(out.msg_id, command, payload, REPLY))


def region(
    argsz: int, flags: int = 15, cap_offset: int = 32, caps: bytes = b"", size: int = 0x1000
) -> bytes:
    return struct.pack("<4IQQ", argsz, flags, 0, cap_offset, size, 0) + caps


def capability(number: int, following: int, rest: bytes) -> bytes:
    return struct.pack("<HHI", number, 1, following) + rest


ONE_AREA = capability(1, 0, struct.pack("<2I2Q", 1, 0, 0, 0x1000))


@pytest.mark.parametrize(
    ("payload", "result"),
    [
        (region(32, flags=7), None),
        (region(64, caps=ONE_AREA), [(0, 0x1000)]),
        (region(64, flags=7, caps=ONE_AREA), None),
        (region(64, cap_offset=0, caps=ONE_AREA), None),
        (region(64)[:32], None),
        (region(48, caps=capability(1, 0, struct.pack("<2I", 0, 0))), []),
        (region(32)[:31], EPROTO),
        (b"", EPROTO),
        (region(64, cap_offset=31, caps=ONE_AREA), EPROTO),
        (region(64, cap_offset=57, caps=ONE_AREA), EPROTO),
        (region(64, cap_offset=1 << 31, caps=ONE_AREA), EPROTO),
        (region(48, caps=capability(1, 0, struct.pack("<2I", 1, 0))), EPROTO),
        (region(64, caps=capability(1, 0, struct.pack("<2I2Q", 0xFFFFFFFF, 0, 0, 1))), EPROTO),
        (region(40, caps=capability(1, 0, b"")), EPROTO),
        # Another capability before it, and a third that nobody knows.
        (
            region(88, caps=capability(9, 48, bytes(8)) + ONE_AREA + bytes(8)),
            [(0, 0x1000)],
        ),
        # Chains that lead nowhere, backwards and to themselves.
        (region(64, caps=capability(9, 60, bytes(24))), EPROTO),
        (region(64, caps=capability(9, 32, bytes(24))), EPROTO),
        (region(64, caps=capability(9, 48, bytes(8)) + capability(9, 32, bytes(8))), EPROTO),
        (region(64, caps=capability(9, 1, bytes(24))), EPROTO),
    ],
)
def test_region_info(payload: bytes, result: object) -> None:
    found = outcome(replies.region_info_untrusted, replied(5, payload))
    assert (found.areas if isinstance(found, replies.RegionReply) else found) == result


def test_a_region_reply_that_was_cut_says_how_much_it_needs() -> None:
    info = vfio.RegionInfo(argsz=0, flags=7, index=3, size=0x3000, offset=0x1000)
    cut = replies.region_info(info, [(0, 0x1000)], 32)
    found = replies.region_info_untrusted(replied(5, cut))
    assert (found.info.argsz, found.info.cap_offset, found.areas) == (64, 0, None)
    whole = replies.region_info(info, [(0, 0x1000)], found.info.argsz)
    assert len(whole) == 64
    assert replies.region_info_untrusted(replied(5, whole)).areas == [(0, 0x1000)]


@pytest.mark.parametrize(
    ("payload", "count", "result"),
    [
        (access(0, 0, 4, b"1234"), 4, None),
        (b"", 0, None),
        (access(0, 0, 0), 0, None),
        (b"", 4, EPROTO),
        (access(0, 0, 4, b"1234")[:15], 4, EPROTO),
        (access(0, 0, 4, b"123"), 4, EPROTO),
        (access(0, 0, 4, b"12345"), 4, EPROTO),
        (access(0, 0, 3, b"123"), 4, EPROTO),
        (access(0, 0, 3, b"1234"), 4, EPROTO),
        (access(0, 0, 0), 4, EPROTO),
        (access(0, 0, 20_000, bytes(20_000)), 20_000, None),
        (access(0, 0, 20_000, bytes(19_999)), 20_000, EPROTO),
    ],
)
def test_the_answer_to_region_read(payload: bytes, count: int, result: object) -> None:
    assert outcome(replies.region_read_untrusted, replied(9, payload), count) == result


@pytest.mark.parametrize(
    ("payload", "count", "result"),
    [
        (access(0, 0, 4), 4, None),
        (access(0, 0, 4, b"more"), 4, None),
        (b"", 0, None),
        (b"", 4, EPROTO),
        (access(0, 0, 3), 4, EPROTO),
        (access(0, 0, 4)[:15], 4, EPROTO),
    ],
)
def test_the_answer_to_region_write(payload: bytes, count: int, result: object) -> None:
    assert outcome(replies.region_write_untrusted, replied(10, payload), count) == result


@pytest.mark.parametrize(
    ("payload", "size", "result"),
    [
        (b"", 0, b""),
        (unmap(24, 0, 0, 0), 0, b""),
        (unmap(48, 1, 0, 0, 4096, 8) + b"12345678", 8, b"12345678"),
        (unmap(48, 1, 0, 0, 4096, 8) + b"1234567", 8, EPROTO),
        (unmap(48, 1, 0, 0, 4096, 8), 8, EPROTO),
        (b"", 8, EPROTO),
    ],
)
def test_the_answer_to_dma_unmap(payload: bytes, size: int, result: object) -> None:
    found = outcome(replies.dma_unmap_untrusted, replied(3, payload), size)
    assert (bytes(found) if isinstance(found, memoryview) else found) == result


def mig(argsz: int, size: int, data: bytes) -> bytes:
    return struct.pack("<2I", argsz, size) + data


@pytest.mark.parametrize(
    ("payload", "result"),
    [
        (mig(12, 4, b"data"), 4),
        (mig(8, 0, b""), 0),
        # libvfio-user pads what it sends to what was asked for.
        (mig(12, 4, b"data" + bytes(96)), 4),
        (mig(8, 0, bytes(100)), 0),
        (mig(8 + 16392, 16392, bytes(65536)), EPROTO),
        (mig(108, 101, bytes(101)), EPROTO),
        (mig(12, 5, b"data"), EPROTO),
        (mig(12, 0xFFFFFFFF, b"data"), EPROTO),
        (mig(12, 4, b"")[:7], EPROTO),
        (b"", EPROTO),
    ],
)
def test_the_answer_to_mig_data_read(payload: bytes, result: object) -> None:
    assert outcome(replies.mig_read_untrusted, replied(17, payload), 100) == result


def test_a_padded_answer_of_libvfio_user_is_read_and_its_padding_dropped() -> None:
    client = agreed()[0]
    out = client.request(17, struct.pack("<2I", 65544, 65536))
    text = message(out.msg_id, 17, mig(16400, 16392, b"s" * 16392 + bytes(49144)), REPLY)
    assert len(text) == 65560, "as it was seen"
    found = arrival(client, text)
    reply = found.message
    assert replies.mig_read_untrusted(reply, 65536) == 16392  # type: ignore[arg-type]  # a Reply
    assert found.data[:16392] == b"s" * 16392


@pytest.mark.parametrize(
    ("payload", "result"),
    [
        (struct.pack("<QQ", 0x1000, 4) + b"data", None),
        (struct.pack("<QQ", 0x1000, 4) + b"dat", EPROTO),
        (struct.pack("<QQ", 0x1001, 4) + b"data", EPROTO),
        (struct.pack("<QQ", 0x1000, 5) + b"data", EPROTO),
        (b"", EPROTO),
    ],
)
def test_the_answer_to_dma_read(payload: bytes, result: object) -> None:
    assert outcome(replies.dma_read_untrusted, replied(11, payload), 0x1000, 4) == result


@pytest.mark.parametrize(
    ("payload", "result"),
    [
        (struct.pack("<QQ", 0x1000, 4), None),
        (b"", None),  # QEMU 10.1
        (struct.pack("<QQ", 0x1000, 3), EPROTO),
        (struct.pack("<QI", 0x1000, 4), EPROTO),  # the specification's 4 bytes, which nobody sends
    ],
)
def test_the_answer_to_dma_write(payload: bytes, result: object) -> None:
    assert outcome(replies.dma_write_untrusted, replied(12, payload), 0x1000, 4) == result


@pytest.mark.parametrize(
    ("payload", "size", "result"),
    [
        (struct.pack("<2I", 16, 1) + b"12345678", 8, b"12345678"),
        (struct.pack("<2I", 16, 1) + b"12345678", 0, b"12345678"),
        (struct.pack("<2I", 8, 1), 0, b""),
        (struct.pack("<2I", 8, 1), 8, EPROTO),
        (struct.pack("<2I", 8, 1)[:7], 0, EPROTO),
        (b"", 0, EPROTO),
    ],
)
def test_the_answer_to_device_feature(payload: bytes, size: int, result: object) -> None:
    found = outcome(replies.feature_untrusted, replied(16, payload), size)
    assert (bytes(found) if isinstance(found, memoryview) else found) == result


@pytest.mark.parametrize(
    ("command", "parse", "size"),
    [
        (4, replies.device_info_untrusted, 16),
        (7, replies.irq_info_untrusted, 16),
        (15, replies.write_multi_untrusted, 8),
        (0x8079, replies.precopy_info_untrusted, 24),
    ],
)
def test_an_answer_that_is_too_short_is_none(
    command: int, parse: Callable[..., object], size: int
) -> None:
    for length in range(size):
        assert outcome(parse, replied(command, bytes(length))) == EPROTO
    assert outcome(parse, replied(command, bytes(size))) != EPROTO
