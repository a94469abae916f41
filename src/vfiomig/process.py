"""What /proc tells of another process: whose a thread is, and what it may do."""

from __future__ import annotations

import os

__all__ = ("CAP_SYS_RESOURCE", "capable", "process_of")

#: include/uapi/linux/capability.h
CAP_SYS_RESOURCE = 24
#: The first user namespace, which alone gives power over the machine; PROC_USER_INIT_INO.
FIRST_NAMESPACE = "user:[4026531837]"


def process_of(tid: int) -> int:
    """Process that a thread belongs to; the thread itself if it is gone."""
    return int(_status(tid, "Tgid") or tid)


def capable(tid: int, capability: int) -> bool:
    """Whether a thread has a capability over the machine, not only in a namespace of its own."""
    try:
        if os.readlink(f"/proc/{tid}/ns/user") != FIRST_NAMESPACE:
            return False
    except OSError:
        return False
    return bool(int(_status(tid, "CapEff") or "0", 16) >> capability & 1)


def _status(tid: int, field: str) -> str:
    """Return a field of its status file; nothing if it is gone."""
    try:
        with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as status:
            for line in status:
                if line.startswith(f"{field}:"):
                    return line.split()[1]
    except OSError:
        pass
    return ""
