"""Ready devices, by name, and those of a user's own file."""

from __future__ import annotations

from vfiomig.models.spec import KNOWN, describe, make, parse_size

__all__ = ("KNOWN", "describe", "make", "parse_size")
