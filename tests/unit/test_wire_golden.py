"""Every message of the protocol both ways, its bytes spelled out from the specification's layouts.

A case is one exchange: what the asking end writes, what the asked end reads from it, what that
answers, and what the first end reads. Bytes are grouped by field, the header first: number,
command, size, flags, errno.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from vfiomig.abi import vfio, vfio_iommu
from vfiomig.abi import vfio_user as abi
from vfiomig.abi.uapi import UapiStruct
from vfiomig.wire import COMMANDS, Role, replies, requests
from wire_peers import agreed, answered, asked, joined, octets, outstanding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfiomig.wire import Buffers, Connection, Limits, Outgoing, Reply, Request


@dataclass
class Exchange:
    name: str
    command: int
    write: Callable[[Connection], Outgoing]
    request: str
    read: Callable[[Request, Limits], object]
    means: object
    answer: Callable[[Connection, Request], Buffers]
    reply: str
    read_reply: Callable[[Reply], object]
    reply_means: object


def plain(value: Any) -> object:
    """Make what was read comparable: structs are their members, views are bytes."""
    if isinstance(value, UapiStruct):
        return {name: plain(getattr(value, name)) for name, *_ in value._fields_}
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def with_data(parse: Callable[..., object], *args: object) -> Callable[..., object]:
    """Read the head of a message and its data."""

    def read(message: Request | Reply, *_: object) -> object:
        return parse(message, *args), message.data

    return read


def nothing(_message: object, *_: object) -> None:
    """Read a message that is a header alone."""


def echo(server: Connection, request: Request) -> Buffers:
    return server.reply(request, request.body)


def done(server: Connection, request: Request) -> Buffers:
    return server.reply(request)


def ask(
    command: int, head: bytes = b"", data: bytes = b"", fds: Sequence[int] = ()
) -> Callable[[Connection], Outgoing]:
    return lambda end: end.request(command, head, data, fds=fds)


def say(head: bytes, data: bytes = b"") -> Callable[[Connection, Request], Buffers]:
    return lambda end, request: end.reply(request, head, data)


INFO = {"argsz": 16, "flags": 3, "num_regions": 9, "num_irqs": 5}
SPARSE = vfio.RegionInfo(argsz=32, flags=7, index=2, size=0x3000, offset=0x20000)
DIRTY = bytes((0x81, 0, 0, 0, 0, 0, 0, 0x40))

EXCHANGES = (
    Exchange(
        "DMA_MAP",
        2,
        ask(2, bytes(abi.DmaMap(argsz=32, flags=3, offset=0x1000, addr=0xFEE00000, size=0x200000))),
        """ 0200 0200 30000000 00000000 00000000
            20000000 03000000 0010000000000000 0000e0fe00000000 0000200000000000 """,
        lambda request, _: requests.dma_map_untrusted(request),
        {"argsz": 32, "flags": 3, "offset": 0x1000, "addr": 0xFEE00000, "size": 0x200000},
        done,
        " 0200 0200 10000000 01000000 00000000 ",
        nothing,
        None,
    ),
    Exchange(
        "DMA_UNMAP",
        3,
        ask(3, bytes(abi.DmaUnmap(argsz=24, addr=0x10000, size=0x8000))),
        """ 0200 0300 28000000 00000000 00000000
            18000000 00000000 0000010000000000 0080000000000000 """,
        lambda request, _: requests.dma_unmap_untrusted(request),
        [24, 0, 0x10000, 0x8000, None],
        echo,
        """ 0200 0300 28000000 01000000 00000000
            18000000 00000000 0000010000000000 0080000000000000 """,
        replies.dma_unmap_untrusted,
        b"",
    ),
    Exchange(
        "DMA_UNMAP with the dirty bitmap",
        3,
        ask(
            3,
            bytes(
                abi.DmaUnmap(
                    argsz=48,
                    flags=vfio_iommu.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
                    addr=0x10000,
                    size=0x40000,
                )
            )
            + bytes(abi.Bitmap(pgsize=4096, size=8)),
        ),
        """ 0200 0300 38000000 00000000 00000000
            30000000 01000000 0000010000000000 0000040000000000
            0010000000000000 0800000000000000 """,
        lambda request, _: requests.dma_unmap_untrusted(request),
        [48, 1, 0x10000, 0x40000, {"pgsize": 4096, "size": 8}],
        lambda server, request: server.reply(request, request.body, DIRTY),
        """ 0200 0300 40000000 01000000 00000000
            30000000 01000000 0000010000000000 0000040000000000
            0010000000000000 0800000000000000
            81 00 00 00 00 00 00 40 """,
        lambda reply: replies.dma_unmap_untrusted(reply, 8),
        DIRTY,
    ),
    Exchange(
        "DEVICE_GET_INFO",
        4,
        ask(4, bytes(abi.DeviceInfo(argsz=16))),
        " 0200 0400 20000000 00000000 00000000  10000000 00000000 00000000 00000000 ",
        lambda request, _: requests.device_info_untrusted(request),
        {"argsz": 16, "flags": 0, "num_regions": 0, "num_irqs": 0},
        say(bytes(abi.DeviceInfo(**INFO))),
        " 0200 0400 20000000 01000000 00000000  10000000 03000000 09000000 05000000 ",
        replies.device_info_untrusted,
        INFO,
    ),
    Exchange(
        "DEVICE_GET_REGION_INFO",
        5,
        ask(5, bytes(vfio.RegionInfo(argsz=32, index=2))),
        """ 0200 0500 30000000 00000000 00000000
            20000000 00000000 02000000 00000000 0000000000000000 0000000000000000 """,
        lambda request, _: requests.region_info_untrusted(request),
        {"argsz": 32, "flags": 0, "index": 2, "cap_offset": 0, "size": 0, "offset": 0},
        lambda server, request: server.reply(
            request, replies.region_info(vfio.RegionInfo.parse(bytes(SPARSE)), None, 32)
        ),
        """ 0200 0500 30000000 01000000 00000000
            20000000 07000000 02000000 00000000 0030000000000000 0000020000000000 """,
        replies.region_info_untrusted,
        [
            {
                "argsz": 32,
                "flags": 7,
                "index": 2,
                "cap_offset": 0,
                "size": 0x3000,
                "offset": 0x20000,
            },
            None,
        ],
    ),
    Exchange(
        "DEVICE_GET_REGION_INFO with sparse areas",
        5,
        ask(5, bytes(vfio.RegionInfo(argsz=80, index=2))),
        """ 0200 0500 30000000 00000000 00000000
            50000000 00000000 02000000 00000000 0000000000000000 0000000000000000 """,
        lambda request, _: requests.region_info_untrusted(request).argsz,
        80,
        lambda server, request: server.reply(
            request,
            replies.region_info(
                vfio.RegionInfo.parse(bytes(SPARSE)), [(0, 0x1000), (0x2000, 0x1000)], 80
            ),
        ),
        """ 0200 0500 60000000 01000000 00000000
            50000000 0f000000 02000000 20000000 0030000000000000 0000020000000000
            0100 0100 00000000 02000000 00000000
            0000000000000000 0010000000000000
            0020000000000000 0010000000000000 """,
        replies.region_info_untrusted,
        [
            {
                "argsz": 80,
                "flags": 15,
                "index": 2,
                "cap_offset": 32,
                "size": 0x3000,
                "offset": 0x20000,
            },
            [[0, 0x1000], [0x2000, 0x1000]],
        ],
    ),
    Exchange(
        "DEVICE_GET_IRQ_INFO",
        7,
        ask(7, bytes(vfio.IrqInfo(argsz=16, index=2))),
        " 0200 0700 20000000 00000000 00000000  10000000 00000000 02000000 00000000 ",
        lambda request, _: requests.irq_info_untrusted(request),
        {"argsz": 16, "flags": 0, "index": 2, "count": 0},
        say(bytes(vfio.IrqInfo(argsz=16, flags=1, index=2, count=2048))),
        " 0200 0700 20000000 01000000 00000000  10000000 01000000 02000000 00080000 ",
        replies.irq_info_untrusted,
        {"argsz": 16, "flags": 1, "index": 2, "count": 2048},
    ),
    Exchange(
        "DEVICE_SET_IRQS",
        8,
        ask(8, bytes(vfio.IrqSet(argsz=23, flags=0x22, index=1, start=4, count=3)) + b"\1\0\1"),
        """ 0200 0800 27000000 00000000 00000000
            17000000 22000000 01000000 04000000 03000000 01 00 01 """,
        lambda request, _: requests.set_irqs_untrusted(request),
        [{"argsz": 23, "flags": 0x22, "index": 1, "start": 4, "count": 3}, b"\1\0\1"],
        done,
        " 0200 0800 10000000 01000000 00000000 ",
        nothing,
        None,
    ),
    Exchange(
        "REGION_READ",
        9,
        ask(9, requests.pack_region_access(0x10, 7, 4)),
        " 0200 0900 20000000 00000000 00000000  1000000000000000 07000000 04000000 ",
        requests.region_read_untrusted,
        [0x10, 7, 4],
        lambda server, request: server.reply(request, request.body, b"\xde\xad\xbe\xef"),
        """ 0200 0900 24000000 01000000 00000000
            1000000000000000 07000000 04000000 de ad be ef """,
        with_data(replies.region_read_untrusted, 4),
        [None, b"\xde\xad\xbe\xef"],
    ),
    Exchange(
        "REGION_WRITE",
        10,
        ask(10, requests.pack_region_access(1 << 40, 0, 3), b"abc"),
        """ 0200 0a00 23000000 00000000 00000000
            0000000000010000 00000000 03000000 61 62 63 """,
        with_data(requests.region_write_untrusted),
        [[1 << 40, 0, 3], b"abc"],
        echo,
        " 0200 0a00 20000000 01000000 00000000  0000000000010000 00000000 03000000 ",
        lambda reply: replies.region_write_untrusted(reply, 3),
        None,
    ),
    Exchange(
        "REGION_WRITE_MULTI",
        15,
        ask(
            15,
            struct.pack("<Q QII8s QII8s", 2, 8, 0, 2, b"\1\2", 0x100, 4, 8, b"\1\2\3\4\5\6\7\x08"),
        ),
        """ 0200 0f00 48000000 00000000 00000000
            0200000000000000
            0800000000000000 00000000 02000000 01 02 00 00 00 00 00 00
            0001000000000000 04000000 08000000 01 02 03 04 05 06 07 08 """,
        lambda request, _: requests.write_multi_untrusted(request),
        [[0x8, 0, b"\1\2"], [0x100, 4, b"\1\2\3\4\5\6\7\x08"]],
        say(bytes(abi.WriteMulti(wr_cnt=2))),
        " 0200 0f00 18000000 01000000 00000000  0200000000000000 ",
        replies.write_multi_untrusted,
        2,
    ),
    Exchange(
        "DMA_READ",
        11,
        ask(11, bytes(abi.DmaRegionAccess(addr=0xFFFF0000, count=5))),
        " 0100 0b00 20000000 00000000 00000000  0000ffff00000000 0500000000000000 ",
        requests.dma_read_untrusted,
        [0xFFFF0000, 5],
        lambda client, request: client.reply(request, request.body, b"bytes"),
        """ 0100 0b00 25000000 01000000 00000000
            0000ffff00000000 0500000000000000 62 79 74 65 73 """,
        with_data(replies.dma_read_untrusted, 0xFFFF0000, 5),
        [None, b"bytes"],
    ),
    Exchange(
        "DMA_WRITE",
        12,
        ask(12, bytes(abi.DmaRegionAccess(addr=0x1000, count=2)), b"hi"),
        """ 0100 0c00 22000000 00000000 00000000
            0010000000000000 0200000000000000 68 69 """,
        with_data(requests.dma_write_untrusted),
        [[0x1000, 2], b"hi"],
        echo,
        " 0100 0c00 20000000 01000000 00000000  0010000000000000 0200000000000000 ",
        lambda reply: replies.dma_write_untrusted(reply, 0x1000, 2),
        None,
    ),
    Exchange(
        "DEVICE_RESET",
        13,
        ask(13),
        " 0200 0d00 10000000 00000000 00000000 ",
        nothing,
        None,
        done,
        " 0200 0d00 10000000 01000000 00000000 ",
        nothing,
        None,
    ),
    Exchange(
        "DEVICE_FEATURE, set the state",
        16,
        ask(16, requests.feature(0x20002, bytes(vfio.MigState(device_state=3, data_fd=-1)))),
        " 0200 1000 20000000 00000000 00000000  10000000 02000200 03000000 ffffffff ",
        lambda request, _: requests.feature_untrusted(request),
        [16, 0x20002, octets("03000000 ffffffff")],
        echo,
        " 0200 1000 20000000 01000000 00000000  10000000 02000200 03000000 ffffffff ",
        lambda reply: replies.feature_untrusted(reply, 8),
        octets("03000000 ffffffff"),
    ),
    Exchange(
        "DEVICE_FEATURE, get the capabilities",
        16,
        ask(16, requests.feature(0x10001, room=8)),
        " 0200 1000 18000000 00000000 00000000  10000000 01000100 ",
        lambda request, _: requests.feature_untrusted(request),
        [16, 0x10001, b""],
        say(octets("10000000 01000100"), octets("0700000000000000")),
        " 0200 1000 20000000 01000000 00000000  10000000 01000100 0700000000000000 ",
        lambda reply: replies.feature_untrusted(reply, 8),
        octets("0700000000000000"),
    ),
    Exchange(
        "DEVICE_FEATURE, start logging",
        16,
        ask(
            16,
            requests.feature(
                0x20006, requests.logging_start(4096, [(0, 0x100000), (0x200000, 0x1000)])
            ),
        ),
        """ 0200 1000 48000000 00000000 00000000  38000000 06000200
            0010000000000000 02000000 00000000
            0000000000000000 0000100000000000
            0000200000000000 0010000000000000 """,
        lambda request, _: struct.unpack("<QII4Q", requests.feature_untrusted(request).payload),
        [4096, 2, 0, 0, 0x100000, 0x200000, 0x1000],
        echo,
        """ 0200 1000 48000000 01000000 00000000  38000000 06000200
            0010000000000000 02000000 00000000
            0000000000000000 0000100000000000
            0000200000000000 0010000000000000 """,
        lambda reply: len(replies.feature_untrusted(reply, 16)),
        48,
    ),
    Exchange(
        "DEVICE_FEATURE, report the log",
        16,
        ask(
            16,
            requests.feature(
                0x10008,
                bytes(abi.DmaLoggingReport(iova=0x200000, length=0x40000, page_size=4096)),
                room=8,
            ),
        ),
        """ 0200 1000 30000000 00000000 00000000  28000000 08000100
            0000200000000000 0000040000000000 0010000000000000 """,
        lambda request, _: abi.DmaLoggingReport.parse(requests.feature_untrusted(request).payload),
        {"iova": 0x200000, "length": 0x40000, "page_size": 4096},
        lambda server, request: server.reply(request, request.body, DIRTY),
        """ 0200 1000 38000000 01000000 00000000  28000000 08000100
            0000200000000000 0000040000000000 0010000000000000
            81 00 00 00 00 00 00 40 """,
        lambda reply: replies.feature_untrusted(reply, 32)[24:],
        DIRTY,
    ),
    Exchange(
        "MIG_DATA_READ",
        17,
        ask(17, bytes(abi.MigData(argsz=0x10008, size=0x10000))),
        " 0200 1100 18000000 00000000 00000000  08000100 00000100 ",
        requests.mig_data_untrusted,
        0x10000,
        say(bytes(abi.MigData(argsz=11, size=3)), b"end"),
        " 0200 1100 1b000000 01000000 00000000  0b000000 03000000 65 6e 64 ",
        with_data(replies.mig_read_untrusted, 0x10000),
        [3, b"end"],
    ),
    Exchange(
        "MIG_DATA_WRITE",
        18,
        ask(18, bytes(abi.MigData(argsz=12, size=4)), b"data"),
        " 0200 1200 1c000000 00000000 00000000  0c000000 04000000 64 61 74 61 ",
        lambda request, limits: (requests.mig_data_untrusted(request, limits), request.data),
        [4, b"data"],
        done,
        " 0200 1200 10000000 01000000 00000000 ",
        nothing,
        None,
    ),
    Exchange(
        "MIG_GET_PRECOPY_INFO",
        0x8079,
        ask(0x8079, bytes(vfio.PrecopyInfo(argsz=24))),
        """ 0200 7980 28000000 00000000 00000000
            18000000 00000000 0000000000000000 0000000000000000 """,
        lambda request, _: requests.precopy_info_untrusted(request),
        {"argsz": 24, "flags": 0, "initial_bytes": 0, "dirty_bytes": 0},
        say(bytes(vfio.PrecopyInfo(argsz=24, flags=1, initial_bytes=256, dirty_bytes=1 << 33))),
        """ 0200 7980 28000000 01000000 00000000
            18000000 01000000 0001000000000000 0000000002000000 """,
        replies.precopy_info_untrusted,
        {"argsz": 24, "flags": 1, "initial_bytes": 256, "dirty_bytes": 1 << 33},
    ),
)


def ends(exchange: Exchange) -> tuple[Connection, Connection]:
    """Return the end that asks and the one that is asked."""
    client, server = agreed()
    (row,) = [row for row in COMMANDS if row.number == exchange.command]
    return (client, server) if row.asks is Role.CLIENT else (server, client)


each = pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.name)


@each
def test_a_request_has_the_bytes_of_the_specification(exchange: Exchange) -> None:
    end, _ = ends(exchange)
    assert joined(exchange.write(end).buffers) == octets(exchange.request)


@each
def test_the_bytes_of_a_request_mean_what_the_specification_says(exchange: Exchange) -> None:
    _, end = ends(exchange)
    request = asked(end, octets(exchange.request))
    assert request.command == exchange.command
    assert end.limits is not None
    assert plain(exchange.read(request, end.limits)) == exchange.means


@each
def test_a_reply_has_the_bytes_of_the_specification(exchange: Exchange) -> None:
    _, end = ends(exchange)
    request = asked(end, octets(exchange.request))
    assert joined(exchange.answer(end, request)) == octets(exchange.reply)


@each
def test_the_bytes_of_a_reply_mean_what_the_specification_says(exchange: Exchange) -> None:
    end, _ = ends(exchange)
    out = exchange.write(end)
    reply = answered(end, octets(exchange.reply))
    assert (reply.msg_id, reply.command, reply.errno) == (out.msg_id, exchange.command, 0)
    assert plain(exchange.read_reply(reply)) == exchange.reply_means
    assert outstanding(end) == 0


@each
def test_an_error_is_a_header_that_says_so(exchange: Exchange) -> None:
    end, other = ends(exchange)
    out = exchange.write(end)
    request = asked(other, octets(exchange.request))
    error = octets(exchange.request)[:4] + octets("10000000 21000000 13000000")
    assert joined(other.error(request, 0x13)) == error
    reply = answered(end, error)
    assert (reply.msg_id, reply.errno, bytes(reply.body)) == (out.msg_id, 0x13, b"")


def test_every_command_has_an_exchange_here() -> None:
    version = 1  # test_wire_version.py
    assert {row.number for row in COMMANDS} == {e.command for e in EXCHANGES} | {version}


def test_region_io_fds_is_refused_like_a_command_that_is_not_there() -> None:
    _, server = agreed()
    request = asked(
        server,
        octets("0200 0600 20000000 00000000 00000000  10000000 00000000 02000000 00000000"),
    )
    assert request.refusal is not None
    assert joined(server.error(request, request.refusal.errno or 0)) == octets(
        "0200 0600 10000000 21000000 16000000"
    )
