"""What goes wrong before, in and around a guest."""

from __future__ import annotations

__all__ = ("FetchError", "GuestEnded", "GuestTimeout", "MigrationFailed", "VmtestError")


class VmtestError(Exception):
    """Base of everything that this package raises on purpose; the message says what to do."""


class FetchError(VmtestError):
    """What a guest is made of cannot be had here."""


class GuestEnded(VmtestError):
    """QEMU ended while somebody waited for the guest."""


class GuestTimeout(VmtestError, TimeoutError):
    """The guest, or QEMU, did not answer in time."""


class MigrationFailed(VmtestError):
    """QEMU gave a migration up; the message has its reason."""
