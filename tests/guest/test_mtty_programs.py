"""The C programs that see this project's door, before the kernel: they have to see the same.

What differs is a row of a table here, with its reason. The devices are the kernel's mtty and do no
DMA, so that sections about DMA are left out, and lines that tell of some.
"""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

import pytest

import vfiomig
from c_programs import HERE, differences, sections
from kernel_guest import PAIR, PROGRAMS
from vmtest.inside import WORK

DMA = re.compile(r"(?<!_)DMA|it is (?:there|at)|it is gone")


class Way(NamedTuple):
    """A program, the flavours it has to run in, and the sections that suit the devices."""

    program: str
    flavours: tuple[str, ...]
    sections: tuple[str, ...]


WAYS = (
    Way(
        "group",
        ("group", "cdev"),
        (
            "open",
            "a container alone",
            "GET_STATUS",
            "SET_IOMMU",
            "GET_DEVICE_FD: names",
            "GET_DEVICE_FD",
            "one state for all descriptors",
            "who keeps what",
            "two groups",
            "no stream",
        ),
    ),
    Way("group", ("cdev",), ("SET_CONTAINER", "a device by its group", "both ways")),
    Way(
        "type1",
        ("group", "cdev"),
        (
            "GET_INFO",
            "MAP_DMA",
            "UNMAP_DMA",
            "version 1",
            "DIRTY_PAGES: arguments",
            "UNMAP_DMA with a bitmap",
        ),
    ),
    Way(
        "compat",
        ("cdev",),
        (
            "alone",
            "SET_CONTAINER",
            "a device",
            "SET_IOMMU",
            "GET_INFO",
            "MAP_DMA",
            "UNMAP_DMA",
            "version 1",
        ),
    ),
    Way(
        "landed",
        ("cdev",),
        (
            "the header of FEATURE",
            "SET",
            "SET: arguments",
            "SET: memory that ends",
            "SET: read-only memory",
            "SET: no descriptor left",
            "unknown requests",
        ),
    ),
    Way(
        "binding",
        ("cdev",),
        (
            "open",
            "before BIND",
            "BIND: arguments",
            "BIND: to whom",
            "IOAS_ALLOC and DESTROY",
            "IOAS_IOVA_RANGES",
            "IOAS_MAP",
            "IOAS_UNMAP",
            "ATTACH and DETACH",
            "no stream",
        ),
    ),
)

#: What differs in a section: the door's line, and the kernel's, or "" if it says nothing.
Lines = dict[str, str]

THREE_DEVICES: Lines = {
    "stat /dev/vfio/2 = ENOENT": "stat /dev/vfio/2 = 0, a character device",
    "group 2 = ENOENT": "group 2 = fd new cloexec",
}
#: Linux 6.12 has an IOMMU with nested tables, number 6, which later releases lack.
NESTING: Lines = {"CHECK_EXTENSION 0x6 = 0": "CHECK_EXTENSION 0x6 = 1"}
#: So the container has its IOMMU from then on.
NESTING_IS_SET: Lines = {
    "SET_IOMMU 0x6 = ENODEV": "SET_IOMMU 0x6 = 0",
    **{
        f"SET_IOMMU {number} = ENODEV": f"SET_IOMMU {number} = EINVAL"
        for number in ("0x7", "0x8", "0xa", "0xb", "0x100000003")
    },
    "MAP_DMA = EINVAL": "MAP_DMA = EFAULT",
    "SET_IOMMU 3 = 0": "SET_IOMMU 3 = EINVAL",
}
#: Mappings of a device without an IOMMU get no new addresses.
NO_NEW_ADDRESSES: Lines = {"CHECK_EXTENSION 0xa = 1": "CHECK_EXTENSION 0xa = 0"}
#: Options behind a name are for vfio-pci; this driver compares the whole.
NO_OPTIONS: Lines = {
    "a space behind it = fd new cloexec": "a space behind it = ENODEV",
    "an option = EINVAL": "an option = ENODEV",
    "an unknown option = EINVAL": "an unknown option = ENODEV",
}
#: Without an IOMMU there are no ranges, and every size of page is as good.
NO_RANGES: Lines = {
    **{
        f"argsz {size} = 0, argsz 120 flags 3 pgsizes 0x40201000 cap_offset {offset}": (
            f"argsz {size} = 0, argsz {needed} flags 3 pgsizes 0xfffffffffffff000 cap_offset {there}"
        )
        for size, offset, needed, there in (
            (16, "0xeeeeeeee", 72, "0xeeeeeeee"),
            (24, "0", 72, "0"),
            (119, "0", 119, "0x18"),
            (120, "0x18", 120, "0x18"),
        )
    },
    "no room for capabilities = EFAULT": "no room for capabilities = 0",
    "ranges, version 1: 2": "",
    "from 0 to 0xfedfffff": "",
    "from 0xfef00000 to 0xffffffffffff": "",
}
#: Without an IOMMU no address is reserved, and no memory is looked at before it is used.
NOTHING_IS_PINNED: Lines = {
    "iova beyond 48 bits = EINVAL": "iova beyond 48 bits = 0",
    "the last page of all = EINVAL": "the last page of all = 0",
    "reserved for interrupts = EINVAL": "reserved for interrupts = 0",
    "memory that is not there = EFAULT": "memory that is not there = 0",
    "memory with a hole = EFAULT": "memory with a hole = EEXIST",
    "read-only memory, to be written = EFAULT": "read-only memory, to be written = EEXIST",
    "read-only memory, to be read = 0": "read-only memory, to be read = EEXIST",
}
NOTHING_IS_PINNED_BY_IOMMUFD: Lines = {
    "a reserved iova = EINVAL": "a reserved iova = 0",
    "memory that is not there = EFAULT": "memory that is not there = 0",
    "memory that ends half way = EFAULT": "memory that ends half way = EEXIST",
    "read-only memory, to be written = EFAULT": "read-only memory, to be written = EEXIST",
    "read-only memory, to be read = 0": "read-only memory, to be read = EEXIST",
}
NO_RANGES_OF_IOMMUFD: Lines = {
    **{
        f"argsz {size} = 0, argsz 88 flags 3 pgsizes 0x40201000 cap_offset {offset}": (
            f"argsz {size} = 0, argsz 72 flags 3 pgsizes 0xfffffffffffff000 cap_offset {there}"
        )
        for size, offset, there in (
            (16, "0xeeeeeeee", "0xeeeeeeee"),
            (24, "0", "0"),
            (35, "0", "0"),
            (39, "0", "0"),
            (40, "0", "0"),
            (87, "0", "0x18"),
            (88, "0x18", "0x18"),
        )
    },
    "behind argsz 87: 0x10003, 0x28, and 0xeeeeeeee": "behind argsz 87: 0x10003, 0x28, and 0x10001",
    "capability 1, version 1: 2": "capability 1, version 1: 1",
    "from 0 to 0xfedfffff": "from 0 to 0xffffffffffffffff",
    "from 0xfef00000 to 0xffffffffffff": "",
}
NOTHING_IS_PINNED_IN_ITS_PLACE: Lines = {
    "reserved for interrupts = EINVAL": "reserved for interrupts = 0",
    "memory that is not there = EFAULT": "memory that is not there = 0",
}
#: Nobody else can own the DMA of a device that does none.
ALWAYS_VIABLE: Lines = {"status outside: 0": "status outside: 1"}
#: Before the token, what lay behind the struct was not looked at; the device is bound then.
NO_TOKEN: Lines = {
    "argsz 40 flags 0 rest set = E2BIG, devid none": "argsz 40 flags 0 rest set = 0, devid given",
    "read-only memory = EFAULT": "read-only memory = EINVAL",
    "then PROBE MIGRATION = EINVAL": "then PROBE MIGRATION = 0",
}
#: Without an IOMMU a device has an IOAS only.
NO_PAGE_TABLE: Lines = {
    "ATTACH to a device = EINVAL": "ATTACH to a device = ENOENT",
    "a page table of its own: yes": "a page table of its own: no",
}
#: The last close leaves the device in its state, and a state has 96 bytes.
STATE_STAYS: Lines = {
    "read = 100": "read = 96",
    "read after one was closed = 8092": "read after one was closed = 0",
    "a new one is in RUNNING": "a new one is in STOP_COPY",
}
NOTHING_WAS_WRITTEN: Lines = {
    "both = 0, size 0x6000, bits 0x82": "both = 0, size 0x6000, bits 0",
}

DIFFERENCES: dict[tuple[str, str], Lines] = {
    ("group", "open"): THREE_DEVICES,
    ("group", "a container alone"): NESTING,
    ("group", "SET_IOMMU"): NESTING | NESTING_IS_SET | NO_NEW_ADDRESSES,
    ("group", "GET_DEVICE_FD: names"): NO_OPTIONS,
    ("group", "one state for all descriptors"): STATE_STAYS,
    ("type1", "GET_INFO"): NO_RANGES,
    ("type1", "UNMAP_DMA with a bitmap"): NOTHING_WAS_WRITTEN,
    ("type1", "MAP_DMA"): NOTHING_IS_PINNED,
    ("compat", "a device"): ALWAYS_VIABLE,
    ("compat", "GET_INFO"): NO_RANGES_OF_IOMMUFD,
    ("compat", "MAP_DMA"): NOTHING_IS_PINNED_IN_ITS_PLACE,
    ("binding", "BIND: arguments"): NO_TOKEN,
    ("binding", "IOAS_MAP"): NOTHING_IS_PINNED_BY_IOMMUFD,
    ("binding", "ATTACH and DETACH"): NO_PAGE_TABLE,
}

CASES = [
    pytest.param(flavour, way, name, id=f"{flavour}-{way.program}: {name}")
    for way in WAYS
    for flavour in way.flavours
    for name in way.sections
]


def promised(program: str) -> dict[str, list[str]]:
    return sections((HERE / "expected" / f"{program}.txt").read_text(encoding="utf-8"))


def without_dma(lines: list[str]) -> list[str]:
    return [line for line in lines if line and not DMA.search(line)]


@pytest.mark.parametrize(("flavour", "way", "section"), CASES)
def test_a_program_sees_of_the_kernel_what_it_sees_of_the_door(
    flavour: str, way: Way, section: str
) -> None:
    whole = promised(way.program)
    differing = DIFFERENCES.get((way.program, section), {})
    assert differing.keys() <= set(whole[section])
    # In whatever state the last program left it, an open by the client puts it into RUNNING.
    vfiomig.open(PAIR[0]).close()
    done = subprocess.run(
        [WORK / PROGRAMS / way.program, *(name for name in whole if name not in {section, "end"})],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    seen = sections(done.stdout)
    expected = [differing.get(line, line) for line in whole[section]]
    difference = differences(without_dma(expected), without_dma(seen.get(section, [])))
    assert not difference, difference
    assert list(seen) == [section, "end"]
