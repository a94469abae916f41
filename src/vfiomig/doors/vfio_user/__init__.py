"""The door of vfio-user: a device behind a Unix socket, for QEMU and other clients.

================  ================================================================
`server`          the listening socket, and one client after the other
`visit`           one client, from VERSION to its leaving
`line`            its socket: messages out, messages in, by threads in turns
`commands`        the table: what each command means
`opened`          the device in use
`compat`          how servers differ, in a table
`trace`           a line for every request
`caller`          the client as ``core`` sees it during one request
`feature`         DEVICE_FEATURE, whose pointers a message does not have
`data`            MIG_DATA_READ and MIG_DATA_WRITE
`dma`             the client's memory, mapped here or reached by messages
================  ================================================================

Nothing here decides what the protocol says: that is `vfiomig.core`. What a message may look like
is `vfiomig.wire`.
"""

from __future__ import annotations

from vfiomig.doors.vfio_user.server import Server

__all__ = ("Server",)
