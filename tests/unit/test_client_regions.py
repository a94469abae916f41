"""The sparse areas of a region, from a device's side that may write anything."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import pytest

from vfiomig.abi import vfio
from vfiomig.client.regions import mappable_areas
from vfiomig.client.requests import Requests

if TYPE_CHECKING:
    from vfiomig.abi.uapi import UapiStruct

MMAP, CAPS = vfio.VFIO_REGION_INFO_FLAG_MMAP, vfio.VFIO_REGION_INFO_FLAG_CAPS
INFO = 32


class Answers:
    """A transport that puts these bytes behind the struct, and this offset into it."""

    device, iommufd = 3, -1

    def __init__(self, capabilities: bytes, cap_offset: int) -> None:
        self.capabilities = capabilities
        self.cap_offset = cap_offset

    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int:
        assert (on, number) == (self.device, vfio.VFIO_DEVICE_GET_REGION_INFO)
        assert isinstance(argument, vfio.RegionInfo)
        assert argument.argsz == INFO + len(self.capabilities)
        argument.cap_offset = self.cap_offset
        ctypes.memmove(ctypes.addressof(argument) + INFO, self.capabilities, len(self.capabilities))
        return 0


def capability(number: int, following: int, body: bytes) -> bytes:
    return number.to_bytes(2, "little") + b"\1\0" + following.to_bytes(4, "little") + body


def words(*numbers: int, size: int = 8) -> bytes:
    return b"".join(number.to_bytes(size, "little") for number in numbers)


def sparse(*areas: tuple[int, int], count: int | None = None, following: int = 0) -> bytes:
    head = words(len(areas) if count is None else count, 0, size=4)
    return capability(1, following, head + b"".join(words(*area) for area in areas))


def areas_of(
    capabilities: bytes, cap_offset: int = INFO, flags: int = MMAP | CAPS, argsz: int | None = None
) -> list[tuple[int, int]]:
    region = vfio.RegionInfo(
        argsz=INFO + len(capabilities) if argsz is None else argsz, flags=flags, size=0x4000
    )
    requests = Requests(Answers(capabilities, cap_offset), "dev")  # type: ignore[arg-type]
    return mappable_areas(requests, region)


def test_a_region_that_cannot_be_mapped_has_no_area() -> None:
    assert areas_of(b"", flags=CAPS) == []


def test_without_capabilities_all_of_it_may_be_mapped() -> None:
    assert areas_of(b"", flags=MMAP) == [(0, 0x4000)]
    assert areas_of(capability(9, 0, b""), flags=MMAP | CAPS) == [(0, 0x4000)]


def test_areas_are_found_behind_another_capability() -> None:
    first = capability(2, INFO + 16, words(7))
    assert areas_of(first + sparse((0, 0x1000), (0x3000, 0x1000))) == [
        (0, 0x1000),
        (0x3000, 0x1000),
    ]


@pytest.mark.parametrize(
    ("capabilities", "cap_offset"),
    [
        (sparse((0, 0x1000)), 8),
        (sparse((0, 0x1000)), INFO + 32),
        (sparse((0, 0x1000)), 0xFFFFFFF0),
        (sparse((0, 0x1000), count=2), INFO),
        (sparse((0, 0x1000), count=0), INFO),
        (sparse((0, 0x1000), count=0xFFFFFFFF), INFO),
        (sparse((0x3000, 0x2000)), INFO),
        (sparse((0xFFFFFFFFFFFFF000, 0x1000)), INFO),
        (sparse((0, 0x1000))[:12], INFO),
        (capability(2, INFO, words(7)), INFO),
        (capability(2, INFO + 17, words(7)), INFO),
    ],
    ids=[
        "inside the struct", "at the end", "far away", "one area short", "no area", "four billion",
        "leaves the region", "wraps", "cut off", "points at itself", "points behind the end",
    ],
)  # fmt: skip
def test_capabilities_that_make_no_sense_are_eproto(capabilities: bytes, cap_offset: int) -> None:
    with pytest.raises(OSError) as caught:
        areas_of(capabilities, cap_offset)
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("argsz", [INFO, 31, (1 << 20) + 1, 0xFFFFFFFF])
def test_no_buffer_is_made_for_a_size_that_makes_no_sense(argsz: int) -> None:
    with pytest.raises(OSError) as caught:
        areas_of(b"", argsz=argsz)
    assert caught.value.errno == errno.EPROTO
