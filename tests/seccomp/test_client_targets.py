"""A device by every name that it has: node, group, address, uuid, descriptor; and who is in the way.

The client is a program under the door, and sysfs a made one.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

from door_programs import Plain, serve, served
from made_sysfs import Made, make_sysfs
from vfiomig.abi.ioctls import Dialect

if TYPE_CHECKING:
    from pathlib import Path

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
FIRST, SECOND = "0000:01:00.0", "0000:02:00.0"

#: What the programs share: the sysfs root is the first argument.
PRELUDE = """
import errno, mmap, os, subprocess, sys
import vfiomig
from vfiomig import State, TargetError

SYSFS = sys.argv[1]

def open_(target):
    return vfiomig.open(target, sysfs=SYSFS)

def refused(target):
    try:
        open_(target).close()
    except (TargetError, vfiomig.SpecError) as failure:
        return str(failure)
    raise AssertionError("it was opened")

def is_reached(client):
    assert client.state is State.RUNNING, client.state
    assert bytes(client.read_region(0, 0, 4)) == bytes(4)
    with mmap.mmap(-1, 4096) as memory:
        client.map(0x10000, memory)
        assert client.unmap(0x10000, 4096) == 4096
"""


def run(
    sysfs: Path,
    program: str,
    capfd: pytest.CaptureFixture[str],
    *more: str,
    dialect: Dialect = Dialect.LANDED,
) -> str:
    """Run a program with two devices; return what it printed."""
    devices = served(Plain(4096), Plain(4096), dialect=dialect)
    code = serve(
        devices, [sys.executable, "-W", "error", "-c", PRELUDE + program, str(sysfs), *more]
    )
    seen = capfd.readouterr()
    assert code == 0, seen.err
    return seen.out


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """As a kernel shows it that offers both ways."""
    return make_sysfs(
        tmp_path,
        Made(FIRST, "mlx5_vfio_pci", "vfio0", "0"),
        Made(SECOND, "vfio-pci", "vfio1", "1"),
    )


@pytest.mark.parametrize(
    ("target", "about"),
    [
        ("/dev/vfio/devices/vfio0", {"driver": "mlx5_vfio_pci"}),
        ("/dev/vfio/1", {"driver": "vfio-pci", "group": "/dev/vfio/1"}),
        (f"/dev/vfio/1:{SECOND}", {"driver": "vfio-pci", "group": "/dev/vfio/1"}),
        (FIRST, {"driver": "mlx5_vfio_pci"}),
        ("02:00.0", {"driver": "vfio-pci"}),
    ],
)
def test_a_device_is_reached_by_each_of_its_names(
    sysfs: Path, target: str, about: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    program = """
with open_(sys.argv[2]) as client:
    is_reached(client)
    print({"by": "system calls", **%r} == client.about, client.name)
"""
    name = {"02:00.0": SECOND, "/dev/vfio/1": SECOND, f"/dev/vfio/1:{SECOND}": SECOND}
    expected = name.get(target, target.rpartition("/")[2])
    assert run(sysfs, program % about, capfd, target) == f"True {expected}\n"


def test_without_a_character_device_a_name_leads_to_the_group(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # vfio9 is not there; a kernel before 6.1 shows no node at all.
    rows = Made(SECOND, "vfio-pci", "vfio9", "1"), Made(FIRST, "mtty", None, "0")
    program = f"""
for name in ("{SECOND}", "{FIRST}"):
    with open_(name) as client:
        is_reached(client)
        print(client.about["group"])
"""
    assert run(make_sysfs(tmp_path, *rows), program, capfd) == "/dev/vfio/1\n/dev/vfio/0\n"


def test_a_mediated_device_is_found_by_its_uuid(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sysfs = make_sysfs(tmp_path, Made(UUID, "mtty", "vfio0", "0", "mdev"))
    program = f"""
with open_("{UUID.upper()}") as client:
    is_reached(client)
    print(client.name, client.about["driver"])
"""
    assert run(sysfs, program, capfd) == f"{UUID} mtty\n"


@pytest.mark.parametrize("dialect", list(Dialect), ids=str)
def test_a_group_speaks_either_dialect(
    sysfs: Path, dialect: Dialect, capfd: pytest.CaptureFixture[str]
) -> None:
    program = """
with open_("/dev/vfio/0:0000:01:00.0") as client:
    session = client.set_state(State.STOP_COPY)
    print(client.dialect, sum(map(len, session)), client.set_state(State.RUNNING))
    session.close()
"""
    assert run(sysfs, program, capfd, dialect=dialect) == f"{dialect} 4096 None\n"


def test_who_is_in_the_way_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sysfs = make_sysfs(
        tmp_path,
        Made(FIRST, "vfio-pci", "vfio0", "0"),
        Made("0000:03:00.0", "nvme", None, "77"),
        Made("0000:04:00.0", None, None, None),
        Made("0000:05:00.0", "vfio-pci", "vfio8", "88"),
    )
    program = f"""
with open_("{FIRST}"):
    for target in ("/dev/vfio/0:{FIRST}", "/dev/vfio/devices/vfio0"):
        print(refused(target))
with open_("/dev/vfio/0"):
    for target in ("/dev/vfio/0", "{FIRST}"):
        print(refused(target))
for target in ("0000:03:00.0", "0000:04:00.0", "0000:05:00.0", "0000:06:00.0"):
    print(refused(target))
for target in ("/dev/vfio/0:0000:09:00.0", "/dev/vfio/9:0000:09:00.0", "/dev/vfio/1"):
    print(refused(target))
"""
    lines = run(sysfs, program, capfd).splitlines()
    words = [
        ("/dev/vfio/0", "EBUSY", "as a character device"),
        ("vfio0", "another program"),
        ("/dev/vfio/0", "EBUSY", "another program"),
        (FIRST, "EBUSY", "another program has its group open"),
        ("0000:03:00.0", "bound to nvme", "no VFIO driver"),
        ("0000:04:00.0", "no driver", "no IOMMU group"),
        ("0000:05:00.0", "/dev/vfio/devices/vfio8", "visible"),
        ("0000:06:00.0", "no such device", "lspci"),
        ("0000:09:00.0", "ENODEV", "no device of that name"),
        ("/dev/vfio/9", "ENOENT", "no such group"),
        ("does not tell which device", "/dev/vfio/1:0000:01:00.0"),
    ]
    assert len(lines) == len(words)
    for line, expected in zip(lines, words, strict=True):
        for word in expected:
            assert word in line


# Descriptors that were handed over.

#: The child's program, and how the parent starts it.
CHILD = (
    PRELUDE
    + """
TARGET, STATE = sys.argv[2:]
with vfiomig.open(TARGET) as client:
    assert client.state.name == STATE, client.state
    print(client.about["descriptor"], end=" ")
    try:
        with mmap.mmap(-1, 4096) as memory:
            client.map(0x10000, memory)
            client.unmap(0x10000, 4096)
        print("mapped")
    except OSError as failure:
        print(errno.errorcode[failure.errno], failure.strerror)
"""
)
PARENT = """
def hand_over(target, state, *fds):
    numbers = dict(zip("dic", fds))
    command = [sys.executable, "-W", "error", "-c", CHILD, "", target.format(**numbers), state]
    sys.stdout.flush()
    subprocess.run(command, pass_fds=fds, check=True, timeout=100)
"""


def hand_over(
    sysfs: Path, program: str, capfd: pytest.CaptureFixture[str], dialect: Dialect = Dialect.LANDED
) -> list[str]:
    text = f"CHILD = {CHILD!r}\n{PARENT}\n{program}"
    return run(sysfs, text, capfd, dialect=dialect).splitlines()


def test_a_node_that_was_handed_over_is_bound_by_whoever_got_it(
    sysfs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = """
device = os.open("/dev/vfio/devices/vfio0", os.O_RDWR)
hand_over("fd:{d}", "RUNNING", device)
os.close(device)
device, iommufd = os.open("/dev/vfio/devices/vfio0", os.O_RDWR), os.open("/dev/iommu", os.O_RDWR)
hand_over("fd:{d},iommufd={i}", "RUNNING", device, iommufd)
"""
    assert hand_over(sysfs, program, capfd) == ["/dev/vfio/devices/vfio0 mapped"] * 2


def test_a_device_that_was_bound_before_keeps_its_state_and_needs_its_iommufd(
    sysfs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = """
with open_("/dev/vfio/devices/vfio0") as client:
    session = client.set_state(State.STOP_COPY)
    device, iommufd = client._transport.device, client._transport.iommufd
    hand_over("fd:{d},iommufd={i}", "STOP_COPY", device, iommufd)
    hand_over("fd:{d}", "STOP_COPY", device)
    session.close()
"""
    first, second = hand_over(sysfs, program, capfd)
    assert first == "/dev/vfio/devices/vfio0 mapped"
    assert second.startswith("/dev/vfio/devices/vfio0 ENODEV ")
    assert "fd:3,iommufd=4" in second


@pytest.mark.parametrize("dialect", list(Dialect), ids=str)
def test_a_device_out_of_a_group_maps_through_its_container(
    sysfs: Path, dialect: Dialect, capfd: pytest.CaptureFixture[str]
) -> None:
    program = """
with open_("/dev/vfio/0") as client:
    client.set_state(State.STOP)
    device, container = client._transport.device, client._memory._container.fileno()
    hand_over("fd:{d},container={i}", "STOP", device, container)
    hand_over("fd:{d}", "STOP", device)
"""
    first, second = hand_over(sysfs, program, capfd, dialect)
    assert first == "anon_inode:[vfio-device] mapped"
    assert second.startswith("anon_inode:[vfio-device] ENODEV ")
    assert "fd:3,container=4" in second


def test_what_is_no_device_is_refused(sysfs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = """
print(refused("fd:99"))
print(refused(f"fd:{os.open('/dev/vfio/devices/vfio0', os.O_RDWR)},iommufd=99"))
print(refused(f"fd:{os.open('/dev/null', os.O_RDWR)}"))
print(refused(f"fd:{os.open('/dev/vfio/0', os.O_RDWR)}"))
print(refused(f"fd:{os.open('/dev/vfio/vfio', os.O_RDWR)}"))
print(refused(f"fd:{os.open('/dev/iommu', os.O_RDWR)}"))
"""
    lines = run(sysfs, program, capfd).splitlines()
    for line, number in zip(lines[:2], ("99", "99"), strict=True):
        assert f"descriptor {number} cannot be opened: EBADF" in line
        assert "pass_fds" in line
    for line in lines[2:4]:
        assert "no VFIO device" in line
    for line in lines[4:]:
        assert re.search(r"fd:(\d+) cannot.*it is a container or an iommufd.*container=\1 or", line)
    assert len(lines) == 6
