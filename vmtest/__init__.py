"""Guests for tests: fetched, built, booted under QEMU, migrated, and listened to.

Nothing is installed and nobody has to be root. ``python -m vmtest fetch`` downloads QEMU, a
distribution kernel and busybox into a cache folder; ``python -m vmtest boot -- COMMAND`` boots
them, runs a command in the guest and ends with its exit status. The modules:

``packages``   Debian packages, resolved, downloaded, checked and unpacked into a folder
``fetch``      what a guest is made of, and the cache folder that has it
``vmlinux``    the kernel out of its compressed image, because that boots faster
``initrd``     busybox, kernel modules and the guest's first process as one archive
``qemu``       which QEMU, and the arguments of a machine
``wire``       a socket to a program that talks in lines, under deadlines
``qmp``        QEMU's monitor protocol
``terminal``   the host's end of a guest's serial port, read as expect does
``guest``      a QEMU process with a shell in it
``migration``  a guest from one QEMU to another

It needs the standard library alone and knows nothing of vfiomig: devices are arguments, and
``vfiomig run`` is a launcher in front of QEMU like any other.
"""

from __future__ import annotations
