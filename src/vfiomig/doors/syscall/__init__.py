"""The system call door: real ioctls of an unmodified program, answered by a Python process.

::

    bpf          assembles a seccomp filter
    filter       which system calls stop, as one table
    launch       starts a program under the filter and keeps the end at which its calls arrive
    notify       receives a stopped call and answers it
    lastclose    tells when the program has closed its last copy of a descriptor

These modules know the mechanism and nothing of VFIO.
"""

from __future__ import annotations
