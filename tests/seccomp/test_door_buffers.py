"""Bad pointers, odd counts and full tables: every argument that a program can get wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from door_programs import Plain, build, serve

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig.doors.syscall.run import FilterName

PAGES = r"""
    enum { PAGE = 4096 };
    /* Three pages of which only the first and the last may be touched. */
    static char *hole(int protection)
    {
        char *pages = mmap(0, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(pages != MAP_FAILED);
        memset(pages, 7, 3 * PAGE);
        CHECK(!mprotect(pages + PAGE, PAGE, protection));
        return pages;
    }
"""


def test_a_fault_cuts_a_transfer_and_loses_nothing(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        PAGES
        + r"""
        int main(void)
        {
            int in = data_fd(use_device(0), STOP_COPY), out = data_fd(use_device(1), RESUMING);
            char *pages = hole(PROT_NONE), *fixed = hole(PROT_READ);
            FAILS(read(in, 0, 10), EFAULT);
            FAILS(read(in, (void *)-4096L, 10), EFAULT);
            FAILS(read(in, pages + PAGE, 10), EFAULT);
            FAILS(read(in, fixed + PAGE, 10), EFAULT);  /* read-only stays as it is */
            IS(fixed[PAGE], 7);
            IS(read(in, pages + PAGE - 100, 300), 100);
            IS((unsigned char)pages[PAGE - 1], 99);
            IS(read(in, pages + 2 * PAGE, 300), 300);
            IS((unsigned char)pages[2 * PAGE], 100);
            /* Pages that were never touched, across a boundary. */
            char *fresh = mmap(0, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                               -1, 0);
            IS(read(in, fresh + PAGE - 4, 2 * PAGE), 2 * PAGE);
            IS((unsigned char)fresh[PAGE - 4], (400) % 256);

            FAILS(write(out, pages + PAGE, 10), EFAULT);
            FAILS(write(out, 0, 10), EFAULT);
            IS(write(out, pages + PAGE - 100, 300), 100);
            IS(write(out, fixed + PAGE - 100, 300), 300);  /* reading it is allowed */
            return 0;
        }
        """,
    )
    assert serve([Plain(), Plain()], [program]) == 0


def test_huge_counts_are_what_this_kernel_makes_of_them(tmp_path: Path) -> None:
    """The same counts on /dev/zero tell: refused at sight, or cut."""
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            enum { SIZE = 1 << 20 };
            static char bytes[SIZE];
            int zero = open("/dev/null", O_RDONLY), in = data_fd(use_device(0), STOP_COPY);
            unsigned long counts[] = { 1ul << 31, 3ul << 30, 1ul << 32, 1ul << 40, 1ul << 46,
                                       SSIZE_MAX, 1ul << 63, -4096ul, -1ul };
            for (unsigned i = 0; i < sizeof counts / sizeof *counts; i++) {
                errno = 0;
                long plain = syscall(SYS_read, zero, bytes, counts[i]);
                int refused = errno;
                errno = 0;
                long ours = syscall(SYS_read, in, bytes, counts[i]);
                if (plain < 0) {
                    IS(ours, -1);
                    IS(errno, refused);
                } else {
                    CHECK(ours >= 0);  /* all of the state at the first time, its end later */
                }
            }
            char none;
            IS(read(in, &none, 1), 0);

            int device = use_device(1), out = data_fd(device, RESUMING);
            IS(write(out, bytes, 3ul << 30), SIZE);  /* up to where the memory ends, or more */
            return 0;
        }
        """.replace(
            "IS(write(out, bytes, 3ul << 30), SIZE);", "CHECK(write(out, bytes, 3ul << 30) > 0);"
        ),
    )
    assert serve([Plain(1 << 20), Plain(64 << 20)], [program]) == 0


def test_vectors_follow_the_rules_of_the_kernel(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        PAGES
        + r"""
        int main(void)
        {
            int source = use_device(0), in = data_fd(source, STOP_COPY);
            int out = data_fd(use_device(1), RESUMING);
            char a[10], b[20], *pages = hole(PROT_NONE);
            struct iovec two[] = { { a, 10 }, { b, 20 } }, none[] = { { a, 0 }, { 0, 0 } };
            IS(readv(in, two, 2), 30);
            CHECK(a[9] == 9 && b[0] == 10 && b[19] == 29);
            IS(readv(in, two, 0), 0);
            IS(readv(in, none, 2), 0);
            FAILS(readv(in, two, 1025), EINVAL);
            FAILS(readv(in, two, -1), EINVAL);
            FAILS(readv(in, (void *)8, 1), EFAULT);
            struct iovec negative[] = { { a, 10 }, { b, -1ul } };
            FAILS(readv(in, negative, 2), EINVAL);
            struct iovec broken[] = { { a, 10 }, { pages + PAGE, 20 } };
            IS(readv(in, broken, 2), 10);
            IS(a[0], 30);
            struct iovec *split = (void *)(pages + PAGE - sizeof *split);
            *split = (struct iovec){ a, 10 };
            IS(readv(in, split, 1), 10);
            FAILS(readv(in, split, 2), EFAULT);

            IS(preadv2(in, two, 2, -1, 0), 30);
            FAILS(preadv2(in, two, 2, -1, RWF_NOWAIT), EOPNOTSUPP);
            FAILS(preadv2(in, two, 2, 0, 0), ESPIPE);
            FAILS(preadv(in, two, 2, 0), ESPIPE);
            FAILS(preadv(in, two, 2, -5), EINVAL);
            FAILS(pread(in, a, 1, 0), ESPIPE);
            FAILS(pread(in, a, 1, -1), EINVAL);

            IS(writev(out, two, 2), 30);
            IS(pwritev2(out, two, 2, -1, 0), 30);
            FAILS(pwritev(out, two, 2, 0), ESPIPE);
            IS(write(out, a, 0), 0);
            IS(read(in, a, 0), 0);
            FAILS(writev(in, two, 2), EBADF);
            FAILS(readv(out, two, 2), EBADF);
            FAILS(write(in, a, 0), EBADF);
            IS(set_state(source, STOP, 0), 0);
            FAILS(read(in, a, 0), ENODEV);
            IS(readv(in, none, 2), 0);  /* nobody is asked for nothing */
            return 0;
        }
        """,
    )
    assert serve([Plain(), Plain()], [program]) == 0


def test_bad_pointers_in_requests_are_efault(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        PAGES
        + r"""
        int main(void)
        {
            int device = use_device(0), iommu = open("/dev/iommu", O_RDWR);
            char *pages = hole(PROT_NONE), *fixed = hole(PROT_READ);
            unsigned long pointers[] = { 0, 8, 1ul << 47, 1ul << 63, -8ul,
                                         (unsigned long)(pages + PAGE),
                                         (unsigned long)(pages + PAGE - 4) };
            memset(pages + PAGE - 4, 0, 4);
            pages[PAGE - 4] = 64;
            unsigned device_requests[] = { 0x3B6B, 0x3B6C, 0x3B6D, FEATURE, 0x3B77, 0x3B78 };
            unsigned iommu_requests[] = { 0x3B80, 0x3B81, 0x3B84, 0x3B85, 0x3B86 };
            for (int i = 0; i < 7; i++) {
                for (int k = 0; k < 6; k++)
                    FAILS(ioctl(device, device_requests[k], pointers[i]), EFAULT);
                for (int k = 0; k < 5; k++)
                    FAILS(ioctl(iommu, iommu_requests[k], pointers[i]), EFAULT);
            }
            /* The answer cannot be written: the state is reached all the same. */
            uint32_t request[4] = { 16, 2 | 0x20000, STOP_COPY, 0 };
            char *only_read = fixed + PAGE;
            CHECK(!mprotect(only_read, PAGE, PROT_READ | PROT_WRITE));
            memcpy(only_read, request, sizeof request);
            CHECK(!mprotect(only_read, PAGE, PROT_READ));
            int lowest = dup(0);
            close(lowest);
            FAILS(ioctl(device, FEATURE, only_read), EFAULT);
            CHECK(!memcmp(only_read, request, sizeof request));
            IS(get_state(device), STOP_COPY);
            IS(dup(0), lowest);  /* and no descriptor was left */
            FAILS(open((char *)8, O_RDWR), EFAULT);
            struct stat about;
            (void)about;
            FAILS(syscall(SYS_stat, "/dev/vfio/devices/vfio0", 8), EFAULT);
            FAILS(syscall(SYS_openat2, -100, "/dev/vfio/devices/vfio0", 8, 24), EFAULT);
            return 0;
        }
        """,
    )
    assert serve([Plain()], [program]) == 0


@pytest.mark.parametrize("filter_name", ["exact", "fast"])
def test_a_full_table_is_emfile_and_the_state_is_reached(
    filter_name: FilterName, tmp_path: Path
) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            int device = use_device(0), spare = dup(0), fd;
            struct rlimit limit = { spare, spare }, before;
            getrlimit(RLIMIT_NOFILE, &before);
            limit.rlim_max = before.rlim_max;
            close(spare);
            CHECK(!setrlimit(RLIMIT_NOFILE, &limit));
            FAILS(open("/dev/vfio/devices/vfio0", O_RDWR), EMFILE);
            FAILS(open("/dev/iommu", O_RDWR), EMFILE);
            IS(set_state(device, STOP_COPY, &fd), -EMFILE);
            IS(fd, -1);  /* as it was passed in */
            IS(get_state(device), STOP_COPY);
            CHECK(!setrlimit(RLIMIT_NOFILE, &before));
            IS(set_state(device, STOP_COPY, &fd), 0);  /* no arc, so no descriptor */
            IS(fd, -1);
            IS(set_state(device, STOP, 0), 0);
            close(data_fd(device, STOP_COPY));
            return 0;
        }
        """,
    )
    assert serve([Plain()], [program], filter_name=filter_name) == 0


def test_regions_are_accessed_as_a_drivers(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        PAGES
        + r"""
        int main(void)
        {
            char bytes[8192] = "region", back[8192], *pages = hole(PROT_NONE);
            int device = use_device(0);
            IS(pwrite(device, bytes, 4096, BAR0), 4096);
            IS(pread(device, back, 8192, BAR0), 4096);  /* up to its end */
            CHECK(!memcmp(bytes, back, 4096));
            struct iovec two[] = { { back, 3 }, { back + 100, 3 } };
            IS(preadv(device, two, 2, BAR0), 6);
            CHECK(!memcmp(back + 100, "ion", 3));
            IS(preadv2(device, two, 2, BAR0, 0), 6);
            IS(pwritev(device, two, 2, BAR0), 6);
            FAILS(preadv2(device, two, 2, BAR0, RWF_NOWAIT), EOPNOTSUPP);
            FAILS(pread(device, pages + PAGE, 8, BAR0), EFAULT);
            FAILS(pwrite(device, pages + PAGE, 8, BAR0), EFAULT);
            IS(pread(device, back, 0, BAR0), 0);
            FAILS(pread(device, back, 8, -1), EINVAL);
            FAILS(pread(device, back, 8, 8ull << 40), EINVAL);
            /* Its position begins in BAR0, as in the kernel, and goes on. */
            IS(pwrite(device, "positions", 9, BAR0), 9);
            IS(read(device, back, 3), 3);
            CHECK(!memcmp(back, "pos", 3));
            IS(write(device, "IT", 2), 2);
            struct iovec more = { back, 4 };
            IS(readv(device, &more, 1), 4);
            IS(preadv2(device, &more, 1, -1, 0), 4);
            CHECK(!memcmp(back, "\0\0\0\0", 4));
            IS(pread(device, back, 9, BAR0), 9);
            CHECK(!memcmp(back, "posITions", 9));
            FAILS(lseek(device, 0, SEEK_SET), ESPIPE);
            CHECK(mmap(0, 4096, PROT_READ, MAP_SHARED, device, 0) == MAP_FAILED && errno == EINVAL);
            FAILS(ftruncate(device, 0), EINVAL);
            FAILS(fallocate(device, 0, 0, 4096), ENODEV);
            FAILS(fsync(device), EINVAL);
            FAILS(ioctl(device, FIONREAD, back), ENOTTY);

            int reader = open("/dev/vfio/devices/vfio0", O_RDONLY);
            FAILS(pwrite(reader, back, 8, BAR0), EBADF);
            FAILS(pread(reader, back, 8, BAR0), EINVAL);  /* not bound */
            int writer = open("/dev/vfio/devices/vfio0", O_WRONLY);
            FAILS(pread(writer, back, 8, BAR0), EBADF);

            int in = data_fd(device, STOP_COPY), null = open("/dev/null", O_WRONLY), ends[2];
            CHECK(!pipe(ends));
            CHECK(mmap(0, 4096, PROT_READ, MAP_PRIVATE, in, 0) == MAP_FAILED && errno == ENODEV);
            FAILS(lseek(in, 0, SEEK_SET), ESPIPE);
            FAILS(ftruncate(in, 0), EINVAL);
            FAILS(fallocate(in, 0, 0, 4096), EBADF);  /* not open for writing */
            FAILS(fsync(in), EINVAL);
            FAILS(splice(in, 0, ends[1], 0, 10, 0), EINVAL);
            FAILS(tee(in, ends[1], 10, 0), EINVAL);
            FAILS(vmsplice(in, two, 1, 0), EBADF);
            FAILS(sendfile(null, in, 0, 10), EINVAL);
            FAILS(copy_file_range(in, 0, null, 0, 10, 0), EINVAL);
            FAILS(ioctl(in, FIONREAD, back), ENOTTY);
            IS(read(in, back, 1), 1);  /* nothing of that took a byte */
            IS(back[0], 0);
            return 0;
        }
        """,
    )
    assert serve([Plain()], [program]) == 0
