"""A device behind a vfio-user socket.

From the socket up, each standing on those above it:

===============  ==============================================================================
`stream`         the socket: bytes move at once, and only waiting takes time
`channel`        requests and replies of several threads, and the server's own requests
`sessions`       which session is open, on a wire without data_fds
`remote`         what can be asked of the device, a message each
`running`        the device runs when it is opened and after a reset, whatever the server does
`facts`          what the device is made of, asked for once
`memory`         the memory that the server may reach, by descriptor or by messages
`dirty_log`      what was written there
`interrupts`     SET_IRQS
`features`       DEVICE_FEATURE
`transport`      all of it in the shape of system calls
`connecting`     from a path to a transport
===============  ==============================================================================
"""

from __future__ import annotations

from vfiomig.client.vfio_user.connecting import connect
from vfiomig.client.vfio_user.transport import VfioUserTransport

__all__ = ("VfioUserTransport", "connect")
