"""Every error that vfiomig raises, drawn as a tree.

::

    VfioMigError
     +- SpecError            (also ValueError)  a SPEC, TARGET or capability set that means nothing
     +- PrerequisiteError    (also RuntimeError) the machine lacks something; the message names it
     +- DoorError            (also RuntimeError) a front door could not be set up or kept up
     +- RequestError         (also OSError)     a request to a device failed with an errno
     |   +- SetStateError                       ... and that request was a change of state
     |   +- SessionError                        ... and it was a read or write of a data_fd
     |   +- TargetError                         ... and the target could not even be opened
     +- WireError            (also OSError)     bytes from a vfio-user peer mean nothing
     +- DeviceError          (also OSError)     a device hook refuses; its errno reaches the caller
     |   +- StateRejected                       load() refuses the state that it was given
     +- GuestError                              a guest under QEMU, or its monitor, fails
         +- GuestEnded                          ... because QEMU ended meanwhile
         +- GuestTimeout     (also TimeoutError) ... to answer in time
         +- MigrationFailed                     ... to migrate; QEMU's reason is in the message

Kernel-shaped failures are ``OSError`` as well and carry ``errno``, so code that knows nothing
of vfiomig handles them like those of a real device.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfiomig.fsm import State

__all__ = (
    "DeviceError",
    "DoorError",
    "GuestEnded",
    "GuestError",
    "GuestTimeout",
    "MigrationFailed",
    "PrerequisiteError",
    "RequestError",
    "SessionError",
    "SetStateError",
    "SpecError",
    "StateRejected",
    "TargetError",
    "VfioMigError",
    "WireError",
)


class VfioMigError(Exception):
    """Base of everything that this package raises on purpose."""


class SpecError(VfioMigError, ValueError):
    """A SPEC, a TARGET or a capability set means nothing; the message names what would."""


class PrerequisiteError(VfioMigError, RuntimeError):
    """The machine lacks something that the job needs; one line names it and the next step."""


class DoorError(VfioMigError, RuntimeError):
    """A front door could not be set up, or lost the program that it served."""


class RequestError(VfioMigError, OSError):
    """A request to a device failed; ``errno`` is what the device's side answered."""

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(errno, message or os.strerror(errno))


class SetStateError(RequestError):
    """A change of state failed.

    ``device_state`` is where the device is now, ``None`` where nobody can know: V6 gives no
    reliable state with EOPNOTSUPP, EFAULT and ENOTTY, and the query after a failure of the
    landed dialect may fail as well.
    """

    def __init__(
        self, errno: int, requested: int, device_state: State | None, message: str = ""
    ) -> None:
        super().__init__(errno, message)
        self.requested = requested
        self.device_state = device_state


class SessionError(RequestError):
    """A read or write of a data_fd failed; ENODEV means that the session is over."""


class TargetError(RequestError):
    """A target could not be opened; the message says what to try next."""


class WireError(VfioMigError, OSError):
    """What a peer sent over a vfio-user socket means nothing; the message says what is wrong.

    ``errno`` is what a request is answered with. It is the one error that parsers of foreign
    bytes raise.
    """


class DeviceError(VfioMigError, OSError):
    """What a device hook raises to refuse: the caller's request fails with ``errno``.

    With ``fatal`` the device goes to ERROR, from where only a reset leads back; without it
    the device stays in the last state that it reached.
    """

    def __init__(self, errno: int, message: str = "", *, fatal: bool = False) -> None:
        super().__init__(errno, message or os.strerror(errno))
        self.fatal = fatal


class StateRejected(DeviceError):
    """What ``load`` raises when the state is incomplete, damaged or not this device's."""

    def __init__(
        self, message: str = "", errno: int = _errno.EINVAL, *, fatal: bool = False
    ) -> None:
        super().__init__(errno, message or "the device refuses this state", fatal=fatal)


class GuestError(VfioMigError):
    """A guest under QEMU, or its monitor, does not do what it was asked for."""


class GuestEnded(GuestError):
    """QEMU ended while somebody waited for it or the guest; its exit code and words are added."""


class GuestTimeout(GuestError, TimeoutError):
    """The guest, or QEMU, did not answer in time."""


class MigrationFailed(GuestError):
    """QEMU gave a migration up; the message has its reason."""
