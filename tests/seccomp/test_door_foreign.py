"""What is not ours behaves under the door as it does without."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from door_programs import Plain, build, serve

if TYPE_CHECKING:
    from pathlib import Path

    from vfiomig.doors.syscall.run import FilterName

SELF_CHECK = r"""
#define SHOW(what) do { errno = 0; long long got_ = (long long)(what); \
    printf("%s = %lld %s\n", #what, got_, errno ? strerror(errno) : ""); } while (0)
int main(void)
{
    static char a[1 << 16], b[1 << 16];
    int ends[2], sockets[2];
    off_t at = 3, to = 5;
    SHOW(chdir(getenv("HERE")));
    int file = open("file", O_RDWR | O_CREAT | O_TRUNC, 0600);
    int other = open("other", O_RDWR | O_CREAT | O_TRUNC, 0600);
    for (unsigned i = 0; i < sizeof a; i++)
        a[i] = i * 7 + i / 256;
    SHOW(write(file, a, sizeof a));
    SHOW(pwrite(file, a, 100, 50));
    SHOW(pread(file, b, sizeof b, 10));
    SHOW(b[100]);
    struct iovec two[] = { { b, 10 }, { b + 100, 20 } };
    SHOW(lseek(file, 7, SEEK_SET));
    SHOW(readv(file, two, 2));
    SHOW(b[110]);
    SHOW(preadv(file, two, 2, 5));
    SHOW(preadv2(file, two, 2, -1, 0));
    SHOW(pwritev(file, two, 2, 1000));
    SHOW(pwritev2(file, two, 2, -1, 0));
    SHOW(writev(file, two, 2));
    SHOW(lseek(file, 0, SEEK_CUR));
    SHOW(sendfile(other, file, &at, 5000));
    SHOW(at);
    SHOW(copy_file_range(file, &at, other, &to, 300, 0));
    SHOW(pipe(ends));
    SHOW(splice(file, &at, ends[1], 0, 4000, 0));
    SHOW(tee(ends[0], ends[1], 0, 0));
    SHOW(ioctl(ends[0], FIONREAD, b) ? -1 : *(int *)b);
    SHOW(read(ends[0], b, 5000));
    SHOW(vmsplice(ends[1], two, 2, 0));
    SHOW(splice(ends[0], 0, other, 0, 30, 0));
    SHOW(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
    SHOW(write(sockets[0], a, 3000));
    SHOW(read(sockets[1], b, 5000));
    SHOW(sendfile(sockets[1], file, 0, 100));
    SHOW(read(sockets[0], b, 5000));
    SHOW(ftruncate(other, 12345));
    SHOW(fallocate(other, 0, 0, 20000));
    SHOW(fsync(other));
    SHOW(fdatasync(other));
    SHOW(sync_file_range(other, 0, 0, 0));
    char *map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, other, 4096);
    SHOW(map != MAP_FAILED);
    SHOW(map[1000]);
    map[1000] = 55;
    SHOW(pread(other, b, 1, 5096));
    SHOW(b[0]);
    int proc = open("/proc/self/status", O_RDONLY), zero = open("/dev/zero", O_RDONLY);
    SHOW(read(proc, b, 5));
    SHOW(!memcmp(b, "Name:", 5));
    SHOW(read(zero, b, 7));
    SHOW(read(999, b, 7));
    SHOW(write(-1, b, 7));
    SHOW(read(file, (void *)8, 7));
    SHOW(pread(ends[0], b, 7, 0));
    SHOW(lseek(ends[0], 0, SEEK_CUR));
    SHOW(ioctl(999, 0x3B64, 0));
    SHOW(ioctl(file, 0x3B64, 0));
    SHOW(ioctl(zero, 0x3B75, b));
    SHOW(ioctl(-1, 0x3B80, b));
    SHOW(ioctl(file, 0x4018AEE1, b));
    SHOW(open("none", O_RDONLY));
    SHOW(open((char *)8, O_RDONLY));
    SHOW(open("", O_RDONLY));
    struct stat about;
    SHOW(fstat(file, &about) ? -1 : about.st_size);
    SHOW(stat("other", &about) ? -1 : about.st_size);
    SHOW(lstat("/proc/self/exe", &about) ? -1 : (long)S_ISLNK(about.st_mode));
    SHOW(fstat(999, &about));
    SHOW(access("other", X_OK));
    SHOW(readlink("/proc/self/cwd", b, 3));
    SHOW(close(ends[1]));
    SHOW(read(ends[0], b, 7));
    signal(SIGPIPE, SIG_IGN);
    SHOW(close(sockets[1]));
    SHOW(write(sockets[0], b, 7));
    return 0;
}
"""


@pytest.mark.parametrize("filter_name", ["exact", "fast"])
def test_a_program_sees_the_same_with_and_without(
    filter_name: FilterName, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = build(tmp_path, SELF_CHECK)
    here = {**os.environ, "HERE": str(tmp_path)}
    without = subprocess.run([program], env=here, capture_output=True, text=True, check=True)
    argv = ["env", f"HERE={tmp_path}", program]
    assert serve([Plain(4096)], argv, filter_name=filter_name) == 0
    assert capfd.readouterr().out.splitlines() == without.stdout.splitlines()
    assert without.stdout.count("\n") > 60


def test_the_same_with_sessions_that_are_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From then on other pipes are looked at twice: they must not be taken for ours."""
    program = build(
        tmp_path,
        r"""
        int main(int argc, char **argv)
        {
            int device = use_device(0), over = data_fd(device, STOP_COPY), ends[2];
            char bytes[100];
            IS(set_state(device, STOP, 0), 0);
            CHECK(!pipe(ends));
            for (int i = 0; i < 100; i++) {
                IS(write(ends[1], "abc", 3), 3);
                IS(read(ends[0], bytes, 100), 3);
                FAILS(read(over, bytes, 100), ENODEV);
            }
            close(device);
            return 0;
        }
        """,
    )
    assert serve([Plain(4096)], [program]) == 0


def test_kvm_is_content_with_our_files_and_asked_about_all_others(tmp_path: Path) -> None:
    """QEMU tells KVM which VFIO files it uses, and gives up if KVM does not know one."""
    program = build(
        tmp_path,
        r"""
        struct attribute { uint32_t flags, group; uint64_t attr, addr; };
        int main(void)
        {
            int device = use_device(0), other = open("/dev/null", O_RDWR), kvm = dup(other);
            struct attribute ours = { 0, 1, 1, (uintptr_t)&device };
            struct attribute foreign = { 0, 1, 1, (uintptr_t)&other };
            struct attribute group = { 0, 2, 1, (uintptr_t)&device }, broken = { 0, 1, 1, 8 };
            IS(ioctl(kvm, 0x4018AEE1, &ours), 0);
            close(device);
            device = open("/dev/vfio/0", O_RDWR);
            IS(ioctl(kvm, 0x4018AEE1, &ours), 0);
            FAILS(ioctl(kvm, 0x4018AEE1, &foreign), ENOTTY);
            FAILS(ioctl(kvm, 0x4018AEE1, &group), ENOTTY);
            FAILS(ioctl(kvm, 0x4018AEE1, &broken), ENOTTY);
            FAILS(ioctl(kvm, 0x4018AEE1, 8), ENOTTY);
            return 0;
        }
        """,
    )
    assert serve([Plain(4096)], [program]) == 0


def test_there_is_no_io_uring_and_no_other_kind_of_call(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        r"""
        int main(void)
        {
            char parameters[120] = { 0 };
            FAILS(syscall(SYS_io_uring_setup, 4, parameters), ENOSYS);
            FAILS(syscall(0x40000000 | SYS_getpid), ENOSYS);  /* x32 */
            long result = 20;  /* getpid of i386 */
            __asm__ volatile("int $0x80" : "+a"(result) : : "memory", "r8", "r9", "r10", "r11");
            IS(result, -ENOSYS);
            return 0;
        }
        """,
    )
    assert serve([Plain(4096)], [program]) == 0


#: The smallest 32-bit program: exit(0) by int 0x80, in an ELF file of its own class.
ELF_32 = bytes.fromhex(
    "7f454c46010101000000000000000000"
    "02000300010000005480040834000000"
    "00000000000000003400200001000000"
    "00000000"
    "01000000000000000080040800800408"
    "60000000600000000500000000100000"
    "31c04031dbcd80f4"
    "00000000"
)


def test_a_32_bit_program_is_refused_every_call(tmp_path: Path) -> None:
    file = tmp_path / "tiny"
    file.write_bytes(ELF_32)
    file.chmod(0o755)
    try:
        plain = subprocess.run([file], check=False).returncode
    except OSError:
        pytest.skip("this kernel runs no 32-bit programs (CONFIG_IA32_EMULATION)")
    assert plain == 0
    # Its exit is refused like all else, so it runs into the instruction behind it.
    assert serve([Plain(4096)], [str(file)]) in {128 + 11, 128 + 4}


def test_pythons_own_tools_work(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    program = f"""
import multiprocessing, os, shutil, socket, subprocess, tempfile, threading
print(subprocess.run(["cat"], input=b"x" * 200000, stdout=-1).stdout.count(b"x"))
with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}) as folder:
    data = os.urandom(100000)
    open(folder + "/a", "wb").write(data)
    shutil.copyfile(folder + "/a", folder + "/b")
    print(open(folder + "/b", "rb").read() == data)
here, there = socket.socketpair()
sender = threading.Thread(target=lambda: (here.sendall(data), here.close()))
sender.start()
with there.makefile("rb") as stream:
    print(stream.read() == data)
sender.join()
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(sum(pool.map(abs, range(-10, 0))))
"""
    assert serve([Plain(4096)], [sys.executable, "-c", program]) == 0
    assert capfd.readouterr().out.split() == ["200000", "True", "True", "55"]
