"""The memory of another process, with the kernel's own ideas of what may be touched.

Theory of operation
===================
A driver in the kernel copies its caller's structs with ``copy_from_user``: it honours page
protection, stops at the first byte that may not be touched and says EFAULT. ``process_vm_readv``
and ``process_vm_writev`` do the same from outside. /proc/PID/mem does not (it writes to
read-only pages, and goes stale when the process executes another program), so requests do not
use it.

Both calls find the process by number each time; a thread's number serves as well as the
process's, which is what a notification carries. When the caller is gone that is
:class:`ProcessGone`, and there is nobody left to answer.

A device's DMA is another matter: it goes on between requests, in memory that was found to be
there when it was mapped and counts as pinned since, whatever its protection is by now. There
that a /proc/PID/mem goes stale is what is wanted: when the program has ended, or runs another
one, or its number belongs to a stranger, it moves no byte (:class:`ProgramMemory`).

Requests are short and many: a call costs less than the arrangement of its arguments. Each thread
therefore keeps one :class:`_Lane`, a pair of iovecs and a small buffer in fixed places, and
transfers differ only in four numbers packed into it. The interpreter lock is released while the
kernel copies. Larger transfers go straight to or from the caller's buffer, never through a copy.
Not for use in Python signal handlers: they would borrow the lane of the code they interrupt.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from vfiomig.errors import PrerequisiteError, VfioMigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = (
    "CallMemory",
    "MemoryFault",
    "MemoryRefused",
    "ProcessGone",
    "ProcessMemory",
    "ProgramMemory",
    "covers",
    "explain_refusal",
    "read_maps",
)

# No user address has the top bit set. The kernel refuses them before it looks at any page, and
# so must this module: process_vm_readv also finds the vsyscall page, which lies up there.
USER_ADDRESS_LIMIT = 1 << 63
# One call moves at most MAX_RW_COUNT (2 GiB less a page); rounder pieces stay aligned.
PIECE = 1 << 30
LANE_SIZE = 4096
WINDOW = 64

_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_readv.restype = ctypes.c_ssize_t
_writev = _libc.process_vm_writev
_writev.restype = ctypes.c_ssize_t

_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_PYBUF_SIMPLE = ctypes.c_int(0)
_PYBUF_WRITABLE = ctypes.c_int(1)
_ONE = ctypes.c_ulong(1)
_NO_FLAGS = ctypes.c_ulong(0)


class MemoryFault(VfioMigError, OSError):
    """Bytes that the request named cannot be touched: EFAULT."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(
            errno.EFAULT, f"not all {length} bytes at {address:#x} of the caller can be touched"
        )
        self.address = address
        self.length = length


class ProcessGone(VfioMigError, ProcessLookupError):
    """The process ended, or this thread of it: nobody is left to answer."""

    def __init__(self, pid: int) -> None:
        super().__init__(errno.ESRCH, f"process {pid} is gone")
        self.pid = pid


class MemoryRefused(PrerequisiteError):
    """The kernel's access rules keep this process out of the other one's memory."""


class _PyBuffer(ctypes.Structure):
    """``Py_buffer`` of the stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


class _Lane:
    """What one thread needs for its transfers, allocated once."""

    __slots__ = ("_iovecs", "_local", "_remote", "address", "buffer", "view")

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(LANE_SIZE)
        self.address = ctypes.addressof(self.buffer)
        self.view = memoryview(self.buffer).cast("B")
        iovecs = (ctypes.c_uint64 * 4)()  # struct iovec local, remote
        self._iovecs = memoryview(iovecs).cast("B")
        self._local = ctypes.c_void_p(ctypes.addressof(iovecs))
        self._remote = ctypes.c_void_p(ctypes.addressof(iovecs) + 16)

    def transfer(
        self, call: Callable[..., int], pid: ctypes.c_int, local: int, remote: int, length: int
    ) -> int:
        """Copy up to ``length`` bytes; return how many came before the first that may not."""
        # Nearly every transfer is one piece that succeeds: nothing else is looked at for it.
        if remote >= 0 and remote + length <= USER_ADDRESS_LIMIT and 0 < length <= PIECE:
            _pack_iovecs(self._iovecs, 0, local, length, remote, length)
            if call(pid, self._local, _ONE, self._remote, _ONE, _NO_FLAGS) == length:
                return length
        # A start outside user space touches nothing; a range that runs out of it is cut there.
        length = min(length, USER_ADDRESS_LIMIT - remote) if remote >= 0 else 0
        done = 0
        while done < length:
            piece = min(length - done, PIECE)
            _pack_iovecs(self._iovecs, 0, local + done, piece, remote + done, piece)
            copied = call(pid, self._local, _ONE, self._remote, _ONE, _NO_FLAGS)
            if copied <= 0:
                if copied < 0:
                    _raise_unless_fault(ctypes.get_errno(), pid.value)
                break
            done += copied
        return done


_pack_iovecs = struct.Struct("QQQQ").pack_into
_threads = threading.local()


def _lane() -> _Lane:
    try:
        return _threads.lane  # type: ignore[no-any-return]  # an attribute of this very thread
    except AttributeError:
        _threads.lane = lane = _Lane()
        return lane


class ProcessMemory:
    """The memory of the process that thread or process ``pid`` belongs to."""

    __slots__ = ("_pid", "pid")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pid = ctypes.c_int(pid)

    def read(self, address: int, length: int) -> bytes:
        """Return exactly ``length`` bytes.

        Raises:
            MemoryFault: some of them cannot be read.
            ProcessGone: the process ended.
            MemoryRefused: the kernel's access rules forbid it, whatever the address.

        """
        if length <= LANE_SIZE:
            lane = _lane()
            done = lane.transfer(_readv, self._pid, lane.address, address, length)
            if done != length:
                raise MemoryFault(address, length)
            return lane.buffer[:length]  # type: ignore[return-value]  # c_char gives bytes
        # A length that a caller made up must not cost memory here before it proves readable.
        self.read(address + length - 1, 1)
        large = bytearray(length)
        if self.read_into(address, large) != length:
            raise MemoryFault(address, length)
        return bytes(large)

    def read_into(self, address: int, view: WriteableBuffer) -> int:
        """Fill ``view`` from ``address``; return the number of bytes before the first fault."""
        return self._transfer(_readv, address, view, _PYBUF_WRITABLE)

    def write(self, address: int, data: ReadableBuffer) -> None:
        """Write all of ``data``.

        Raises:
            MemoryFault: some of it cannot be written; what lies before the fault was.
            ProcessGone: the process ended.
            MemoryRefused: the kernel's access rules forbid it, whatever the address.

        """
        length = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
        if length <= LANE_SIZE and isinstance(data, bytes):
            lane = _lane()
            lane.view[:length] = data
            done = lane.transfer(_writev, self._pid, lane.address, address, length)
        else:
            done = self.write_from(address, data)
        if done != length:
            raise MemoryFault(address, length)

    def write_from(self, address: int, view: ReadableBuffer) -> int:
        """Write ``view`` to ``address``; return the number of bytes before the first fault."""
        return self._transfer(_writev, address, view, _PYBUF_SIMPLE)

    def check(self, address: int, length: int, *, writable: bool) -> bool:
        """Whether the whole range is mapped so that it could be pinned, page by page.

        This looks at the mappings only, as they are now: a page that its file no longer backs
        is found when it is touched.
        """
        if not 0 <= address <= address + length <= USER_ADDRESS_LIMIT:
            return False
        return covers(read_maps(self.pid), address, length, writable=writable)

    def _transfer(
        self,
        call: Callable[..., int],
        address: int,
        view: ReadableBuffer,
        access: ctypes.c_int,
    ) -> int:
        """Transfer from or to the very bytes of ``view``, which is held while the kernel copies."""
        export = _PyBuffer()
        _get_buffer(ctypes.py_object(view), ctypes.byref(export), access)
        try:
            return _lane().transfer(call, self._pid, export.buf or 0, address, export.len)
        finally:
            _release_buffer(ctypes.byref(export))


class ProgramMemory:
    """The memory of a program for as long as it runs what it runs now, and for any thread."""

    __slots__ = ("__weakref__", "_mem")

    def __init__(self, task: int | str) -> None:
        """``task``: any living thread of the program, or ``"self"``.

        Raises:
            ProcessGone: there is no such thread.
            MemoryRefused: the kernel's access rules forbid it.

        """
        try:
            self._mem = os.open(f"/proc/{task}/mem", os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            raise _refusal(int(task)) from None
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessGone(int(task)) from None
        # Mappings share it and go one by one, while accesses may be under way: the last one closes.
        weakref.finalize(self, os.close, self._mem)

    def lives(self, address: int) -> bool:
        """Whether the byte at ``address`` is still there, and so the program."""
        try:
            return bool(os.pread(self._mem, 1, address))
        except OSError:
            return False

    def read(self, address: int, length: int) -> bytes:
        """Return exactly ``length`` bytes, or raise ``MemoryFault``."""
        try:
            data = os.pread(self._mem, length, address)
        except OSError:  # EIO: not one byte of it
            raise MemoryFault(address, length) from None
        if len(data) != length:
            raise MemoryFault(address, length)
        return data

    def read_into(self, address: int, view: WriteableBuffer) -> int:
        """Fill ``view`` from ``address``; return the number of bytes before the first fault."""
        try:
            return os.preadv(self._mem, [view], address)
        except OSError:
            return 0

    def write(self, address: int, data: ReadableBuffer) -> None:
        """Write all of ``data``; ``MemoryFault`` behind what could be written."""
        length = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
        try:
            done = os.pwrite(self._mem, data, address)
        except OSError:
            done = 0
        if done != length:
            raise MemoryFault(address, length)


class CallMemory:
    """A caller's memory during one request, read ahead.

    A request's struct is read in steps (its size field, then the rest), each of which would be a
    system call. The first read fetches up to 64 bytes, later ones inside them are served from
    there. Order and place of faults stay the kernel's: where only a part can be read, that part
    is served and the fault comes when more is asked for. One request sees one version of the
    bytes, even when another thread of the caller rewrites them; what this request itself writes
    is seen by its later reads.
    """

    __slots__ = ("_base", "_window", "memory")

    def __init__(self, memory: ProcessMemory) -> None:
        self.memory = memory
        self._base = 0
        self._window = b""

    def read(self, address: int, length: int) -> bytes:
        """Return exactly ``length`` bytes, as :meth:`ProcessMemory.read`."""
        start = address - self._base
        if start >= 0 and start + length <= len(self._window):
            return self._window[start : start + length]
        if length > WINDOW or length == 0:
            return self.memory.read(address, length)
        lane = _lane()
        done = lane.transfer(_readv, self.memory._pid, lane.address, address, WINDOW)
        if done < length:
            raise MemoryFault(address, length)
        self._base = address
        self._window = lane.buffer[:done]  # type: ignore[assignment]  # c_char gives bytes
        return self._window[:length]

    def read_into(self, address: int, view: WriteableBuffer) -> int:
        """Fill ``view``, not from the window, as :meth:`ProcessMemory.read_into`."""
        return self.memory.read_into(address, view)

    def write(self, address: int, data: ReadableBuffer) -> None:
        """Write all of ``data``, as :meth:`ProcessMemory.write`."""
        self._window = b""
        self.memory.write(address, data)

    def write_from(self, address: int, view: ReadableBuffer) -> int:
        """Write from ``view``, as :meth:`ProcessMemory.write_from`."""
        self._window = b""
        return self.memory.write_from(address, view)

    def check(self, address: int, length: int, *, writable: bool) -> bool:
        """Whether the range is mapped, as :meth:`ProcessMemory.check`."""
        return self.memory.check(address, length, writable=writable)


def read_maps(task: int) -> list[str]:
    """Return the lines of /proc/TASK/maps.

    Raises:
        ProcessGone: there is no such process or thread.
        MemoryRefused: the kernel's access rules forbid it.

    """
    try:
        with Path(f"/proc/{task}/maps").open(encoding="utf-8", errors="replace") as maps:
            return maps.readlines()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessGone(task) from None
    except PermissionError:
        raise _refusal(task) from None


def covers(maps: Iterable[str], address: int, length: int, *, writable: bool) -> bool:
    """Whether the mappings of a /proc/PID/maps cover the range without a gap.

    To pin pages for writing the kernel asks for write permission alone, else for read.
    """
    if length == 0:
        return True
    reached, end = address, address + length
    for line in maps:
        span, permissions = line.split(maxsplit=2)[:2]
        low, high = (int(bound, 16) for bound in span.split("-"))
        if high <= reached:
            continue
        if low > reached or permissions[1 if writable else 0] == "-":
            return False
        reached = high
        if reached >= end:
            return True
    return False


def _raise_unless_fault(number: int, pid: int) -> None:
    if number == errno.EFAULT:
        return
    if number == errno.ESRCH:
        raise ProcessGone(pid)
    if number == errno.EPERM:
        raise _refusal(pid)
    raise OSError(number, f"memory of process {pid}: {os.strerror(number)}")


def _refusal(pid: int) -> MemoryRefused:
    """Find out why the kernel said EPERM for ``pid``."""
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii"))
    except (OSError, ValueError):
        scope = 0
    try:
        program_uid = _effective_uid(Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
        proc_uid = Path(f"/proc/{pid}/maps").stat().st_uid
    except OSError:
        program_uid = proc_uid = -1
    return MemoryRefused(
        explain_refusal(
            pid,
            ptrace_scope=scope,
            own_uid=os.geteuid(),
            program_uid=program_uid,
            proc_uid=proc_uid,
        )
    )


def _effective_uid(status: str) -> int:
    """Effective user id in the text of a /proc/PID/status."""
    for line in status.splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[2])
    return -1


def explain_refusal(
    pid: int, *, ptrace_scope: int, own_uid: int, program_uid: int, proc_uid: int
) -> str:
    """Say why the memory of ``pid`` is out of reach and what to do about it.

    ``proc_uid`` owns the files in /proc/PID; of a program that is not dumpable that is root.
    """
    what = f"the memory of process {pid} cannot be reached: "
    if program_uid not in {own_uid, -1}:
        return what + (
            f"it runs as user {program_uid}, this process as {own_uid}; "
            "run both as the same user, and do not start set-uid programs"
        )
    if proc_uid not in {program_uid, -1}:
        return what + (
            "the program made itself non-dumpable (prctl PR_SET_DUMPABLE, a set-uid bit, "
            "file capabilities or an executable without read permission); run it without that"
        )
    if ptrace_scope == 1:
        return what + (
            "kernel.yama.ptrace_scope is 1, which lets only ancestors in; "
            "let the process that serves the devices start the program"
        )
    if ptrace_scope > 1:
        return what + (
            f"kernel.yama.ptrace_scope is {ptrace_scope}, which lets nobody in without "
            "CAP_SYS_PTRACE; set it to 1 (sysctl kernel.yama.ptrace_scope=1; 3 lasts until reboot)"
        )
    return what + (
        "a security module, a user namespace or the program's capabilities forbid it; "
        "run the program in the same namespace and without capabilities of its own"
    )
