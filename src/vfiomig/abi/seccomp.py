"""``linux/seccomp.h``, and what a filter is made of: BPF, prctl, architecture numbers."""

from __future__ import annotations

from vfiomig.abi.uapi import IOW, IOWR, UapiStruct, s32, s64, u8, u16, u32, u64, u64x6

# --- prctl -------------------------------------------------------------------------------------

PR_SET_PDEATHSIG = 1
PR_GET_DUMPABLE = 3
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = 0xFFFF_FFFF_FFFF_FFFF

# --- the seccomp system call -------------------------------------------------------------------

SECCOMP_MODE_FILTER = 2

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_GET_ACTION_AVAIL = 2
SECCOMP_GET_NOTIF_SIZES = 3

SECCOMP_FILTER_FLAG_TSYNC = 1 << 0
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
SECCOMP_FILTER_FLAG_TSYNC_ESRCH = 1 << 4
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 1 << 5

SECCOMP_RET_KILL_PROCESS = 0x8000_0000
SECCOMP_RET_ERRNO = 0x0005_0000
SECCOMP_RET_USER_NOTIF = 0x7FC0_0000
SECCOMP_RET_ALLOW = 0x7FFF_0000
SECCOMP_RET_DATA = 0x0000_FFFF

SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1 << 0
SECCOMP_ADDFD_FLAG_SETFD = 1 << 0
SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP = 1 << 0

# --- classic BPF, as far as a filter over struct seccomp_data needs it -------------------------

BPF_LD = 0x00
BPF_ALU = 0x04
BPF_JMP = 0x05
BPF_RET = 0x06

BPF_W = 0x00
BPF_ABS = 0x20
BPF_K = 0x00

BPF_AND = 0x50
BPF_RSH = 0x70

BPF_JA = 0x00
BPF_JEQ = 0x10
BPF_JGT = 0x20
BPF_JGE = 0x30
BPF_JSET = 0x40

BPF_MAXINSNS = 4096

# --- what seccomp_data.arch says ---------------------------------------------------------------

AUDIT_ARCH_X86_64 = 0xC000_003E
AUDIT_ARCH_I386 = 0x4000_0003
AUDIT_ARCH_AARCH64 = 0xC000_00B7
# An x32 call carries AUDIT_ARCH_X86_64, and this bit in its number.
X32_SYSCALL_BIT = 0x4000_0000


class SockFilter(UapiStruct):
    """struct sock_filter, one instruction."""

    code: u16
    jt: u8
    jf: u8
    k: u32


class SockFprog(UapiStruct):
    """struct sock_fprog, whose filter is a pointer."""

    len: u16
    filter: u64


class SeccompData(UapiStruct):
    """struct seccomp_data."""

    nr: s32
    arch: u32
    instruction_pointer: u64
    args: u64x6


class SeccompNotifSizes(UapiStruct):
    """struct seccomp_notif_sizes."""

    seccomp_notif: u16
    seccomp_notif_resp: u16
    seccomp_data: u16


class SeccompNotif(UapiStruct):
    """struct seccomp_notif; it must be all zeros before each receive."""

    id: u64
    pid: u32
    flags: u32
    data: SeccompData


class NotifResp(UapiStruct):
    """struct seccomp_notif_resp; error is a negative errno."""

    id: u64
    val: s64
    error: s32
    flags: u32


class NotifAddfd(UapiStruct):
    """struct seccomp_notif_addfd."""

    id: u64
    flags: u32
    srcfd: u32
    newfd: u32
    newfd_flags: u32


SECCOMP_IOC_MAGIC = 0x21

SECCOMP_IOCTL_NOTIF_RECV = IOWR(SECCOMP_IOC_MAGIC, 0, SeccompNotif.SIZE)
SECCOMP_IOCTL_NOTIF_SEND = IOWR(SECCOMP_IOC_MAGIC, 1, NotifResp.SIZE)
SECCOMP_IOCTL_NOTIF_ID_VALID = IOW(SECCOMP_IOC_MAGIC, 2, 8)
SECCOMP_IOCTL_NOTIF_ADDFD = IOW(SECCOMP_IOC_MAGIC, 3, NotifAddfd.SIZE)
SECCOMP_IOCTL_NOTIF_SET_FLAGS = IOW(SECCOMP_IOC_MAGIC, 4, 8)
