"""How older programs find a device: by what sysfs tells of its address, its group and its nodes."""

from __future__ import annotations

import os
import re
import stat
import sys
from typing import TYPE_CHECKING

from door_programs import Plain, build, serve
from vfiomig import Device
from vfiomig.device import PciIdentity, Region

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

FIRST, SECOND = "0000:01:00.0", "0000:02:00.0"


class Card(Device):
    pci = PciIdentity(0x1AF4, 0x1042, 0x10, 0x20, class_code=0x018000, revision=3)
    bar0 = Region(size=64, io=True)
    bar2 = Region(size=1 << 14, bits64=True, prefetchable=True)


#: Finds every function that is bound to vfio-pci, as DPDK and its like do.
SCAN = r"""
#include <dirent.h>
#include <libgen.h>
#define DEVICES "/sys/bus/pci/devices"
UNUSED static const char *text(const char *address, const char *file)
{
    static char line[4096];
    char path[256];
    snprintf(path, sizeof path, DEVICES "/%s/%s", address, file);
    FILE *in = fopen(path, "r");
    CHECK(in);
    line[fread(line, 1, sizeof line - 1, in)] = 0;
    fclose(in);
    return line;
}
UNUSED static const char *leads_to(const char *address, const char *link)
{
    static char target[256];
    char path[256];
    snprintf(path, sizeof path, DEVICES "/%s/%s", address, link);
    ssize_t length = readlink(path, target, sizeof target - 1);
    CHECK(length > 0);
    target[length] = 0;
    return basename(target);
}
"""


def test_a_program_that_scans_the_bus_reaches_the_group_of_each_function(tmp_path: Path) -> None:
    body = r"""
    int main(void)
    {
        DIR *bus = opendir(DEVICES);
        CHECK(bus);
        int found = 0;
        for (struct dirent *entry; (entry = readdir(bus));) {
            const char *address = entry->d_name;
            if (*address == '.')
                continue;
            CHECK(!strcmp(leads_to(address, "driver"), "vfio-pci"));
            CHECK(!strcmp(leads_to(address, "subsystem"), "pci"));
            CHECK(strtol(text(address, "class"), 0, 16) == 0xff0000 || strtol(text(address, "class"), 0, 16) == 0x018000);
            IS(atoi(text(address, "numa_node")), -1);
            char path[64];
            snprintf(path, sizeof path, "/dev/vfio/%s", leads_to(address, "iommu_group"));
            int container = open("/dev/vfio/vfio", O_RDWR), group = open(path, O_RDWR);
            CHECK(container >= 0 && group >= 0);
            CHECK(!ioctl(group, 0x3B68, &container) && !ioctl(container, 0x3B66, 3));
            int device = ioctl(group, 0x3B6A, address);
            CHECK(device >= 0);
            /* Such programs know where vfio-pci's regions begin, and do not ask. */
            uint16_t vendor, command = 3;
            CHECK(pread(device, &vendor, 2, 7ull << 40) == 2);
            IS(strtol(text(address, "vendor"), 0, 16), vendor);
            CHECK(pwrite(device, &command, 2, (7ull << 40) + 4) == 2);
            FAILS(pread(device, &vendor, 2, 8ull << 40), EINVAL);
            found++;
        }
        closedir(bus);
        IS(found, 2);
        return 0;
    }
    """
    assert serve([Plain(4096), Card()], [build(tmp_path, SCAN + body)]) == 0


def test_the_folder_of_a_function_names_its_character_device(tmp_path: Path) -> None:
    body = r"""
    int main(void)
    {
        DIR *folder = opendir(DEVICES "/0000:02:00.0/vfio-dev");
        CHECK(folder);
        struct dirent *entry;
        do
            CHECK((entry = readdir(folder)));
        while (*entry->d_name == '.');
        CHECK(!strcmp(entry->d_name, "vfio1"));
        unsigned major_, minor_;
        struct stat about;
        CHECK(sscanf(text("0000:02:00.0", "vfio-dev/vfio1/dev"), "%u:%u", &major_, &minor_) == 2);
        CHECK(!stat("/dev/vfio/devices/vfio1", &about));
        CHECK(about.st_rdev == makedev(major_, minor_));
        CHECK(sscanf(text("0000:02:00.0", "../../../class/vfio/1/dev"), "%u:%u", &major_, &minor_) == 2);
        CHECK(!stat("/dev/vfio/1", &about));
        CHECK(about.st_rdev == makedev(major_, minor_));
        return 0;
    }
    """
    assert serve([Plain(4096), Card()], [build(tmp_path, SCAN + body)]) == 0


def test_every_way_to_look_at_links_folders_and_files(tmp_path: Path) -> None:
    body = r"""
    #define CARD "/sys/devices/pci0000:02/0000:02:00.0"
    int main(void)
    {
        struct stat about, other;
        struct statx wide;
        char whole[PATH_MAX], few[4];
        CHECK(!lstat(DEVICES "/0000:02:00.0", &about) && S_ISLNK(about.st_mode));
        CHECK(!stat(DEVICES "/0000:02:00.0", &about) && S_ISDIR(about.st_mode));
        CHECK(!stat(CARD, &other) && other.st_ino == about.st_ino);
        CHECK(!lstat(DEVICES "/0000:02:00.0/vendor", &about));
        IS(about.st_mode, S_IFREG | 0444);
        IS(about.st_size, 7);
        CHECK(!statx(AT_FDCWD, CARD "/iommu_group", 0, STATX_BASIC_STATS, &wide));
        CHECK(S_ISDIR(wide.stx_mode));
        CHECK(!statx(AT_FDCWD, CARD "/iommu_group", AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS, &wide));
        CHECK(S_ISLNK(wide.stx_mode));
        CHECK(realpath(DEVICES "/0000:02:00.0/iommu_group/devices/0000:02:00.0/driver", whole));
        CHECK(!strcmp(whole, "/sys/bus/pci/drivers/vfio-pci"));
        CHECK(realpath("/sys/class/vfio-dev/vfio1/device", whole) && !strcmp(whole, CARD));
        IS(readlink(CARD "/iommu_group", few, 4), 4);
        CHECK(!memcmp(few, "../.", 4));
        FAILS(readlink(CARD "/vendor", few, 4), EINVAL);
        FAILS(readlink(CARD, few, 4), EINVAL);
        FAILS(readlink(CARD "/iommu_group", few, 0), EINVAL);

        CHECK(!access(CARD "/vendor", R_OK) && !access(CARD, R_OK | X_OK));
        FAILS(access(CARD "/vendor", W_OK), EACCES);
        FAILS(access(CARD "/physfn", F_OK), ENOENT);
        FAILS(open(CARD "/vendor", O_RDWR), EACCES);
        FAILS(open(CARD "/vendor", O_WRONLY | O_TRUNC), EACCES);
        FAILS(open(CARD "/driver_override", O_WRONLY), ENOENT);
        FAILS(open(CARD "/vendor/", O_RDONLY), ENOTDIR);
        FAILS(open(CARD "/vendor", O_DIRECTORY), ENOTDIR);
        FAILS(open(CARD, O_RDWR), EISDIR);
        FAILS(open(CARD "/driver", O_RDONLY | O_NOFOLLOW), ELOOP);
        FAILS(stat(DEVICES "/0000:03:00.0", &about), ENOENT);
        FAILS(stat("/sys/kernel/iommu_groups/7", &about), ENOENT);
        CHECK(!stat("/sys/module/vfio_pci", &about) && S_ISDIR(about.st_mode));
        FAILS(open("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", O_RDONLY), ENOENT);

        int folder = open(DEVICES "/0000:02:00.0", O_RDONLY | O_DIRECTORY);
        int file = openat(folder, "vendor", O_RDONLY);
        CHECK(folder >= 0 && file >= 0);
        IS(read(file, whole, sizeof whole), 7);
        CHECK(!memcmp(whole, "0x1af4\n", 7));
        FAILS(fstatat(folder, "iommu_group/type", &about, 0), ENOENT);
        IS(openat(folder, "../../pci0000:01/0000:01:00.0/vfio-dev/vfio1", O_RDONLY), -1);
        CHECK(openat(folder, "../../pci0000:01/0000:01:00.0/vfio-dev/vfio0", O_RDONLY) >= 0);
        sprintf(whole, "/proc/self/fd/%d", folder);
        char named[64] = { 0 };
        CHECK(readlink(whole, named, 63) > 0 && !strcmp(named, CARD));
        return 0;
    }
    """
    assert serve([Plain(4096), Card()], [build(tmp_path, SCAN + body)]) == 0


#: What the Python programs of these tests print.
TELL = """
import os, sys
folder = "/sys/bus/pci/devices/0000:01:00.0/"
names = "vendor device subsystem_vendor subsystem_device class revision irq numa_node".split()
print(*(open(folder + name).read().strip() for name in names))
print(open(folder + "resource").read(), end="")
print(os.path.getsize(folder + "config"), open(folder + "config", "rb").read(4).hex())
"""


def test_the_files_of_a_function_say_what_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert serve([Card()], [sys.executable, "-c", TELL]) == 0
    first, *lines, last = capfd.readouterr().out.splitlines()
    assert first == "0x1af4 0x1042 0x0010 0x0020 0x018000 0x03 0 -1"
    rows = [[int(word, 16) for word in line.split()] for line in lines]
    assert len(rows) == 13
    assert all(re.fullmatch("(0x[0-9a-f]{16} ?){3}", line) for line in lines)
    assert {n: row[:2] for n, row in enumerate(rows) if any(row)} == {0: [0, 63], 2: [0, 16383]}
    assert [row[2] & 0x102300 for row in rows[:3]] == [0x100, 0, 0x102200]
    assert last == "256 f41a4210"


def test_the_machines_own_functions_are_not_the_programs_and_all_else_is(
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = (
        "import os; print(sorted(os.listdir('/sys/bus/pci/devices')), "
        "os.listdir('/sys/kernel/iommu_groups'), os.path.exists('/sys/kernel/mm'), "
        "os.stat('/sys/bus').st_ino)"
    )
    assert serve([Card(), Card()], [sys.executable, "-c", program]) == 0
    seen = capfd.readouterr().out.split("] ")
    assert seen[0] == f"['{FIRST}', '{SECOND}'"
    assert sorted(re.findall(r"\d", seen[1])) == ["0", "1"]
    assert seen[2] == f"{os.path.exists('/sys/kernel/mm')} {os.stat('/sys/bus').st_ino}\n"


def test_the_client_finds_a_served_device_by_its_address_and_its_group(
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = f"""
import vfiomig
for target in ("{FIRST}", "/dev/vfio/0", "/dev/vfio/devices/vfio0"):
    with vfiomig.open(target) as client:
        print(client.name, client.state.name, client.about["driver"], client.about.get("group"))
"""
    assert serve([Plain(4096)], [sys.executable, "-W", "error", "-c", program]) == 0
    assert capfd.readouterr().out.splitlines() == [
        f"{FIRST} RUNNING vfio-pci None",
        f"{FIRST} RUNNING vfio-pci /dev/vfio/0",
        "vfio0 RUNNING vfio-pci None",
    ]


def test_nothing_is_left_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "link"))
    program = (
        "import os; os.fstat(os.open('/sys/bus/pci/devices', 0)); print(os.listdir('/sys/bus/pci'))"
    )
    assert serve([Card()], [sys.executable, "-c", program]) == 0
    assert list(real.iterdir()) == []
    assert stat.S_ISDIR(real.stat().st_mode)
