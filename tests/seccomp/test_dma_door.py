"""DMA into the memory of a program behind the system call door, and what ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from door_programs import WAIT, Worker, build, serve
from vfiomig.iommu.backing import FileMemory, ShrinkingFileMemory
from vfiomig.memory import ProgramMemory

if TYPE_CHECKING:
    from pathlib import Path

#: What the programs share: guest memory of a kind that is named by the first argument.
GUEST = r"""
#include <sys/syscall.h>
#define BUS 0x100000ull
#define LENGTH 0x10000ull
static int iommufd;
static uint32_t ioas;

static char *guest_memory(const char *kind)
{
    int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    if (!strcmp(kind, "memfd") || !strcmp(kind, "sealed")) {
        fd = memfd_create("guest memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        CHECK(!ftruncate(fd, LENGTH));
        flags = MAP_SHARED;
        if (!strcmp(kind, "sealed"))
            CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
    }
    char *memory = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, flags, fd, 0);
    CHECK(memory != MAP_FAILED);
    return memory;
}

static void map_memory(char *memory, uint64_t iova)
{
    struct { uint32_t size, flags, id, r; uint64_t va, length, iova; } map =
        { 40, 7, ioas, 0, (uintptr_t)memory, LENGTH, iova };
    CHECK(!ioctl(iommufd, 0x3B85, &map));
}

static int attached_device(void)
{
    int device = open_device(0);
    iommufd = open("/dev/iommu", O_RDWR | O_CLOEXEC);
    struct bind bind = { sizeof bind, 0, iommufd, 0 };
    CHECK(!ioctl(device, 0x3B76, &bind));
    uint32_t alloc[3] = { 12 };
    CHECK(!ioctl(iommufd, 0x3B81, alloc));
    ioas = alloc[2];
    uint32_t attach[3] = { 12, 0, ioas };
    CHECK(!ioctl(device, 0x3B77, attach));
    uint16_t command = 6; // it decodes memory and masters the bus
    CHECK(pwrite(device, &command, 2, 0x56ull << 56 | 7ull << 40 | 4) == 2);
    return device;
}
"""


def mapped_here() -> int:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return sum("guest memory" in line for line in maps)


KINDS = [("sealed", FileMemory), ("memfd", ShrinkingFileMemory), ("anonymous", ProgramMemory)]


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> str:
    body = r"""
static void *last_thread(void *device)
{
    nap(0.05);          /* the first thread has gone by now */
    await_rounds((int)(long)device, 3);
    _exit(0);
}

/* A file is memory still; what was the program's alone is gone. */
static int executed(int device, int gone)
{
    uint64_t first, seen;
    if (!gone) {
        await_rounds(device, 3);
        return 0;
    }
    CHECK(pread(device, &first, 8, BAR0 + 8) == 8);
    do {
        nap(0.001);
        CHECK(pread(device, &seen, 8, BAR0 + 8) == 8);
    } while (seen < first + 3);
    return 0;
}

int main(int argc, char **argv)
{
    if (!strcmp(argv[2], "executed"))
        return executed(atoi(argv[3]), !strcmp(argv[1], "anonymous"));
    int device = attached_device();
    char *memory = guest_memory(argv[1]);
    map_memory(memory, BUS);
    await_rounds(device, 3);
    uint64_t word;
    memcpy(&word, memory + 5, 8);
    CHECK(word);
    if (!strcmp(argv[2], "exit"))
        _exit(0);
    if (!strcmp(argv[2], "kill"))
        kill(getpid(), SIGKILL);
    if (!strcmp(argv[2], "unmap")) {
        for (int at = 0; at < 50; at++) {
            struct { uint32_t size, id; uint64_t iova, length; } unmap = { 24, ioas, 0, -1 };
            CHECK(!ioctl(iommufd, 0x3B86, &unmap));
            memset(memory, 0xA5, 4096);         /* it is the program's alone now */
            nap(0.0005);
            for (int byte = 0; byte < 4096; byte++)
                IS((unsigned char)memory[byte], 0xA5);
            map_memory(memory, BUS);
            await_rounds(device, 1);
        }
        return 0;
    }
    if (!strcmp(argv[2], "thread")) {
        pthread_t thread;
        CHECK(!pthread_create(&thread, NULL, last_thread, (void *)(long)device));
        pthread_exit(NULL);
    }
    if (!strcmp(argv[2], "exec")) {
        /* The device and the iommufd stay open; the memory does not. */
        char number[16];
        sprintf(number, "%d", device);
        fcntl(device, F_SETFD, 0);
        fcntl(iommufd, F_SETFD, 0);
        execl("/proc/self/exe", argv[0], argv[1], "executed", number, NULL);
    }
    return 9;
}
"""
    return build(tmp_path_factory.mktemp("endings"), GUEST + WAIT + body)


@pytest.mark.parametrize("ending", ["exit", "kill", "unmap", "thread", "exec"])
@pytest.mark.parametrize(("kind", "memory"), KINDS)
def test_dma_meets_the_memory_that_it_should_and_survives_every_ending(
    endings: str, kind: str, memory: type, ending: str
) -> None:
    device = Worker()
    assert serve([device], [endings, kind, ending]) == (137 if ending == "kill" else 0)
    device.check()
    assert device.met == {memory}
    assert mapped_here() == 0


def test_one_file_is_mapped_once_for_all_its_mappings(tmp_path: Path) -> None:
    class Counts(Worker):
        seen = 0

        @Worker.bar0.reader
        def read_bar0(self, offset: int, size: int) -> bytes:
            self.seen = max(self.seen, mapped_here())
            return bytes(size)

    body = r"""
int main(void)
{
    int device = attached_device();
    char *memory = guest_memory("sealed");
    uint32_t word;
    for (int at = 0; at < 8; at++)
        map_memory(memory, BUS + at * LENGTH);
    CHECK(pread(device, &word, 4, BAR0) == 4);
    return 0;
}
"""
    device = Counts()
    assert serve([device], [build(tmp_path, GUEST + body)]) == 0
    assert device.seen == 1
    assert mapped_here() == 0


def test_the_memory_of_a_forked_child_is_the_childs(tmp_path: Path) -> None:
    body = r"""
int main(void)
{
    int device = attached_device();
    char *memory = guest_memory("anonymous");
    memset(memory, 1, LENGTH);
    map_memory(memory, BUS);
    pid_t child = fork();
    if (!child) {
        struct { uint32_t size, id; uint64_t iova, length; } unmap = { 24, ioas, 0, -1 };
        CHECK(!ioctl(iommufd, 0x3B86, &unmap));
        memset(memory, 2, LENGTH);
        map_memory(memory, BUS);
        await_rounds(device, 3);
        uint64_t word;
        memcpy(&word, memory + 5, 8);
        CHECK(word < 1ull << 32);
        _exit(0);
    }
    await_child(child);
    nap(0.05);
    memset(memory, 3, LENGTH);
    nap(0.02);
    for (unsigned byte = 0; byte < LENGTH; byte++)
        IS(memory[byte], 3);            /* mapped by a child that has ended: nobody's */
    return 0;
}
"""
    device = Worker()
    assert serve([device], [build(tmp_path, GUEST + WAIT + body)]) == 0
    device.check()
    assert device.refusals
