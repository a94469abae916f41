"""Groups and containers behind the door: their paths, their descriptors, their ends, their trace."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import pytest

from door_programs import WAIT, Plain, Worker, build, serve, served
from vfiomig.abi.ioctls import Dialect
from vfiomig.doors.syscall.trace import Trace

if TYPE_CHECKING:
    from pathlib import Path

#: What a program of that time begins with.
OLD = r"""
#define NAME "0000:01:00.0"
static int container, group;

UNUSED static void open_group(int number)
{
    char path[32];
    container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
    sprintf(path, "/dev/vfio/%d", number);
    group = open(path, O_RDWR | O_CLOEXEC);
    CHECK(container >= 0 && group >= 0);
    CHECK(!ioctl(group, 0x3B68, &container));
    CHECK(!ioctl(container, 0x3B66, 3));
}

UNUSED static int device_of_group(const char *name)
{
    int device = ioctl(group, 0x3B6A, name);
    CHECK(device >= 0);
    return device;
}
"""


def test_what_stat_and_links_say_of_them(tmp_path: Path) -> None:
    body = r"""
    static void is(const char *path, unsigned mode, int first, int second)
    {
        struct stat about;
        CHECK(!stat(path, &about));
        IS(about.st_mode, S_IFCHR | mode);
        CHECK(major(about.st_rdev) == (unsigned)first && minor(about.st_rdev) == (unsigned)second);
    }
    static void leads_to(int fd, const char *path)
    {
        char own[32], link[100] = { 0 };
        sprintf(own, "/proc/self/fd/%d", fd);
        IS(readlink(own, link, 99), strlen(path));
        CHECK(!strcmp(link, path));
    }
    int main(void)
    {
        struct stat about, other;
        struct statx wide;
        is("/dev/vfio/vfio", 0666, 10, 196);
        is("/dev/vfio/0", 0600, 510, 1024);
        is("/dev/vfio/1", 0600, 510, 1025);
        FAILS(stat("/dev/vfio/2", &about), ENOENT);
        FAILS(stat("/dev/vfio/vfio/x", &about), ENOTDIR);
        FAILS(stat("/dev/vfio/noiommu-0", &about), ENOENT);
        int handle = open("/dev/vfio/0", O_PATH | O_CLOEXEC), other_handle = open("/dev/vfio/0", O_PATH);
        CHECK(handle >= 0 && other_handle >= 0);             /* and the group is not open */
        CHECK(!fstat(handle, &about) && minor(about.st_rdev) == 1024);
        FAILS(ioctl(handle, 0x3B69), EBADF);
        container = open("/dev/vfio/vfio", O_RDWR);
        leads_to(handle, "/dev/vfio/0");
        char anew[32];
        sprintf(anew, "/proc/self/fd/%d", handle);
        group = open(anew, O_RDWR);
        CHECK(!ioctl(group, 0x3B68, &container));
        FAILS(ioctl(group, 0x3B68, &handle), EBADF);
        close(group);
        close(container);
        close(handle);
        close(other_handle);
        open_group(0);
        leads_to(container, "/dev/vfio/vfio");
        leads_to(group, "/dev/vfio/0");
        CHECK(!fstat(group, &about) && !stat("/dev/vfio/0", &other));
        CHECK(!memcmp(&about, &other, sizeof about));
        FAILS(open("/proc/self/fd/4", O_RDWR), EBUSY);       /* the group, once more */
        int again = open("/proc/self/fd/3", O_RDWR);
        CHECK(again >= 0 && !ioctl(again, 0x3B64));
        FAILS(ioctl(again, 0x3B71, 0), EINVAL);              /* another container, and empty */
        close(again);

        /* What a group gives out has no path. */
        int device = device_of_group(NAME);
        leads_to(device, "anon_inode:[vfio-device]");
        CHECK(!fstat(device, &about));
        IS(about.st_mode, 0600);
        IS(about.st_size, 0);
        IS(about.st_nlink, 1);
        CHECK(!statx(device, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &wide));
        IS(wide.stx_mode, 0600);
        char own[32];
        sprintf(own, "/proc/self/fd/%d", device);
        FAILS(open(own, O_RDWR), ENXIO);
        IS(fcntl(device, F_GETFD), FD_CLOEXEC);
        return 0;
    }
    """
    assert serve([Plain(4096), Plain(4096)], [build(tmp_path, OLD + body)]) == 0


@pytest.mark.parametrize("end", ["close", "exit", "kill", "exec"])
def test_however_a_user_ends_the_next_one_finds_group_and_device(tmp_path: Path, end: str) -> None:
    body = r"""
    int main(int argc, char **argv)
    {
        int device, data;
        FAILS(open("/dev/vfio/7", O_RDWR), ENOENT);
        for (int round = 0; round < 5; round++) {
            pid_t child = fork();
            if (!child) {
                open_group(0);
                device = device_of_group(NAME);
                IS(get_state(device), RUNNING);
                data = data_fd(device, RESUMING);
                IS(write(data, "x", 1), 1);
                if (!strcmp(argv[1], "kill"))
                    kill(getpid(), SIGKILL);
                if (!strcmp(argv[1], "exec"))
                    execl("/bin/true", "true", NULL);
                if (!strcmp(argv[1], "close")) {
                    close(group);
                    FAILS(open("/dev/vfio/0", O_RDWR), EBUSY);
                    close(container);
                    close(data);
                    close(device);
                    open_group(0);
                }
                _exit(0);
            }
            int status;
            CHECK(waitpid(child, &status, 0) == child);
        }
        open_group(0);
        device = device_of_group(NAME);
        IS(get_state(device), RUNNING);
        return 0;
    }
    """
    devices = served(Plain())
    assert serve(devices, [build(tmp_path, OLD + body), end]) == 0
    assert devices[0].users == 0
    assert devices[0].group is None
    assert devices[0].device.dma.table is None


def test_copies_that_went_elsewhere_keep_everything(tmp_path: Path) -> None:
    body = r"""
    int main(void)
    {
        int sockets[2];
        CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
        open_group(0);
        send_fd(sockets[0], device_of_group(NAME));
        send_fd(sockets[0], dup(group));
        CHECK(!close_range(sockets[1] + 1, ~0u, 0));
        FAILS(open("/dev/vfio/0", O_RDWR), EBUSY);
        int device = take_fd(sockets[1]), copy = take_fd(sockets[1]);
        IS(get_state(device), RUNNING);
        FAILS(ioctl(copy, 0x3B69), EBUSY);
        close(device);
        CHECK(!ioctl(copy, 0x3B69));
        FAILS(open("/dev/vfio/0", O_RDWR), EBUSY);
        close(copy);
        CHECK(open("/dev/vfio/0", O_RDWR) >= 0);
        return 0;
    }
    """
    assert serve([Plain(4096)], [build(tmp_path, OLD + body)]) == 0


def test_an_iommufd_stands_for_a_container(tmp_path: Path) -> None:
    body = r"""
    int main(void)
    {
        int iommu = open("/dev/iommu", O_RDWR);
        group = open("/dev/vfio/0", O_RDWR);
        container = open("/dev/null", O_RDWR);
        FAILS(ioctl(group, 0x3B68, &container), EBADFD);
        IS(ioctl(iommu, 0x3B64), 0);
        IS(ioctl(iommu, 0x3B65, 3), 1);
        FAILS(ioctl(iommu, 0x3B66, 3), ENODEV);
        CHECK(!ioctl(group, 0x3B68, &iommu));
        CHECK(!ioctl(iommu, 0x3B66, 3));
        char *memory = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        struct { uint32_t argsz, flags; uint64_t vaddr, iova, size; } map =
            { 32, 3, (uintptr_t)memory, 0x100000, 4096 };
        CHECK(!ioctl(iommu, 0x3B71, &map));
        close(iommu);                           /* the group keeps it */
        int device = device_of_group(NAME);
        uint16_t command = 6;
        CHECK(pwrite(device, &command, 2, BAR0 + (7ull << 40) + 4) == 2);
        await_rounds(device, 3);
        close(group);
        await_rounds(device, 1);
        return 0;
    }
    """
    device = Worker()
    out = io.StringIO()
    devices = served(device)
    trace = Trace(out, devices, as_json=True)
    assert serve(devices, [build(tmp_path, WAIT + OLD + body)], trace=trace) == 0
    device.check()
    names = {json.loads(line)["request"] for line in out.getvalue().splitlines()}
    assert {"VFIO_CHECK_EXTENSION(3)", "VFIO_SET_IOMMU(3)", "VFIO_IOMMU_MAP_DMA()"} <= names


@pytest.mark.parametrize("end", ["exit", "kill", "unmap"])
def test_dma_goes_through_the_container_until_its_end(tmp_path: Path, end: str) -> None:
    body = r"""
    #define BUS 0x100000ull
    int main(int argc, char **argv)
    {
        open_group(0);
        int device = device_of_group(NAME);
        uint16_t command = 6; /* it decodes memory and masters the bus */
        CHECK(pwrite(device, &command, 2, BAR0 + (7ull << 40) + 4) == 2);
        char *memory = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        struct { uint32_t argsz, flags; uint64_t vaddr, iova, size; } map =
            { 32, 3, (uintptr_t)memory, BUS, 4096 };
        CHECK(!ioctl(container, 0x3B71, &map));
        await_rounds(device, 3);
        if (!strcmp(argv[1], "kill"))
            kill(getpid(), SIGKILL);
        for (int at = 0; at < 50 && !strcmp(argv[1], "unmap"); at++) {
            struct { uint32_t argsz, flags; uint64_t iova, size; } unmap = { 24, 0, BUS, 4096 };
            CHECK(!ioctl(container, 0x3B72, &unmap));
            IS(unmap.size, 4096);
            memset(memory, 0xA5, 4096);         /* it is the program's alone now */
            nap(0.0005);
            for (int byte = 0; byte < 4096; byte++)
                IS((unsigned char)memory[byte], 0xA5);
            CHECK(!ioctl(container, 0x3B71, &map));
            await_rounds(device, 1);
        }
        return 0;
    }
    """
    device = Worker()
    assert serve([device], [build(tmp_path, WAIT + OLD + body), end]) == (
        137 if end == "kill" else 0
    )
    device.check()


def test_v6_is_spoken_by_a_group_as_well(tmp_path: Path) -> None:
    body = r"""
    int main(void)
    {
        open_group(0);
        int device = device_of_group(NAME);
        FAILS(open("/dev/vfio/devices/vfio0", O_RDWR), EBUSY);
        uint32_t words[4] = { 16, STOP_COPY, -1, 0 };
        CHECK(!ioctl(device, 0x3B79, words));
        IS(words[1], STOP_COPY);
        char bytes[100];
        IS(read(words[2], bytes, 100), 100);
        close(device);
        FAILS(read(words[2], bytes, 100), ENODEV);
        close(group);
        CHECK((device = open("/dev/vfio/devices/vfio0", O_RDWR)) >= 0);
        FAILS(open("/dev/vfio/0", O_RDWR), EBUSY);
        return 0;
    }
    """
    devices = served(Plain(), dialect=Dialect.V6)
    assert serve(devices, [build(tmp_path, OLD + body)]) == 0


def test_the_trace_names_them(tmp_path: Path) -> None:
    body = r"""
    int main(void)
    {
        IS(ioctl(open("/dev/vfio/vfio", O_RDWR), 0x3B65, 10), 0);
        open_group(0);
        CHECK(device_of_group(NAME) >= 0);
        FAILS(ioctl(group, 0x3B6A, "0000:02:00.0"), ENODEV);
        FAILS(ioctl(group, 0x3B6A, 8), EFAULT);
        FAILS(ioctl(container, 0x3B71, 0), EFAULT);
        FAILS(read(group, &group, 4), EINVAL);
        return 0;
    }
    """
    devices = served(Plain())
    out = io.StringIO()
    trace = Trace(out, devices, as_json=True)
    assert serve(devices, [build(tmp_path, OLD + body)], trace=trace) == 0
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(row["on"], row["request"], row["result"], row["errno"]) for row in rows] == [
        ("/dev/vfio/vfio", "openat", 3, None),
        ("container", "VFIO_CHECK_EXTENSION(10)", 0, None),
        ("/dev/vfio/vfio", "openat", 4, None),
        ("/dev/vfio/0", "openat", 5, None),
        ("group0", "VFIO_GROUP_SET_CONTAINER()", 0, None),
        ("container", "VFIO_SET_IOMMU(3)", 0, None),
        ("group0", "VFIO_GROUP_GET_DEVICE_FD(0000:01:00.0)", 6, None),
        ("group0", "VFIO_GROUP_GET_DEVICE_FD(0000:02:00.0)", -1, "ENODEV"),
        ("group0", "VFIO_GROUP_GET_DEVICE_FD(0x8)", -1, "EFAULT"),
        ("container", "VFIO_IOMMU_MAP_DMA()", -1, "EFAULT"),
        ("group0", "read(4)", -1, "EINVAL"),
    ]


def test_threads_that_fight_for_a_group_get_it_one_after_the_other(tmp_path: Path) -> None:
    body = r"""
    static void *fight(void *nothing)
    {
        for (int round = 0; round < 15;) {
            int own = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
            int file = open("/dev/vfio/0", O_RDWR | O_CLOEXEC);
            CHECK(own >= 0);
            if (file < 0) {
                IS(errno, EBUSY);
                close(own);
                continue;
            }
            CHECK(!ioctl(file, 0x3B68, &own));
            CHECK(!ioctl(own, 0x3B66, 3));
            int device = ioctl(file, 0x3B6A, NAME);
            CHECK(device >= 0);
            IS(get_state(device), RUNNING);
            /* Whichever goes last gives the group up. */
            int order[3] = { file, own, device };
            close(order[round % 3]);
            close(order[(round + 1) % 3]);
            close(order[(round + 2) % 3]);
            round++;
        }
        return nothing;
    }
    int main(void)
    {
        pthread_t threads[4];
        for (int i = 0; i < 4; i++)
            CHECK(!pthread_create(&threads[i], NULL, fight, NULL));
        for (int i = 0; i < 4; i++)
            CHECK(!pthread_join(threads[i], NULL));
        open_group(0);
        IS(get_state(device_of_group(NAME)), RUNNING);
        return 0;
    }
    """
    devices = served(Plain(4096))
    assert serve(devices, [build(tmp_path, OLD + body)]) == 0
    assert devices[0].group is None
