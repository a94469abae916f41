"""QEMU as a user of devices: which one, its words, and guests that boot, talk and migrate in it.

``installed``  which QEMU, kernel and busybox there are
``machine``    the arguments of a machine
``vfio``       the words that give a QEMU devices, and put it behind ``vfiomig run``
``initrd``     busybox, kernel modules and the guest's first process as one archive
``lines``      a socket to a program that talks in lines, under deadlines
``qmp``        QEMU's monitor protocol
``terminal``   the host's end of a guest's serial port, read as expect does
``guest``      a QEMU process with a shell in it
``migration``  a guest from one QEMU to another

What a guest is made of is fetched by ``vmtest``, which stands beside the package.
"""

from __future__ import annotations
