"""vfio-user without sockets: messages in and out of bytes, and what both ends agree on.

Pure: no socket, no descriptor is touched, no clock, no thread, no logger. A server's door and a
client do the I/O around it::

    connection = ServerConnection(Capabilities(max_msg_fds=16, max_data_xfer_size=16 << 20))
    count, ancillary, flags, _ = sock.recvmsg_into([connection.buffer()], room)
    connection.received(count, descriptors_in(ancillary))
    while (message := connection.next()) is not None:
        sock.sendmsg(connection.reply(message, ...))

=============  ===================================================================
`commands`     the one table of commands
`messages`     what comes in: `Request` and `Reply`
`receiving`    bytes and descriptors, up to where a message ends
`connection`   both ends: framing, numbers, replies
`version`      what both ends agree on
`requests`     the payloads of requests
`replies`      the payloads of replies
`layouts`      structs as compiled formats
=============  ===================================================================

The one error about what a peer sent is `vfiomig.errors.WireError`.
"""

from __future__ import annotations

from vfiomig.wire.commands import COMMANDS, Command, Role, command_name
from vfiomig.wire.connection import (
    Buffer,
    Buffers,
    ClientConnection,
    Connection,
    Outgoing,
    ServerConnection,
    rest,
)
from vfiomig.wire.messages import Reply, Request
from vfiomig.wire.version import Capabilities, Limits

__all__ = (
    "COMMANDS",
    "Buffer",
    "Buffers",
    "Capabilities",
    "ClientConnection",
    "Command",
    "Connection",
    "Limits",
    "Outgoing",
    "Reply",
    "Request",
    "Role",
    "ServerConnection",
    "command_name",
    "rest",
)
