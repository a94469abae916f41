"""The system call door: real ioctls of an unmodified program, answered by a Python process.

::

    bpf          assembles a seccomp filter
    filter       which system calls stop, as one table
    launch       starts a program under the filter and keeps the end at which its calls arrive
    notify       receives a stopped call and answers it
    lastclose    tells when the program has closed its last copy of a descriptor

These modules know the mechanism and nothing of VFIO. Those that do::

    run          a program with devices, from its launch to its exit code
    door         what the program has open, and the threads that look after it
    receivers    the threads that receive calls, in turns
    calls        what each call means; pathcalls, those that take a path; paths, where devices are
    caller       the program as core sees it during one request
    opened       whose a descriptor is; closing, what happens after its last close
    transfer     one read or write of a data_fd; held, those that wait; readiness, poll
    trace        one line for every request
"""

from __future__ import annotations
