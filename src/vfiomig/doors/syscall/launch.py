"""Starting a program whose system calls stop here.

Theory of operation
===================
The child of a fork puts itself under the filter, hands the listener to its parent over a socket
and becomes the program. From the moment the filter is in place, a call that it stops waits for
a listener that nobody has yet: a deadlock. So after it the child makes three calls only,
``sendmsg``, ``rt_sigprocmask`` and ``execve``, which no filter may name.

The parent may have other threads. They do not exist in the child, while the locks that they
held do; everything that the child needs is therefore imported, looked up and allocated before
the fork. Signals are blocked from before the fork until just before the exec, so that no handler
of the parent runs in the child and no signal that is meant for the program gets lost.

The socket closes on exec. Its end of file tells the parent that the program runs; a message
instead tells why it does not.

The program is killed when the thread that launched it ends: without a supervisor its devices
would answer ENOSYS, which no driver does. Launch from a thread that outlives the program.

Yama lets only ancestors into a program's memory. Descendants whose parents end would leave the
family, so this process inherits them until the program is closed (heir.py).
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import select
import signal
import socket
import struct
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vfiomig.abi.seccomp import (
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    SECCOMP_FILTER_FLAG_NEW_LISTENER,
    SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
    SECCOMP_SET_MODE_FILTER,
    SockFilter,
    SockFprog,
)
from vfiomig.abi.syscalls import X86_64
from vfiomig.descriptors import Fd, poll_until
from vfiomig.doors.syscall.heir import be_heir, resign
from vfiomig.doors.syscall.notify import Listener, kernel_version
from vfiomig.doors.syscall.program import Program
from vfiomig.errors import DoorError, PrerequisiteError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ("LaunchError", "check_prerequisites", "explain_exec", "explain_seccomp", "launch")

_SignalMask = set[signal.Signals | int]

HAND_OVER_TIMEOUT = 10.0

# The child's message: the step that failed and its errno. Step 0 comes with the listener.
_MESSAGE = struct.Struct("ii")
_LISTENER, _PREPARE, _ORPHANED, _NO_NEW_PRIVS, _SECCOMP, _EXEC = range(6)
_UNEXPECTED = 0  # in place of an errno: an exception that carries none

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_prctl = _libc.prctl
_FLAGS = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV


class LaunchError(DoorError):
    """The program could not be started; ``exit_code`` is what a shell would answer."""

    def __init__(self, message: str, exit_code: int = 125) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that the child needs, complete before the fork."""

    parent: int
    seccomp: tuple[object, ...]  # arguments of the system call, as ctypes objects
    candidates: tuple[bytes, ...]
    argv: tuple[bytes, ...]
    env: dict[bytes, bytes]
    keep_open: tuple[int, ...]
    default_signals: tuple[int, ...]
    prepare: Callable[[], None] | None


def launch(
    argv: Sequence[str],
    env: Mapping[str, str],
    program: bytes,
    *,
    prepare: Callable[[], None] | None = None,
    keep_open: Sequence[int] = (),
    timeout: float = HAND_OVER_TIMEOUT,
) -> Program:
    """Start ``argv`` under the seccomp filter ``program``.

    Args:
        argv: the command; without a slash it is looked for in the ``PATH`` of ``env``.
        env: the whole environment of the program.
        program: from :mod:`vfiomig.doors.syscall.filter`.
        prepare: called in the child before the filter; it may take no lock and import nothing.
        keep_open: descriptors that the program inherits under the numbers that they have here.
        timeout: seconds that the child may take from the fork to the exec.

    Raises:
        LaunchError: with exit code 127 (not found), 126 (found, cannot be executed) or 125.
        PrerequisiteError: the kernel or a sandbox around this process cannot do it.

    """
    check_prerequisites()
    deadline = time.monotonic() + timeout
    instructions = ctypes.create_string_buffer(program, len(program))
    fprog = SockFprog(len=len(program) // SockFilter.SIZE, filter=ctypes.addressof(instructions))
    plan = _Plan(
        parent=os.getpid(),
        seccomp=_seccomp_arguments(fprog),
        candidates=_candidates(argv[0], env),
        argv=tuple(map(os.fsencode, argv)),
        env={os.fsencode(name): os.fsencode(env[name]) for name in env},
        keep_open=tuple(keep_open),
        default_signals=_signals_to_reset(),
        prepare=prepare,
    )
    be_heir()
    try:
        return _start(plan, argv[0], deadline)
    except BaseException:
        resign()
        raise


def _start(plan: _Plan, name: str, deadline: float) -> Program:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = None
    with here:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            try:
                with there:
                    pid = _fork_into(plan, there, mask)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return _meet(pid, here, name, deadline)
        except BaseException:
            if pid is not None:
                # Not collected yet, so the number still means our child.
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise


def _seccomp_arguments(fprog: SockFprog) -> tuple[object, ...]:
    return (
        ctypes.c_long(X86_64["seccomp"]),
        ctypes.c_ulong(SECCOMP_SET_MODE_FILTER),
        ctypes.c_ulong(_FLAGS),
        ctypes.byref(fprog),
    )


def _signals_to_reset() -> tuple[int, ...]:
    """What the interpreter changed for itself: handlers, and the two that it ignores.

    What was ignored when this process started (as by nohup) stays ignored in the program.
    """
    handled = [number for number in signal.valid_signals() if callable(signal.getsignal(number))]
    return (*handled, signal.SIGPIPE, signal.SIGXFSZ)


def _candidates(name: str, env: Mapping[str, str]) -> tuple[bytes, ...]:
    if "/" in name:
        return (os.fsencode(name),)
    folders = env.get("PATH", os.defpath).split(os.pathsep)
    # An empty entry means the working directory.
    return tuple(os.fsencode(Path(folder or ".") / name) for folder in folders) if name else ()


# --- in the child ------------------------------------------------------------------------------


def _fork_into(plan: _Plan, channel: socket.socket, mask: _SignalMask) -> int:
    with warnings.catch_warnings():
        # Later Pythons warn of forks beside threads; this child runs into exec and takes no lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _become(plan, channel, mask)
    return pid


def _become(plan: _Plan, channel: socket.socket, mask: _SignalMask) -> NoReturn:
    """Turn this child into the program, or tell the parent why not."""
    step = _PREPARE
    try:
        gc.disable()  # a finalizer could take a lock
        for number in plan.default_signals:
            signal.signal(number, signal.SIG_DFL)
        for fd in plan.keep_open:
            os.set_inheritable(fd, True)
        if plan.prepare is not None:
            plan.prepare()
        step = _ORPHANED
        _must(_prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0))
        if os.getppid() != plan.parent:
            os._exit(125)
        step = _NO_NEW_PRIVS
        _must(_prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        step = _SECCOMP
        listener = _must(_syscall(*plan.seccomp))
        # Under the filter from here on.
        step = _EXEC
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, listener.to_bytes(4, "little"))
        channel.sendmsg([_MESSAGE.pack(_LISTENER, 0)], [rights])
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        number = _execute(plan)
    except OSError as error:
        number = error.errno or _UNEXPECTED
    except BaseException:  # noqa: BLE001 - nothing may unwind into the copy of the parent's stack
        number = _UNEXPECTED
    try:
        channel.sendmsg([_MESSAGE.pack(step, number)])
    finally:
        os._exit(125)


def _must(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def _execute(plan: _Plan) -> int:
    """Execute the first candidate that exists; return the errno that says why none did."""
    number = errno.ENOENT
    for path in plan.candidates:
        try:
            os.execve(path, plan.argv, plan.env)
        except OSError as error:
            if error.errno == errno.EACCES:
                number = errno.EACCES  # unless a later folder has one
            elif error.errno not in {errno.ENOENT, errno.ENOTDIR}:
                return error.errno or _UNEXPECTED
    return number


# --- in the parent -----------------------------------------------------------------------------


def _meet(pid: int, channel: socket.socket, name: str, deadline: float) -> Program:
    """Take the listener over and wait until the child has become the program."""
    pidfd = Fd(os.pidfd_open(pid))
    listener = None
    try:
        _await_message(channel, deadline)
        message, fds, _, _ = socket.recv_fds(channel, _MESSAGE.size, 1, socket.MSG_CMSG_CLOEXEC)
        if fds:
            listener = Listener(Fd(fds[0]))
            _await_message(channel, deadline)
            message = channel.recv(_MESSAGE.size)
        elif not message:
            raise LaunchError(
                f"the child that was to become {name!r} died before its filter was in place; "
                "look for an out-of-memory kill or a limit on processes"
            )
        if message:
            step, number = _MESSAGE.unpack(message)
            raise _explain_step(step, number, name)
        assert listener is not None
        return Program(pid, pidfd, listener)
    except BaseException:
        pidfd.close()
        if listener is not None:
            listener.close()
        raise


def _await_message(channel: socket.socket, deadline: float) -> None:
    if not poll_until(channel, select.POLLIN, deadline):
        raise LaunchError(
            "the child did not become the program in time; "
            "a filter must not stop sendmsg, rt_sigprocmask or execve"
        )


def _explain_step(step: int, number: int, name: str) -> Exception:
    if step == _EXEC and number != _UNEXPECTED:
        return explain_exec(name, number, exists=os.path.exists(name))
    why = os.strerror(number) if number != _UNEXPECTED else "an exception that is no OSError"
    if step == _PREPARE:
        return LaunchError(f"the preparation of {name!r} failed in the child: {why}")
    if step == _SECCOMP and number == errno.EBUSY:
        return LaunchError(
            "this process itself runs under a seccomp listener, and the kernel allows one only; "
            "start it outside of the other supervisor (another run of this door, a container "
            "manager that answers system calls)"
        )
    if step == _SECCOMP:
        return PrerequisiteError(f"the kernel refuses the seccomp filter: {why}")
    return LaunchError(f"prctl failed in the child (step {step}): {why}")


def explain_exec(name: str, number: int, *, exists: bool) -> LaunchError:
    """Return the error for ``name``, whose exec failed with errno ``number``.

    ``exists``: the name, taken as a path, leads to a file.
    """
    if number in {errno.ENOENT, errno.ENOTDIR}:
        if "/" in name and exists:
            return LaunchError(
                f"{name} exists, but the interpreter that it names does not: look at its first "
                "line, or at the loader that readelf -l shows",
                126,
            )
        where = "no such file" if "/" in name else "it is in no folder of PATH"
        return LaunchError(f"{name}: not found, {where}", 127)
    if number == errno.EACCES and "/" in name and not exists:
        return LaunchError(f"{name}: this user may not look into its folder", 126)
    if number == errno.EACCES:
        return LaunchError(f"{name}: found, but not executable; chmod +x may be missing", 126)
    if number == errno.ENOEXEC:
        return LaunchError(
            f"{name}: neither a program for this machine nor a script that begins with #!", 126
        )
    return LaunchError(f"{name}: cannot be executed: {os.strerror(number)}", 126)


def check_prerequisites() -> None:
    """Raise PrerequisiteError if no program can be served on this machine."""
    machine = os.uname().machine
    if machine != "x86_64":
        raise PrerequisiteError(f"the system call door knows x86-64 only, and this is {machine}")
    # Without a filter, a kernel that knows the flags gets as far as EFAULT.
    _syscall(*_seccomp_arguments(SockFprog())[:3], ctypes.c_void_p(None))
    if message := explain_seccomp(ctypes.get_errno(), os.uname().release):
        raise PrerequisiteError(message)


def explain_seccomp(number: int, release: str) -> str | None:
    """Say what is missing if asking for the filter's flags gave ``number``; None if nothing."""
    if number == errno.EFAULT:
        return None
    if number == errno.EINVAL and kernel_version(release) < (5, 19):
        return (
            f"Linux {release} has no SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, without which a "
            "signal makes a program's call happen twice; run Linux 5.19 or later"
        )
    if number in {errno.EINVAL, errno.ENOSYS}:
        return (
            f"this kernel ({release}) offers no seccomp filters with a listener; "
            "it needs CONFIG_SECCOMP_FILTER, and sandboxes that imitate a kernel often lack it"
        )
    return (
        f"the seccomp system call is refused ({os.strerror(number)}); "
        "a sandbox around this process forbids it: run outside, or allow seccomp(2) in its profile"
    )
