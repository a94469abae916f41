"""What goes wrong before there is a guest."""

from __future__ import annotations

from vfiomig.errors import PrerequisiteError

__all__ = ("FetchError",)


class FetchError(PrerequisiteError):
    """What a guest is made of cannot be had here; the message says what to do."""
