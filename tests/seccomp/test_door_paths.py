"""/dev/vfio and /dev/iommu as programs find them, by every call that takes a path."""

from __future__ import annotations

import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from door_programs import Plain, build, serve
from vfiomig.abi.ioctls import Dialect
from vfiomig.core.vfio_device import VfioDevice

if TYPE_CHECKING:
    from pathlib import Path

THREE = 3


def devices() -> list[Plain]:
    return [Plain(4096) for _ in range(THREE)]


def test_every_way_to_open(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        #include <linux/openat2.h>
        #define V0 "/dev/vfio/devices/vfio0"
        static void opens(int fd, int flags)
        {
            CHECK(fd >= 0);
            int seen = fcntl(fd, F_GETFL);
            IS(seen & (O_ACCMODE | O_NONBLOCK | O_APPEND), flags & (O_ACCMODE | O_NONBLOCK | O_APPEND));
            IS(fcntl(fd, F_GETFD), flags & O_CLOEXEC ? FD_CLOEXEC : 0);
            uint32_t info[6] = { 20 };
            FAILS(ioctl(fd, 0x3B6B, info), EINVAL);  /* ours, and not bound */
            close(fd);
        }
        int main(void)
        {
            int flags[] = { O_RDONLY, O_WRONLY, O_RDWR, O_RDWR | O_CLOEXEC, O_RDWR | O_NONBLOCK,
                            O_RDWR | O_APPEND, O_RDWR | O_TRUNC, O_RDWR | O_CREAT, O_RDWR | O_NOFOLLOW,
                            O_RDWR | O_SYNC, O_RDWR | O_NOCTTY, O_RDWR | O_LARGEFILE };
            for (unsigned i = 0; i < sizeof flags / sizeof *flags; i++) {
                opens(syscall(SYS_open, V0, flags[i], 0600), flags[i]);
                opens(openat(AT_FDCWD, V0, flags[i], 0600), flags[i]);
                opens(syscall(SYS_openat, 0xFFFFFF9CL, V0, flags[i], 0600), flags[i]);
                struct open_how how = { .flags = flags[i], .mode = flags[i] & O_CREAT ? 0600 : 0 };
                opens(syscall(SYS_openat2, AT_FDCWD, V0, &how, sizeof how), flags[i]);
            }
            opens(syscall(SYS_creat, V0, 0600), O_WRONLY);
            FAILS(open(V0, O_RDWR | O_CREAT | O_EXCL, 0600), EEXIST);
            FAILS(open(V0, O_RDWR | O_DIRECTORY), ENOTDIR);
            FAILS(open(V0 "/", O_RDWR), ENOTDIR);
            FAILS(open(V0 "/x", O_RDWR), ENOTDIR);
            FAILS(open("/dev/vfio/devices/vfio3", O_RDWR), ENOENT);
            FAILS(open("/dev/vfio/devices/vfio00", O_RDWR), ENOENT);
            FAILS(open("/dev/vfio/devices/vfio", O_RDWR), ENOENT);
            FAILS(open("/dev/vfio/devices", O_RDWR), EISDIR);
            struct open_how how = { .flags = O_RDWR };
            FAILS(syscall(SYS_openat2, AT_FDCWD, V0, &how, 8), EINVAL);
            opens(open("//dev/./vfio//devices/../devices/vfio0", O_RDWR), O_RDWR);
            CHECK(!chdir("/dev"));
            opens(open("vfio/devices/vfio0", O_RDWR), O_RDWR);
            int dev = open("/dev", O_PATH);
            opens(openat(dev, "vfio/devices/vfio0", O_RDWR), O_RDWR);
            int folder = open("/dev/vfio/devices", O_RDONLY | O_DIRECTORY);
            CHECK(folder >= 0);
            opens(openat(folder, "vfio0", O_RDWR), O_RDWR);
            FAILS(openat(folder, "vfio9", O_RDWR), ENOENT);
            opens(openat(folder, "../../vfio/devices/vfio1", O_RDWR), O_RDWR);
            CHECK(!fchdir(folder));
            opens(open("vfio2", O_RDWR), O_RDWR);
            CHECK(!chdir("/"));

            int handle = open(V0, O_PATH | O_CLOEXEC);
            CHECK(handle >= 0);
            FAILS(ioctl(handle, 0x3B6B, &how), EBADF);
            FAILS(read(handle, &how, 1), EBADF);
            FAILS(pread(handle, &how, 1, 0), EBADF);
            FAILS(lseek(handle, 0, SEEK_SET), EBADF);
            CHECK(mmap(0, 4096, PROT_READ, MAP_SHARED, handle, 0) == MAP_FAILED && errno == EBADF);
            struct stat about;
            CHECK(!fstat(handle, &about) && S_ISCHR(about.st_mode));
            char path[32];
            sprintf(path, "/proc/self/fd/%d", handle);
            opens(open(path, O_RDWR), O_RDWR);

            int iommu = open("/dev/iommu", O_RDWR), second = open("/dev/iommu", O_RDWR);
            uint32_t alloc[3] = { 12 };
            CHECK(!ioctl(iommu, 0x3B81, alloc));
            uint32_t destroy[2] = { 8, alloc[2] };
            FAILS(ioctl(second, 0x3B80, destroy), ENOENT);  /* each open has its own */
            CHECK(!ioctl(iommu, 0x3B80, destroy));
            FAILS(read(iommu, path, 1), EINVAL);
            return 0;
        }
        """,
    )
    assert serve(devices(), [program]) == 0


def test_every_way_to_look(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        static void device(const struct stat *about, int number)
        {
            CHECK(S_ISCHR(about->st_mode) && (about->st_mode & 07777) == 0600);
            IS(minor(about->st_rdev), number + 1);
            IS(about->st_nlink, 1);
            IS(about->st_size, 0);
            IS(about->st_uid, geteuid());
            CHECK(about->st_mtim.tv_sec > 1600000000 && about->st_mtim.tv_nsec < 1000000000);
        }
        int main(void)
        {
            const char *path = "/dev/vfio/devices/vfio1", *folder = "/dev/vfio/devices";
            struct stat about, other;
            CHECK(!syscall(SYS_stat, path, &about));
            device(&about, 1);
            CHECK(!syscall(SYS_lstat, path, &other) && !memcmp(&about, &other, sizeof about));
            CHECK(!syscall(SYS_newfstatat, AT_FDCWD, path, &other, 0));
            CHECK(!memcmp(&about, &other, sizeof about));
            int fd = open(path, O_RDWR);
            CHECK(!syscall(SYS_fstat, fd, &other) && !memcmp(&about, &other, sizeof about));
            CHECK(!syscall(SYS_newfstatat, fd, "", &other, AT_EMPTY_PATH));
            CHECK(!memcmp(&about, &other, sizeof about));
            FAILS(syscall(SYS_newfstatat, fd, "", &other, 0), ENOENT);
            FAILS(syscall(SYS_newfstatat, fd, "none", &other, AT_EMPTY_PATH), ENOTDIR);
            struct statx wide;
            memset(&wide, 0xEE, sizeof wide);
            CHECK(!statx(AT_FDCWD, path, 0, STATX_BASIC_STATS, &wide));
            CHECK(!(STATX_BASIC_STATS & ~wide.stx_mask));
            IS(wide.stx_mode, about.st_mode);
            IS(wide.stx_ino, about.st_ino);
            IS(wide.stx_nlink, 1);
            IS(wide.stx_uid, about.st_uid);
            IS(wide.stx_gid, about.st_gid);
            IS(wide.stx_size, 0);
            IS(wide.stx_blksize, about.st_blksize);
            IS(wide.stx_rdev_major, major(about.st_rdev));
            IS(wide.stx_rdev_minor, minor(about.st_rdev));
            IS(wide.stx_dev_major, major(about.st_dev));
            IS(wide.stx_dev_minor, minor(about.st_dev));
            IS(wide.stx_mtime.tv_sec, about.st_mtim.tv_sec);
            IS(wide.stx_mtime.tv_nsec, about.st_mtim.tv_nsec);
            IS(wide.stx_ctime.tv_sec, about.st_ctim.tv_sec);
            IS(wide.stx_attributes, 0);
            CHECK(!statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &wide));
            IS(wide.stx_ino, about.st_ino);

            CHECK(!stat(folder, &about) && S_ISDIR(about.st_mode));
            int listing = open(folder, O_RDONLY | O_DIRECTORY);
            CHECK(!syscall(SYS_fstat, listing, &other) && !memcmp(&about, &other, sizeof about));
            FAILS(syscall(SYS_newfstatat, listing, "none", &other, AT_EMPTY_PATH), ENOENT);
            CHECK(!fstatat(listing, "vfio2", &other, 0));
            device(&other, 2);
            CHECK(!stat("/dev/vfio", &other) && S_ISDIR(other.st_mode));
            CHECK(!stat("/dev/iommu", &other));
            device(&other, -1);
            FAILS(stat("/dev/vfio/devices/vfio7", &other), ENOENT);
            FAILS(stat("/dev/vfio/devices/vfio1/x", &other), ENOTDIR);

            IS(access(path, F_OK), 0);
            IS(access(path, R_OK | W_OK), 0);
            FAILS(access(path, X_OK), EACCES);
            IS(access(folder, R_OK | X_OK), 0);
            FAILS(access(path, 64), EINVAL);
            IS(faccessat(AT_FDCWD, path, R_OK, 0), 0);
            IS(syscall(439, AT_FDCWD, path, R_OK, AT_EACCESS), 0);
            FAILS(access("/dev/vfio/devices/vfio7", F_OK), ENOENT);
            char text[100];
            FAILS(readlink(path, text, 100), EINVAL);
            FAILS(readlinkat(listing, "vfio0", text, 100), EINVAL);
            sprintf(text, "/proc/self/fd/%d", fd);
            char link[100] = { 0 };
            IS(readlink(text, link, 100), strlen(path));
            CHECK(!strcmp(link, path));
            CHECK(!lstat(text, &other) && S_ISLNK(other.st_mode));
            CHECK(!stat(text, &other));
            device(&other, 1);
            char *real = realpath("/dev/../dev/vfio/devices/vfio1", 0);
            CHECK(real && !strcmp(real, path));
            return 0;
        }
        """,
    )
    assert serve(devices(), [program]) == 0


def test_the_real_ls_lists_and_describes_them(capfd: pytest.CaptureFixture[str]) -> None:
    assert serve(devices(), ["ls", "-l", "/dev/vfio/devices", "/dev/iommu"]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    assert lines[0].startswith("crw------- 1 ")
    assert lines[0].endswith(" /dev/iommu")
    assert [line.split()[-1] for line in lines[4:]] == ["vfio0", "vfio1", "vfio2"]
    assert all(line.startswith("crw------- 1 ") for line in lines[4:])
    assert lines[6].split()[4:6] == ["510,", "3"]


def test_shell_and_python_find_them(capfd: pytest.CaptureFixture[str]) -> None:
    script = """
        for d in /dev/vfio/devices/*; do test -c $d && test -r $d && test ! -x $d && echo $d; done
        test -d /dev/vfio && test ! -e /dev/vfio/devices/vfio9 && echo folder
        cd / && find /dev/vfio -type c | sort
    """
    assert serve(devices(), ["sh", "-c", script]) == 0
    assert capfd.readouterr().out.split() == [
        *(f"/dev/vfio/devices/vfio{n}" for n in range(THREE)),
        "folder",
        *(f"/dev/vfio/{n}" for n in range(THREE)),
        *(f"/dev/vfio/devices/vfio{n}" for n in range(THREE)),
        "/dev/vfio/vfio",
    ]
    program = """
import os, pathlib
print(sorted(os.listdir("/dev/vfio/devices")), sorted(os.listdir("/dev/vfio")))
with os.scandir("/dev/vfio/devices") as entries:
    print({(e.name, e.is_dir(), e.is_file()) for e in entries} == {
        (f"vfio{n}", False, False) for n in range(3)})
print(pathlib.Path("/dev/vfio/devices/vfio1").is_char_device(), os.path.realpath("/dev/iommu"))
with open("/dev/vfio/devices/vfio0", "rb+", buffering=0) as device:
    print(device.readable(), device.seekable(), os.path.sameopenfile(0, device.fileno()))
"""
    assert serve(devices(), [sys.executable, "-c", program]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "['vfio0', 'vfio1', 'vfio2'] ['0', '1', '2', 'devices', 'vfio']",
        "True",
        "True /dev/iommu",
        "True False False",
    ]


def test_other_paths_are_the_kernels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What fails fails alike, and what contains our words is not ours for that."""
    (tmp_path / "vfio-notes").write_text("mine\n", encoding="ascii")
    (tmp_path / "iommu").mkdir()
    script = f"""
        cd {tmp_path}; cat vfio-notes ./iommu/../vfio-notes; ls; cat < /dev/null
        stat -c '%F %s' vfio-notes /dev/null; readlink /proc/self/cwd
        cat /dev/vfio-none iommu none 2>&1; test -e vfio/devices/vfio0 || echo no
        echo x > "$(printf '%0200d' 0)" && rm 0*0 && echo long
    """
    plain = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert serve(devices(), ["sh", "-c", script]) == plain.returncode
    output = capfd.readouterr()
    assert output.out == plain.stdout
    assert output.err == plain.stderr


@pytest.mark.parametrize("dialect", list(Dialect))
def test_descriptors_are_handed_over_as_arguments(
    dialect: Dialect, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = build(
        tmp_path,
        r"""
        int main(int argc, char **argv)
        {
            for (int i = 1; i < argc; i++) {
                int fd = atoi(argv[i]);
                char path[64], link[100] = { 0 };
                sprintf(path, "/proc/self/fd/%d", fd);
                if (argv[i][0] >= '0' && argv[i][0] <= '9' && readlink(path, link, 99) > 0) {
                    IS(fcntl(fd, F_GETFD), 0);
                    puts(link);
                } else
                    puts(argv[i]);
            }
            int count = 0;
            for (int fd = 3; fd < 200; fd++)
                count += fcntl(fd, F_GETFD) == 0;
            printf("%d\n", count);
            return 0;
        }
        """,
    )
    named = [VfioDevice(Plain(4096), f"vfio{n}", dialect) for n in range(2)]
    left_alone = ["{dev2}", "{dev00}", "{dev}", "{}", "{{iommu", "{x}", "{Dev0}", "{dev\u0661}"]
    arguments = ["{dev0}", "{iommu}", "{dev1}", "{dev0}", *left_alone]
    without = subprocess.run(
        [program], capture_output=True, text=True, check=True, close_fds=False
    ).stdout
    assert serve(named, [program, *arguments]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "/dev/vfio/devices/vfio0",
        "/dev/iommu",
        "/dev/vfio/devices/vfio1",
        "/dev/vfio/devices/vfio0",
        *left_alone,
        str(int(without) + 3),
    ]
    assert [device.users for device in named] == [0, 0]


def test_what_stands_in_braces_inside_an_argument_is_put_in(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert serve(devices(), ["sh", "-c", 'echo "$1" | tr 0-9 N', "sh", "fd={dev0},x={iommu}"]) == 0
    assert capfd.readouterr().out.replace("NN", "N") == "fd=N,x=N\n"


def test_a_listing_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert serve(devices(), ["true"]) == 0
    assert serve(devices(), ["ls", "/dev/vfio/devices"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert stat.S_ISDIR(tmp_path.stat().st_mode)
