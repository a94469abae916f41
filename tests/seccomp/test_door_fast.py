"""The fast filter: where it differs from the exact one, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from door_programs import BASIC, Plain, build, serve
from vfiomig import Capability

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vfiomig.device import Buffer


def test_data_fds_have_high_numbers_and_never_one_in_use(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            int first = data_fd(use_device(0), STOP_COPY), null = open("/dev/null", O_RDONLY);
            CHECK(first > 500);
            char byte;
            IS(read(first, &byte, 1), 1);
            for (int i = 1; i < 10; i += 2)
                IS(dup2(null, first + i), first + i);
            int second = data_fd(use_device(1), RESUMING);
            IS(second, first + 2);
            for (int i = 1; i < 10; i += 2)
                IS(read(first + i, &byte, 1), 0);  /* still /dev/null */
            IS(write(second, "x", 1), 1);
            IS(fcntl(second, F_GETFD), FD_CLOEXEC);
            close(second);
            FAILS(write(second, "x", 1), EBADF);
            return 0;
        }
        """,
    )
    assert serve([Plain(), Plain()], [program], filter_name="fast") == 0


def test_threads_never_get_the_same_number(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        static int fds[2];
        static void *save(void *number)
        {
            long n = (long)number;
            int device = use_device(n);
            for (int i = 0; i < 100; i++) {
                fds[n] = data_fd(device, STOP_COPY);
                unsigned char bytes[3];
                IS(read(fds[n], bytes, 3), 3);
                IS(bytes[2], 2);
                IS(set_state(device, STOP, 0), 0);
                close(fds[n]);
            }
            return 0;
        }
        int main(void)
        {
            pthread_t thread;
            close(use_device(0));
            pthread_create(&thread, 0, save, (void *)1L);
            save((void *)0L);
            pthread_join(thread, 0);
            return 0;
        }
        """,
    )
    assert serve([Plain(4096), Plain(4096)], [program], filter_name="fast") == 0


def test_a_table_too_short_for_high_numbers_is_emfile(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            int device = use_device(0), fd;
            struct rlimit limit;
            getrlimit(RLIMIT_NOFILE, &limit);
            limit.rlim_cur = 100;
            CHECK(!setrlimit(RLIMIT_NOFILE, &limit));
            IS(set_state(device, STOP_COPY, &fd), -EMFILE);
            IS(get_state(device), STOP_COPY);
            return 0;
        }
        """,
    )
    assert serve([Plain()], [program], filter_name="fast") == 0


def test_a_dup_at_a_low_number_is_not_seen(tmp_path: Path) -> None:
    """The documented difference: a copy shows the placeholder, the descriptor itself does not."""
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            unsigned char bytes[10];
            int fd = data_fd(use_device(0), STOP_COPY), low = dup(fd);
            IS(read(low, bytes, 10), 1);  /* the byte that stands for "readable" */
            IS(read(fd, bytes, 10), 10);
            IS(bytes[9], 9);
            int high = fcntl(fd, F_DUPFD, fd);
            IS(read(high, bytes, 10), 10);
            IS(bytes[9], 19);
            return 0;
        }
        """,
    )
    assert serve([Plain()], [program], filter_name="fast") == 0


class Pausing(Plain):
    """Has something to say early, then nothing for now."""

    capabilities = BASIC | Capability.PRE_COPY

    def precopy(self) -> Iterator[Buffer]:
        yield bytes(10)


def test_whoever_reads_a_copy_that_is_not_seen_takes_nothing_from_the_session(
    tmp_path: Path,
) -> None:
    """Also where it is no longer readable just then."""
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            unsigned char bytes[10];
            int device = use_device(0), fd = data_fd(device, PRE_COPY), low = dup(fd);
            IS(read(low, bytes, 10), 1);  /* the byte that stands for "readable" */
            IS(read(fd, bytes, 10), 10);
            FAILS(read(fd, bytes, 10), ENOMSG);
            IS(set_state(device, STOP_COPY, 0), 0);
            IS(read(fd, bytes, 10), 10);
            IS(bytes[9], 9);
            return 0;
        }
        """,
    )
    assert serve([Pausing()], [program], filter_name="fast") == 0


def test_regions_and_positions_work_by_their_offset(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            char bytes[8];
            int device = use_device(0), fd = data_fd(device, STOP_COPY);
            IS(pwrite(device, "region", 7, BAR0 + 8), 7);
            IS(pread(device, bytes, 7, BAR0 + 8), 7);
            CHECK(!strcmp(bytes, "region"));
            /* Whoever does not ask where configuration space is goes where vfio-pci has it. */
            uint16_t vendor, asked;
            IS(pread(device, &vendor, 2, 7ull << 40), 2);
            IS(pread(device, &asked, 2, BAR0 + (7ull << 40)), 2);
            IS(vendor, asked);
            IS(pwrite(device, "\7", 1, (7ull << 40) + 4), 1);
            FAILS(pread(fd, bytes, 1, 0), ESPIPE);
            FAILS(lseek(fd, 0, SEEK_SET), ESPIPE);
            CHECK(mmap(0, 4096, PROT_READ, MAP_SHARED, device, BAR0) == MAP_FAILED);
            IS(errno, EINVAL);
            struct stat about;
            CHECK(!fstat(device, &about) && S_ISCHR(about.st_mode));
            return 0;
        }
        """,
    )
    assert serve([Plain()], [program], filter_name="fast") == 0
