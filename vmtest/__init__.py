"""What guests are made of, fetched: QEMU, a distribution kernel and busybox, and lspci.

Nothing is installed and nobody has to be root. ``python -m vmtest fetch`` downloads them into a
cache folder; ``python -m vmtest boot -- COMMAND`` boots them, runs a command in the guest and ends
with its exit status. The modules:

``packages``   Debian packages, resolved, downloaded, checked and unpacked into a folder
``fetch``      what a guest is made of, and the cache folder that has it
``vmlinux``    the kernel out of its compressed image, because that boots faster
``mtty``       a kernel's sample driver for VFIO, built
``inside``     the host's files in a guest, so that the host's programs run on the guest's kernel

The guests themselves are ``vfiomig.qemu``, which takes from the cache what is there.
"""

from __future__ import annotations
