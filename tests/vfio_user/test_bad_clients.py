"""What malformed and untimely requests get, one row each, and that the next client is served.

A row is what is sent and what must come back: an errno, ``OVER`` for a connection that is closed,
or nothing for a message that wants no reply. Where the connection is not closed the next request
on it is answered, which shows that the server still knows where messages begin.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from raw_vfio_user import (
    CONFIG,
    DIRTY_PAGES,
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    DMA_WRITE,
    ERROR,
    ERROR_STATE,
    FEATURE,
    FULL,
    GET,
    GET_INFO,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    GET_REGION_IO_FDS,
    HEADER,
    MIB,
    MIG_DATA_READ,
    MIG_DATA_WRITE,
    NO_REPLY,
    PLAIN,
    PRECOPY_INFO,
    PROBE,
    REGION_READ,
    REGION_WRITE,
    REGION_WRITE_MULTI,
    REPLY,
    REPORT,
    RESET,
    RUNNING,
    SET,
    SET_IRQS,
    START,
    STATE,
    STOP_LOGGING,
    VERSION,
    Raw,
    served,
)
from suite_devices import Card
from vfiomig import Region
from vfiomig.device import Msix

if TYPE_CHECKING:
    from collections.abc import Iterator

E: Final = errno.EINVAL
#: The connection is closed.
OVER: Final = "over"
ID: Final = 0x77
LIMIT: Final = 16 * MIB + 64


class Target(Card):
    """Everything that a request can be about."""

    interrupt_pin = 1
    pci_capabilities = (Msix(vectors=4, table=(1, 0), pending=(1, 2048)),)
    bar1 = Region(size=4 * 4096, mapped=((4096, 4096),))


class Bad(NamedTuple):
    """One client: what it sends, with how many descriptors, and what it gets."""

    name: str
    sends: bytes
    expected: tuple[int | str, ...]
    fds: int = 0


def message(
    command: int, body: bytes = b"", *, flags: int = 0, size: int | None = None, error: int = 0
) -> bytes:
    length = 16 + len(body) if size is None else size
    return HEADER.pack(ID, command, length, flags, error) + body


def version(text: bytes = PLAIN, major: int = 0, minor: int = 2) -> bytes:
    return message(VERSION, struct.pack("<HH", major, minor) + text)


def feature(index: int, flags: int, payload: bytes = b"", argsz: int | None = None) -> bytes:
    size = 8 + len(payload) if argsz is None else argsz
    return message(FEATURE, struct.pack("<II", size, index | flags) + payload)


def dma_map(addr: int, size: int, *, flags: int = 3, offset: int = 0, argsz: int = 32) -> bytes:
    return message(DMA_MAP, struct.pack("<IIQQQ", argsz, flags, offset, addr, size))


def unmap(addr: int, size: int, *, flags: int = 0, argsz: int = 24, more: bytes = b"") -> bytes:
    return message(DMA_UNMAP, struct.pack("<IIQQ", argsz, flags, addr, size) + more)


def irqs(
    flags: int, index: int, start: int, count: int, data: bytes = b"", argsz: int = 20
) -> bytes:
    size = argsz + len(data)
    return message(SET_IRQS, struct.pack("<5I", size, flags, index, start, count) + data)


def region(
    command: int, offset: int, index: int, count: int, data: bytes = b"", flags: int = 0
) -> bytes:
    return message(command, struct.pack("<QII", offset, index, count) + data, flags=flags)


def multi(count: int, *writes: tuple[int, int, int]) -> bytes:
    packed = b"".join(struct.pack("<QII8s", *write, b"12345678") for write in writes)
    return message(REGION_WRITE_MULTI, struct.pack("<Q", count) + packed)


def logging_start(*ranges: tuple[int, int], count: int | None = None, page: int = 4096) -> bytes:
    number = len(ranges) if count is None else count
    packed = b"".join(struct.pack("<QQ", *one) for one in ranges)
    return struct.pack("<QII", page, number, 0) + packed


def data(command: int, argsz: int, size: int, content: bytes = b"") -> bytes:
    return message(command, struct.pack("<II", argsz, size) + content)


COMMANDS = {
    "DMA_MAP": (DMA_MAP, 32),
    "DMA_UNMAP": (DMA_UNMAP, 24),
    "GET_INFO": (GET_INFO, 16),
    "GET_REGION_INFO": (GET_REGION_INFO, 32),
    "GET_IRQ_INFO": (GET_IRQ_INFO, 16),
    "SET_IRQS": (SET_IRQS, 20),
    "REGION_READ": (REGION_READ, 16),
    "REGION_WRITE": (REGION_WRITE, 16),
    "REGION_WRITE_MULTI": (REGION_WRITE_MULTI, 8),
    "RESET": (RESET, 0),
    "FEATURE": (FEATURE, 8),
    "MIG_DATA_READ": (MIG_DATA_READ, 8),
    "MIG_DATA_WRITE": (MIG_DATA_WRITE, 8),
    "PRECOPY_INFO": (PRECOPY_INFO, 24),
}
#: Numbers that a client may not ask for.
UNKNOWN = (0, VERSION, GET_REGION_IO_FDS, DMA_READ, DMA_WRITE, DIRTY_PAGES, 19, 0x8078, 0xFFFF)

# --- before a version has been agreed on -------------------------------------------------------

TOO_EARLY = [
    *(Bad(f"{n} first", message(c, bytes(s)), (E, OVER)) for n, (c, s) in COMMANDS.items()),
    *(Bad(f"command {c} first", message(c), (E, OVER)) for c in (0, 6, 11, 12, 14, 19, 0xFFFF)),
    Bad("a reply first", message(VERSION, bytes(4), flags=REPLY), (OVER,)),
    Bad("an error first", message(VERSION, flags=REPLY | ERROR, error=5), (OVER,)),
    Bad("type 2 first", message(VERSION, bytes(4), flags=2), (E, OVER)),
    Bad("no size first", message(VERSION, size=0), (E, OVER)),
    Bad("a size below a header first", message(VERSION, size=15), (E, OVER)),
    Bad("a version of a gigabyte", message(VERSION, size=1 << 30), (E, OVER)),
    Bad("garbage", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", (OVER,)),
    Bad("zeros", bytes(64), (E, OVER)),
    Bad("ones", b"\xff" * 64, (OVER,)),
]
JSON = {
    "no version": message(VERSION),
    "half a version": message(VERSION, bytes(3)),
    "major 1": version(major=1),
    "major 65535": version(major=0xFFFF),
    "no NUL": version(b"{}"),
    "text behind the NUL": version(b"{}\0{}"),
    "two NULs": version(b"{}\0\0"),
    "only a NUL": version(b"\0"),
    "no JSON": version(b"max_msg_fds=8\0"),
    "half a JSON": version(b'{"capabilities":{\0'),
    "a comma too many": version(b'{"capabilities":{},}\0'),
    "two documents": version(b"{} {}\0"),
    "a list": version(b"[]\0"),
    "a number": version(b"8\0"),
    "null": version(b"null\0"),
    "NaN": version(b'{"capabilities":{"x":NaN}}\0'),
    "infinity": version(b'{"capabilities":{"x":-Infinity}}\0'),
    "bytes that are no text": version(b'{"capabilities":{"\xff\xfe":1}}\0'),
    "deep lists": version(b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}\0"),
    "deep objects": version(b'{"x":' * 3000 + b"1" + b"}" * 3000 + b"\0"),
    "a key twice": version(b'{"capabilities":{"max_msg_fds":1,"max_msg_fds":2}}\0'),
    "capabilities that are a list": version(b'{"capabilities":[]}\0'),
    "capabilities that are a number": version(b'{"capabilities":1}\0'),
    "-1 descriptors": version(b'{"capabilities":{"max_msg_fds":-1}}\0'),
    "1025 descriptors": version(b'{"capabilities":{"max_msg_fds":1025}}\0'),
    "half a descriptor": version(b'{"capabilities":{"max_msg_fds":0.5}}\0'),
    "descriptors in words": version(b'{"capabilities":{"max_msg_fds":"8"}}\0'),
    "descriptors that are true": version(b'{"capabilities":{"max_msg_fds":true}}\0'),
    "no data at all": version(b'{"capabilities":{"max_data_xfer_size":0}}\0'),
    "less than no data": version(b'{"capabilities":{"max_data_xfer_size":-5}}\0'),
    "data beyond 64 bits": version(
        b'{"capabilities":{"max_data_xfer_size":18446744073709551616}}\0'
    ),
    "endless digits": version(b'{"capabilities":{"max_dma_maps":' + b"9" * 6000 + b"}}\0"),
    "pages of no bytes": version(b'{"capabilities":{"migration":{"pgsize":0}}}\0'),
    "migration that is a number": version(b'{"capabilities":{"migration":1}}\0'),
    "an extension that is a number": version(b'{"capabilities":{"mig_stream":1}}\0'),
    "an extension of version 0": version(b'{"capabilities":{"mig_stream":{"version":0}}}\0'),
    "several writes in words": version(b'{"capabilities":{"write_multiple":"yes"}}\0'),
}
VERSIONS = [
    *(Bad(f"a version with {name}", sends, (E, OVER)) for name, sends in JSON.items()),
    Bad("a version with descriptors", version(), (E, OVER), 2),
]

# --- framing -----------------------------------------------------------------------------------

FRAMING = [
    *(
        Bad(f"a message of {size} bytes", message(GET_INFO, size=size), (E, OVER))
        for size in (0, 1, 8, 15, LIMIT + 1, 1 << 31, 0xFFFF_FFFF)
    ),
    *(
        Bad(f"a write of {size} bytes", message(MIG_DATA_WRITE, size=size), (E, OVER))
        for size in (15, LIMIT + 1, 0xFFFF_FFFF)
    ),
    *(Bad(f"type {n}", message(GET_INFO, bytes(16), flags=n), (E, OVER)) for n in (2, 3, 8, 15)),
    Bad("a wrong size without a reply", message(GET_INFO, size=3, flags=NO_REPLY), (OVER,)),
    Bad("a reply to nothing", message(DMA_READ, bytes(16), flags=REPLY), (OVER,)),
    Bad("an error to nothing", message(DMA_WRITE, flags=REPLY | ERROR, error=5), (OVER,)),
    Bad("a reply to a command of its own", message(GET_INFO, bytes(16), flags=REPLY), (OVER,)),
    Bad("unknown flags", message(GET_INFO, struct.pack("<4I", 16, 0, 0, 0), flags=0xFF00), (0,)),
    Bad("an errno that is none", message(RESET, error=77), (0,)),
    *(Bad(f"command {c} without a payload", message(c), (E,)) for c in UNKNOWN),
    *(Bad(f"command {c} with one", message(c, bytes(100)), (E,)) for c in UNKNOWN),
    Bad("an unknown command of 200000 bytes", message(77, bytes(200_000)), (E,)),
    Bad("an unknown command without a reply", message(77, bytes(50), flags=NO_REPLY), ()),
    *(Bad(f"{n} without a payload", message(c), (E,)) for n, (c, s) in COMMANDS.items() if s),
    *(
        Bad(f"{n} that is a byte too short", message(c, bytes(s - 1)), (E,))
        for n, (c, s) in COMMANDS.items()
        if s
    ),
    *(
        Bad(f"{n} with a descriptor", message(c, bytes(s)), (E,), 1)
        for n, (c, s) in COMMANDS.items()
        if n not in {"DMA_MAP", "SET_IRQS"}
    ),
    Bad("an unknown command with descriptors", message(77, bytes(8)), (E,), 5),
    Bad("SET_IRQS with too many descriptors", irqs(36, 2, 0, 17), (E,), 17),
    Bad("DMA_MAP with too many descriptors", dma_map(0, 4096), (E,), 17),
    Bad("100 requests at once", message(GET_INFO, bytes(16)) * 100, (E,) * 100),
]

# --- the device --------------------------------------------------------------------------------

INFO = [
    Bad("GET_INFO with no argsz", message(GET_INFO, bytes(16)), (E,)),
    Bad("GET_INFO with argsz 15", message(GET_INFO, struct.pack("<4I", 15, 0, 0, 0)), (E,)),
    Bad("GET_INFO with much argsz", message(GET_INFO, b"\xff" * 16), (0,)),
    Bad("region with argsz 31", message(GET_REGION_INFO, struct.pack("<8I", 31, *[0] * 7)), (E,)),
    Bad("VGA", message(GET_REGION_INFO, struct.pack("<8I", 32, 0, 8, *[0] * 5)), (E,)),
    Bad("region 9", message(GET_REGION_INFO, struct.pack("<8I", 32, 0, 9, *[0] * 5)), (E,)),
    Bad(
        "last region",
        message(GET_REGION_INFO, struct.pack("<8I", 32, 0, 2**32 - 1, *[0] * 5)),
        (E,),
    ),
    Bad(
        "4 GiB argsz", message(GET_REGION_INFO, struct.pack("<8I", 2**32 - 1, 0, 1, *[0] * 5)), (0,)
    ),
    Bad("irq with argsz 15", message(GET_IRQ_INFO, struct.pack("<4I", 15, 0, 0, 0)), (E,)),
    Bad("irq 5", message(GET_IRQ_INFO, struct.pack("<4I", 16, 0, 5, 0)), (E,)),
    Bad("errors without PCI Express", message(GET_IRQ_INFO, struct.pack("<4I", 16, 0, 3, 0)), (E,)),
    Bad("RESET with a payload", message(RESET, bytes(64)), (0,)),
]
IRQS = [
    Bad("irqs without flags", irqs(0, 0, 0, 1), (E,)),
    Bad("irqs with every flag", irqs(0x3F, 0, 0, 1), (E,)),
    Bad("irqs with unknown flags", irqs(0x1000 | 33, 0, 0, 1), (E,)),
    Bad("irqs of index 5", irqs(33, 5, 0, 1), (E,)),
    Bad("irqs of no index", irqs(33, 0xFFFF_FFFF, 0, 1), (E,)),
    Bad("MSI, which is not there", irqs(36, 1, 0, 1), (E,), 1),
    Bad("a fifth vector", irqs(36, 2, 4, 1), (E,), 1),
    Bad("vectors over the end", irqs(36, 2, 3, 2), (E,), 2),
    Bad("4294967295 vectors", irqs(36, 2, 0, 0xFFFF_FFFF), (E,)),
    Bad("vectors that wrap", irqs(36, 2, 0xFFFF_FFFF, 2), (E,)),
    Bad("fewer descriptors than vectors", irqs(36, 2, 0, 3), (E,), 2),
    Bad("more descriptors than vectors", irqs(36, 2, 0, 1), (E,), 2),
    Bad("descriptors that are no data", irqs(33, 2, 0, 1), (E,), 1),
    Bad("descriptors that are no eventfds", irqs(36, 2, 0, 2), (E,), 2),
    Bad("fewer bools than vectors", irqs(34, 2, 0, 4, b"\1\1"), (E,)),
    Bad("more bools than vectors", irqs(34, 2, 0, 1, b"\1\1"), (E,)),
    Bad("irqs with argsz 19", irqs(33, 0, 0, 1, argsz=19), (E,)),
    Bad("irqs with no argsz", irqs(33, 0, 0, 1, argsz=0), (E,)),
    Bad("unmasking a pin that is off", irqs(17, 0, 0, 1), (E,)),
    Bad("masking MSI-X", irqs(9, 2, 0, 1), (errno.ENOTTY,)),
    Bad("trying what is not enabled", irqs(33, 2, 0, 1), (E,)),
]
ACCESSES = [
    *(
        Bad(f"a read of region {index} at {offset:#x}, {count} bytes", sends, (number,))
        for index, offset, count, number in (
            (0, 4096, 1, E),
            (0, 1 << 40, 4, E),
            (0, 0xFFFF_FFFF_FFFF_FFFF, 1, E),
            (0, 0xFFFF_FFFF_FFFF_FFF0, 64, E),
            (0, 0, 16 * MIB + 1, E),
            (0, 0, 0xFFFF_FFFF, E),
            (2, 0, 4, E),
            (6, 0, 4, E),
            (8, 0, 4, E),
            (9, 0, 4, E),
            (0x56_0000, 0, 4, E),
            (0xFFFF_FFFF, 0, 4, E),
            (CONFIG, 4096, 4, errno.EFAULT),
            (CONFIG, 0, 5000, errno.EFAULT),
        )
        for sends in [region(REGION_READ, offset, index, count)]
    ),
    Bad("a read of nothing", region(REGION_READ, 0, 0, 0), (0,)),
    Bad("a read of nothing anywhere", region(REGION_READ, 99, 99, 0), (E,)),
    Bad("a read over the end", region(REGION_READ, 4090, 0, 100), (0,)),
    Bad("a read without a reply", region(REGION_READ, 0, 0, 4, flags=NO_REPLY), ()),
    Bad("a read of nowhere without one", region(REGION_READ, 0, 9, 4, flags=NO_REPLY), ()),
    Bad("a write without its data", region(REGION_WRITE, 0, 0, 4), (E,)),
    Bad("a write with less data", region(REGION_WRITE, 0, 0, 4, b"123"), (E,)),
    Bad("a write with more data", region(REGION_WRITE, 0, 0, 4, b"12345"), (E,)),
    Bad("a write with much more data", region(REGION_WRITE, 0, 0, 4, bytes(300_000)), (E,)),
    Bad("a write that says 4 GiB", region(REGION_WRITE, 0, 0, 0xFFFF_FFFF, b"1234"), (E,)),
    Bad("a write behind a region", region(REGION_WRITE, 4096, 0, 4, b"1234"), (E,)),
    Bad("a large write behind a region", region(REGION_WRITE, 4096, 0, MIB, bytes(MIB)), (E,)),
    Bad("a write to no region", region(REGION_WRITE, 0, 3, 4, b"1234"), (E,)),
    Bad("a write to region 9", region(REGION_WRITE, 0, 9, 4, b"1234"), (E,)),
    Bad("a write at the end of all", region(REGION_WRITE, 2**64 - 1, 0, 4, b"1234"), (E,)),
    Bad("several writes, none there", multi(3), (E,)),
    Bad("several writes, one missing", multi(2, (0, 0, 4)), (E,)),
    Bad("several writes, one too many", multi(1, (0, 0, 4), (0, 0, 4)), (E,)),
    Bad("no writes", multi(0), (0,)),
    Bad("2^64 writes", multi(2**64 - 1, (0, 0, 4)), (E,)),
    Bad("several writes, one of 9 bytes", multi(2, (0, 0, 8), (0, 0, 9)), (E,)),
    Bad("several writes, the first nowhere", multi(2, (0, 5, 4), (0, 0, 4)), (E,)),
    Bad("several writes, the second nowhere", multi(2, (0, 0, 4), (0, 5, 4)), (0,)),
]

# --- memory ------------------------------------------------------------------------------------

MAPS = [
    Bad("a map with argsz 31", dma_map(0, 4096, argsz=31), (E,)),
    Bad("a map with no argsz", dma_map(0, 4096, argsz=0), (E,)),
    Bad("a map with unknown flags", dma_map(0, 4096, flags=0x13), (E,)),
    Bad("a map of no descriptor to be mapped", dma_map(0, 4096, flags=7), (E,)),
    Bad("a map of no descriptor to be read", dma_map(0, 4096, flags=11), (E,)),
    Bad("a map of nothing", dma_map(0, 0), (E,)),
    Bad("a map over the end", dma_map(2**64 - 4096, 8192), (E,)),
    Bad("a map at the end of a file's end", dma_map(0, 4096, offset=2**64 - 1), (E,)),
    Bad("a map of a pipe", dma_map(0, 4096), (E,), 1),
    Bad("a map of a pipe, of which two came", dma_map(0, 4096), (E,), 2),
    Bad("an unmap of what is not mapped", unmap(0, 4096), (errno.ENOENT,)),
    Bad("an unmap of nothing", unmap(0, 0), (errno.ENOENT,)),
    Bad("an unmap with argsz 23", unmap(0, 4096, argsz=23), (E,)),
    Bad("an unmap with unknown flags", unmap(0, 4096, flags=8), (E,)),
    Bad("an unmap of all, with a bitmap", unmap(0, 0, flags=3, argsz=48, more=bytes(16)), (E,)),
    Bad("an unmap of all and of an address", unmap(4096, 0, flags=2), (E,)),
    Bad("an unmap of all and of a size", unmap(0, 4096, flags=2), (E,)),
    Bad("an unmap over the end", unmap(2**64 - 1, 2), (E,)),
    Bad("an unmap without its bitmap", unmap(0, 4096, flags=1), (E,)),
    Bad("an unmap with half a bitmap", unmap(0, 4096, flags=1, argsz=40, more=bytes(15)), (E,)),
    Bad(
        "an unmap with a bitmap of 4 GiB",
        unmap(0, 4096, flags=1, argsz=2**32 - 1, more=struct.pack("<QQ", 4096, 2**32)),
        (E,),
    ),
    Bad(
        "an unmap with a bitmap and no logging",
        unmap(0, 4096, flags=1, argsz=48, more=struct.pack("<QQ", 4096, 8)),
        (E,),
    ),
]

# --- features and migration --------------------------------------------------------------------

FEATURES = [
    Bad("a feature with argsz 7", feature(1, GET, argsz=7), (E,)),
    Bad("a feature with no argsz", feature(1, GET, argsz=0), (E,)),
    Bad("a feature with little argsz", feature(1, GET, argsz=15), (E,)),
    Bad("a feature with 4 GiB argsz", feature(1, GET, argsz=2**32 - 1), (0,)),
    Bad("a feature with unknown flags", feature(1, GET | 1 << 20, argsz=16), (E,)),
    Bad("a feature to get and set", feature(2, GET | SET, bytes(8)), (E,)),
    Bad("a feature without an operation", feature(1, 0, bytes(8)), (E,)),
    Bad("a feature that is only got", feature(1, SET, bytes(8)), (E,)),
    Bad("a probe for what is only got", feature(1, SET | PROBE), (E,)),
    *(
        Bad(f"feature {n}", feature(n, GET, argsz=64), (errno.ENOTTY,))
        for n in (0, 3, 10, 11, 13, 14, 0xFFFF)
    ),
    *(
        Bad(f"state {n}", feature(STATE, SET, struct.pack("<Ii", n, -1)), (E,))
        for n in (ERROR_STATE, 8, 99, 0xFFFF_FFFF)
    ),
    *(
        Bad(f"a state of {n} bytes", feature(STATE, SET, bytes(n), argsz=16), (E,))
        for n in (0, 4, 7)
    ),
    Bad("a log of half a struct", feature(START, SET, bytes(15), argsz=40), (E,)),
    Bad("a log of nothing", feature(START, SET, logging_start()), (E,)),
    Bad("a log of ranges that are missing", feature(START, SET, logging_start(count=2)), (E,)),
    Bad("a log of too many", feature(START, SET, logging_start(count=257)), (errno.E2BIG,)),
    Bad(
        "a log of 4294967295 ranges",
        feature(START, SET, logging_start(count=2**32 - 1)),
        (errno.E2BIG,),
    ),
    Bad("a log of bytes", feature(START, SET, logging_start((1, 4096))), (E,)),
    Bad("a log of half pages", feature(START, SET, logging_start((0, 2048))), (E,)),
    Bad(
        "a log over the end",
        feature(START, SET, logging_start((2**64 - 4096, 8192))),
        (errno.EOVERFLOW,),
    ),
    Bad(
        "a log of the same twice", feature(START, SET, logging_start((0, 8192), (4096, 4096))), (E,)
    ),
    Bad("a log to get", feature(START, GET, logging_start((0, 4096))), (E,)),
    Bad("the end of no log", feature(STOP_LOGGING, SET), (0,)),
    Bad(
        "a report of no log",
        feature(REPORT, GET, struct.pack("<3Q", 0, 1 << 18, 4096), argsz=40),
        (E,),
    ),
    Bad("a report of half a struct", feature(REPORT, GET, bytes(23), argsz=64), (E,)),
    Bad("a report to set", feature(REPORT, SET, bytes(24), argsz=64), (E,)),
    Bad(
        "a report of 2^64 bytes",
        feature(REPORT, GET, struct.pack("<3Q", 0, 2**64 - 1, 4096), argsz=2**32 - 1),
        (E,),
    ),
    Bad(
        "a report of a bitmap of 1 GiB",
        feature(REPORT, GET, struct.pack("<3Q", 0, 1 << 45, 4096), argsz=2**32 - 1),
        (errno.E2BIG,),
    ),
    Bad(
        "a report of no pages", feature(REPORT, GET, struct.pack("<3Q", 0, 4096, 0), argsz=64), (E,)
    ),
]
TRANSFERS = [
    Bad("a read of the state without a session", data(MIG_DATA_READ, 12, 4), (E,)),
    Bad("a read of no state without one", data(MIG_DATA_READ, 8, 0), (E,)),
    Bad("a read of too much state", data(MIG_DATA_READ, 2**32 - 1, 16 * MIB + 1), (E,)),
    Bad("a read of 4 GiB of state", data(MIG_DATA_READ, 2**32 - 1, 2**32 - 9), (E,)),
    Bad("a read with no room", data(MIG_DATA_READ, 11, 4), (E,)),
    Bad("a read with a wrapping size", data(MIG_DATA_READ, 7, 2**32 - 1), (E,)),
    Bad("a write of state without a session", data(MIG_DATA_WRITE, 12, 4, b"1234"), (E,)),
    Bad("a write of much state without one", data(MIG_DATA_WRITE, 8 + MIB, MIB, bytes(MIB)), (E,)),
    Bad("a write of less state", data(MIG_DATA_WRITE, 12, 4, b"123"), (E,)),
    Bad("a write of more state", data(MIG_DATA_WRITE, 12, 4, b"12345"), (E,)),
    Bad("a write of much more state", data(MIG_DATA_WRITE, 12, 4, bytes(MIB)), (E,)),
    Bad("a write that says 4 GiB of state", data(MIG_DATA_WRITE, 2**32 - 1, 2**32 - 9, b"1"), (E,)),
    Bad("a write with small argsz", data(MIG_DATA_WRITE, 11, 4, b"1234"), (E,)),
    Bad(
        "precopy info without a session",
        message(PRECOPY_INFO, struct.pack("<IIQQ", 24, 0, 0, 0)),
        (E,),
    ),
    Bad("precopy info with no argsz", message(PRECOPY_INFO, bytes(24)), (E,)),
]
BEFORE = [*TOO_EARLY, *VERSIONS]
AFTER = [*FRAMING, *INFO, *IRQS, *ACCESSES, *MAPS, *FEATURES, *TRANSFERS]


@pytest.fixture(scope="module")
def path() -> Iterator[str]:
    """One server for all of them."""
    with served(Target()) as path:
        yield path


def test_there_are_more_than_enough() -> None:
    rows = [*BEFORE, *AFTER]
    assert len(rows) >= 150
    assert len({row.name for row in rows}) == len(rows)


def ids(rows: list[Bad]) -> list[str]:
    return [row.name.replace(" ", "-") for row in rows]


@pytest.mark.parametrize("row", BEFORE, ids=ids(BEFORE))
def test_before_a_version(path: str, row: Bad, caplog: pytest.LogCaptureFixture) -> None:
    meet(path, row, None)
    assert bugs(caplog) == []


@pytest.mark.parametrize("row", AFTER, ids=ids(AFTER))
def test_after_the_version(path: str, row: Bad, caplog: pytest.LogCaptureFixture) -> None:
    meet(path, row, FULL)
    assert bugs(caplog) == []


def bugs(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as one of ours: a client can be the reason for a warning at most."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def meet(path: str, row: Bad, capabilities: bytes | None) -> None:
    """Be that client, and then a good one.

    Descriptors that stay open at the server's end are found by conftest.py.
    """
    pipes = [os.pipe() for _ in range((row.fds + 1) // 2)]
    fds = [fd for pipe in pipes for fd in pipe][: row.fds]
    try:
        with Raw.connect(path, capabilities) as bad:
            send(bad, row.sends, fds)
            for expected in row.expected:
                expect(bad, expected)
            if OVER not in row.expected:
                assert bad.state() == RUNNING
    finally:
        for pipe in pipes:
            for fd in pipe:
                os.close(fd)
    with Raw.connect(path) as good:
        assert good.state() == RUNNING
        assert good.write_region(0, 0, b"good") == 0
        assert good.read_region(0, 0, 4) == b"good"


def send(bad: Raw, data: bytes, fds: list[int]) -> None:
    """Send all of it, or as much as a server takes that has heard enough."""
    try:
        if fds:
            data = data[socket.send_fds(bad.sock, [data], fds) :]
        bad.sock.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass


def expect(bad: Raw, expected: int | str) -> None:
    reply = bad.receive()
    if expected == OVER:
        assert reply is None
        return
    assert reply is not None, "the server hung up"
    assert reply.flags == (REPLY | ERROR if expected else REPLY)
    assert reply.errno == expected, os.strerror(reply.errno)
    if expected:
        assert reply.body == b""
