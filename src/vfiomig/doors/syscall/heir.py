"""Who inherits the descendants of a program whose parents have ended: this process, meanwhile.

A process that inherits orphans (a subreaper) gets those of all its children, and has to collect
them. So it is one only while it has programs under a filter, and afterwards what it was before:
an application that once served a program does not collect for the others that it starts.
"""

from __future__ import annotations

import ctypes
import threading

from vfiomig.abi.seccomp import PR_GET_CHILD_SUBREAPER, PR_SET_CHILD_SUBREAPER

__all__ = ("be_heir", "resign")

_prctl = ctypes.CDLL(None).prctl
_lock = threading.Lock()
_programs = 0
_before = 0


def be_heir() -> None:
    """Inherit orphans until ``resign``; several may ask for it at a time."""
    global _programs, _before  # noqa: PLW0603 - there is one such setting in a process
    with _lock:
        _programs += 1
        if _programs == 1:
            was = ctypes.c_int()
            _prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(was), 0, 0, 0)
            _before = was.value
            _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def resign() -> None:
    """End what one ``be_heir`` began."""
    global _programs  # noqa: PLW0603 - as above
    with _lock:
        _programs -= 1
        if not _programs:
            _prctl(PR_SET_CHILD_SUBREAPER, _before, 0, 0, 0)
